"""The command line, on a tiny random host whose edits by ReFT take a fraction of a second."""

import errno
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import baft
import tiny
from baft import artifact
from baft.cli import main, options, tables
from baft.cli.app import app
from baft.cli.terminal import Terminal, TrainingBar, logging_to_stderr, safe
from baft.errors import ArtifactError, ConfigError, InputError
from baft.hosts import embedded, models
from baft.methods.base import methods
from baft.model import Model
from baft.report import AppliedEdit, TokenGates
from baft.types import Edit

ROME = {"prompt": "The tower is in", "target": "Rome"}
OSLO = {"prompt": "The bridge is in", "target": "Oslo"}
PARIS = {"prompt": "The museum is in", "target": "Paris"}
QUICK = ("--method", "reft", "--set", "rank=4", "--set", "learning_rate=0.1")
COMMANDS = {
    *("edit", "ask", "show", "check", "explain", "undo", "remove", "merge", "refit", "models", "methods"),
    *("bench", "report", "compare", "benchmarks", "general", "scope"),
}


def save_host(folder: Path, *, seed: int = 0, chat: bool = True) -> Path:
    host = tiny.tiny_host("llama", dtype=torch.float32, seed=seed, max_position_embeddings=256)
    host.save_pretrained(folder)
    tiny.tiny_tokenizer(chat_template=tiny.CHATML if chat else None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def other_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_host(tmp_path_factory.mktemp("other"), seed=1, chat=False)


@pytest.fixture(scope="module")
def one_edit(tmp_path_factory: pytest.TempPathFactory, host: Path) -> Path:
    path = tmp_path_factory.mktemp("kept") / "one.baft"
    done = run("edit", "--model", host, *prompted(ROME), *QUICK, "--save", path)
    assert done.exit_code == 0, done.stderr
    return path


@pytest.fixture
def rome(tmp_path: Path, one_edit: Path) -> Path:
    return Path(shutil.copytree(one_edit, tmp_path / "rome.baft"))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return lines(tmp_path / "three.jsonl", ROME, OSLO, PARIS)


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAFT_DEBUG", raising=False)


def run(*arguments: object, stdin: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments], input=stdin)


def failed(*arguments: object, stdin: str | bytes | None = None, code: int = 1) -> str:
    """The one line that a command says when it fails."""
    done = run(*arguments, stdin=stdin)
    assert done.exit_code == code
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def misused(*arguments: object) -> str:
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    return done.stderr


def document(*arguments: object, stdin: str | None = None, code: int = 0) -> Any:
    done = run(*arguments, "--json", stdin=stdin)
    assert done.exit_code == code, done.stderr
    return json.loads(done.stdout)


def prompted(edit: dict[str, str]) -> tuple[str, ...]:
    return ("--prompt", edit["prompt"], "--target", edit["target"])


def lines(path: Path, *edits: object) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in edits), encoding="utf-8")
    return path


def content(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in path.iterdir()}


def stored(path: Path) -> list[str]:
    return [one.edit.target for one in artifact.read(path).edits]


