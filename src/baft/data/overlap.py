"""How much of one set of cases is in another."""

from collections.abc import Sequence
from dataclasses import dataclass

from baft.types import EditCase


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two sets of cases share.

    Args:
        n_a: Distinct edit prompts of the first set.
        n_b: Distinct edit prompts of the second set.
        same_prompt: Of these, how many are in both.
        same_prompt_and_target: Distinct pairs of an edit's prompt and target that are in both.
    """

    n_a: int
    n_b: int
    same_prompt: int
    same_prompt_and_target: int


def overlap(a: Sequence[EditCase], b: Sequence[EditCase]) -> Overlap:
    """Counts the edits that two sets of cases share, such as two splits or two benchmarks.

    A method that is trained on the one must not be scored on what is also in the other.
    """
    prompts = [{case.edit.prompt for case in cases} for cases in (a, b)]
    pairs = [{(case.edit.prompt, case.edit.target) for case in cases} for cases in (a, b)]
    return Overlap(len(prompts[0]), len(prompts[1]), len(prompts[0] & prompts[1]), len(pairs[0] & pairs[1]))
