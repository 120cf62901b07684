"""The four benchmarks of facts in KnowEdit."""

from collections import Counter

import pytest

from baft.data import cases as phrases
from baft.data import knowedit
from baft.data.knowedit import KnowEditZsre, WikiBio, WikidataCounterfact, WikidataRecent
from baft.errors import DataError

TEST_CF = "knowedit/wiki_counterfact/test_cf.json"
ROW = {
    "subject": "Ann",
    "prompt": "The spouse of Ann is",
    "target_new": "Bo",
    "ground_truth": "Cy",
    "portability": {
        "Reasoning": [
            {"prompt": "The father of the spouse of Ann is", "ground_truth": [["Di", "D."], ["Ed"]]}
        ],
        "Subject_Aliasing": [{"prompt": "The spouse of Annie is", "ground_truth": [["Bo"]]}],
        "Logical_Generalization": [{"prompt": "The spouse of Bo is", "ground_truth": "Ann"}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The mother of Ann is", "ground_truth": ["Flo"]}],
        "Forgetfulness": [{"prompt": "The spouse of Ann, which is not Bo, is", "ground_truth": [["Cy"]]}],
    },
}


def counted(put, *rows):
    benchmark = WikidataCounterfact(put(TEST_CF, list(rows)))
    return benchmark.cases(), benchmark.anomalies()


def asking(
    prompt="The mother of Ann is", ground_truth=(("Flo",),), kind="locality", group="Relation_Specificity"
):
    """The row with one other group of one probe."""
    return ROW | {kind: {group: [{"prompt": prompt, "ground_truth": ground_truth}]}}


def test_what_a_record_asks(put) -> None:
    [case], odd = counted(put, ROW)
    assert odd == {}
    assert case.id == "wikidata-counterfact/test/0"
    edit = case.edit
    assert (edit.prompt, edit.target, edit.subject, edit.ground_truth) == (ROW["prompt"], "Bo", "Ann", "Cy")
    assert [(one.kind, one.tag, one.prompt, one.target, one.aliases) for one in case.probes] == [
        ("portability", "reasoning", "The father of the spouse of Ann is", "Di", ("D.", "Ed")),
        ("portability", "subject_aliasing", "The spouse of Annie is", "Bo", ()),
        ("portability", "logical_generalization", "The spouse of Bo is", "Ann", ()),
        ("locality", "relation_specificity", "The mother of Ann is", "Flo", ()),
        ("locality", "forgetfulness", "The spouse of Ann, which is not Bo, is", "Cy", ()),
    ]


def test_empty_groups_are_counted_and_the_case_is_kept(put) -> None:
    empty = ROW | {"portability": {}, "locality": {}}
    [case, other], odd = counted(put, empty, ROW | {"target_new": "Gil", "portability": {"Reasoning": []}})
    assert case.probes == ()
    assert {probe.kind for probe in other.probes} == {"locality"}
    assert odd == {
        knowedit.EMPTY_PART["portability"]: 1,
        knowedit.EMPTY_PART["locality"]: 1,
        knowedit.EMPTY_GROUP: 1,
        phrases.CONFLICT: 1,
    }


def test_a_missing_part_or_an_unknown_group_is_an_error(put) -> None:
    with pytest.raises(DataError, match="record 1, field 'portability': is missing"):
        counted(put, ROW, {name: value for name, value in ROW.items() if name != "portability"})
    with pytest.raises(
        DataError, match="record 0, portability, field 'Reason': unknown group .* are Reasoning, "
    ):
        counted(put, asking(kind="portability", group="Reason"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The name of the child of Q is"},
        {"prompt": "The capital of Q are"},
        {"prompt": "What is Q is"},
        {"target_new": "Q781063"},
    ],
)
def test_an_edit_without_a_name_is_left_out(put, row) -> None:
    [case], odd = counted(put, ROW | row, ROW)
    assert case.id == "wikidata-counterfact/test/1"
    assert odd == {knowedit.UNRESOLVED_EDIT: 1}


def test_a_probe_without_a_name_is_left_out(put) -> None:
    [case], odd = counted(put, asking("The name of the child of Q is"))
    assert {probe.kind for probe in case.probes} == {"portability"}
    assert odd == {knowedit.UNRESOLVED_PROMPT: 1}


@pytest.mark.parametrize(
    "prompt", ["The composer of Q & Q is", "The cast of John Q is", "The home of J. Q. Ward is", "Q follows"]
)
def test_a_name_with_a_q_is_a_name(put, prompt: str) -> None:
    [case], odd = counted(put, asking(prompt))
    assert case.probes[-1].prompt == prompt
    assert odd == {}


def test_a_subject_may_be_called_q(put) -> None:
    [case], odd = counted(put, asking("The composer of Q is") | {"subject": "Q"})
    assert case.probes[-1].prompt == "The composer of Q is"
    assert odd == {phrases.NO_SUBJECT: 1}  # the edit itself is about Ann


def test_an_answer_that_is_an_id_is_passed_over(put) -> None:
    [case], odd = counted(put, asking(ground_truth=[["Q61161873"], ["Flo"]]) | {"ground_truth": "Q66128589"})
    assert case.probes[-1].target == "Flo"
    assert case.edit.ground_truth is None
    assert odd == {knowedit.UNRESOLVED_ANSWER: 2}


@pytest.mark.parametrize(
    ("answers", "target", "aliases", "odd"),
    [
        ([["Flo", "F."], ["Gus"]], "Flo", ("F.", "Gus"), {}),
        ([[], ["Gus", "G."]], "Gus", ("G.",), {phrases.FIRST_ANSWER_EMPTY: 1}),
        ([["Flo"], []], "Flo", (), {phrases.LATER_ANSWER_EMPTY: 1}),
        ([[]], None, (), {phrases.NO_ANSWER_KEPT: 1}),
        ([], None, (), {phrases.NO_ANSWER_KEPT: 1}),
        ("", None, (), {phrases.NO_ANSWER_KEPT: 1}),
        ([["Q61161873"]], None, (), {phrases.NO_ANSWER_KEPT: 1, knowedit.UNRESOLVED_ANSWER: 1}),
    ],
)
def test_answers_with_gaps(put, answers, target, aliases, odd) -> None:
    [case], found = counted(put, asking(ground_truth=answers))
    assert (case.probes[-1].target, case.probes[-1].aliases) == (target, aliases)
    assert found == odd


def test_portability_needs_an_answer(put) -> None:
    [case], odd = counted(put, asking(ground_truth=[[]], kind="portability", group="Reasoning"))
    assert {probe.kind for probe in case.probes} == {"locality"}
    assert odd == {phrases.NO_ANSWER: 1}


def test_zsre_is_also_rephrased(put) -> None:
    row = ROW | {"ground_truth": ["Cy", "Cyril"], "rephrase_prompt": "Ann is married to", "cond": "..."}
    [case] = KnowEditZsre(put("knowedit/ZsRE/ZsRE-test-all.json", [row])).cases()
    assert [one.prompt for one in case.probes if one.kind == "generality"] == ["Ann is married to"]
    assert case.probes[0].tag == "rephrase"
    assert case.edit.ground_truth == "Cy"


def test_a_passage_is_gone_on_with(put) -> None:
    row = {
        "text": "About ann. She was. ",
        "labels": "She sang.",
        "concept": "ann",
        "locality": ROW["locality"],
    }
    bio = WikiBio(put("knowedit/WikiBio/wikibio-train-all.json", [row]))
    [case] = bio.cases("train")
    assert (case.edit.prompt, case.edit.target, case.edit.subject) == (
        "About ann. She was.",
        "She sang.",
        "ann",
    )
    assert {probe.kind for probe in case.probes} == {"locality"}
    assert bio.anomalies("train") == {phrases.PADDED: 1}


def test_the_original_recent_test_is_preferred_to_the_rebuilt_one(put) -> None:
    put("knowedit/wiki_recent/recent_test.rebuilt.json", [ROW])
    rebuilt = WikidataRecent(put("knowedit/wiki_recent/recent_train.json", [ROW]))
    assert rebuilt.anomalies() == {
        "record of recent_test.rebuilt.json, which stands in for the original file: read": 1
    }
    assert rebuilt.anomalies("train") == {}
    original = WikidataRecent(put("knowedit/wiki_recent/recent_test.json", [ROW]))
    assert original.anomalies() == {}
    assert original.cases() == rebuilt.cases()


REBUILT = "record of recent_test.rebuilt.json, which stands in for the original file: read"
REAL = {
    ("knowedit-zsre", "test"): (
        1304,
        {
            phrases.CONFLICT: 10,  # with the next, the 18 repeated pairs of subject and prompt
            phrases.SAME_EDIT: 8,
            phrases.TARGET_TRUE: 43,
            phrases.NO_SUBJECT: 3,
            phrases.PADDED: 13,
        },
    ),
    ("wikibio", "test"): (306, {phrases.PADDED: 68}),
    ("wikibio", "train"): (464, {phrases.PADDED: 95}),
    ("wikidata-counterfact", "test"): (
        885,
        {
            knowedit.EMPTY_PART["portability"]: 75,
            knowedit.EMPTY_PART["locality"]: 46,
            knowedit.EMPTY_GROUP: 28,
            # 28 probes begin with an empty list of aliases: 25 + 2 + 1. With the 12, 40 hold one somewhere.
            phrases.NO_ANSWER: 25,
            phrases.NO_ANSWER_KEPT: 2,
            phrases.FIRST_ANSWER_EMPTY: 1,
            phrases.LATER_ANSWER_EMPTY: 12,
            phrases.CONFLICT: 21,
            # 22 prompts hold a "Q" that stands alone; in two of them, about QAnon, it is that name.
            knowedit.UNRESOLVED_PROMPT: 20,
            phrases.REPEATED_PROBE: 15,
        },
    ),
    ("wikidata-counterfact", "train"): (
        1428 - 11 - 1,
        {
            phrases.DUPLICATE: 11,
            phrases.BLANK_TRUTH: 1,
            knowedit.EMPTY_PART["portability"]: 8,
            phrases.NO_ANSWER_KEPT: 2,  # the two blank answers
            phrases.TARGET_TRUE: 6,
            knowedit.UNRESOLVED_EDIT: 1,
            knowedit.UNRESOLVED_ANSWER: 1,
            knowedit.UNRESOLVED_PROMPT: 2,
        },
    ),
    ("wikidata-recent", "test"): (
        1266 - 1,
        {
            REBUILT: 1266,
            # 49 portability and 4 locality prompts hold a "Q" that stands alone. In 8 and 4 of them it is in
            # the name of the film "Q & Q", in 2 in that of the sculptor J. Q. A. Ward; 39 are unresolved.
            knowedit.UNRESOLVED_PROMPT: 39,
            knowedit.UNRESOLVED_EDIT: 1,
            phrases.CONFLICT: 2,
            phrases.REPEATED_PROBE: 196,
        },
    ),
    ("wikidata-recent", "train"): (
        570,
        {
            knowedit.EMPTY_PART["portability"]: 466,
            knowedit.EMPTY_PART["locality"]: 155,
            knowedit.EMPTY_GROUP: 35,
            phrases.NO_ANSWER_KEPT: 7,  # with the next, the 9 that begin with an empty list
            phrases.FIRST_ANSWER_EMPTY: 2,
            phrases.LATER_ANSWER_EMPTY: 8,
            knowedit.UNRESOLVED_ANSWER: 1,
        },
    ),
}


@pytest.mark.parametrize(("name", "split"), REAL)
def test_the_real_files(real, name: str, split: str) -> None:
    n_cases, odd = REAL[name, split]
    assert len(real(name).cases(split)) == n_cases
    assert real(name).anomalies(split) == odd


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        (
            "wikidata-counterfact",
            {
                "reasoning": 2226 - 15 - 5,  # less exact duplicates and those without an answer
                "subject_aliasing": 2408,
                "logical_generalization": 483 - 20 - 20,  # less those without an answer or a name
                "relation_specificity": 5488,
                "forgetfulness": 468,
            },
        ),
        (
            "knowedit-zsre",  # one rephrasing, one portability and two locality questions each
            {
                "rephrase": 1304,
                "reasoning": 771,
                "subject_aliasing": 264,
                "logical_generalization": 269,
                "relation_specificity": 2608,
            },
        ),
    ],
)
def test_the_probes_of_the_real_files(real, name: str, tags: dict[str, int]) -> None:
    assert Counter(probe.tag for case in real(name).cases() for probe in case.probes) == tags
