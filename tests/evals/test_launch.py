"""Runs on a real Ray cluster: two nodes of one CPU on this machine, and a host that workers load by name."""

import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import ray
import torch
from ray._private import ray_constants
from ray._private.state import actors
from ray.cluster_utils import Cluster

from baft.errors import ConfigError, HostError
from baft.evals import launch
from baft.evals.experiment import BenchmarkSpec, Experiment, MethodSpec, ProtocolSpec
from baft.evals.launch import run_on_ray
from baft.evals.records import ROWS, difference, read_manifest, read_rows
from baft.evals.runner import Bench
from baft.methods.base import methods
from tiny import CHATML, tiny_host, tiny_tokenizer

REFT = MethodSpec(name="reft", settings={"learning_rate": 5e-2, "max_steps": 20, "layers": [1]})
AGAIN = MethodSpec(
    name="reft", label="again", settings={"learning_rate": 2e-2, "max_steps": 20, "layers": [1]}
)
PROTOCOLS = (ProtocolSpec(kind="single"), ProtocolSpec(kind="sequential", size=3))
FACTS = [("The tower is in", "Ro"), ("The king of France was", "Al"), ("Paris is in", "Be"), ("I am", "he")]
PLANTED = {"patient": "PatientEditor", "deadly": "DeadlyEditor", "refusing": "RefusingEditor"}
STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes, whose workers also find what is planted: by the entry points of a package."""
    package = tmp_path_factory.mktemp("packages") / "planted-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0\n")
    lines = [f"{name} = planted:{kind}\n" for name, kind in PLANTED.items()]
    (package / "entry_points.txt").write_text("[baft.methods]\n" + "".join(lines))
    paths = [
        str(package.parent),
        str(Path(__file__).parents[1]),
        *os.environ.get("PYTHONPATH", "").split(":"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # else 127.0.0.1 is made a public address
        patch.setenv("PYTHONPATH", ":".join(os.path.abspath(path) for path in paths if path))
        node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "node_ip_address": "127.0.0.1"}
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.add_node(**node)
        yield made.address
        made.shutdown()


@pytest.fixture(scope="module")
def host_folder(tmp_path_factory):
    return save_host(tmp_path_factory.mktemp("host"))


def save_host(folder, *, seed=0):
    tiny_host("llama", dtype=torch.float32, seed=seed, max_position_embeddings=160).save_pretrained(folder)
    tiny_tokenizer(chat_template=CHATML).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bench_of(host_folder):
    file = host_folder / "mine.jsonl"
    about = {"generality": [{"prompt": "Where?"}], "locality": [{"prompt": "A hat"}]}
    rows = [{"prompt": prompt, "target": target, **about} for prompt, target in FACTS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*specs, model=host_folder, protocols=PROTOCOLS):
        return Bench(
            Experiment(
                name="x",
                benchmarks=(BenchmarkSpec(name="jsonl", file=str(file)),),
                methods=specs,
                protocols=protocols,
                model=str(model),
                max_new_tokens=4,
                scorers=("teacher_forced", "generate"),
                stack=1,  # a block a case, so that there is something to share out
            )
        )

    return make


@pytest.fixture(scope="module")
def bench(bench_of):
    return bench_of(REFT, AGAIN)


@pytest.fixture(scope="module")
def serial(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serial")
    bench.run(folder)
    return rows_of(folder)


@pytest.fixture
def planted(monkeypatch):
    for name, kind in PLANTED.items():
        monkeypatch.setitem(methods._targets, name, f"planted:{kind}")


def rows_of(folder):
    """But for how long they took."""
    return [json.dumps({**row, "seconds_s": None}) for row in read_rows(folder)]


def workers(state="ALIVE"):
    """The workers of the run at hand."""
    mine = actors(job_id=ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id())))
    return [one for one in mine.values() if one["State"] == state]


@pytest.mark.slow
def test_two_nodes_make_the_serial_record_though_a_worker_is_killed(bench, serial, cluster, tmp_path):
    seen, nodes, dead = [], set(), []

    def on_block(*told):
        seen.append(told)
        nodes.update(one["Address"]["NodeID"] for one in workers())
        if told[0] == 2:
            os.kill(workers()[0]["Pid"], signal.SIGKILL)
        if told[0] == 12:
            dead.extend(workers("DEAD"))

    run_on_ray(bench, tmp_path / "run", address=cluster, on_block=on_block)
    assert rows_of(tmp_path / "run") == serial
    assert [told[:2] for told in seen] == [(n, 12) for n in range(1, 13)]
    assert {told[2] for told in seen} == {f"{method.called} on {task.id}" for task, method in bench.blocks}
    assert len(nodes) == 2
    assert len(dead) == 1
    assert difference(read_manifest(tmp_path / "run"), bench.manifest) is None
    assert not ray.is_initialized()
    # There is nothing left to do, so no cluster is asked.
    run_on_ray(bench, tmp_path / "run", address="127.0.0.1:1", on_block=lambda *_: pytest.fail("done twice"))


@pytest.fixture
def interruptible():
    """Ctrl-C as an interactive Python takes it; pytest-xdist has its workers ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("planted", "interruptible")
