"""The commands that measure, on a tiny random host."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baft.cli.app import app
from baft.evals.experiment import default_experiment, read_experiment
from baft.evals.general import TaskScore
from tiny import CHATML, tiny_host, tiny_tokenizer

FACTS = [("The tower is in", "Ro"), ("The king of France was", "Al")]
FILE = """
model = {model!r}
scorers = ["generate"]
max_new_tokens = 4
[[benchmarks]]
name = "jsonl"
file = {data!r}
[[methods]]
name = "reft"
settings = {{ learning_rate = 5e-2, stop_margin = 0.7, layers = [1] }}
[[methods]]
name = "reft"
label = "dull"
settings = {{ learning_rate = 1e-6, max_steps = 1, layers = [1] }}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    tiny_host("llama", max_position_embeddings=160).float().save_pretrained(folder / "host")
    tiny_tokenizer(chat_template=CHATML).save_pretrained(folder / "host")
    rows = [
        {"prompt": prompt, "target": target, "locality": [{"prompt": "A hat"}]} for prompt, target in FACTS
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "mine.toml"
    path.write_text(FILE.format(model=str(folder / "host"), data=str(folder / "mine.jsonl")))
    return path


@pytest.fixture(scope="module")
def ran(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mine"
    return folder, invoke("bench", file, "--out", folder, "--json")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def failed(*arguments):
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    return line.removeprefix("error: ")


def test_an_experiment_is_run_and_reported(ran):
    folder, done = ran
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["run"] == str(folder)
    scores = {row["method"]: row for row in found["scores"]}
    assert set(scores) == {"unedited", "reft", "dull"}
    assert scores["reft"]["reliability@generate"].startswith("1.00")
    assert scores["dull"]["reliability@generate"].startswith("0.00")
    assert sorted(one.name for one in folder.iterdir()) == [
        "record.json",
        "report.html",
        "report.md",
        "rows.jsonl",
    ]
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 4


def test_the_same_command_does_nothing_twice(ran, file):
    folder, _ = ran
    before = (folder / "rows.jsonl").read_bytes()
    assert invoke("bench", file, "--out", folder).exit_code == 0
    assert (folder / "rows.jsonl").read_bytes() == before
    assert "another configuration: benchmarks was" in failed("bench", file, "--out", folder, "--limit", "1")
    assert (folder / "rows.jsonl").read_bytes() == before


def test_fewer_cases(file, tmp_path):
    done = invoke("bench", file, "--out", tmp_path / "few", "--limit", "1", "--json")
    assert done.exit_code == 0, done.stderr
    assert {row["n"] for row in json.loads(done.stdout)["scores"]} == {"1"}


def test_a_report_of_what_was_run(ran, tmp_path):
    folder, _ = ran
    done = invoke("report", folder, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "again" / "report.html").read_text() == (folder / "report.html").read_text()
    assert str(tmp_path / "again" / "report.md") in done.stdout
    assert "is no record of a run" in failed("report", tmp_path)


def test_two_methods_are_compared(ran):
    folder, _ = ran
    done = invoke("compare", f"{folder}:reft", f"{folder}:dull", "--json")
    assert done.exit_code == 0, done.stderr
    assert any("reliability@generate" in row.values() for row in json.loads(done.stdout))
    assert "give a run that `baft bench` wrote, or RUN:METHOD" in failed(
        "compare", "nowhere", f"{folder}:reft"
    )
    assert "refd" in failed("compare", f"{folder}:refd", f"{folder}:dull")


def test_benchmarks_are_listed():
    done = invoke("benchmarks", "--json")
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert found["facts"]["splits"] == ["report", "tune"]
    assert {"zsre", "counterfact", "wikidata-recent", "wikibio", "convsent", "jsonl"} <= set(found)
    assert all(one["summary"] and one["source"] for one in found.values())
    assert "facts" in invoke("benchmarks").stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "reft"\nlabel', 'name = "reff"\nlabel', "did you mean"),
        ('name = "jsonl"', 'name = "factz"', "did you mean 'facts'"),
        ('"generate"', '"generator"', "scorers"),
        ("mine.jsonl", "gone.jsonl", "gone.jsonl"),
    ],
)
def test_mistakes_in_a_file_are_told(file, tmp_path, old, new, message):
    text = file.read_text()
    assert old in text
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(text.replace(old, new))
    assert message in failed("bench", wrong, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def contents(folder):
    return {one.name: one.read_bytes() for one in folder.iterdir()}


@pytest.mark.parametrize(
    ("data", "old", "new", "message"),
    [
        (b'{"prompt": "The tower is in"}\n', "", "", "mine.jsonl, line 1, field 'target'"),
        (b"\xff\xfe{", "", "", "not UTF-8"),
        (None, "", "", "mine.jsonl does not exist"),
        (b"as it was", '"generate"', '"generated"', "scorers[0]"),
        (b"as it was", "scorers", 'renderings = ["doubtful"]\nscorers', "renderings[0]"),
        (b"as it was", "scorers", "texts = 2\nscorers", "asks for held-out text"),
        (b"as it was", "[[methods]]", "[[method]]", "unknown key 'method'"),
    ],
)
def test_whatever_is_wrong_afterwards_results_stay(file, ran, tmp_path, monkeypatch, data, old, new, message):
    """The same run once more, its data or its file spoilt since: an error, and not a byte is touched."""
    monkeypatch.delenv("BAFT_DATA", raising=False)
    folder, cases, spoilt = tmp_path / "run", tmp_path / "mine.jsonl", tmp_path / "spoilt.toml"
    shutil.copytree(ran[0], folder)
    if data is not None:
        whole = (file.parent / "mine.jsonl").read_bytes()
        cases.write_bytes(whole if data == b"as it was" else data)
    text = file.read_text().replace(str(file.parent / "mine.jsonl"), str(cases))
    assert old in text
    spoilt.write_text(text.replace(old, new) if old else text)
    before = contents(folder)
    assert message in failed("bench", spoilt, "--out", folder)
    assert contents(folder) == before


def test_a_disk_that_is_full_half_way_keeps_what_is_done(file, ran, tmp_path, monkeypatch):
    """What was written is whole, and with room again the same command goes on from there."""
    folder, sync, n_rows = tmp_path / "run", os.fsync, []

    def full(handle):
        if (folder / "rows.jsonl").exists() and (folder / "rows.jsonl").read_bytes().count(b"\n") > 2:
            n_rows.append((folder / "rows.jsonl").read_bytes().count(b"\n"))
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        said = failed("bench", file, "--out", folder)
    assert "No space left on device. What was written before is whole: make room" in said
    assert n_rows == [4]  # the stack of the second method
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 2
    assert not (folder / "report.md").exists()
    done = invoke("bench", file, "--out", folder, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["scores"] == json.loads(ran[1].stdout)["scores"]


def test_work_is_shared_out(file, ran, tmp_path, monkeypatch):
    given = []

    def run_on_ray(bench, folder, *, address, n_workers, on_block):
        given.append((address, n_workers))
        return bench.run(folder, on_block=on_block)

    monkeypatch.setattr("baft.evals.launch.run_on_ray", run_on_ray)
    done = invoke(
        "bench", file, "--out", tmp_path, "--json", "--ray", "--ray-address", "auto", "--workers", "2"
    )
    assert done.exit_code == 0
    assert given == [("auto", 2)]
    assert json.loads(done.stdout)["scores"] == json.loads(ran[1].stdout)["scores"]


@pytest.mark.parametrize("option", [("--workers", "2"), ("--ray-address", "auto")])
def test_what_belongs_to_ray_goes_with_it(option, file, tmp_path):
    done = invoke("bench", file, "--out", tmp_path / "run", *option)
    assert done.exit_code == 2
    assert f"Invalid value for {option[0]}: goes with --ray" in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_ray_no_host_is_loaded_for_it(file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("baft.evals.runner.Bench", lambda *_, **__: pytest.fail("loaded for nothing"))
    assert "pip install 'baft[ray]'" in failed("bench", file, "--out", tmp_path / "run", "--ray")


def test_no_file_means_the_projects_own_facts(monkeypatch, tmp_path):
    seen = []

    def bench(experiment, **_):
        seen.append(experiment)
        raise KeyboardInterrupt

    monkeypatch.setattr("baft.evals.runner.Bench", bench)
    done = invoke("bench", "--out", tmp_path / "run", "--limit", "3")
    assert done.exit_code == 130
    [experiment] = seen
    assert [(one.name, one.limit) for one in experiment.benchmarks] == [("facts", 3)]
    assert [one.called for one in experiment.methods] == ["baft", "reft"]
    assert experiment.name == "facts"


def test_the_default_is_of_one_kind_with_the_quick_look():
    """And needs nothing but the package: no data folder, no file."""
    default = default_experiment()
    quick = read_experiment(Path(__file__).parents[1] / "experiments" / "quick.toml")
    for part in ("model", "methods", "protocols", "scorers"):
        assert getattr(default, part) == getattr(quick, part)
    [benchmark] = default.benchmarks
    assert (benchmark.name, benchmark.split) == ("facts", "report")
    assert len(benchmark.chosen(benchmark.load(None), "report", None).cases) == 20
    assert default.texts == 0


@pytest.fixture(scope="module")
def saved(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits") / "one.baft"
    settings = [f"--set={one}" for one in ("learning_rate=5e-2", "stop_margin=0.7", "layers=[1]")]
    edit = ["--model", file.parent / "host", "--prompt", FACTS[0][0], "--target", FACTS[0][1]]
    done = invoke("edit", *edit, "--method", "reft", *settings, "--save", folder)
    assert done.exit_code == 0, done.stderr
    return folder


def test_general_ability_is_measured_before_and_after(saved, monkeypatch):
    asked = []

    def measure(host, live, tokenizer, tasks, **more):
        asked.append((live.baft_edited_model.host is host, tasks, more))
        return [TaskScore("toy", "acc", 0.5, 0.1, 0.75, None, 4)]

    monkeypatch.setattr("baft.evals.general.require_lm_eval", lambda: None)
    monkeypatch.setattr("baft.evals.general.general_ability", measure)
    done = invoke("general", saved, "--tasks", "toy, other", "--tasks", "third", "--limit", "4", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == [
        {
            "task": "toy",
            "metric": "acc",
            "before": 0.5,
            "before_stderr": 0.1,
            "after": 0.75,
            "after_stderr": None,
            "n": 4,
        }
    ]
    assert asked == [(True, ["toy", "other", "third"], {"limit": 4, "batch_size": 8, "folder": None})]
    said = invoke("general", saved, "--tasks", "toy").stdout
    for shown in ("0.5000 ± 0.1000", "0.7500", "+0.2500"):
        assert shown in said


def test_without_lm_eval_no_edits_are_loaded_for_it(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("baft.loading.load", lambda *_, **__: pytest.fail("loaded for nothing"))
    assert "pip install 'baft[general]'" in failed("general", saved, "--tasks", "toy")
