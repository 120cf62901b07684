"""What the benchmark `facts` promises about every case, and that its text is fit to be read."""

import json
import re
import tomllib
from collections import Counter
from importlib.resources import files
from itertools import product
from pathlib import Path

import pytest

import baft.data.facts
from baft.data.base import benchmarks
from baft.data.facts import Facts
from baft.errors import DataError, UnknownNameError
from baft.types import EditCase, Probe

ROOT = Path(__file__).parent.parent.parent
FACTS = Facts()
SPLITS = {split: FACTS.cases(split) for split in FACTS.splits}
CASES = [case for cases in SPLITS.values() for case in cases]
PROBES = [(case, probe) for case in CASES for probe in case.probes]

# Whoever changes the data changes these: it is then another benchmark, whose numbers cannot be compared with
# the old one's. Say so in experiments/LOG.md, with the new fingerprints.
FINGERPRINTS = {"report": "688d44ae83092f59", "tune": "b345058bd48da40e"}


def tagged(case: EditCase, tag: str) -> list[Probe]:
    return [probe for probe in case.probes if probe.tag == tag]


def relation_of(case: EditCase) -> str:
    return case.id.split("/")[0]


def background_texts() -> set[str]:
    """What the closed-form gates learn as ordinary text, with every template filled."""
    raw = tomllib.loads(files("baft.hosts").joinpath("background.toml").read_text(encoding="utf-8"))
    texts = {*raw["sentences"], *raw["requests"], *raw["canaries"]}
    for template in (*raw["cloze"], *raw["questions"]):
        kinds = re.findall(r"{(\w+)}", template)
        for names in product(*(raw["entities"][kind] for kind in kinds)):
            texts.add(template.format(**dict(zip(kinds, names, strict=True))))
    return texts


def test_it_is_registered_and_its_text_is_pinned() -> None:
    assert benchmarks.get("facts") is Facts
    assert Facts().cases() == SPLITS["report"]
    assert {split: Facts().fingerprint(split) for split in Facts.splits} == FINGERPRINTS
    with pytest.raises(UnknownNameError, match="did you mean 'tune'"):
        FACTS.cases("tunes")


def test_there_is_enough_of_it_and_both_halves_are_alike() -> None:
    report, tune = (Counter(relation_of(case) for case in SPLITS[split]) for split in ("report", "tune"))
    assert len(CASES) >= 220
    assert set(report) == set(tune)
    assert len(report) >= 16
    assert abs(report.total() - tune.total()) <= 0.1 * tune.total()
    assert all(abs(report[name] - tune[name]) <= 1 for name in report)


def test_every_case_asks_what_it_should() -> None:
    for case in CASES:
        counts = Counter((probe.kind, probe.tag) for probe in case.probes)
        portability = {tag: n for (kind, tag), n in counts.items() if kind == "portability"}
        assert sum(portability.values()) == 2, case.id
        assert set(portability) <= {"alias", "reverse", "one_hop"}
        assert {key: n for key, n in counts.items() if key[0] != "portability"} == {
            ("generality", "rephrase"): 3,
            ("generality", "chat_question"): 1,
            ("generality", "distracting_prefix"): 1,
            ("locality", "same_relation"): 2,
            ("locality", "same_subject"): 1,
            ("locality", "unrelated"): 2,
            ("locality", "negation"): 1,
        }, case.id
        assert [probe.tag for probe in case.probes if probe.chat] == ["chat_question"]
        assert all(probe.prompt.endswith("?") for probe in tagged(case, "chat_question"))


def test_what_has_an_answer_and_what_has_none() -> None:
    for case, probe in PROBES:
        assert (probe.target is None) == (probe.tag in ("unrelated", "negation")), (case.id, probe.prompt)
        if probe.kind == "generality":
            assert probe.target == case.edit.target


def test_an_edit_says_something_new_and_its_neighbors_can_tell() -> None:
    for case in CASES:
        new, old = FACTS.answers(case.edit.target), FACTS.answers(case.edit.ground_truth or "")
        assert not set(new) & set(old), case.id
        for probe in case.probes:
            if probe.kind == "locality" and probe.target:
                assert not {probe.target, *probe.aliases} & set(new), (case.id, probe.prompt)


def test_portability_follows_from_the_new_answer_alone() -> None:
    """Answers of one hop are looked up again here, for the edit's target and for the truth."""
    tables = tomllib.loads(files("baft.data").joinpath("facts_attributes.toml").read_text(encoding="utf-8"))
    aliases = tables.pop("aliases")

    def reachable(answer: str, n_steps: int = 2) -> set[str]:
        rows = [table[answer] for table in tables.values() if answer in table]
        values = {v for row in rows for one in row.values() for v in ([one] if isinstance(one, str) else one)}
        further = {value for one in values for value in (reachable(one, n_steps - 1) if n_steps > 1 else ())}
        return values | further | {name for value in values for name in aliases.get(value, ())}

    for case in CASES:
        for probe in tagged(case, "one_hop"):
            assert probe.target in reachable(case.edit.target), (case.id, probe.prompt)
            assert case.edit.subject in probe.prompt, case.id
        for probe in tagged(case, "reverse"):
            assert probe.target == case.edit.subject
            assert case.edit.target.lower() in probe.prompt.lower()
        for probe in tagged(case, "alias"):
            assert probe.target == case.edit.target
            assert case.edit.subject not in probe.prompt, probe.prompt


