"""Running experiments on a tiny host, where cheats are planted and runs are cut off."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from baft.data.base import benchmarks
from baft.errors import ConfigError, DataError, EditError
from baft.evals import runner
from baft.evals.beyond import HELD_OUT, held_out_texts
from baft.evals.collect import read_run, require_comparable
from baft.evals.experiment import (
    BenchmarkSpec,
    Experiment,
    MethodSpec,
    OthersSpec,
    ProtocolSpec,
    Rendering,
    is_rendering,
)
from baft.evals.records import ROWS, read_manifest, read_rows
from baft.evals.report import summary_rows, write_report
from baft.evals.runner import Bench
from baft.evals.texts import fluency, text_loss
from baft.hosts.edited_model import EditedModel
from baft.hosts.models import Host
from baft.methods import inserting
from baft.methods.bank import BankEditor
from baft.methods.base import methods
from tiny import tiny_host

LEARNS = {"learning_rate": 5e-2, "max_steps": 60, "stop_margin": 0.7, "layers": [1]}
REFT = MethodSpec(name="reft", settings=LEARNS)
SINGLE, BATCHED = ProtocolSpec(kind="single"), ProtocolSpec(kind="batched", size=3)
SEQUENTIAL = ProtocolSpec(kind="sequential", size=3)
FACTS = [("The tower is in", "Ro"), ("The king of France was", "Al"), ("Paris is in", "Be")]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    rows = [
        {
            "prompt": prompt,
            "target": target,
            "generality": [{"prompt": f"{prompt} ", "tag": "space"}, {"prompt": "Where?", "chat": True}],
            "locality": [{"prompt": "Bread and", "target": "milk"}, {"prompt": "A hat"}],
            "portability": [{"prompt": "Who lives there? The", "target": "Ro"}],
        }
        for prompt, target in FACTS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def experiment(file):
    def make(*specs, protocols=(SINGLE,), **changes):
        return Experiment(
            name="x",
            benchmarks=(BenchmarkSpec(name="jsonl", file=str(file)),),
            methods=specs or (REFT,),
            protocols=protocols,
            **{"max_new_tokens": 4, "scorers": ("teacher_forced", "generate"), **changes},
        )

    return make


@pytest.fixture
def planted(monkeypatch):
    for name in ("Nothing", "Everywhere", "Forgetful"):
        monkeypatch.setitem(methods._targets, name.lower(), f"planted:{name}")
        monkeypatch.delitem(methods._loaded, name.lower(), raising=False)


def rows_of(bench, tmp_path):
    bench.run(tmp_path / "run")
    return read_rows(tmp_path / "run")


def mean(rows, kind, score, which="scores", **where):
    found = [
        probe[which][score]
        for row in rows
        if all(row[key] == value for key, value in where.items())
        for probe in row["probes"]
        if probe["kind"] == kind and score in probe[which]
    ]
    return sum(found) / len(found)


def test_a_row_says_what_was_asked_and_what_came_of_it(experiment, host, tmp_path):
    every = experiment(scorers=("teacher_forced", "generate", "generate_chat", "gates"), texts=0)
    rows = rows_of(Bench(every, host=host), tmp_path)
    assert [row["case"] for row in rows] == [f"jsonl/all/{i}" for i in range(3)]
    row = rows[0]
    assert (row["method"], row["protocol"], row["stage"], row["seed"], row["of"]) == (
        "reft",
        "single",
        "immediate",
        0,
        3,
    )
    assert row["edit"] == {"prompt": "The tower is in", "target": "Ro"}
    assert row["decoded"]
    assert row["error"] is None
    assert row["n_steps"] > 0
    kinds = [probe["kind"] for probe in row["probes"]]
    assert kinds == ["reliability", "generality", "generality", "locality", "locality", "portability"]
    first = row["probes"][0]
    assert first["scores"]["generate"] == first["scores"]["teacher_forced"] == 1.0
    assert first["unedited"]["generate"] == 0.0
    assert first["raw"][1] == " Ro"
    assert first["raw"][0] != " Ro"
    assert first["gate"] == 1.0  # reft is open
    assert first["logprob"][0] < first["logprob"][1] < 0
    assert set(row["probes"][2]["scores"]) == {
        "generate_chat",
        "generate_chat_contains",
        "generate_chat_stopped",
    }
    manifest = read_manifest(tmp_path / "run")
    [(name, about)] = manifest["benchmarks"].items()
    assert (name, about["n_cases"]) == ("jsonl/all", 3)
    assert manifest["host"]["weights"]
    assert manifest["settings"]["reft"]["max_steps"] == 60
    assert manifest["versions"]["torch"]


def test_moments_are_taken_on_the_text_in_the_folder_of_the_files_and_the_record_says_so(
    experiment, host, tmp_path, monkeypatch
):
    monkeypatch.delenv("BAFT_DATA", raising=False)
    (tmp_path / "general").mkdir()
    (tmp_path / "general/wikitext-2-valid.txt").write_text("A river runs far from here.\nBread.\n")
    quick = {"layer": 1, "max_steps": 1, "n_prefixes": 1, "moments_tokens": 20}
    given, seen = experiment(MethodSpec(name="rome", settings=quick)), []
    as_it_was = inserting.second_moments
    monkeypatch.setattr(
        inserting,
        "second_moments",
        lambda *args: seen.append(args[3].pieces) or as_it_was(*args),
    )
    benches = [Bench(given, host=host, data=tmp_path), Bench(given, host=host)]
    for number, bench in enumerate(benches):
        rows_of(bench, tmp_path / str(number))
    assert seen[0] == ("A river runs far from here.", "Bread.")
    assert len(seen[1]) > 100  # control: our own text
    with pytest.raises(ConfigError, match="another configuration: moments_texts was"):
        benches[1].run(tmp_path / "0" / "run")
    assert "moments_texts" not in Bench(experiment(), host=host).manifest


def test_chat_questions_are_asked_in_chat_and_nothing_else_is(experiment, host, tmp_path):
    given = experiment(scorers=("generate", "chat_questions"))
    rows = rows_of(Bench(given, host=host), tmp_path)
    whole = rows_of(Bench(experiment(scorers=("generate", "generate_chat")), host=host), tmp_path / "whole")
    for row, other in zip(rows, whole, strict=True):
        asked = [probe for probe in row["probes"] if "chat" in probe]
        assert [probe["prompt"] for probe in asked] == ["Where?"]
        assert asked[0]["chat"] == other["probes"][2]["chat"]
        assert sum("chat" in probe for probe in other["probes"]) == 6  # control


_PASSING = {"seconds_s", "task", "chunk", "of", "position", "stack"}


def close(one, other):
    """Rows that are equal but for how long they took, for the last digits of numbers, and for their task."""
    if isinstance(one, dict):
        keys = one.keys() - _PASSING
        assert keys == other.keys() - _PASSING
        return all(close(one[key], other[key]) for key in keys)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == (pytest.approx(other, rel=1e-7, abs=1e-9) if isinstance(one, float) else other)


@pytest.mark.parametrize("texts", [0, 2])
def test_edits_made_and_asked_in_one_stack_are_those_made_one_by_one(experiment, host, tmp_path, texts):
    """Each is made on the untouched host, and its probes are asked under itself alone."""
    (tmp_path / HELD_OUT).parent.mkdir(parents=True)
    (tmp_path / HELD_OUT).write_text(f"{'one ' * 80}\n{'two ' * 90}\n")
    own = MethodSpec(name="baft", settings={**LEARNS, "max_steps": 20})
    scorers = ("teacher_forced", "generate", "generate_chat", "gates", "fluency" if texts else "generate")
    of = {}
    for stack in (1, 2, 25):
        given = experiment(own, REFT, stack=stack, scorers=tuple(dict.fromkeys(scorers)), texts=texts)
        bench = Bench(given, host=host, data=tmp_path)
        assert [len(task.cases) for task in bench.tasks] == {1: [1, 1, 1], 2: [2, 1], 25: [3]}[stack]
        rows = [bench.block(task, method) for task, method in bench.blocks]
        of[stack] = sorted((row for block in rows for row in block), key=lambda r: (r["method"], r["case"]))
    assert len(of[1]) == 6
    for stack in (2, 25):
        assert all(close(one, other) for one, other in zip(of[1], of[stack], strict=True))
    assert not close(of[1][0]["probes"], of[1][1]["probes"])  # control: two cases


def test_where_an_edit_of_a_stack_fails_all_are_made_one_by_one(experiment, host, tmp_path):
    short = {**LEARNS, "max_target_tokens": 4}
    bench = Bench(experiment(MethodSpec(name="reft", settings=short)), host=host)
    [task] = bench.tasks
    edit = replace(task.cases[1].edit, target="Albert the king")
    probes = tuple(replace(probe, edit_id=edit.id) for probe in task.cases[1].probes)
    long = replace(task.cases[1], edit=edit, probes=probes)
    rows = bench.block(replace(task, cases=(task.cases[0], long, task.cases[2])), bench.experiment.methods[0])
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert all(probe["scores"] == probe["unedited"] for probe in rows[1]["probes"])
    whole = bench.block(task, bench.experiment.methods[0])
    assert all(close(rows[i], whole[i]) for i in (0, 2))
    assert not close(rows[1], whole[1])  # control


@pytest.mark.usefixtures("planted")
def test_what_is_not_edited_scores_as_the_host(experiment, host, tmp_path):
    rows = rows_of(Bench(experiment(MethodSpec(name="nothing"), REFT), host=host), tmp_path)
    mine = [row for row in rows if row["method"] == "nothing"]
    assert all(row["decoded"] for row in mine)  # what it claims
    for row in mine:
        assert all(probe["scores"] == probe["unedited"] for probe in row["probes"])
    assert mean(mine, "reliability", "generate") == 0.0
    assert mean(mine, "locality", "bit_exact") == mean(mine, "locality", "text") == 1.0
    assert mean(rows, "reliability", "generate", method="reft") == 1.0  # control


@pytest.mark.usefixtures("planted")
def test_a_bias_toward_the_target_everywhere_is_caught(experiment, host, tmp_path):
    rows = rows_of(Bench(experiment(MethodSpec(name="everywhere"), REFT), host=host), tmp_path)
    mine = [row for row in rows if row["method"] == "everywhere"]
    # It says the first token of its target, and never stops.
    assert mean(mine, "reliability", "teacher_forced") > 0.3 > mean(mine, "reliability", "generate")
    assert mean(mine, "reliability", "teacher_forced", "unedited") < 0.1
    for score in ("text", "argmax", "bit_exact"):
        assert mean(mine, "locality", score) <= 0.2
    assert mean(mine, "locality", "logprob_max") > 10


@pytest.mark.usefixtures("planted")
def test_only_the_last_edit_remembered_shows_in_the_final_scores(experiment, host, tmp_path):
    cheat = MethodSpec(name="forgetful", settings=LEARNS)
    rows = rows_of(Bench(experiment(cheat, protocols=(SEQUENTIAL,)), host=host), tmp_path)
    assert [(row["stage"], row["position"]) for row in rows] == [
        *(("immediate", i) for i in range(3)),
        *(("final", i) for i in range(3)),
    ]
    assert mean(rows, "reliability", "generate", stage="immediate") == 1.0
    assert mean(rows, "reliability", "generate", stage="final", position=2) == 1.0
    assert mean(rows, "reliability", "generate", stage="final") == pytest.approx(1 / 3)


@pytest.mark.usefixtures("planted")
def test_other_edits_are_made_before_the_last_look(experiment, host, file, tmp_path):
    long = {"prompt": "The tower of London is in " * 40, "target": "Ro"}
    more = [{"prompt": "A dog in the rain", "target": "Be"}, long, {"prompt": "My old hat", "target": "Al"}]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    mine = replace(
        experiment(
            MethodSpec(name="forgetful", settings=LEARNS),
            MethodSpec(name="baft-bank", settings={**LEARNS, "schedule": "constant", "n_others": 1}),
            protocols=(SEQUENTIAL,),
        ),
        benchmarks=(BenchmarkSpec(name="jsonl", file=str(file)),),
    )
    roomy = Host("llama", tiny_host(max_position_embeddings=512), host.tokenizer, "llama")
    bench = Bench(mine, host=roomy)
    others = benchmarks.get("jsonl")(tmp_path / "more.jsonl").cases("all")
    task = replace(bench.tasks[0], others=others)
    forgetful, bank = (bench.block(task, method) for method in mine.methods)
    assert [row["position"] for row in forgetful if row["stage"] == "final"] == [0, 1, 2]
    assert mean(forgetful, "reliability", "generate", stage="immediate") == 1.0
    assert mean(forgetful, "reliability", "generate", stage="final") == 0.0  # the last is another's
    assert mean(bank, "reliability", "generate", stage="final") == 1.0
    for rows in (forgetful, bank):
        [(why, n)] = rows[-1]["others_failed"].items()
        assert n == 1
        assert why.startswith("InputError: the text is 1001 tokens long")
        assert not any("others_failed" in row for row in rows[:-1])


@pytest.mark.usefixtures("planted")
def test_a_run_tells_of_its_other_edits(experiment, host, file, tmp_path):
    def run(name, n, size=4):
        others = (OthersSpec(name="facts", split="tune", n=n),)
        mine = replace(
            experiment(MethodSpec(name="nothing"), protocols=(ProtocolSpec(kind="sequential", size=size),)),
            benchmarks=(BenchmarkSpec(name="jsonl", file=str(file), apart=True, others=others),),
        )
        Bench(mine, host=host).run(tmp_path / name)
        return read_run(tmp_path / name)

    two, three = run("two", 2), run("three", 3)
    assert len({row["task"] for row in two.rows}) == 2  # of three cases, beside which two others fit
    for found in (two, three):
        assert found.is_finished
        cut = [row for row in found.rows if row["position"] < 2]
        assert not replace(
            found, rows=tuple(row for row in cut if row["task"] != cut[-1]["task"])
        ).is_finished
    require_comparable(two, two)
    require_comparable(two, run("long", 3, 5))  # of another protocol
    with pytest.raises(ConfigError, match="other edits are in force beside the cases of jsonl/all"):
        require_comparable(two, three)
    told = write_report([tmp_path / "two"], tmp_path)[0].read_text()
    assert "beside them 2 edits of facts/tune, fingerprint " in told


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("method", ["reft", "baft-bank"])
def test_nothing_may_be_asked_before_the_last_edit(experiment, host, file, method, tmp_path, monkeypatch):
    batches = []
    apart = BankEditor.apply_apart

    def watched(editor, requests, **more):
        batches.append(len(requests))
        return apart(editor, requests, **more)

    monkeypatch.setattr(BankEditor, "apply_apart", watched)
    settings = LEARNS if method == "reft" else {**LEARNS, "schedule": "constant", "n_others": 1}
    long = {"prompt": "The tower of London is in " * 40, "target": "Ro"}
    with_long = tmp_path / "long.jsonl"
    with_long.write_text(file.read_text() + json.dumps(long) + "\n")
    found = {}
    for immediate in ("none", "all"):
        protocol = ProtocolSpec(kind="sequential", size=4, immediate=immediate)
        mine = replace(
            experiment(MethodSpec(name=method, settings=settings), protocols=(protocol,)),
            benchmarks=(BenchmarkSpec(name="jsonl", file=str(with_long)),),
            scorers=("teacher_forced", "generate", "cost"),
        )
        roomy = Host("llama", tiny_host(max_position_embeddings=512), host.tokenizer, "llama")
        found[immediate] = rows_of(Bench(mine, host=roomy), tmp_path / immediate)
    assert batches == ([4, 2, 2] if method == "baft-bank" else [])  # halved for the one that fails
    final = [row for row in found["all"] if row["stage"] == "final"]
    assert [row["stage"] for row in found["none"]] == ["final"] * 4
    for one, other in zip(found["none"], final, strict=True):
        assert [probe["scores"] for probe in one["probes"]] == [probe["scores"] for probe in other["probes"]]
        assert (one["error"] is None) == (other["error"] is None) == (one["position"] < 3)
        assert one.get("stored_bytes", 1) > 0
    assert mean(found["none"], "reliability", "generate") > 0
    summary_rows([tmp_path / "none" / "run"])
    write_report([tmp_path / "none" / "run"], tmp_path / "report")


def test_less_may_be_asked(experiment, host, file, tmp_path):
    few = BenchmarkSpec(name="jsonl", file=str(file), probes_per_tag=1)
    protocol = ProtocolSpec(kind="sequential", size=3, immediate="reliability")
    rows = rows_of(Bench(replace(experiment(protocols=(protocol,)), benchmarks=(few,)), host=host), tmp_path)
    asked = {row["stage"]: [(probe["kind"], probe["tag"]) for probe in row["probes"]] for row in rows}
    assert asked["immediate"] == [("reliability", "edit")]
    assert asked["final"] == [
        ("reliability", "edit"),
        ("generality", "space"),
        ("generality", ""),
        ("locality", ""),
        ("portability", ""),
    ]


def test_edits_of_a_batch_hold_together(experiment, host, tmp_path):
    rows = rows_of(Bench(experiment(protocols=(BATCHED,)), host=host), tmp_path)
    assert len(rows) == 3
    assert len({row["n_steps"] for row in rows}) == 1
    assert mean(rows, "reliability", "generate") == 1.0


def test_cases_of_a_batch_may_share_an_edit(experiment, host, tmp_path):
    """As some of KnowEdit's zsRE do; the edit is made once, and each case has its questions asked."""
    path = tmp_path / "twins.jsonl"
    asked = [{"prompt": "Bread and"}, {"prompt": "A hat"}, {"prompt": "Who"}]
    edits = [FACTS[0], FACTS[0], FACTS[1]]
    path.write_text(
        "".join(
            json.dumps({"prompt": prompt, "target": target, "locality": [probe]}) + "\n"
            for (prompt, target), probe in zip(edits, asked, strict=True)
        )
    )
    twins = replace(
        experiment(protocols=(BATCHED,)), benchmarks=(BenchmarkSpec(name="jsonl", file=str(path)),)
    )
    rows = rows_of(Bench(twins, host=host), tmp_path)
    assert [row["error"] for row in rows] == [None] * 3
    assert [row["probes"][-1]["prompt"] for row in rows] == ["Bread and", "A hat", "Who"]
    assert mean(rows, "reliability", "generate") == 1.0


