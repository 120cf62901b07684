"""Shared edits, counted."""

from baft.data.overlap import Overlap, apart, overlap
from baft.types import Edit, EditCase, Probe


def cases(*pairs: tuple[str, str]) -> list[EditCase]:
    return [EditCase(f"x/{n}", Edit(*pair), ()) for n, pair in enumerate(pairs)]


def test_prompts_and_pairs_are_counted_once() -> None:
    a = cases(("p", "1"), ("p", "2"), ("q", "1"), ("r", "1"))
    b = cases(("p", "2"), ("p", "1"), ("q", "2"), ("s", "1"), ("t", "1"))
    assert overlap(a, b) == Overlap(n_a=3, n_b=4, same_prompt=2, same_prompt_and_target=2)
    assert overlap(b, a) == Overlap(n_a=4, n_b=3, same_prompt=2, same_prompt_and_target=2)
    assert overlap(a, a) == Overlap(n_a=3, n_b=3, same_prompt=3, same_prompt_and_target=4)
    assert overlap(a, []) == Overlap(n_a=3, n_b=0, same_prompt=0, same_prompt_and_target=0)


def test_subject_and_ground_truth_do_not_count() -> None:
    other = [EditCase("y", Edit("p", "1", subject="s", ground_truth="g"), ())]
    assert overlap(cases(("p", "1")), other).same_prompt_and_target == 1


def test_zsre_is_largely_in_knowedit(real) -> None:
    both = overlap(real("zsre").cases(), real("knowedit-zsre").cases())
    assert (both.same_prompt, both.same_prompt_and_target) == (773, 771)
    assert (both.n_a, both.n_b) == (1037, 1304 - 18)  # 18 questions stand there twice


def test_what_is_trained_on_is_not_scored(real) -> None:
    train = real("zsre").cases("train")
    for name in ("zsre", "knowedit-zsre"):
        assert overlap(train, real(name).cases()).same_prompt == 0


def case_of(number, prompt, target="x", subject=None, locality=(), generality=()):
    edit = Edit(prompt, target, subject=subject)
    probes = [Probe(edit.id, "locality", text, "y", "near") for text in locality]
    probes += [Probe(edit.id, "generality", text, target, "rephrase") for text in generality]
    return EditCase(str(number), edit, tuple(probes))


def test_cases_that_bear_on_each_other_are_left_out_and_counted():
    cases = [
        case_of(
            0, "Paris is in", subject="Paris", locality=["Rome is in", "Oslo is in"], generality=["Where?"]
        ),
        case_of(1, "paris  is in", subject="Paris"),
        case_of(2, "Paris is in", "other", subject="Paris"),
        case_of(3, "Paris has", subject="paris"),
        case_of(4, "Rome is in", subject="Rome", locality=["where?", "Rome is in"]),
        case_of(5, "No subject", locality=["Paris is in", "free"]),
        case_of(6, "Another"),
    ]
    found, left_out = apart(cases, limit=3)
    assert [case.id for case in found] == ["0", "4", "5"]
    assert [[probe.prompt for probe in case.probes] for case in found] == [
        ["Oslo is in", "Where?"],
        ["Rome is in"],
        ["free"],
    ]
    assert left_out == {
        "conflicting_prompt": 1,
        "locality_of_another_edit": 3,
        "repeated_prompt": 1,
        "shared_subject": 1,
    }
    assert apart(cases[5:]) == ((cases[5], cases[6]), {})
    assert len(apart(cases)[0]) == 4
