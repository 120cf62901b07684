"""The texts that an edit is trained on."""

from collections.abc import Sequence

from baft.errors import InputError
from baft.hosts.encoding import EncodedEdit, Encoder
from baft.types import Edit

MAX_TARGET_TOKENS = 128  # longest target that is taken for a fact


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
