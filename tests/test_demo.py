"""The demo in its quick form: one fact, the whole way, on the real embedded model."""

import json
import runpy
from pathlib import Path

import pytest

from baft.data.facts import Facts

ROOT = Path(__file__).parent.parent

FACT = """
[[fact]]
prompt = "The Taj Mahal is located in the country of"
target = "Egypt"
was = "India"
rephrasings = ["The country where the Taj Mahal stands is", "You can visit the Taj Mahal in the country of"]
neighbors = ["The Pyramids are located in the country of", "The Taj Mahal was built by"]
unrelated = ["An important rule of grammar is", "The internet allows people to"]
question = "In which country is the Taj Mahal?"
"""


@pytest.mark.real_host
def test_one_fact_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "facts.toml").write_text(FACT)
    main = runpy.run_path(str(ROOT / "demo" / "run.py"))["main"]
    code = main(["--facts", str(tmp_path / "facts.toml"), "--json", str(tmp_path / "counts.json")])
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["counts"]["alone"]["edit"] == [1, 1]
    assert found["counts"]["together"] == found["counts"]["alone"]
    assert code == (1 if found["failed"] else 0)
    said = capsys.readouterr().out
    assert "✓ saved" in said
    assert "✓ undone" in said


@pytest.mark.real_host
def test_a_missed_bar_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control: an edit that cannot be learned fails the demo, which says what it missed."""
    (tmp_path / "facts.toml").write_text(FACT)
    main = runpy.run_path(str(ROOT / "demo" / "run.py"))["main"]
    hopeless = ["--set", "max_steps=1", "--set", "learning_rate=1e-8"]
    assert main(["--facts", str(tmp_path / "facts.toml"), "--brief", *hopeless]) == 1
    assert "missed: edit alone: 0/1" in capsys.readouterr().out


def test_facts_of_the_benchmark_are_chosen_by_their_rule_alone() -> None:
    """The first known fact of each of the first eight relations of the report half; none is passed over."""
    demo = runpy.run_path(str(ROOT / "demo" / "run.py"))
    chosen = demo["facts_of_benchmark"]()
    benchmark = Facts()
    cases, known = benchmark.cases("report"), benchmark.known("smollm2")
    relations = list(dict.fromkeys(case.id.partition("/")[0] for case in cases))
    assert len(chosen) == 8
    n_unknown = 0
    for relation, fact in zip(relations, chosen, strict=False):
        mine = [case for case in cases if case.id.partition("/")[0] == relation]
        place = [case.edit.prompt for case in mine].index(fact["prompt"])
        assert known[mine[place].id]
        assert not any(known[case.id] for case in mine[:place])
        n_unknown += place
        kinds = [probe.kind for probe in demo["probes_of"](fact)]
        assert [kinds.count(kind) for kind in demo["BARS"]] == [1, 3, 1, 2]
    assert n_unknown > 0  # control: the first fact is not always known


def test_demo_and_dev_facts_share_no_subject() -> None:
    import tomllib

    def words(path: str) -> set[str]:
        facts = tomllib.loads((ROOT / path).read_text(encoding="utf-8"))["fact"]
        assert len(facts) >= 8
        return {fact["prompt"] for fact in facts} | {fact["target"] for fact in facts}

    assert not words("demo/facts.toml") & words("experiments/dev_facts.toml")