def test_wordings_differ_and_none_gives_the_edit_away() -> None:
    for case in CASES:
        prompts = [probe.prompt for probe in case.all_probes]
        assert len(set(prompts)) == len(prompts), case.id
        for probe in tagged(case, "rephrase"):
            assert case.edit.prompt.lower() not in probe.prompt.lower(), probe.prompt
            assert case.edit.subject.lower() in probe.prompt.lower()
        [prefixed] = tagged(case, "distracting_prefix")
        assert prefixed.prompt.endswith(f". {case.edit.prompt}")
        prefix = prefixed.prompt.removesuffix(case.edit.prompt)
        assert not any(name in prefix for name in (case.edit.subject, case.edit.target)), prefix
        [same] = tagged(case, "same_subject")
        assert case.edit.subject.lower() in same.prompt.lower(), same.prompt
    wordings = {relation_of(case): set() for case in CASES}
    for case in CASES:
        drawn = frozenset(probe.prompt.replace(case.edit.subject, "_") for probe in tagged(case, "rephrase"))
        wordings[relation_of(case)].add(drawn)
    assert all(len(found) > 1 for found in wordings.values()), "all edits of a relation share their wording"


def test_no_edit_contradicts_another_or_its_probes() -> None:
    """All edits of a split may be in force at once: their probes must still have one right answer each."""
    assert len({case.id for case in CASES}) == len(CASES)
    assert len({case.edit.subject for case in CASES}) == len(CASES)
    edited = {case.edit.prompt for case in CASES}
    assert len(edited) == len(CASES)
    assert not [probe.prompt for _, probe in PROBES if probe.prompt in edited]
    for cases in SPLITS.values():
        right: dict[str, str] = {}
        for case in cases:
            for probe in case.all_probes:
                if probe.target is not None:
                    assert right.setdefault(probe.prompt, probe.target) == probe.target, probe.prompt


def test_no_consequence_leads_to_a_subject_that_is_edited_itself() -> None:
    """Once the Volga has been moved, it is no longer known to be the longest river of Europe."""
    moved = (
        "river",
        "landmark-city",
        "landmark-country",
        "author",
        "painter",
        "founder",
        "inventor",
        "discoverer",
    )
    bare = {case.edit.subject.removeprefix("the ").lower() for case in CASES if relation_of(case) in moved}
    hops = [probe for case in CASES for probe in tagged(case, "one_hop")]
    answers = {
        answer.removeprefix("the ").lower() for hop in hops for answer in (hop.target or "", *hop.aliases)
    }
    assert len(bare) > 60
    assert len(answers) > 100
    assert bare & answers == {"amazon"}, "the river, whatever becomes of the company"


@pytest.mark.parametrize("tag", ["same_relation", "same_subject", "unrelated"])
def test_the_splits_share_no_subject_no_neighbor_and_no_ordinary_text(tag: str) -> None:
    report, tune = ({case.edit.subject for case in cases} for cases in SPLITS.values())
    assert not report & tune
    asked = [{probe.prompt for case in cases for probe in tagged(case, tag)} for cases in SPLITS.values()]
    assert all(asked)
    assert not asked[0] & asked[1]


def test_the_pools_of_ordinary_text_are_large_and_disjoint() -> None:
    raw = tomllib.loads(files("baft.data").joinpath("facts_unrelated.toml").read_text(encoding="utf-8"))
    assert len(raw["prompts"]) >= 120
    for pool in raw.values():
        assert len(set(pool)) == len(pool)
    prefixes = [
        {probe.prompt.split(". ")[0] for case in cases for probe in tagged(case, "distracting_prefix")}
        for cases in SPLITS.values()
    ]
    assert not prefixes[0] & prefixes[1]


def test_the_text_is_clean() -> None:
    for case in CASES:
        for probe in case.all_probes:
            texts = [probe.prompt, *([probe.target] if probe.target else []), *probe.aliases]
            for text in texts:
                assert text == text.strip(), repr(text)
                assert not re.search(r"[{}]|  |\b[Tt]he [Tt]he\b|\ba [aeiou]|\b(\w+) \1\b", text), text
            assert probe.prompt[0].isupper() or probe.prompt[0].isdigit(), probe.prompt
            if probe.tag != "chat_question":
                assert re.search(r"[\w\"]$", probe.prompt), probe.prompt


def test_nothing_was_seen_where_settings_are_chosen_or_gates_are_fitted() -> None:
    """No prompt of demo or dev facts is an edit here, and no prompt at all is background text."""
    facts = [
        fact
        for name in ("demo/facts.toml", "experiments/dev_facts.toml")
        for fact in tomllib.loads((ROOT / name).read_text(encoding="utf-8"))["fact"]
    ]
    assert len(facts) >= 16
    assert not {fact["prompt"] for fact in facts} & {case.edit.prompt for case in CASES}
    ordinary = {text for fact in facts for text in fact["unrelated"]}
    seen = background_texts() | ordinary
    assert "The capital of Norway is" in seen
    assert not seen & {probe.prompt for case in CASES for probe in case.all_probes}


def test_what_a_host_knows_is_recorded_for_every_case() -> None:
    known = FACTS.known("smollm2")
    assert set(known) == {case.id for case in CASES}
    for cases in SPLITS.values():
        share = sum(known[case.id] for case in cases) / len(cases)
        assert 0.6 <= share < 1, "the originals are chosen so that the smallest host knows most of them"


def test_an_unknown_host_and_an_old_record_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'gpt9' knows; recorded are .*smollm2.* Run .*facts_known\.py gpt9"):
        FACTS.known("gpt9")
    old = json.dumps({"smollm2": {"asked": "0" * 16, "known": {}}})
    monkeypatch.setattr(baft.data.facts, "_read", lambda name: old)
    with pytest.raises(DataError, match="recorded for other prompts or answers than today's"):
        FACTS.known("smollm2")
