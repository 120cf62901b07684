"""Experiment files, and the tasks they come to."""

import dataclasses
import json
from pathlib import Path

import pytest

from baft.data.base import benchmarks
from baft.errors import ConfigError
from baft.evals.experiment import (
    BenchmarkSpec,
    Chosen,
    Experiment,
    MethodSpec,
    OthersSpec,
    ProtocolSpec,
    read_experiment,
    tasks_of,
)
from baft.hosts.embedded import EMBEDDED
from baft.methods.base import methods
from baft.types import Edit, EditCase

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

WHOLE = """
seeds = [0, 3]
scorers = ["generate"]
[[benchmarks]]
name = "facts"
limit = 5
[[methods]]
name = "baft"
[[methods]]
name = "baft"
preset = "paper"
settings = { max_steps = 3 }
[[protocols]]
kind = "single"
[[protocols]]
kind = "sequential"
size = 2
"""


def cases(n):
    return [EditCase(f"toy/{i}", Edit(f"The king of {i} is", "Al"), ()) for i in range(n)]


def experiment(**changes):
    given = {"benchmarks": (BenchmarkSpec(name="toy"),), "methods": (MethodSpec(name="baft"),)}
    return Experiment(name="x", **{**given, **changes})


def test_a_file_is_read(tmp_path):
    path = tmp_path / "quick.toml"
    path.write_text(WHOLE)
    found = read_experiment(path)
    assert (found.name, found.model, found.seeds, found.scorers) == (
        "quick",
        "smollm2",
        (0, 3),
        ("generate",),
    )
    assert found.benchmarks == (BenchmarkSpec(name="facts", limit=5),)
    assert [one.called for one in found.methods] == ["baft", "baft/paper"]
    assert found.methods[1].settings == {"max_steps": 3}
    assert [one.called for one in found.protocols] == ["single", "sequential(2)"]
    path.write_text('name = "other"\n' + WHOLE)
    assert read_experiment(path).name == "other"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"generate"', '"generated"', r"quick.toml: scorers\[0\].*'generated'"),
        ("seeds = [0, 3]", 'renderings = ["doubtful"]', r"renderings\[0\].*'doubtful'"),
        ("seeds = [0, 3]", 'renderings = ["negated", "negated"]', "'negated' stands twice among the rend"),
        ("seeds = [0, 3]", 'renderings = ["doubted"]', "add 'generate_chat' to scorers"),
        ("limit = 5", "limits = 5", "limits"),
        ("limit = 5", 'limit = "5"', "limit"),
        ('kind = "single"', 'kind = "single"\nsize = 2', "single edits come one at a time, got size=2"),
        ('kind = "single"', 'kind = "single"\nimmediate = "reliability"', "single edits are scored once"),
        ("limit = 5", "probes_per_tag = 0", "probes_per_tag of benchmark 'facts' must be at least 1, got 0"),
        ("size = 2", "size = 0", "size is at least 1, got 0"),
        (
            "limit = 5",
            'others = [{ name = "facts", n = 0 }]',
            "n of the other edits, from 'facts', must be at",
        ),
        ('preset = "paper"', "", "'baft' stands twice among the methods"),
        ("seeds = [0, 3]", "seeds = []", "has no seeds: give at least one"),
        ("seeds = [0, 3]", "texts = -1", "texts must be 0 or more, got -1"),
        ("seeds = [0, 3]", "batch_size = 0", "batch_size must be at least 1, got 0"),
        ("seeds = [0, 3]", "seeds = [0, 3", "not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, old, new, message):
    path = tmp_path / "quick.toml"
    assert old in WHOLE
    path.write_text(WHOLE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_experiment(path)


def test_labels_tell_methods_apart():
    twice = (MethodSpec(name="baft"), MethodSpec(name="baft", settings={"rank": 4}, label="rank 4"))
    assert [one.called for one in experiment(methods=twice).methods] == ["baft", "rank 4"]


def test_tasks_cover_every_case_once_in_each_protocol():
    protocols = (
        ProtocolSpec(kind="single"),
        ProtocolSpec(kind="batched", size=3),
        ProtocolSpec(kind="sequential", size=4),
    )
    found = list(tasks_of(experiment(protocols=protocols, stack=5), {"toy/all": Chosen(tuple(cases(7)))}))
    assert len({task.id for task in found}) == len(found) == 2 + 3 + 2
    for protocol, sizes in (("single", [5, 2]), ("batched(3)", [3, 3, 1]), ("sequential(4)", [4, 3])):
        mine = [task for task in found if task.protocol.called == protocol]
        assert [len(task.cases) for task in mine] == sizes
        assert [case.id for task in mine for case in task.cases] == [case.id for case in cases(7)]


def test_a_seed_draws_the_order_of_edits_that_meet():
    protocols = (ProtocolSpec(kind="single"), ProtocolSpec(kind="sequential", size=9))
    found = list(
        tasks_of(experiment(protocols=protocols, seeds=(0, 1, 2)), {"toy/all": Chosen(tuple(cases(9)))})
    )
    orders = [tuple(case.id for case in task.cases) for task in found if task.protocol.kind == "sequential"]
    assert len(set(orders)) == 3
    assert orders[0] == tuple(case.id for case in cases(9))
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}
    again = list(
        tasks_of(experiment(protocols=protocols, seeds=(0, 1, 2)), {"toy/all": Chosen(tuple(cases(9)))})
    )
    assert again == found
    singles = [
        [task.cases[0].id for task in found if task.id.startswith(f"toy/all:single:seed{s}")] for s in (0, 2)
    ]
    assert singles[0] == singles[1]


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(EXPERIMENTS.glob("*.toml")) if not path.stem.startswith("dev_")],  # data
    ids=lambda path: path.stem,
)
def test_every_experiment_of_the_repository_can_be_run(path):
    experiment = read_experiment(path)
    assert experiment.model in EMBEDDED
    for spec in experiment.methods:
        methods.get(spec.name).configured(spec.preset, spec.settings)
    for benchmark in experiment.benchmarks:
        assert benchmark.name in benchmarks.names()