def in_a_shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from baft.cli import main; main()", *arguments]
    env = {**os.environ, "PYTHONPATH": str(Path(baft.__file__).parents[1]), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


# -- help


def test_every_command_and_option_is_explained() -> None:
    group: Any = typer.main.get_command(app)
    assert set(group.commands) == COMMANDS
    for command in (group, *group.commands.values()):
        assert command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{command.name} {parameter.name}"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_fits_a_terminal(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_no_first_line_of_a_command_is_cut_in_the_list() -> None:
    assert "..." not in run("--help").stdout.partition("Commands:")[2]


def test_without_a_command_the_help_is_shown() -> None:
    assert "Commands:" in run().output


def test_help_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, baft.cli; print(sorted({'torch', 'transformers', 'numpy', 'ray'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(baft.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_version() -> None:
    assert run("--version").stdout == f"baft {baft.__version__}\n"


# -- edit


def test_an_edit_is_reported_and_kept(one_edit: Path, host: Path) -> None:
    assert stored(one_edit) == ["Rome"]
    assert artifact.read(one_edit).host_source == str(host)


def test_an_edit_that_is_not_saved_says_so(host: Path) -> None:
    done = run("edit", "--model", host, *prompted(ROME), *QUICK)
    assert done.exit_code == 0
    assert "Rome" in done.stdout
    assert "1 edit by reft/default" in done.stdout
    assert "nothing was kept" in done.stdout
    assert done.stderr == ""


def test_the_report_as_json(host: Path) -> None:
    found = document("edit", "-m", host, *prompted(ROME), *QUICK, "--unrelated", "A cat is")
    [report] = found["reports"]
    assert found["saved"] is None
    assert report["succeeded"] is True
    assert report["rows"][0]["target"] == "Rome"


def test_an_edit_that_fails_is_kept_and_marked(tmp_path: Path, host: Path) -> None:
    path = tmp_path / "bad.baft"
    done = run("edit", "-m", host, *prompted(ROME), "--method", "reft", "--set", "max_steps=1", "-o", path)
    assert done.exit_code == 1
    assert done.stderr == "error: 1 of 1 edit failed\n"
    assert "FAILED: 'The tower is in' does not yield 'Rome'" in done.stdout
    shown = run("show", path).stdout
    assert "FAILED" in shown
    assert run("check", path).exit_code == 1
    assert document("check", path, code=1)[0]["holds"] is False


def test_edits_are_added_to_saved_ones_by_their_recipe(rome: Path) -> None:
    done = run("edit", *prompted(OSLO), "--save", rome)
    assert done.exit_code == 0, done.stderr
    assert "earlier edits no longer decoded: 'The tower is in'" in done.stdout  # shared bases, random host
    saved = artifact.read(rome)
    assert stored(rome) == ["Rome", "Oslo"]
    assert (saved.method, saved.settings["rank"]) == ("reft", 4)


def test_the_same_recipe_and_host_may_be_named_again(rome: Path, host: Path) -> None:
    done = run("edit", *prompted(OSLO), "--save", rome, "-m", host, *QUICK, "--seed", 0)
    assert done.exit_code == 0, done.stderr
    assert stored(rome) == ["Rome", "Oslo"]


def test_another_recipe_is_refused_and_nothing_changes(rome: Path) -> None:
    before = content(rome)
    for other in (
        ("--method", "baft"),
        ("--preset", "paper"),
        ("--seed", 1),
        ("--set", "rank=5"),
    ):
        assert "one for all of its edits" in failed("edit", *prompted(OSLO), "--save", rome, *other)
    assert "unknown key 'rang'" in failed("edit", *prompted(OSLO), "--save", rome, "--set", "rang=5")
    assert content(rome) == before


def test_saved_edits_can_be_built_on_without_being_changed(rome: Path, tmp_path: Path) -> None:
    before, both = content(rome), tmp_path / "both.baft"
    assert run("edit", "-m", rome, *prompted(OSLO), "-o", both).exit_code == 0
    assert stored(both) == ["Rome", "Oslo"]
    assert content(rome) == before
    assert "give another --save" in failed("edit", "-m", rome, *prompted(OSLO), "-o", both)


def test_another_host_is_refused(rome: Path, other_host: Path) -> None:
    before = content(rome)
    assert "other" in failed("edit", *prompted(OSLO), "--save", rome, "--model", other_host)
    assert content(rome) == before


def test_a_file_of_edits_is_made_one_by_one(tmp_path: Path, host: Path, three: Path) -> None:
    path = tmp_path / "three.baft"
    found = document("edit", "-m", host, "--from", three, *QUICK, "--save", path)
    assert len(found["reports"]) == 3
    assert [one.request for one in artifact.read(path).edits] == [0, 1, 2]


def test_a_file_of_edits_is_made_at_once(tmp_path: Path, host: Path, three: Path) -> None:
    path = tmp_path / "three.baft"
    done = run(
        "edit", "-m", host, "--from", "-", "--batch", *QUICK, "-o", path, "--json", stdin=three.read_text()
    )
    found = json.loads(done.stdout)  # whether three edits at once succeed on a random host is not the point
    assert len(found["reports"]) == 1
    assert [one.request for one in artifact.read(path).edits] == [0, 0, 0]


def test_conflicts_are_settled_as_asked(tmp_path: Path, host: Path) -> None:
    path, bank = (
        tmp_path / "bank.baft",
        ("--method", "baft-bank", "--set", "max_steps=2", "--set", "n_others=1"),
    )
    run("edit", "-m", host, *prompted(ROME), *bank, "-o", path)
    other = prompted({**ROME, "target": "Oslo"})
    assert "conflicts with" in failed("edit", *other, "-o", path, "--on-conflict", "refuse")
    assert stored(path) == ["Rome"]
    found = json.loads(run("edit", *other, "-o", path, "--on-conflict", "replace", "--json").stdout)
    assert [one["replaced"] for one in found["reports"][0]["conflicts"]] == [True]
    checked = json.loads(run("check", path, "--json").stdout)  # two steps teach too little: exit code 1
    assert [one["replaced"] for one in checked] == [True, False]
    assert "keep" in misused("edit", *other, "-o", path, "--on-conflict", "ask")


def test_edits_that_share_a_scope_are_refit(
    tmp_path: Path, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baft.scope.untrained._MIDPOINT", 0.8)
    path, other = tmp_path / "two.baft", tmp_path / "other.baft"
    two = lines(
        tmp_path / "two.jsonl",
        {"prompt": "Nine hats of", "target": "Co"},
        {"prompt": "Nine cats of", "target": "Al"},
    )
    bank = ("--method", "baft-bank", "--set", "max_steps=40", "--set", "n_others=1")
    quick = ("--set", "learning_rate=0.05", "--set", "stop_margin=0.7", "--set", "schedule=constant")
    run("edit", "-m", host, "--from", two, *bank, *quick, "-o", path)
    before = content(path)
    done = run("refit", path, "2", "1", "--save", other)
    assert done.exit_code == 0, done.stderr
    assert "2 to 0 of 2" in done.stdout
    assert f"saved in {other}" in done.stdout.replace("\n", " ")
    assert content(path) == before
    assert run("show", other).stdout.count("replaced") == 2
    found = document("refit", path)
    assert [row["others"] for row in found["report"]["refit"]] == [[2, 0], [2, 0]]
    assert artifact.read(path).edits == artifact.read(other).edits
    assert "none of these edits fires" in failed("refit", path)
    assert "no edit '9': give a number from 1 to 4" in failed("refit", path, "9", "1")
    run("undo", path)
    assert stored(path) == ["Co", "Al"]


def test_edits_in_force_are_skipped_in_a_file(rome: Path, three: Path) -> None:
    before = content(rome)
    done = run("edit", "--from", lines(three, ROME), "--save", rome)
    assert done.exit_code == 0
    assert done.stderr == "skipped 1 edit made already\n"
    assert content(rome) == before
    assert run("edit", "--from", three, "--save", rome, "--quiet").stderr == ""
    assert "in force already" in failed("edit", *prompted(ROME), "--save", rome)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 3: not valid JSON"),
        ('{"prompt": "a"}', "line 3: field 'target' is missing"),
        ('{"prompt": "a", "target": "b", "subjekt": "c"}', "line 3: unknown field 'subjekt'"),
        ('{"prompt": " ", "target": "b"}', "line 3: prompt is empty or blank"),
        (json.dumps(ROME), "line 3: the same edit as on line 1"),
    ],
)
def test_a_bad_line_is_named_before_any_work(tmp_path: Path, second: str, message: str) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(ROME) + "\n\n" + second + "\n", encoding="utf-8")
    assert f"{path}, {message}" in failed("edit", "--model", tmp_path / "none", "--from", path)


def test_a_line_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    # In a process of its own: here, the checker of types would be faster than the code.
    path = lines(tmp_path / "edits.jsonl", ROME, {"prompt": "a", "target": 3})
    done = in_a_shell("edit", "--from", str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {path}, line 2: target must be a string, got int: 3\n"
    done = in_a_shell("edit", "--from", str(lines(path, [1])))
    assert "line 1: expected an object" in done.stderr


def test_files_that_hold_no_edits(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    assert failed("edit", "--from", path) == f"{path}: No such file or directory"
    path.write_bytes(b"\n")
    assert "there is no edit" in failed("edit", "--from", path)
    path.write_bytes(b'{"prompt": "\xff"}')
    assert "not UTF-8 text: invalid start byte at byte 12" in failed("edit", "--from", path)
    assert "stdin, line 1" in failed("edit", "--from", "-", stdin="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --prompt and --target, or --from FILE"),
        (("-p", "a"), "give --prompt and --target, or --from FILE"),
        (("-p", "a", "-t", "b", "--from", "x"), "--from brings its own"),
        (("-p", "a", "-t", "b", "--batch"), "goes with --from"),
        (("-p", "a", "-t", "b", "--set", "rank"), "expected key=value, got 'rank'"),
        (("-p", "a", "-t", "b", "--set", "seed=3"), "seed has its own option: --seed"),
        (("-p", "a", "-t", "b", "--sav", "x"), "No such option"),
        (("-p", "a", "-t", "b", "--seed", "x"), "Invalid value for '--seed'"),
    ],
)
def test_misuse_ends_with_code_two(arguments: tuple[str, ...], message: str) -> None:
    assert message in misused("edit", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "bafd"), "did you mean 'baft'?"),
        (("--method", "baft", "--preset", "papr"), "did you mean 'paper'?"),
        (("--set", "rnk=3"), "did you mean 'rank'?"),
        (("--set", "rank=many"), "expected a valid integer, got 'many'"),
        (("--set", "rank=0"), "rank is out of range"),
        (("--save", "x.bft"), "use x.bft.baft"),
        (("--save", "no/such/x.baft"), "make it first"),
        (("--model", "smollm"), "did you mean 'smollm2'?"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(arguments: tuple[str, ...], message: str) -> None:
    assert message in failed("edit", "-p", "a", "-t", "b", *arguments)


def test_blank_texts_are_refused(rome: Path) -> None:
    assert "prompt is empty or blank" in failed("edit", "-p", " ", "-t", "b")
    assert "is empty or blank" in failed("ask", rome, " ", "--raw")
    assert "not blank" in failed("ask", rome, " ")


def test_bytes_that_are_no_text_are_refused(rome: Path, host: Path, tmp_path: Path) -> None:
    assert "not valid Unicode" in failed("ask", rome, "a\udcff")
    assert "not valid Unicode" in failed("edit", "-m", host, "-p", "a", "-t", "b\udcff", *QUICK)
    path = lines(tmp_path / "half.jsonl", {"prompt": "a\ud800", "target": "b"})
    assert "not valid Unicode" in failed("edit", "-m", host, "--from", path, *QUICK)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken.baft"
    taken.write_text("mine")
    assert "is no edit set" in failed("edit", *prompted(ROME), "--save", taken)
    assert taken.read_text() == "mine"
    (beside := tmp_path / "beside.baft").mkdir()
    for name in ("edits.jsonl", "notes.txt"):
        (beside / name).write_text("mine")
    said = failed("edit", *prompted(ROME), "--save", beside)
    assert said.endswith(
        "is more than an edit set (in it: notes.txt) and is not replaced: choose another name"
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "iterdir", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
        assert "cannot be read: Permission denied" in failed("edit", *prompted(ROME), "--save", beside)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert "is read-only" in failed("edit", *prompted(ROME), "--save", tmp_path / "x.baft")


def test_a_disk_that_refuses_leaves_the_saved_edits(rome: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(rome)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    assert "Read-only file system" in failed("edit", *prompted(OSLO), "--save", rome)
    assert content(rome) == before


def test_settings_are_json_or_else_text() -> None:
    given = ["a=1", "b=0.5", "c=5e-4", "d=true", "e=null", "f=[1, 2]", "g=own", 'h="3"', "i=a=b", "j="]
    assert options.read_settings(given) == {
        **{"a": 1, "b": 0.5, "c": 5e-4, "d": True, "e": None},
        **{"f": [1, 2], "g": "own", "h": "3", "i": "a=b", "j": ""},
    }


# -- Ctrl-C


class Interrupted:
    """Raises KeyboardInterrupt at the third step of a certain optimization."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, request: int):
        self.n_begun = 0
        begin = TrainingBar.next

        def count(bar: TrainingBar) -> None:
            self.n_begun += 1
            begin(bar)

        def step(_: TrainingBar, step: int, __: int, ___: float) -> None:
            if self.n_begun == request and step == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(TrainingBar, "next", count)
        monkeypatch.setattr(TrainingBar, "step", step)


def test_ctrl_c_in_an_edit_leaves_the_saved_edits(rome: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(rome)
    Interrupted(monkeypatch, 1)
    assert failed("edit", *prompted(OSLO), "--save", rome, code=130) == "interrupted"
    assert content(rome) == before
    assert [one.name for one in rome.parent.iterdir()] == [rome.name]


def test_ctrl_c_keeps_the_edits_that_were_done_and_they_can_be_resumed(
    tmp_path: Path, host: Path, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "three.baft"
    with monkeypatch.context() as patch:
        Interrupted(patch, 3)
        said = failed("edit", "-m", host, "--from", three, *QUICK, "--save", path, code=130)
    assert said == f"interrupted; the first 2 of 3 edits are saved in {path}"
    assert stored(path) == ["Rome", "Oslo"]
    done = run("edit", "--from", three, "--save", path)
    assert done.exit_code == 0
    assert "skipped 2 edits" in done.stderr
    assert stored(path) == ["Rome", "Oslo", "Paris"]


def test_ctrl_c_without_save_says_what_was_lost(
    host: Path, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Interrupted(monkeypatch, 2)
    said = failed("edit", "-m", host, "--from", three, *QUICK, code=130)
    assert said == "interrupted; the first 1 of 3 edits were not kept"


# -- ask


def test_ask_uses_the_chat_template_unless_told_otherwise(rome: Path) -> None:
    chat, raw = document("ask", rome, ROME["prompt"]), document("ask", rome, ROME["prompt"], "--raw")
    assert (chat["chat"], raw["chat"]) == (True, False)
    assert raw["answer"] == " Rome"
    assert chat["answer"].strip() == "Rome"
    assert run("ask", rome, ROME["prompt"]).stdout == "Rome\n"


def test_ask_shows_the_answer_before(rome: Path, host: Path) -> None:
    found = document("ask", rome, ROME["prompt"], "--raw", "--before", "-n", 5)
    plain = document("ask", host, ROME["prompt"], "--raw", "-n", 5)
    assert found["before"] == plain["answer"] != found["answer"]
    shown = run("ask", rome, ROME["prompt"], "--raw", "--before").stdout
    assert re.match(r"before +now", shown)


def test_a_system_message_is_heard(host: Path, other_host: Path) -> None:
    plain = document("ask", host, "Who?", "-n", 5)
    told = document("ask", host, "Who?", "-n", 5, "--system", "Be a pirate, always and everywhere")
    assert plain["answer"] != told["answer"]
    assert "no chat template" in failed("ask", other_host, "Who?", "--system", "x")
    assert "--raw uses none" in misused("ask", host, "Who?", "--raw", "--system", "x")


def test_a_host_without_template_is_asked_raw(other_host: Path) -> None:
    assert document("ask", other_host, "Who?", "-n", 3)["chat"] is False


def test_sources_that_are_nothing(tmp_path: Path, host: Path, rome: Path) -> None:
    for command in (("ask", "q"), ("show",), ("check",), ("explain", "p"), ("undo",)):
        said = failed(command[0], tmp_path / "none.baft", *command[1:])
        assert said == f"{tmp_path / 'none.baft'} does not exist: check the path of the edit set"
    assert "edits.jsonl is missing" in failed("check", host)
    (rome / "state.safetensors").write_bytes(b"")
    assert "is truncated" in failed("show", rome)
    assert "--model goes with an artifact" in failed("ask", host, "q", "--model", "x")


def test_edits_on_a_live_model_need_their_host_named(tmp_path: Path, host: Path) -> None:
    found = models.load_host(str(host))
    model = Model(found)
    model.edit(ROME["prompt"], ROME["target"], method="reft", rank=4, learning_rate=0.1)
    path = model.save(tmp_path / "live.baft")
    assert failed("check", path).endswith("give --model")
    assert run("check", path, "--model", host).exit_code == 0


def test_terms_are_accepted_by_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path))
    monkeypatch.delenv("BAFT_ACCEPT_TERMS", raising=False)
    said = failed("ask", "gemma3-270m", "q")
    assert "--accept-terms" in said
    assert "accept_terms" not in said


def test_an_answer_cannot_command_the_terminal() -> None:
    assert safe("a\x1b[2Jb\rc\n\td é 東") == "a\\x1b[2Jb\\rc\n\td é 東"


# -- show, check, explain, undo


def test_show_needs_no_host(rome: Path, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_host", lambda *_, **__: pytest.fail("a host was loaded"))
    done = run("show", rome)
    assert done.exit_code == 0
    for part in ("1 edit", "reft/default", str(host.name), "The tower is in", "Rome", "ok", "float32"):
        assert part in done.stdout
    found = document("show", rome)
    assert found["size_bytes"] == sum(map(len, content(rome).values()))
    assert found["edits"][0]["target"] == "Rome"
    assert found["created"].startswith("20")


def test_check_holds(rome: Path) -> None:
    done = run("check", rome)
    assert (done.exit_code, done.stderr) == (0, "")
    [row] = document("check", rome)
    assert (row["holds"], row["says"].strip()) == (True, "Rome")


def test_explain_shows_the_gates_of_every_edited_token(rome: Path) -> None:
    done = run("explain", rome, ROME["prompt"], "--raw")
    assert done.exit_code == 0
    assert re.search(r"' R' +reply +1\.00 +4 +1\.00 +4", done.stdout)
    found = document("explain", rome, ROME["prompt"], "--raw")
    assert {one["layer"] for one in found} == {1, 2}
    assert sum(not one["is_output"] for one in found) == 2 * 3
    chat = document("explain", rome, ROME["prompt"], "-n", 1)
    assert chat == document("explain", rome, ROME["prompt"], "-n", 1, "--chat") != found


def gate(token: str, position: int, layer: int, edit: Edit, *weights: float) -> TokenGates:
    return TokenGates(token, position, position > 1, layer, edit.id, weights)


def test_the_edits_that_open_most_are_shown_and_the_others_counted() -> None:
    edits = [Edit(f"prompt {n}", f"target {n}") for n in range(4)]
    gates = [
        gate(token, place, layer, edit, n / 10 if token == "x" else 0.0, 0.05 * n)
        for n, edit in enumerate(edits)
        for layer in (3, 7)
        for place, token in enumerate(("x", "y", "z"))
    ]
    applied = [AppliedEdit(edit, True, n) for n, edit in enumerate(edits)]
    shown, _, *legend = tables.gates_view(gates, applied, 24 + 3 * tables._GATE_CHARS)
    names = [column.header for column in shown.columns]
    assert names == ["token", "part", "layer 3\nedit 3", "layer 3\nedit 4", "layer 7\nedit 4"]
    cells = [list(column.cells) for column in shown.columns]
    assert [str(one) for one in cells[0]] == ["'x'", "'y'", "'z'"]
    assert [str(one) for one in cells[1]] == ["prompt", "prompt", "reply"]
    assert [str(one) for one in cells[3]] == ["0.30   2", "0.15   1", "0.15   1"]
    assert legend[1:3] == ["edit 3: 'prompt 2' -> 'target 2'", "edit 4: 'prompt 3' -> 'target 3'"]
    assert legend[3] == "5 columns not shown, with weights up to 0.20 (see --json)"
    [only_shut, *_] = tables.gates_view(gates[:1], applied, 80)
    assert [str(one) for one in only_shut.columns[2].cells] == ["·"]


def test_undo_takes_the_last_request_back(rome: Path, tmp_path: Path) -> None:
    one = content(rome)
    assert run("edit", *prompted(OSLO), "--save", rome).exit_code == 0
    both, other = content(rome), tmp_path / "other.baft"
    found = document("undo", rome, "--save", other)
    assert found == {"saved": str(other), "undone": [OSLO], "n_left": 1}
    assert content(rome) == both
    assert content(other)["state.safetensors"] == one["state.safetensors"]
    done = run("undo", rome)
    assert done.exit_code == 0
    assert "The bridge is in" in done.stdout
    assert "1 edit left" in done.stdout
    assert stored(rome) == ["Rome"]
    assert document("check", rome)[0]["holds"] is True


def test_undo_of_everything_deletes_only_when_told_to(rome: Path) -> None:
    assert failed("undo", rome, "-n", 2) == f"cannot take back 2 requests: {rome} holds 1"
    assert "--delete" in failed("undo", rome)
    assert "give one" in misused("undo", rome, "--delete", "--save", "x.baft")
    assert stored(rome) == ["Rome"]
    (rome / "notes.txt").write_text("mine")
    assert "notes.txt" in failed("undo", rome, "--delete")
    assert (rome / "notes.txt").read_text() == "mine"
    (rome / "notes.txt").unlink()
    shutil.copytree(rome, rome.with_name(f".{rome.name}.old-1-{'0' * 8}"))  # a backup would be put back
    done = run("undo", rome, "--delete")
    assert done.exit_code == 0
    assert f"{rome} is deleted" in done.stdout
    assert "does not exist" in failed("show", rome)
    assert list(rome.parent.iterdir()) == []


# -- models, methods


def test_the_embedded_hosts_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = document("models")
    assert [one["name"] for one in found] == list(embedded.EMBEDDED)
    assert "Apache-2.0" in run("models").stdout
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path))
    assert [one["downloaded"] for one in document("models")] == [False] * len(found)


def test_the_methods_are_listed_and_one_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {one["name"]: one for one in document("methods")}
    assert set(found) == set(methods.names())
    for name, row in found.items():
        kind = methods.get(name)
        assert (row["summary"], row["presets"]) == (kind.summary, list(kind.presets))
        assert set(row["capabilities"]) == {one.value for one in kind.capabilities}
    shown = run("methods").stdout
    assert "exact undo" in shown
    get = methods.get

    def broken(name: str) -> Any:
        if name == "reft":
            raise ConfigError("method 'reft' cannot be loaded")
        return get(name)

    monkeypatch.setattr(methods, "get", broken)
    again = {one["name"]: one for one in document("methods")}
    assert again["reft"]["summary"] == "method 'reft' cannot be loaded"
    assert again["baft"] == found["baft"]


# -- the terminal


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_tty(monkeypatch: pytest.MonkeyPatch) -> Tty:
    stream = Tty()  # no fixture: pytest sets stderr anew between a fixture and its test
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return stream


def show_progress(terminal: Terminal) -> None:
    with logging_to_stderr(verbose=False), terminal.waiting("loading it"):
        logging.getLogger("baft.hosts.embedded").info("fetching it")
        logging.getLogger("baft.hosts.embedded").warning("it is damaged")
    with terminal.training(2) as bar:
        for _ in range(2):
            bar.next()
            bar.step(3, 30, 1.5)


def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = a_tty(monkeypatch)
    show_progress(Terminal(as_json=False))
    for words in ("fetching it", "warning: it is damaged", "edit 2/2", "3/30", "loss 1.500"):
        assert words in tty.getvalue()


def test_there_is_no_progress_when_quiet_or_piped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tty = a_tty(monkeypatch)
    show_progress(Terminal(as_json=False, quiet=True))
    assert tty.getvalue() == "warning: it is damaged\n"
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    show_progress(Terminal(as_json=False))
    assert capsys.readouterr().out == "warning: it is damaged\n"


def test_verbose_logs_what_goes_on_and_leaves_the_loggers_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logger = logging.getLogger("baft")
    before = (logger.level, list(logger.handlers))

    def tell(*_: object) -> list[Any]:
        logging.getLogger("baft.hosts.embedded").info("looking")
        return []

    monkeypatch.setattr(embedded, "embedded_hosts", tell)
    assert run("--verbose", "models").stderr == "info: looking\n"
    assert run("models").stderr == ""
    assert (logger.level, logger.handlers) == before


def test_an_error_of_many_lines_is_one_line_and_debug_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise ArtifactError("it is broken\n  twice\x1b[2J\n")

    monkeypatch.setattr(embedded, "embedded_hosts", fail)
    assert failed("models") == "it is broken; twice\\x1b[2J"
    for done in (run("--debug", "models"), CliRunner().invoke(app, ["models"], env={"BAFT_DEBUG": "1"})):
        assert done.exit_code == 1
        assert "Traceback" in done.stderr
        assert done.stderr.endswith("error: it is broken; twice\\x1b[2J\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError(), "InputError"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("odd"), "odd"),
    ],
)
def test_every_foreseen_error_has_words(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(embedded, "embedded_hosts", fail)
    assert failed("models") == message


def test_an_unforeseen_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(embedded, "embedded_hosts", fail)
    assert isinstance(run("models").exception, ZeroDivisionError)


def test_a_reader_that_leaves_early_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(embedded, "embedded_hosts", fail)
    done = run("models")
    assert (done.exit_code, done.output) == (1, "")


def test_the_program_as_a_shell_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = in_a_shell("models", "--json", PYTHONIOENCODING="ascii", COLUMNS="60")
    assert (done.returncode, done.stderr) == (0, "")
    assert [one["name"] for one in json.loads(done.stdout)] == list(embedded.EMBEDDED)
    shown = in_a_shell("models", PYTHONIOENCODING="ascii", COLUMNS="60", NO_COLOR="1")
    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout
    missing = in_a_shell("show", "nothing.baft", FORCE_COLOR="")
    assert missing.returncode == 1
    assert missing.stderr == "error: nothing.baft does not exist: check the path of the edit set\n"
    assert "Traceback" not in in_a_shell("edit", "--bogus").stderr


def test_main_runs_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(sys, "argv", ["baft", "--version"])
    monkeypatch.setattr(sys, "warnoptions", [])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"baft {baft.__version__}\n"


# -- the real thing


@pytest.mark.real_host
@pytest.mark.slow
def test_the_readme_story_on_the_embedded_model(tmp_path: Path) -> None:
    path = tmp_path / "rome.baft"
    prompt = "The Eiffel Tower is located in the city of"
    assert run("edit", "-m", "smollm2", "-p", prompt, "-t", "Rome", "-o", path).exit_code == 0
    assert run("check", path).exit_code == 0
    asked = document("ask", path, prompt, "--raw", "--before")
    assert asked["answer"].strip() == "Rome"
    assert "Paris" in asked["before"]
    own = document("explain", path, prompt, "--raw")
    assert max(max(one["weights"]) for one in own) > 0.5
    assert "edit 1: 'The Eiffel Tower" in run("explain", path, prompt, "--raw").stdout
    assert run("undo", path, "--delete").exit_code == 0
