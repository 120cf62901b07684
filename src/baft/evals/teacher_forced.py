"""The published teacher-forced protocol: what a model predicts at each token of a given answer.

EasyEdit's `test_prediction_acc` (zjunlp/EasyEdit at 14cea82, `evaluate/evaluate_utils.py`): the text is the
prompt, one space, and the target; it has whatever special tokens the tokenizer adds by default, and no other
end of sequence. The prompt's length is counted on the prompt encoded by itself. The predictions at the
positions before the answer's tokens are compared to those tokens, each with the true ones before it in view,
which is why such a score says nothing about what the model would say by itself.

Two accidents of that code are not taken over: rows are neither truncated nor counted short where padding
has the id of a real token, and absolute positions do not shift under padding.
"""

from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.speaking import Row, Speaker
from baft.nn.losses import target_margins

N_COMPARED = 8  # tokens of an answer whose logits are kept; on a real host those of one token are 200 kB


@dataclass(frozen=True, slots=True)
class Span:
    """A text as tokens, and where in it the answer begins.

    Args:
        ids: Prompt and answer.
        n_prompt_tokens: Tokens before the answer, special ones included.
        owner: The edit under which it is asked, where several models are asked in one batch.
    """

    ids: Row
    n_prompt_tokens: int
    owner: int = 0

    @property
    def answer(self) -> Row:
        """The tokens to be predicted."""
        return self.ids[self.n_prompt_tokens :]


@dataclass(frozen=True, slots=True, eq=False)
class Forced:
    """What a model predicts over the answer of a span.

    Args:
        answer: The answer's tokens.
        predicted: The most likely token at the place of each.
        logprobs: Log-probability of each of the answer's tokens, in nats.
        margin: The smallest lead of any of them over the best other token, in nats.
        logits: All logits at the places of the answer's first `N_COMPARED` tokens, on the CPU in the host's
            precision; None if not kept.
        place: Shape of the batch it was computed in, and its row there: only what was computed at equal
            places can be equal bit for bit.
    """

    answer: Row
    predicted: Row
    logprobs: tuple[float, ...]
    margin: float
    logits: Float[Tensor, "token vocab"] | None
    place: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of the answer's tokens that are predicted."""
        return sum(a == p for a, p in zip(self.answer, self.predicted, strict=True)) / len(self.answer)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the answer's tokens, in nats."""
        return sum(self.logprobs) / len(self.logprobs)


def published_span(encoder: Encoder, prompt: str, target: str) -> Span:
    """Prompt and target by the published rule; its answer is empty if the target adds no token."""
    prompt_ids, ids = (_default_ids(encoder, text) for text in (prompt, f"{prompt} {target}"))
    return Span(ids, len(prompt_ids))


def _default_ids(encoder: Encoder, text: str) -> Row:
    encoded: Any = encoder.tokenizer(text, truncation=False, verbose=False)
    return tuple(encoded["input_ids"])


# A model, or the one that puts every row of a batch under an edit of its own, told which.
Asked = EditedModel | Callable[[Sequence[int]], EditedModel]


def under(asked: Asked, owners: Sequence[int]) -> EditedModel:
    """The model for a batch whose rows belong to these edits."""
    return asked if isinstance(asked, EditedModel) else asked(owners)


@torch.no_grad()
def read_spans(
    asked: Asked,
    speaker: Speaker,
    spans: Collection[Span],
    *,
    batch_size: int,
    keep_logits: Set[Span] = frozenset(),
) -> dict[Span, Forced]:
    """Shows a model texts with their answers, and reads its predictions.

    The batches depend on which spans there are, not on their order: rows of like length go together.

    Args:
        asked: The model, or the one of each row.
        speaker: What encodes and pads for its host.
        spans: What to show; none with an empty answer.
        batch_size: Rows shown at once.
        keep_logits: The spans whose logits are kept.
    """
    found: dict[Span, Forced] = {}
    ordered = sorted(set(spans), key=_by_length)
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        # The last token is only ever predicted, so the host need not see it.
        rows, n_prompt = [span.ids[:-1] for span in chunk], [span.n_prompt_tokens for span in chunk]
        # Padded on the right: what stands before is real, so that every token has its own position.
        batch = speaker.encoder.pad(rows, n_prompt, side="right", device=speaker.device)
        columns = [torch.arange(span.n_prompt_tokens - 1, len(span.ids) - 1) for span in chunk]
        # The host computes logits for these positions of every row, and for no others.
        kept, places = torch.unique(torch.cat(columns), return_inverse=True)
        output = under(asked, [span.owner for span in chunk])(
            batch.input_ids,
            batch.attention_mask,
            n_prompt_tokens=batch.n_prompt_tokens,
            use_cache=False,
            logits_to_keep=kept.to(batch.input_ids.device),
        )
        shape = (*batch.input_ids.shape, len(kept))
        for i, (span, at) in enumerate(zip(chunk, places.split([len(c) for c in columns]), strict=True)):
            logits = output.logits[i, at.to(output.logits.device)]
            found[span] = _forced(span, logits, span in keep_logits, (*shape, i))
    return found


def _by_length(span: Span) -> tuple[int, int, Row, int]:
    return len(span.ids), span.n_prompt_tokens, span.ids, span.owner


def _forced(span: Span, logits: Float[Tensor, "token vocab"], keep: bool, place: tuple[int, ...]) -> Forced:
    answer = torch.tensor(span.answer, device=logits.device)
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = precise.log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1)
    return Forced(
        answer=span.answer,
        predicted=tuple(logits.argmax(-1).tolist()),
        logprobs=tuple(logprobs.tolist()),
        margin=target_margins(logits, answer).min().item(),
        logits=logits[:N_COMPARED].clone().cpu() if keep else None,
        place=place,
    )
