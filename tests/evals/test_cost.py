"""What making an edit takes beside time."""

import pytest
import torch

from baft.evals.collect import collect
from baft.evals.cost import peak_above, stored_bytes
from baft.evals.experiment import BenchmarkSpec, Experiment, MethodSpec, ProtocolSpec
from baft.evals.records import read_rows
from baft.evals.report import write_report
from baft.evals.runner import Bench
from baft.evals.tables import edits_table
from baft.methods.base import is_earlier, methods
from baft.types import Edit, EditRequest

QUICK = {"learning_rate": 5e-2, "max_steps": 2, "layers": [1]}
D_MODEL, RANK, FLOAT64 = 32, 12, 8
ONE = (2 * RANK * D_MODEL + RANK) * FLOAT64  # R, A and b


def test_a_peak_counts_what_was_held_meanwhile_and_not_what_is_left():
    n_bytes = 64 << 20
    held = peak_above(lambda: torch.ones(n_bytes // 4).sum())
    assert n_bytes * 0.9 < held.above < n_bytes * 2
    assert held.whole_process >= held.own + held.above
    # Control: work that holds nothing.
    assert peak_above(lambda: None).above < n_bytes * 0.1


@pytest.fixture
def run(host, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt": "The tower is in", "target": "Ro"}\n{"prompt": "Paris is in", "target": "Be"}\n'
    )

    def run(kind, scorers=("teacher_forced", "cost")):
        experiment = Experiment(
            name="x",
            benchmarks=(BenchmarkSpec(name="jsonl", file=str(path)),),
            methods=(MethodSpec(name="reft", settings=QUICK),),
            protocols=(ProtocolSpec(kind=kind, **({} if kind == "single" else {"size": 2})),),
            scorers=scorers,
        )
        folder = tmp_path / f"{kind}-{len(scorers)}"
        Bench(experiment, host=host).run(folder)
        return read_rows(folder), folder

    return run


def test_the_bytes_of_an_edit_are_those_of_its_tensors(host, run):
    rows, _ = run("single")
    assert {row["stored_bytes"] for row in rows} == {ONE}
    editor = methods.get("reft")(host, methods.get("reft").configured("default", QUICK))
    editor.apply(EditRequest((Edit("The tower is in", "Ro"),)))
    assert stored_bytes(editor) == ONE
    rows, _ = run("sequential")
    assert rows[-1]["stored_bytes"] == ONE / 2  # one block for both edits
    assert all(row["peak_bytes"] >= 0 for row in rows)
    assert not any("peak_bytes" in row for row in run("single", ("teacher_forced",))[0])  # control


@pytest.mark.parametrize("name", ["reft", "grace"])
def test_what_undo_goes_back_to_is_not_counted(host, name):
    edits = [Edit("The tower is in", "Ro"), Edit("Paris is in", "Be"), Edit("A king", "Al")]
    settings = QUICK if name == "reft" else {"layer": 1, "max_steps": 2}
    editors = [methods.get(name)(host, methods.get(name).configured("default", settings)) for _ in range(2)]
    for edit in edits:
        editors[0].apply(EditRequest((edit,)))
    editors[1].load_state_dict(
        {key: tensor for key, tensor in editors[0].state_dict().items() if not is_earlier(key)},
        editors[0].requests,
    )
    of_all = sum(tensor.nbytes for tensor in editors[0].tensors().values())
    in_force = sum(tensor.nbytes for tensor in editors[1].tensors().values())
    assert stored_bytes(editors[0]) == stored_bytes(editors[1]) == in_force
    assert of_all > 1.5 * in_force  # control: there is something to go back to


def test_the_report_has_it_where_it_was_asked_for(run, tmp_path):
    for scorers, expected in ((("teacher_forced", "cost"), True), (("teacher_forced",), False)):
        _, folder = run("single", scorers)
        results = collect([folder])
        [arena] = results.arenas
        table = edits_table(results, arena)
        assert ("kept an edit, kB" in table.header) is expected
        assert all(len(row) == len(table.header) for row in table.rows)
        if expected:
            assert table.rows[0][-1].text == f"{ONE / 1e3:.1f}"
            write_report([folder], tmp_path / "report")
            assert "peak memory, MB" in (tmp_path / "report" / "report.md").read_text()
