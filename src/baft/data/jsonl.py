"""The user's own edits and probes, from a file of JSON Lines."""

from pathlib import Path

from baft.data.base import Benchmark, Loaded
from baft.data.cases import Cases
from baft.data.files import Record, as_record, parse, read_text, shown
from baft.errors import DataError
from baft.types import Edit, EditCase, Probe, ProbeKind

_KINDS: tuple[ProbeKind, ...] = ("generality", "locality", "portability")
_EDIT_FIELDS = ("id", "prompt", "target", "subject", "ground_truth")
_PROBE_FIELDS = ("prompt", "target", "tag", "aliases", "chat")


class Jsonl(Benchmark):
    """A file of the user's own, one case a line; `folder` is the path of the file.

    A line is an object with these fields and no others:

    - `prompt`, `target`: the edit; texts that are not blank.
    - `subject`, `ground_truth`: texts, optional.
    - `id`: the case's name, a text, optional; no two cases have the same. By default `jsonl/all/` and the
      index of the case.
    - `generality`, `locality`, `portability`: lists of probes, optional.

    A probe is an object with these fields and no others:

    - `prompt`: a text that is not blank.
    - `target`: the right answer. A generality probe without one has the edit's, a locality probe none; a
      portability probe needs one.
    - `tag`: the probe's group, a text, optional.
    - `aliases`: other right answers, a list of texts, optional.
    - `chat`: true for a question that is asked in the chat template alone; false by default.

    Texts are taken as they are, white space included. Blank lines are passed over. Whatever else is found is
    an error that names the line and the field.
    """

    name = "jsonl"
    summary = "edits and probes of your own, from a file of JSON Lines"
    source = "the file that you name"
    splits = ("all",)

    def _load(self, split: str) -> Loaded:
        lines = _lines(self.folder)
        if not lines:
            raise DataError(f"{self.folder} holds no case: give one JSON object a line")
        cases = Cases(self.name, split)
        places: dict[str, str] = {}
        for index, (where, line) in enumerate(lines):
            row = as_record(parse(line, where), where)
            case = _case(row, f"{self.name}/{split}/{index}")
            if case.id in places:
                row.refuse(
                    "id", f"{case.id!r} is already the id of {places[case.id]}; give each case its own"
                )
            places[case.id] = where
            truth = case.edit.ground_truth
            cases.add(case, truths=() if truth is None else (truth,))
        return cases.loaded()


def _lines(path: Path | None) -> list[tuple[str, str]]:
    """The lines of the file that are not blank, each with its place."""
    if path is None:
        raise DataError("benchmark jsonl reads a file of yours, and none is given: name it with --data")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"benchmark jsonl: {path} {what}; name a file of JSON Lines with --data")
    numbered = enumerate(read_text(path).split("\n"), start=1)  # splitlines would also split inside texts
    return [(f"{path}, line {n}", line) for n, line in numbered if line.strip()]


def _case(row: Record, default_id: str) -> EditCase:
    _only(row, (*_EDIT_FIELDS, *_KINDS))
    edit = Edit(
        _text(row, "prompt"),
        _text(row, "target"),
        row.text("subject") if "subject" in row else None,
        row.text("ground_truth") if "ground_truth" in row else None,
    )
    probes = [_probe(one, kind, edit) for kind in _KINDS if kind in row for one in row.records(kind)]
    return EditCase(_text(row, "id") if "id" in row else default_id, edit, tuple(probes))


def _probe(row: Record, kind: ProbeKind, edit: Edit) -> Probe:
    _only(row, _PROBE_FIELDS)
    target = edit.target if kind == "generality" else None
    if "target" in row or kind == "portability":
        target = _text(row, "target")
    aliases = row.texts("aliases") if "aliases" in row else ()
    if aliases and target is None:
        row.refuse("aliases", "stand beside a target, and there is none; add the field 'target'")
    if not all(alias.strip() for alias in aliases):
        row.refuse("aliases", f"expected texts that are not blank, got {shown(list(aliases))}")
    tag = row.text("tag") if "tag" in row else ""
    chat = row.flag("chat") if "chat" in row else False
    return Probe(edit.id, kind, _text(row, "prompt"), target, tag, aliases, chat)


def _only(row: Record, known: tuple[str, ...]) -> None:
    for name in row:
        if name not in known:
            row.refuse(name, f"is unknown; the fields are {', '.join(known)}")


def _text(row: Record, name: str) -> str:
    found = row.text(name)
    if not found.strip():
        row.refuse(name, f"expected a text that is not blank, got {found!r}")
    return found
