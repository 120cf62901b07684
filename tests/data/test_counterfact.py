"""CounterFact in both forms."""

from collections import Counter

import pytest

from baft.data import cases as phrases
from baft.data.counterfact import CounterFact, CounterFactFlat
from baft.data.overlap import overlap
from baft.errors import DataError

AT = "easyedit_edit_data/counterfact/"
ROW = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays",
        "target_new": {"str": "cello", "id": "Q1"},
        "target_true": {"str": "oboe", "id": "Q2"},
        "subject": "Ann {Lee}",
    },
    "paraphrase_prompts": ["Rain fell. Ann {Lee} is heard on the"],
    "neighborhood_prompts": ["Bo plays", "Cy plays"],
    "attribute_prompts": ["Di plays"],
    "generation_prompts": ["Ann {Lee} likes"],
    "portability": {"New Question": "Family of her instrument?", "New Answer": "strings"},
    "alternative_subject": "Anna Lee",
    "distracting_neighborhood_prompts": ["Ann {Lee} plays cello. Bo plays"],
    "unrelated_relation": {"question": "What is Ann {Lee}?", "object": "human"},
}
COMMON = [
    ("generality", "paraphrase", "Rain fell. Ann {Lee} is heard on the", "cello"),
    ("locality", "same_relation", "Bo plays", "oboe"),
    ("locality", "same_relation", "Cy plays", "oboe"),
    ("locality", "attribute", "Di plays", "cello"),
]
ONE_HOP = ("portability", "one_hop", "Family of her instrument?", "strings")


@pytest.mark.parametrize(
    ("split", "name", "asked"),
    [
        ("portability", "counterfact_portability_gpt4.json", [ONE_HOP]),
        (
            "distracting_neighbor",
            "counterfact_distracting_neighbor.json",
            [
                ONE_HOP,
                ("locality", "distracting_neighbor", "Ann {Lee} plays cello. Bo plays", "oboe"),
                ("locality", "other_attribute", "What is Ann {Lee}?", "human"),
            ],
        ),
        (
            "subject_replace",
            "counterfact_subject_replace.json",
            [("portability", "subject_replace", "Anna Lee plays", "cello")],
        ),
    ],
)
def test_what_each_split_asks(put, split: str, name: str, asked: list[tuple[str, ...]]) -> None:
    counterfact = CounterFact(put(AT + name, [ROW]))
    [case] = counterfact.cases(split)
    assert case.id == f"counterfact/{split}/0"
    edit = case.edit
    assert (edit.prompt, edit.target, edit.subject) == ("Ann {Lee} plays", "cello", "Ann {Lee}")
    assert edit.ground_truth == "oboe"
    assert [(one.kind, one.tag, one.prompt, one.target) for one in case.probes] == COMMON + asked
    assert counterfact.anomalies(split) == {}


@pytest.mark.parametrize("template", ["She plays", "{} and {} play"])
def test_a_prompt_has_one_place_for_the_subject(put, template: str) -> None:
    rewrite = ROW["requested_rewrite"] | {"prompt": template}
    folder = put(AT + "counterfact_portability_gpt4.json", [ROW, ROW | {"requested_rewrite": rewrite}])
    with pytest.raises(DataError, match="record 1, requested_rewrite, field 'prompt': .*once, got '"):
        CounterFact(folder).cases()


def test_the_flat_form(put) -> None:
    row = {
        "case_id": 0,
        "prompt": "Ann plays",
        "target_new": "cello",
        "subject": "Ann",
        "ground_truth": "oboe",
        "rephrase_prompt": "Rain fell. Ann is heard on the",
        "locality_prompt": "Bo plays",
        "locality_ground_truth": "oboe",
    }
    flat = CounterFactFlat(put(AT + "counterfact-edit.json", [row, row | {"target_new": "oboe"}]))
    first, second = flat.cases()
    assert first.edit.ground_truth == second.edit.ground_truth == "oboe"
    assert [(one.kind, one.tag, one.prompt, one.target) for one in first.probes] == [
        ("generality", "rephrase", "Rain fell. Ann is heard on the", "cello"),
        ("locality", "neighborhood", "Bo plays", "oboe"),
    ]
    assert flat.anomalies() == {phrases.CONFLICT: 1, phrases.TARGET_TRUE: 1}


@pytest.mark.parametrize(
    ("split", "n_cases", "n_repeated", "tags"),
    [
        (
            "portability",
            1031,
            4,
            {"paraphrase": 2062, "same_relation": 10307, "attribute": 10309, "one_hop": 1031},
        ),
        (
            "distracting_neighbor",
            200,
            2,
            {
                "paraphrase": 400,
                "same_relation": 1999,
                "attribute": 2000,
                "one_hop": 200,
                "distracting_neighbor": 1999,
                "other_attribute": 200,
            },
        ),
        (
            "subject_replace",
            213,
            2,
            {"paraphrase": 426, "same_relation": 2128, "attribute": 2130, "subject_replace": 213},
        ),
    ],
)
def test_the_real_files_in_the_original_form(
    real, split: str, n_cases: int, n_repeated: int, tags: dict[str, int]
) -> None:
    """Ten of each kind of neighbor a record, less the few that stand twice in it."""
    counterfact = real("counterfact")
    cases = counterfact.cases(split)
    assert len(cases) == n_cases
    assert Counter(probe.tag for case in cases for probe in case.probes) == tags
    cut = "record of counterfact_distracting_neighbor.first200.json, which stands in for the original file"
    expected = {phrases.REPEATED_PROBE: n_repeated}
    if split == "distracting_neighbor":
        expected[f"{cut}: read"] = 200
    assert counterfact.anomalies(split) == expected


@pytest.mark.parametrize(
    ("split", "n_cases", "n_repeated"), [("edit", 10000, 83), ("val", 1919, 7), ("train", 5000, 25)]
)
def test_the_real_files_in_the_flat_form(real, split: str, n_cases: int, n_repeated: int) -> None:
    flat = real("counterfact-flat")
    assert len(flat.cases(split)) == n_cases
    odd = flat.anomalies(split)
    assert odd.get(phrases.CONFLICT, 0) + odd.get(phrases.SAME_EDIT, 0) == n_repeated
    assert {len(case.probes) for case in flat.cases(split)} == {2}


def test_the_portability_file_is_part_of_the_edit_file(real) -> None:
    # By case_id all 1,031 are; by text the prompt and the target agree as well.
    shared = overlap(real("counterfact").cases(), real("counterfact-flat").cases())
    assert shared.same_prompt_and_target == 1031
