"""How much of one set of cases is in another, and which cases of one bear on each other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

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


def apart(cases: Sequence[EditCase], limit: int | None = None) -> tuple[tuple[EditCase, ...], dict[str, int]]:
    """The first cases that do not bear on each other, and what was left out for that.

    For edits that are in force together. A case goes if an earlier one has its prompt (whether or not with
    the same target) or its subject; a locality question goes if it is what one of the other edits changes.

    Args:
        cases: In order.
        limit: How many at most; None for all there are.

    Returns:
        The cases, and how often each reason held.
    """
    counts: Counter[str] = Counter()
    kept: list[EditCase] = []
    targets: dict[str, str] = {}
    subjects: set[str] = set()
    for case in cases:
        if len(kept) == limit:
            break
        edit, prompt = case.edit, _plain(case.edit.prompt)
        if prompt in targets:
            same = targets[prompt] == edit.target
            counts["repeated_prompt" if same else "conflicting_prompt"] += 1
        elif edit.subject and _plain(edit.subject) in subjects:
            counts["shared_subject"] += 1
        else:
            kept.append(case)
            targets[prompt] = edit.target
            subjects |= {_plain(edit.subject)} if edit.subject else set()
    asked = {
        _plain(text): case.edit.id
        for case in kept
        for text in (case.edit.prompt, *(p.prompt for p in case.probes if p.kind == "generality"))
    }
    found = []
    for case in kept:
        probes = tuple(
            probe
            for probe in case.probes
            if probe.kind != "locality" or asked.get(_plain(probe.prompt), case.edit.id) == case.edit.id
        )
        counts["locality_of_another_edit"] += len(case.probes) - len(probes)
        found.append(replace(case, probes=probes))
    return tuple(found), {name: n for name, n in sorted(counts.items()) if n}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