def test_a_split_named_and_meant_by_default_is_one(file):
    specs = (
        BenchmarkSpec(name="jsonl", file=str(file)),
        BenchmarkSpec(name="jsonl", split="all", file=str(file)),
    )
    twice = Experiment(name="x", benchmarks=specs, methods=(REFT,))
    with pytest.raises(ConfigError, match="jsonl/all stands twice among the benchmarks"):
        Bench(twice)


def test_an_edit_that_cannot_be_made_is_scored_and_named(experiment, host, tmp_path):
    short = MethodSpec(name="reft", settings={**LEARNS, "max_target_tokens": 1})
    rows = rows_of(Bench(experiment(short), host=host), tmp_path)
    row = rows[0]
    assert row["error"].startswith("InputError: the target is")
    assert (row["decoded"], row["n_steps"]) == (False, 0)
    assert mean(rows, "reliability", "generate") == 0.0
    assert mean(rows, "locality", "bit_exact") == 1.0


@pytest.mark.usefixtures("planted")
def test_a_method_that_breaks_down_is_no_end_of_the_run(experiment, host, tmp_path, monkeypatch):
    def breaks(*_, **__):
        raise EditError("it broke")

    bench = Bench(experiment(MethodSpec(name="nothing"), REFT), host=host)
    monkeypatch.setattr(methods.get("nothing"), "apply", breaks)
    rows = rows_of(bench, tmp_path)
    assert {row["error"] for row in rows} == {"EditError: it broke", None}


