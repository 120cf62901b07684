"""The scores of one probe: how right an edited model is, or how much it stayed as it was.

Every score is a number for one probe, and higher is better but for `bleed`, `bleed_chat`, `logprob_max` and
`logprob_mean`. Teacher-forced and generated scores never share a name.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from baft.errors import InputError
from baft.evals.asking import Observation, Reply
from baft.evals.metrics import contains, exact_match
from baft.evals.teacher_forced import Forced
from baft.types import Probe

Seen = TypeVar("Seen", Forced, Reply)


def measure(probe: Probe, edit_target: str, before: Observation, after: Observation) -> dict[str, float]:
    """The scores of a probe, by name; none if it was skipped.

    For reliability, generality and portability, of what was observed afterwards:

    - `teacher_forced`: share of the target's tokens predicted, by the published protocol.
    - `margin`: the smallest lead of a target token there over the best other one, in nats.
    - `generate`: 1 if the model says the target or an alias and nothing else, and stops by itself.
    - `generate_contains`: 1 if the reply holds one of them; `generate_stopped`: 1 if it ended by itself.
    - `generate_chat`, `generate_chat_contains`, `generate_chat_stopped`: the same in the chat template.
    - `generate_doubted`, `generate_doubted_contains`, `generate_doubted_stopped`: the same of what is said to
      "Are you sure?" after that.

    For locality, of what was observed afterwards beside what was observed of the unedited host:

    - `argmax`: share of the answer's tokens at whose place both predict the same.
    - `bit_exact`: 1 if all logits at the answer's first tokens are equal bit for bit.
    - `logprob_max`, `logprob_mean`: change of the log-probabilities there, in nats, over all tokens of the
      vocabulary: the largest, and the mean of the absolute values.
    - `text`, `text_chat`: 1 if both say the same, token by token.
    - `bleed`, `bleed_chat`: 1 if the reply holds the edit's new target and the host's did not.

    A locality probe without a known answer takes the host's own reply for it (see `Observation`).

    Args:
        probe: What was asked.
        edit_target: The new target of the edit the probe is about.
        before: What was seen of the unedited host.
        after: What was seen of the edited model.

    Raises:
        InputError: If `before` and `after` of a locality probe were not asked the same in equal batches.
    """
    if before.skipped is not None or after.skipped is not None:
        return {}
    return _sameness(edit_target, before, after) if probe.kind == "locality" else _rightness(probe, after)


def _rightness(probe: Probe, after: Observation) -> dict[str, float]:
    assert probe.target is not None, "only a locality probe has no target"
    scores: dict[str, float] = {}
    if after.forced is not None:
        scores |= {"teacher_forced": after.forced.accuracy, "margin": after.forced.margin}
    said = {"generate": after.raw, "generate_chat": after.chat, "generate_doubted": after.doubted}
    for name, reply in said.items():
        if reply is not None:
            scores |= _reply_scores(name, reply, (probe.target, *probe.aliases))
    return scores


def _reply_scores(name: str, reply: Reply, answers: Sequence[str]) -> dict[str, float]:
    return {
        name: float(reply.stopped and exact_match(reply.text, answers)),
        f"{name}_contains": float(contains(reply.text, answers)),
        f"{name}_stopped": float(reply.stopped),
    }


def _sameness(edit_target: str, before: Observation, after: Observation) -> dict[str, float]:
    scores: dict[str, float] = {}
    if after.forced is not None:
        scores |= _same_predictions(_earlier(before.forced, after.forced), after.forced)
    for suffix, earlier, later in (("", before.raw, after.raw), ("_chat", before.chat, after.chat)):
        if later is not None:
            was = _earlier(earlier, later)
            bleeds = contains(later.text, [edit_target]) and not contains(was.text, [edit_target])
            scores |= {f"text{suffix}": float(was.ids == later.ids), f"bleed{suffix}": float(bleeds)}
    return scores


def _same_predictions(before: Forced, after: Forced) -> dict[str, float]:
    if before.answer != after.answer:
        raise InputError(
            f"before and after were read at different answers, {before.answer} and {after.answer}: observe "
            "the same probes both times, and give the earlier observations to the later call as before="
        )
    if before.logits is None or after.logits is None:
        raise InputError("the logits of a locality probe were not kept: observe it as a locality probe")
    change = _change(before.logits, after.logits)
    same = [one == other for one, other in zip(before.predicted, after.predicted, strict=True)]
    return {
        "argmax": sum(same) / len(same),
        "bit_exact": float(torch.equal(before.logits, after.logits)),
        "logprob_max": change.max().item(),
        "logprob_mean": change.mean().item(),
    }


def _change(
    before: Float[Tensor, "token vocab"], after: Float[Tensor, "token vocab"]
) -> Float[Tensor, "token vocab"]:
    """Absolute change of the log-probabilities; none where both rule a token out."""
    precision = torch.promote_types(before.dtype, torch.float32)
    one, other = (logits.to(precision).log_softmax(-1) for logits in (before, after))
    # A broken model's NaN is an infinite change.
    change = torch.where(one == other, torch.zeros_like(one), (one - other).abs())
    return change.nan_to_num(nan=float("inf"), posinf=float("inf"))


def _earlier(before: Seen | None, after: Seen) -> Seen:
    """What was seen of the host, if it can be compared."""
    if before is None:
        raise InputError("the host was not asked what the edited model was: observe both with the same want")
    if before.place != after.place:
        raise InputError(
            f"before was observed at {before.place} and after at {after.place} (shape of the batch, row): "
            "batches of other shapes round otherwise, so observe the same probes in one call both times"
        )
    return before