def test_a_run_that_is_interrupted_goes_on_where_it_was(bench_of, host_folder, cluster, tmp_path):
    """Ctrl-C, while the driver waits for two workers that are at it."""
    bench = bench_of(REFT, MethodSpec(name="patient"), protocols=PROTOCOLS[:1])
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))

    def stop(n, *_):
        if n == 2:  # reft on two tasks; both workers are at the patient method now
            interrupt.start()

    with pytest.raises(KeyboardInterrupt):
        run_on_ray(bench, tmp_path / "run", address=cluster, on_block=stop)
    assert not ray.is_initialized()
    path = tmp_path / "run" / ROWS
    kept = path.read_text()
    assert [json.loads(row)["method"] for row in kept.splitlines()] == ["reft", "reft"]
    path.write_text(kept + kept[:50])  # as a kill would leave it
    (host_folder / "go").touch()
    bench.run(tmp_path / "serial")
    seen = []
    run_on_ray(bench, tmp_path / "run", address=cluster, on_block=lambda n, *_: seen.append(n))
    assert seen == [3, 4, 5, 6, 7, 8]
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "serial")
    assert set(kept.splitlines()) <= set(path.read_text().splitlines())  # seconds included: not done again


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_a_block_that_kills_every_worker_ends_the_run(bench_of, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_DEATHS", 2)
    deadly = bench_of(REFT, MethodSpec(name="deadly"), protocols=(ProtocolSpec(kind="sequential", size=4),))
    with pytest.raises(HostError, match=r"2 workers died at deadly on jsonl/all:sequential\(4\):seed0:0"):
        run_on_ray(deadly, tmp_path / "run", address=cluster, n_workers=1)
    assert Counter(row["method"] for row in read_rows(tmp_path / "run")) == {"reft": 8}


@pytest.mark.slow
def test_a_worker_with_another_host_is_refused(bench_of, cluster, tmp_path):
    ready = bench_of(REFT, model=save_host(tmp_path / "host"))
    save_host(tmp_path / "host", seed=1)
    with pytest.raises(ConfigError, match="a worker would run something else: host was .* same host"):
        run_on_ray(ready, tmp_path / "run", address=cluster, n_workers=1)
    assert read_rows(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.usefixtures("planted")
def test_an_error_in_a_block_ends_the_run_and_keeps_what_is_done(bench_of, cluster, tmp_path, monkeypatch):
    """Without an address: on a cluster that is started on this machine, and stopped.

    It comes last: Ray makes no actors in a process that goes back from one cluster to an earlier one.
    """
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)  # as it is where nobody patched it
    monkeypatch.setattr(launch, "_STORE_BYTES", STORE_BYTES)
    refusing, nodes = bench_of(REFT, MethodSpec(name="refusing")), []
    with pytest.raises(HostError, match="^this host is not good enough") as caught:
        run_on_ray(refusing, tmp_path / "run", n_workers=1, on_block=lambda *_: nodes.extend(ray.nodes()))
    assert type(caught.value) is HostError
    assert caught.value.__notes__[0].startswith("on the worker")
    assert [row["method"] for row in read_rows(tmp_path / "run")] == ["reft"]
    assert [(node["NodeManagerAddress"], node["Resources"]["CPU"]) for node in nodes] == [("127.0.0.1", 1.0)]
    assert not ray.is_initialized()


def test_what_cannot_be_is_said_before_anything_is_started(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("started for nothing"))
    with pytest.raises(ConfigError, match="n_workers must be at least 1, got 0"):
        run_on_ray(bench, tmp_path / "run", n_workers=0)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="connected to a cluster already, got the address 10.0.0.1:6379"):
        run_on_ray(bench, tmp_path / "run", address="10.0.0.1:6379")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray, .*: pip install 'baft\[ray\]'"):
        run_on_ray(bench, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_cluster_that_is_not_there(bench, tmp_path):
    with pytest.raises(ConfigError, match="no Ray cluster at 127.0.0.1:1: .*refused. Give the address"):
        run_on_ray(bench, tmp_path / "run", address="127.0.0.1:1")
    with pytest.raises(ConfigError, match="no Ray cluster at nowhere: "):
        run_on_ray(bench, tmp_path / "run", address="nowhere")


def test_workers_fit_by_their_threads():
    def node(n_cpus, alive=True):
        return {"Resources": {"CPU": float(n_cpus)} if n_cpus else {}, "Alive": alive}

    assert launch._room([node(8), node(4), node(0), node(64, alive=False)], 4) == (4, 3)
    assert launch._room([node(2), node(1)], 4) == (2, 1)  # no node has so many
    with pytest.raises(ConfigError, match="has no CPUs"):
        launch._room([node(0)], 1)