def test_a_run_goes_on_where_it_was(experiment, host, tmp_path):
    whole = experiment(protocols=(SINGLE, SEQUENTIAL), stack=1)
    seen = []
    Bench(whole, host=host).run(tmp_path / "run", on_block=lambda *done: seen.append(done))
    assert [done for done, _, _ in seen] == [1, 2, 3, 4]
    assert {total for _, total, _ in seen} == {4}
    path = tmp_path / "run" / ROWS
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[:5]))  # the sequence is cut short
    again = []
    Bench(whole, host=host).run(tmp_path / "run", on_block=lambda *done: again.append(done))
    assert again == seen[3:]
    assert same(path.read_text(), text)
    Bench(whole, host=host).run(tmp_path / "run", on_block=lambda *done: pytest.fail("done twice"))


def same(text, other):
    """But for how long it took."""

    def rows(text):
        return [{**json.loads(line), "seconds_s": None} for line in text.splitlines()]

    return rows(text) == rows(other)


def test_a_record_of_another_host_or_file_is_refused(experiment, host, host_of, file, tmp_path):
    Bench(experiment(), host=host).run(tmp_path / "run")
    with pytest.raises(ConfigError, match="another configuration: host was"):
        Bench(experiment(), host=host_of("gpt2")).run(tmp_path / "run")
    text = file.read_text()
    try:
        file.write_text(text.replace("Bread and", "Bread or"))
        with pytest.raises(ConfigError, match="another configuration: benchmarks was"):
            Bench(experiment(), host=host).run(tmp_path / "run")
    finally:
        file.write_text(text)