def test_cases_that_bear_on_each_other_can_be_left_out(tmp_path):
    lines = [("Paris is in", "Peru"), ("Paris is in", "Chad"), ("Rome is in", "Mali"), ("Oslo is in", "Cuba")]
    rows = [json.dumps({"prompt": prompt, "target": target}) for prompt, target in lines]
    (tmp_path / "cases.jsonl").write_text("\n".join(rows) + "\n")
    spec = BenchmarkSpec(name="jsonl", file=str(tmp_path / "cases.jsonl"), limit=3, apart=True)
    benchmark = spec.load(None)
    split = benchmark.splits[0]
    found = spec.chosen(benchmark, split, None)
    assert [case.edit.target for case in found.cases] == ["Peru", "Mali", "Cuba"]
    assert found.left_out == {"conflicting_prompt": 1}
    found = dataclasses.replace(spec, apart=False).chosen(benchmark, split, None)
    assert ([case.edit.target for case in found.cases], found.left_out) == (["Peru", "Chad", "Mali"], {})


def test_other_edits_bear_neither_on_the_cases_nor_on_each_other(tmp_path):
    tune, report = (benchmarks.get("facts")(None).cases(split) for split in ("tune", "report"))
    taken, rephrased = tune[1].edit.prompt, next(p.prompt for p in tune[0].probes if p.kind == "generality")
    rows = [
        {"prompt": taken, "target": "Peru", "locality": [{"prompt": rephrased}, {"prompt": "Fish and"}]},
        {"prompt": "Rome is in", "target": "Mali"},
    ]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = (OthersSpec(name="facts", split="tune", n=2), OthersSpec(name="facts", split="report", n=1))
    spec = BenchmarkSpec(name="jsonl", file=str(tmp_path / "cases.jsonl"), apart=True, others=others)
    benchmark = spec.load(None)
    found = spec.chosen(benchmark, "all", None)
    assert [case.edit.target for case in found.cases] == ["Peru", "Mali"]
    assert [probe.prompt for probe in found.cases[0].probes] == ["Fish and"]
    assert [case.id for case in found.others] == [tune[0].id, tune[2].id, report[0].id]
    assert found.left_out == {"facts/tune: conflicting_prompt": 1, "facts/tune: locality_of_another_edit": 1}
    assert [(one["cases"], one["n"]) for one in found.sources] == [("facts/tune", 2), ("facts/report", 1)]
    assert found.sources[0]["fingerprint"] == benchmarks.get("facts")(None).fingerprint("tune")
    for split in ("report", None):  # the first of its splits
        twice = dataclasses.replace(spec, others=(others[1], OthersSpec(name="facts", split=split, n=1)))
        with pytest.raises(ConfigError, match="the others of 'jsonl' name facts/report twice: name it once"):
            twice.chosen(benchmark, "all", None)
    many = dataclasses.replace(spec, others=(OthersSpec(name="facts", split="tune", n=10**6),))
    with pytest.raises(
        ConfigError, match="1000000 others were wanted, and facts/tune has [0-9]+ that do not"
    ):
        many.chosen(benchmark, "all", None)


def test_a_chunk_holds_the_other_edits_too():
    chosen = Chosen(tuple(cases(5)), tuple(cases(9)[5:]))
    protocol = ProtocolSpec(kind="sequential", size=7)
    found = list(tasks_of(experiment(protocols=(protocol,)), {"toy/all": chosen}))
    assert [len(task.cases) for task in found] == [3, 2]
    assert all(task.others == chosen.others for task in found)


@pytest.mark.parametrize(
    ("protocol", "apart", "message"),
    [
        (ProtocolSpec(kind="single"), True, "come after edits in sequence"),
        (ProtocolSpec(kind="sequential", size=3), True, "come after edits in sequence"),
        (ProtocolSpec(kind="sequential", size=4), False, "must not bear on it: set apart = true"),
    ],
)
def test_other_edits_go_with_long_sequences_of_cases_apart(protocol, apart, message):
    others = OthersSpec(name="facts", n=3)
    with pytest.raises(ConfigError, match=message):
        experiment(
            benchmarks=(BenchmarkSpec(name="toy", apart=apart, others=(others,)),), protocols=(protocol,)
        )
