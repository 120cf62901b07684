"""The texts that an edit is trained on, and what a model makes of them."""

from collections.abc import Sequence

import torch

from baft.errors import InputError
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.hosts.models import Host
from baft.hosts.passes import FullPass
from baft.methods.training import row_margins
from baft.nn.losses import row_cross_entropy
from baft.types import Edit

MAX_TARGET_TOKENS = 128  # longest target that is taken for a fact
_TEXTS = 16  # in one pass


def renderings(
    encoder: Encoder,
    edits: Sequence[Edit],
    *,
    chat: bool,
    eos: bool,
    max_target_tokens: int = MAX_TARGET_TOKENS,
) -> list[EncodedEdit]:
    """Every rendering of every edit, the renderings of one edit side by side.

    Args:
        encoder: The host's.
        edits: The edits.
        chat: Whether each is rendered as a chat, too, on a host that has a chat template.
        eos: Whether the target's end is trained.
        max_target_tokens: Longest target.

    Raises:
        InputError: If a prompt or target does not fit.
    """
    kinds = (False, True) if chat and encoder.has_chat else (False,)
    texts = [
        encoder.edit(edit.prompt, edit.target, chat=is_chat, eos=eos) for edit in edits for is_chat in kinds
    ]
    longest = max(len(text.target_ids) for text in texts)
    if longest > max_target_tokens:
        raise InputError(
            f"the target is {longest} tokens long, and at most {max_target_tokens} are edited: shorten it, "
            "split it into several edits, or raise max_target_tokens"
        )
    return texts


@torch.no_grad()
def measured(
    host: Host, encoder: Encoder, edited: EditedModel, texts: Sequence[EncodedEdit]
) -> tuple[list[float], list[float]]:
    """How firmly a model says each text's target.

    Args:
        host: The host.
        encoder: Its encoder.
        edited: The host with the patches and the prompter in force; interventions take no part.
        texts: The texts.

    Returns:
        Of each text the smallest lead of any target token over the best other, and the mean cross-entropy
        of its target tokens, both in nats.
    """
    margins: list[float] = []
    losses: list[float] = []
    for start in range(0, len(texts), _TEXTS):
        shown = FullPass(host, encoder, edited.positions, texts[start : start + _TEXTS], ())
        shown.edited.follow(edited)
        logits = shown({}).logits
        margins += row_margins(logits, shown).tolist()
        losses += row_cross_entropy(logits, shown.targets, shown.rows).tolist()
    return margins, losses