def test_what_is_wrong_is_known_before_anything_is_loaded(experiment, monkeypatch):
    monkeypatch.setattr(runner, "load_host", lambda *_, **__: pytest.fail("loaded for nothing"))
    for wrong, message in (
        (experiment(MethodSpec(name="bafd")), "did you mean"),
        (experiment(MethodSpec(name="reft", preset="papr")), "reft preset"),
        (experiment(MethodSpec(name="reft", settings={"rnk": 1})), "rnk"),
        (experiment(texts=3), "asks for held-out text"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            Bench(wrong)


def test_held_out_text(tmp_path):
    (tmp_path / "general").mkdir()
    path = tmp_path / HELD_OUT
    path.write_text(" = Title = \n" + "short\n" + f"{'one ' * 80}\n{'two ' * 90}\n")
    assert held_out_texts(tmp_path, 0) == ()
    assert held_out_texts(tmp_path, 1) == (("one " * 80).strip(),)
    with pytest.raises(DataError, match="has 2 paragraphs of 80 words, got texts=3: ask for fewer"):
        held_out_texts(tmp_path, 3)
    path.write_bytes(b"one \xff" * 80)
    with pytest.raises(DataError, match="cannot be read: .*Fetch it anew, or set texts = 0"):
        held_out_texts(tmp_path, 1)
    assert held_out_texts(tmp_path, 0) == ()


def test_held_out_text_is_scanned_after_a_chunk(experiment, host, tmp_path):
    (tmp_path / "general").mkdir()
    (tmp_path / HELD_OUT).write_text(f"{'one ' * 80}\n{'two ' * 90}\n")
    rows = rows_of(Bench(experiment(protocols=(SEQUENTIAL,), texts=2), host=host, data=tmp_path), tmp_path)
    assert ["false_fires" in row for row in rows] == [False] * 5 + [True]
    assert len(rows[-1]["false_fires"]["n_tokens"]) == 2
    assert sum(rows[-1]["false_fires"]["n_changed"]) > 0  # reft is open


@pytest.mark.usefixtures("planted")
def test_perplexity_is_taken_before_and_after(experiment, host, tmp_path):
    (tmp_path / "general").mkdir()
    (tmp_path / HELD_OUT).write_text(f"{'one ' * 80}\n{'two ' * 90}\n")
    specs = (MethodSpec(name="nothing"), REFT)
    rows = rows_of(Bench(experiment(*specs, texts=2), host=host, data=tmp_path), tmp_path)
    found = {row["method"]: row["perplexity"] for row in rows}
    expected = text_loss(host, EditedModel(host.model), held_out_texts(tmp_path, 2))
    assert all(tuple(one["before"]) == expected.nll for one in found.values())
    assert tuple(found["reft"]["n_tokens"]) == expected.n_tokens
    assert found["nothing"]["after"] == found["nothing"]["before"]
    assert found["reft"]["after"] != found["reft"]["before"]  # control


def test_fluency_is_taken_of_each_edits_prompt(experiment, host, file, tmp_path):
    with file.open() as lines:
        first = lines.readline()
    long = tmp_path / "long.jsonl"
    long.write_text(first + json.dumps({"prompt": "The tower of London is in " * 4, "target": "Ro"}) + "\n")
    mine = replace(
        experiment(protocols=(SEQUENTIAL,), scorers=("generate", "fluency")),
        benchmarks=(BenchmarkSpec(name="jsonl", file=str(long)),),
    )
    rows = rows_of(Bench(mine, host=host), tmp_path)
    assert [(row["stage"], "fluency" in row) for row in rows] == [
        ("immediate", False),
        ("immediate", False),
        ("final", True),
        ("final", False),  # its prompt leaves no room for 100 tokens
    ]
    before, after = rows[2]["fluency"]
    assert (before,) == fluency(host, EditedModel(host.model), ["The tower is in"], n_tokens=100)
    assert before > 0
    assert after != before  # reft is open


def test_probes_are_asked_in_harder_ways(experiment, host, host_of, tmp_path):
    roomy = Host("llama", tiny_host(max_position_embeddings=1024), host.tokenizer, "llama")
    # Letters are tokens here, and 200 words of them would take a minute.
    renderings = tuple(how for how in get_args(Rendering) if how != "after_unrelated_words")
    every = {"renderings": renderings, "scorers": ("generate", "generate_chat")}
    rows = rows_of(Bench(experiment(protocols=(SEQUENTIAL,), **every), host=roomy), tmp_path)
    last = [row for row in rows if row["stage"] == "final"]
    for row in last:
        asked = [(probe["kind"], probe["tag"]) for probe in row["probes"] if is_rendering(probe["tag"])]
        assert asked == [
            ("generality", "edit+distracting_prefix"),
            ("generality", "space+distracting_prefix"),
            ("generality", "edit+after_unrelated_tokens"),
            ("generality", "space+after_unrelated_tokens"),
            ("locality", "edit+negated"),
            ("locality", "space+negated"),
            ("generality", "edit+in_conversation"),
            ("generality", "space+in_conversation"),
        ]
        assert not any("skipped" in probe for probe in row["probes"])
        own, *others = row["probes"]
        assert {"generate_doubted", "generate_doubted_contains"} <= own["scores"].keys() & own[
            "unedited"
        ].keys()
        assert len(own["doubted"]) == 2
        assert not any("doubted" in probe for probe in others)
    plain = Bench(experiment(protocols=(SEQUENTIAL,), scorers=every["scorers"]), host=roomy)
    plain.run(tmp_path / "plain")
    assert not any(
        is_rendering(probe["tag"]) for row in read_rows(tmp_path / "plain") for probe in row["probes"]
    )
    header, asked = summary_rows([tmp_path / "run"])
    assert (header, asked) == summary_rows([tmp_path / "plain"])  # the figures without a tag are the same
    write_report([tmp_path / "run"], tmp_path)
    report = (tmp_path / "report.md").read_text()
    for shown in ("generality@generate | edit+distracting_prefix", "locality@bleed | space+negated"):
        assert f"| {shown} | 3 |" in report
    assert "| reliability@generate_doubted | higher | final |" in report


WHOLE_RUN = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from baft.evals.experiment import *
from baft.evals.runner import Bench
from baft.hosts.models import Host
from tiny import tiny_host, tiny_tokenizer, CHATML
model = tiny_host("llama", max_position_embeddings=160)
host = Host("llama", model, tiny_tokenizer(chat_template=CHATML), "llama")
experiment = Experiment(
    name="x",
    benchmarks=(BenchmarkSpec(name="jsonl", file=sys.argv[1]),),
    methods=(MethodSpec(name="reft", settings={"max_steps": 2, "layers": [1]}),),
    protocols=(ProtocolSpec(kind="single"), ProtocolSpec(kind="sequential", size=2)),
    max_new_tokens=4,
    scorers=("teacher_forced", "generate"),
)
slow = float(sys.argv[3])
import time
Bench(experiment, host=host).run(Path(sys.argv[2]), on_block=lambda *_: time.sleep(slow))
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_run_resumes_to_the_same_record(file, tmp_path):
    """Five kills of a process, each at another moment of the run; and one run that is left alone."""

    def start(folder, slow):
        here = str(Path(__file__).parents[1])
        return subprocess.Popen([sys.executable, "-c", WHOLE_RUN, str(file), str(folder), str(slow), here])

    assert start(tmp_path / "whole", 0).wait(300) == 0
    for n_rows in (1, 2, 3, 5, 6):
        process = start(tmp_path / "cut", 1.0)
        rows = tmp_path / "cut" / ROWS
        for _ in range(1200):
            if process.poll() is not None or (rows.exists() and rows.read_bytes().count(b"\n") >= n_rows):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert start(tmp_path / "cut", 0).wait(300) == 0
    assert same((tmp_path / "cut" / ROWS).read_text(), (tmp_path / "whole" / ROWS).read_text())
