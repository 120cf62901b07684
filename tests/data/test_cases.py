"""What is odd in a row is dealt with as the phrase says, and counted."""

import pytest

from baft.data import cases as phrases
from baft.data.cases import Cases, Question
from baft.types import EditCase, Probe

ROW = {"prompt": "The capital of Peru is", "target": "Cusco", "subject": "Peru", "truths": ("Lima",)}
REPHRASED = Question("generality", "rephrase", "Peru is ruled from", ("Cusco",))
BESIDE = Question("locality", "neighbor", "The capital of Chile is", ("Santiago",))


def read(*rows: dict[str, object]) -> tuple[tuple[EditCase, ...], dict[str, int]]:
    cases = Cases("x", "test")
    for index, row in enumerate(rows):
        cases.add_row(index, **{"questions": [REPHRASED], **ROW, **row})
    loaded = cases.loaded()
    return loaded.cases, dict(loaded.anomalies)


def probes(*questions: Question) -> tuple[tuple[Probe, ...], dict[str, int]]:
    [case], odd = read({"questions": list(questions)})
    return case.probes, odd


def test_an_ordinary_row_is_nothing_odd() -> None:
    [case], odd = read({"questions": [REPHRASED, BESIDE]})
    assert odd == {}
    assert case.id == "x/test/0"
    assert (case.edit.prompt, case.edit.target, case.edit.subject, case.edit.ground_truth) == (
        "The capital of Peru is",
        "Cusco",
        "Peru",
        "Lima",
    )
    assert case.probes == (
        Probe(case.edit.id, "generality", "Peru is ruled from", "Cusco", "rephrase"),
        Probe(case.edit.id, "locality", "The capital of Chile is", "Santiago", "neighbor"),
    )


@pytest.mark.parametrize("row", [{"prompt": " "}, {"target": ""}])
def test_a_row_without_an_edit_is_left_out_and_the_others_keep_their_ids(row: dict[str, object]) -> None:
    cases, odd = read(row, {})
    assert [case.id for case in cases] == ["x/test/1"]
    assert odd == {phrases.BLANK_EDIT: 1}


def test_of_exact_duplicates_the_first_is_kept() -> None:
    cases, odd = read({}, {"target": "Ica"}, {})
    assert [case.id for case in cases] == ["x/test/0", "x/test/1"]
    assert odd == {phrases.DUPLICATE: 1, phrases.CONFLICT: 1}


def test_what_repeats_a_prompt_otherwise_is_kept() -> None:
    cases, odd = read(
        {}, {"questions": [BESIDE]}, {"truths": ("Tacna",)}, {"target": "Ica"}, {"prompt": "Peru:"}
    )
    assert len(cases) == 5
    assert odd == {phrases.SAME_EDIT: 2, phrases.CONFLICT: 1}


def test_the_same_prompt_about_another_subject_is_no_conflict() -> None:
    assert read({}, {"subject": "capital", "target": "Ica"})[1] == {}


@pytest.mark.parametrize(
    ("row", "phrase"),
    [
        ({"truths": ("Lima", "Cusco")}, phrases.TARGET_TRUE),
        ({"subject": "peru"}, phrases.NO_SUBJECT),
        ({"truths": ("", "Lima")}, phrases.BLANK_TRUTH),
        ({"target": " Cusco\n"}, phrases.PADDED),
    ],
)
def test_what_is_odd_but_harmless_is_kept(row: dict[str, object], phrase: str) -> None:
    [case], odd = read(row)
    assert odd == {phrase: 1}
    assert case.edit.target == "Cusco"
    assert case.edit.ground_truth == "Lima"


def test_nothing_is_recorded_for_a_blank_subject_or_truth() -> None:
    [case], odd = read({"subject": " ", "truths": (" ",)})
    assert case.edit.subject is None
    assert case.edit.ground_truth is None
    assert odd == {phrases.BLANK_TRUTH: 1}


def test_further_answers_are_aliases_each_once() -> None:
    [probe], odd = probes(
        Question("portability", "reasoning", "Spoken in Cusco:", ("Quechua", "Runasimi", "Quechua"))
    )
    assert (probe.target, probe.aliases) == ("Quechua", ("Runasimi",))
    assert odd == {}


def test_an_empty_answer_makes_way_for_the_next() -> None:
    first, later = (
        probes(Question("portability", "", "Spoken in Cusco:", answers))
        for answers in (("", "Quechua", "Runasimi"), ("Quechua", " ", "Runasimi"))
    )
    assert first[0] == later[0]
    assert (first[0][0].target, first[0][0].aliases) == ("Quechua", ("Runasimi",))
    assert first[1] == {phrases.FIRST_ANSWER_EMPTY: 1}
    assert later[1] == {phrases.LATER_ANSWER_EMPTY: 1}


@pytest.mark.parametrize("answers", [(), ("",), (" ", "")])
def test_a_probe_without_an_answer_stays_only_where_none_is_needed(answers: tuple[str, ...]) -> None:
    for kind in ("generality", "portability"):
        assert probes(Question(kind, "", "Spoken in Cusco:", answers)) == ((), {phrases.NO_ANSWER: 1})
    [probe], odd = probes(Question("locality", "", "Spoken in Chile:", answers))
    assert probe.target is None
    assert odd == {phrases.NO_ANSWER_KEPT: 1}


def test_a_probe_without_a_prompt_is_left_out() -> None:
    assert probes(Question("locality", "", " ", ("a",))) == ((), {phrases.BLANK_PROMPT: 1})


def test_a_probe_stands_once_in_a_case() -> None:
    other = Question("locality", "neighbor", "The capital of Chile is", ("Valparaíso",))
    found, odd = probes(BESIDE, other, BESIDE)
    assert [probe.target for probe in found] == ["Santiago", "Valparaíso"]
    assert odd == {phrases.REPEATED_PROBE: 1}
