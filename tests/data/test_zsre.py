"""The four files of zsRE."""

import pytest

from baft.data import cases as phrases
from baft.data.zsre import Zsre

AT = "easyedit_edit_data/zsre/"
ROW = {
    "subject": "Ruby Lake",
    "src": "In which state is Ruby Lake?",
    "pred": "Utah",
    "rephrase": "Which state does Ruby Lake lie in?",
    "alt": "Idaho",
    "answers": ["Nevada", "NV"],
    "loc": "nq question: who wrote the anthem",
    "loc_ans": "Key",
    "portability": {
        "Recalled Relation": "...",
        "New Question": "Capital of that state?",
        "New Answer": "Boise",
    },
    "inverse question": "Which lake is in Idaho?",
    "alter_subject_question": "In which state is Franklin Lake?",
}


@pytest.mark.parametrize(
    ("split", "name", "asked"),
    [
        (
            "test",
            "zsre_mend_eval_portability_gpt4.json",
            [
                ("locality", "nq", ROW["loc"], "Key"),
                ("portability", "one_hop", "Capital of that state?", "Boise"),
            ],
        ),
        ("train", "zsre_mend_train.json", [("locality", "nq", ROW["loc"], "Key")]),
        (
            "inverse",
            "zsre_inverse_relation.json",
            [("portability", "inverse", "Which lake is in Idaho?", "Ruby Lake")],
        ),
        (
            "subject_replace",
            "zsre_subject_replace.json",
            [("portability", "subject_replace", "In which state is Franklin Lake?", "Idaho")],
        ),
    ],
)
def test_what_each_split_asks(put, split: str, name: str, asked: list[tuple[str, ...]]) -> None:
    zsre = Zsre(put(AT + name, [ROW]))
    [case] = zsre.cases(split)
    assert case.id == f"zsre/{split}/0"
    assert (case.edit.prompt, case.edit.target, case.edit.ground_truth) == (ROW["src"], "Idaho", "Nevada")
    found = [(probe.kind, probe.tag, probe.prompt, probe.target) for probe in case.probes]
    assert found == [("generality", "rephrase", ROW["rephrase"], "Idaho"), *asked]
    assert zsre.anomalies(split) == {}


def test_the_first_split_is_the_one_that_is_scored(put) -> None:
    zsre = Zsre(put(AT + "zsre_mend_eval_portability_gpt4.json", [ROW]))
    assert zsre.cases() == zsre.cases("test")


def test_a_cut_of_the_original_is_counted(put) -> None:
    folder = put(AT + "zsre_mend_train.1000.json", [ROW, ROW | {"alt": ""}])
    assert Zsre(folder).anomalies("train") == {
        "record of zsre_mend_train.1000.json, which stands in for the original file: read": 2,
        phrases.BLANK_EDIT: 1,
    }
    put(AT + "zsre_mend_train.json", [ROW])
    assert Zsre(folder).anomalies("train") == {}


@pytest.mark.parametrize(
    ("split", "n_cases", "odd"),
    [
        ("test", 1037, {phrases.TARGET_TRUE: 29, phrases.PADDED: 15}),
        (
            "train",
            998,  # of 1000: the paper's loader also passes over an empty `alt`
            {
                phrases.TARGET_TRUE: 21,
                phrases.PADDED: 10,
                phrases.BLANK_EDIT: 2,
                "record of zsre_mend_train.1000.json, which stands in for the original file: read": 1000,
            },
        ),
        ("inverse", 385, {phrases.NO_SUBJECT: 5, phrases.TARGET_TRUE: 3, phrases.PADDED: 3}),
        ("subject_replace", 293, {phrases.NO_SUBJECT: 4, phrases.TARGET_TRUE: 29, phrases.PADDED: 7}),
    ],
)
def test_the_real_files(real, split: str, n_cases: int, odd: dict[str, int]) -> None:
    zsre = real("zsre")
    assert len(zsre.cases(split)) == n_cases
    assert zsre.anomalies(split) == odd
    portability = sum(probe.kind == "portability" for case in zsre.cases(split) for probe in case.probes)
    assert portability == (0 if split == "train" else n_cases)
    if split in ("test", "train"):  # as EasyEdit asserts
        asked = [probe.prompt for case in zsre.cases(split) for probe in case.probes if probe.tag == "nq"]
        assert len(asked) == n_cases
        assert all(prompt.startswith("nq question: ") for prompt in asked)
