"""`baft remove` and `baft merge`: saved edits taken apart and put together, without their host."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from baft import artifact, types
from baft.artifact import algebra
from baft.cli.app import app
from baft.errors import ArtifactError, UnknownNameError
from edit_sets import independent, written
from unhooked import as_users_import

TEXTS = [("The tower is in", "Rome"), ("The bridge is in", "Oslo"), ("The museum is in", "Paris")]


def save(path: Path, *numbers: int) -> Path:
    return written(path, independent(*(TEXTS[i] for i in numbers)))


def stored(path: Path) -> list[str]:
    return [one.edit.target for one in artifact.read(path).edits]


def run(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.mark.parametrize("named_by", ["number", "id"])
def test_an_edit_is_taken_out(tmp_path: Path, named_by: str) -> None:
    path = save(tmp_path / "all.baft", 0, 1, 2)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    name = "2" if named_by == "number" else artifact.read(path).edits[1].edit.id
    data = json.loads(run("remove", path, name, "-o", tmp_path / "less.baft", "--json").stdout)
    assert data == {
        "saved": str(tmp_path / "less.baft"),
        "removed": [{"prompt": "The bridge is in", "target": "Oslo"}],
        "n_left": 2,
    }
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    left = artifact.read(tmp_path / "less.baft")
    want = artifact.read(save(tmp_path / "want.baft", 0, 2))
    assert [one.request for one in left.edits] == [0, 1]
    assert left.edits == want.edits
    assert left.memory == want.memory
    assert left.state.keys() == want.state.keys()
    assert all((left.state[name] == tensor).all() for name, tensor in want.state.items())
    shown = run("remove", path, "1", "3").stdout
    assert "1 edit left" in shown
    assert stored(path) == ["Oslo"]


def test_what_cannot_be_taken_out(tmp_path: Path) -> None:
    path = save(tmp_path / "a.baft", 0, 1)
    for wrong in ("0", "3", "x"):
        said = run("remove", path, wrong, code=1).stderr
        assert f"no edit '{wrong}': give a number from 1 to 2, or an id" in said.replace("\n", " ")
    said = run("remove", path, "1", "2", code=1).stderr.replace("\n", " ")
    assert "no edit would be left" in said
    assert f"`baft undo {path} -n 2 --delete`" in said
    assert stored(path) == ["Rome", "Oslo"]
    run("undo", path, "-n", "2", "--delete")
    assert not path.exists()


def test_a_list_of_ids_is_no_id() -> None:
    both = independent(*TEXTS[:2])
    with (
        as_users_import(algebra) as unhooked,
        pytest.raises(UnknownNameError, match=r"ids of edits are texts, got \['.*'\]: give each by itself"),
    ):
        unhooked.subset(both, ([both.edits[0].edit.id],))


def test_what_was_replaced_is_told_as_data(tmp_path: Path) -> None:
    both = independent(*TEXTS[:2])
    rome, oslo = (one.edit.id for one in both.edits)
    both.memory["replaces"]["1"] = [[oslo, rome]]
    found = json.loads(run("show", written(tmp_path / "both.baft", both), "--json").stdout)["edits"]
    assert [(one["target"], one["replaced"]) for one in found] == [("Rome", True), ("Oslo", False)]


def test_sets_are_put_together(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a.baft", 0, 1), save(tmp_path / "b.baft", 1, 2)
    data = json.loads(run("merge", first, second, "-o", tmp_path / "both.baft", "--json").stdout)
    assert data["added"] == [{"prompt": "The museum is in", "target": "Paris"}]
    assert data["n_edits"] == 3
    assert stored(first) == ["Rome", "Oslo"]
    both, want = (
        artifact.read(path) for path in (tmp_path / "both.baft", save(tmp_path / "c.baft", 0, 1, 2))
    )
    assert both.edits == want.edits
    assert both.memory == want.memory
    assert all((both.state[name] == tensor).all() for name, tensor in want.state.items())
    assert "3 edits in" in run("merge", first, second).stdout
    assert stored(first) == ["Rome", "Oslo", "Paris"]
    with pytest.raises(ArtifactError, match="differ in settings"):
        artifact.merge(want, independent(TEXTS[0], settings={"rank": 3}))


def test_what_a_set_replaces_is_kept_when_it_is_put_behind_another() -> None:
    other, replaced = (independent(*(TEXTS[i] for i in some)) for some in ((2,), (0, 1)))
    rome, oslo = (one.edit.id for one in replaced.edits)
    replaced.memory["replaces"]["1"] = [[oslo, rome]]
    for both in (artifact.merge(other, replaced), artifact.merge(replaced, other)):
        assert [pair for request in both.requests for pair in request.replaces] == [(oslo, rome)]
        assert types.replaced(both.requests) == {rome}
        left = artifact.without(both, [other.edits[0].edit.id])
        assert types.replaced(left.requests) == {rome}


def test_what_was_replaced_stays_so_whichever_set_comes_first(tmp_path: Path) -> None:
    both = independent(*TEXTS[:2])
    rome, oslo = (one.edit.id for one in both.edits)
    both.memory["replaces"]["1"] = [[oslo, rome]]
    path = written(tmp_path / "both.baft", both)
    run("remove", path, "1", "-o", tmp_path / "less.baft")
    less = artifact.read(tmp_path / "less.baft")
    for one, other in ((both, less), (less, both)):
        merged = artifact.merge(one, other)
        assert [each.edit.id for each in merged.edits] == [rome, oslo]
        assert types.replaced(merged.requests) == {rome}
        assert merged.memory == both.memory
    added = json.loads(run("merge", tmp_path / "less.baft", path, "--json").stdout)["added"]
    assert [one["target"] for one in added] == ["Rome"]
    found = json.loads(run("show", tmp_path / "less.baft", "--json").stdout)["edits"]
    assert [(one["target"], one["request"], one["replaced"]) for one in found] == [
        ("Rome", 0, True),
        ("Oslo", 1, False),
    ]


def test_what_was_made_together_is_parted_where_one_was_replaced_and_one_was_not() -> None:
    whole = independent(*TEXTS, ("The tower is in", "Kyiv"))
    rome, oslo, paris, kyiv = (one.edit.id for one in whole.edits)
    numbers = (0, 1, 1, 2)  # Oslo and Paris in one call
    parts = tuple(replace(one, request=i) for one, i in zip(whole.edits, numbers, strict=True))
    memory = {"unrelated": {"1": ["near both"]}, "replaces": {"1": [[paris, rome]], "2": [[kyiv, oslo]]}}
    whole = replace(whole, edits=parts, memory=memory)
    assert types.replaced(whole.requests) == {rome, oslo}
    last = artifact.subset(whole, [kyiv])
    for merged in (artifact.merge(last, whole), artifact.merge(whole, last)):
        assert types.replaced(merged.requests) == {rome, oslo}
        unrelated = {edit.id: one.unrelated for one in merged.requests for edit in one.edits}
        assert unrelated[oslo] == unrelated[paris] == ("near both",)
    assert [one.edit.id for one in artifact.merge(last, whole).edits] == [oslo, kyiv, rome, paris]
    assert [one.request for one in artifact.merge(last, whole).edits] == [0, 1, 2, 3]
    assert artifact.merge(whole, last).edits == whole.edits


def test_of_its_own_edits_the_first_set_says_which_are_in_force() -> None:
    kept, settled = independent(*TEXTS[:2]), independent(*TEXTS[:2])
    rome, oslo = (one.edit.id for one in kept.edits)
    settled.memory["replaces"]["1"] = [[oslo, rome]]
    assert types.replaced(artifact.merge(kept, settled).requests) == frozenset()
    assert types.replaced(artifact.merge(settled, kept).requests) == {rome}


def test_a_chain_of_what_was_replaced_is_put_together_in_its_order() -> None:
    whole = independent(*TEXTS, ("The tower is in", "Kyiv"))
    rome, oslo, paris, kyiv = (one.edit.id for one in whole.edits)
    whole.memory["replaces"] = {"1": [[oslo, rome]], "2": [[paris, oslo]]}
    last = artifact.subset(whole, [paris])
    merged = artifact.merge(last, whole)
    assert [one.edit.id for one in merged.edits] == [rome, oslo, paris, kyiv]
    assert types.replaced(merged.requests) == {rome, oslo}
    assert merged.requests[2].unrelated == whole.requests[2].unrelated
    without_one = artifact.subset(whole, [rome, paris])  # what Oslo replaced, Paris replaces there
    merged = artifact.merge(without_one, whole)
    assert [one.edit.id for one in merged.edits] == [rome, oslo, paris, kyiv]
    assert types.replaced(merged.requests) == {rome, oslo}


def test_sets_that_replace_in_a_circle_leave_something_in_force() -> None:
    first, second = independent(*TEXTS[:2]), independent(TEXTS[2], *TEXTS[:2])
    rome, oslo, paris = (each.edit.id for each in (*first.edits, second.edits[0]))
    first.memory["replaces"] = {"1": [[oslo, rome]]}
    second.memory["replaces"] = {"0": [[paris, oslo]], "1": [[rome, paris]]}
    merged = artifact.merge(first, second)
    assert [each.edit.id for each in merged.edits] == [paris, rome, oslo]
    assert types.replaced(merged.requests) == {paris, rome}
    merged = artifact.merge(second, first)  # of Rome and Oslo, both there, the first set says nothing
    assert [each.edit.id for each in merged.edits] == [paris, rome, oslo]
    assert types.replaced(merged.requests) == {paris}


def test_sets_that_replace_each_other_s_edits_are_taken_apart() -> None:
    one, other = independent(*TEXTS), independent(*TEXTS[:2])
    rome, oslo, paris = (each.edit.id for each in one.edits)
    one.memory["replaces"] = {"1": [[oslo, rome]], "2": [[paris, oslo]]}
    other.memory["replaces"] = {"0": [[rome, oslo]]}
    left = artifact.without(artifact.merge(one, other), [rome, oslo])
    assert [each.edit.id for each in left.edits] == [paris]
    assert types.replaced(left.requests) == frozenset()


def test_edits_that_know_each_other_stay_together(tmp_path: Path) -> None:
    shared = independent(*TEXTS[:2])
    shared.state["shared.layer1.R"] = next(iter(shared.state.values()))
    path = written(tmp_path / "shared.baft", shared)
    for arguments in (("remove", path, "1"), ("merge", path, save(tmp_path / "a.baft", 2))):
        assert "share what they learned" in run(*arguments, code=1).stderr.replace("\n", " ")
