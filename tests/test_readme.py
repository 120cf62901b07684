"""What the documents tell a user to type is typed here, in order, on the real embedded model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README, QUICKSTART = ROOT / "README.md", ROOT / "docs" / "quickstart.md"


def blocks(document: Path, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [text for name, text in fenced if name == language]


@pytest.mark.real_host
@pytest.mark.parametrize("document", [README, QUICKSTART], ids=lambda path: path.stem)
def test_python_snippets_run_and_do_what_they_say(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = blocks(document, "python")
    assert snippets
    names: dict[str, object] = {}
    for i, snippet in enumerate(snippets):
        exec(compile(snippet, f"{document.name}[{i}]", "exec"), names)
    said = capsys.readouterr().out
    expected = {"README": ["Rome", "Paris"], "quickstart": ["Osaka", "Dickens", "True"]}[document.stem]
    for word in expected:
        assert word in said, said


@pytest.mark.real_host
def test_shell_commands_run_in_order(tmp_path: Path) -> None:
    said = ""
    [block] = blocks(README, "bash")
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "baft"
        command = [sys.executable, "-c", "from baft.cli import main; main()", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        said += done.stdout
    for word in ("Rome", "Osaka", "smollm2", "reft"):
        assert word in said, said


def test_the_file_tree_is_the_real_one() -> None:
    """Every file that the README lists is there, and every module is listed."""
    tree = next(block for block in blocks(README, "") if "src/baft/" in block)
    listed, folder = set(), [""]
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folder = [*folder[: depth + 1], name] if name.endswith("/") else folder[: depth + 1]
        listed.add("".join(folder[: depth + 1]) + name)
    missing = [name for name in listed if not (ROOT / name).exists()]
    assert not missing, f"README lists what is not there: {missing}"
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*.py")}
    unlisted = {name for name in modules - listed if not name.endswith("__init__.py")}
    assert not unlisted, f"README does not list {unlisted}"
