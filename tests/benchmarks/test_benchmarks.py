"""The benchmarks' parts on a tiny host, and every script in its quick form."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import baft
import edit_speed
import memory
from baft.hosts import background
from baft.hosts.models import load_host
from baft.methods.baft import BaftEditor
from contenders import rows_of
from tiny import CHATML, tiny_host, tiny_tokenizer
from workload import Workload, bytes_above, padded_out, questions

PROMPTS = (
    "Bok lives in",
    "Dex was born by",
    "Who is Fay?",
    "Gus works for",
    "Hal speaks",
    "Ivy is made of",
    "Jim plays the",
    "Kay studied",
    "Lou drives a",
    "Max died at",
    "Nat married",
    "Pam comes from",
    "Ray wrote 12",
    "Sue leads!!",
)
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def host_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    tiny_host("llama", dtype=torch.float32, max_position_embeddings=1024).save_pretrained(folder)
    tiny_tokenizer(chat_template=CHATML).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of zsRE's form, with questions short enough for a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("data")
    records = [
        {
            "subject": prompt.split()[0],
            "src": prompt,
            "rephrase": f"{prompt} now",
            "alt": "Rob",
            "answers": ["Al"],
            "loc": "nq question: who ran",
            "loc_ans": "Zed",
        }
        for prompt in PROMPTS
    ]
    path = folder / "easyedit_edit_data" / "zsre" / "zsre_mend_train.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def editor(host_folder):
    return BaftEditor(load_host(str(host_folder)), BaftEditor.preset("default"))


def test_prompts_have_the_lengths_that_are_reported(editor, data):
    edits = questions(data, editor.encoder, 7)
    lengths = [len(editor.encoder.prompt(edit.prompt)) for edit in edits]
    assert all(10 <= length <= 20 for length in lengths), lengths
    assert len({edit.id for edit in edits}) == 7
    long = padded_out(edits[0], editor.encoder)
    assert len(editor.encoder.prompt(long.prompt)) == 128
    assert long.prompt.endswith(edits[0].prompt)
    with pytest.raises(SystemExit, match="14 prompts .* not 1000"):
        questions(data, editor.encoder, 1000)


def test_a_workload_trains_what_the_editor_trains(editor, data):
    work = Workload.of(editor, questions(data, editor.encoder, 2))
    assert [text.is_chat for text in work.texts(0)] == [False, True]
    assert work.edit(2) == work.edit(0), "rounds begin anew after the last edit"
    assert work.edit(1) != work.edit(0)
    raw = work.texts(0)[0]
    assert work.plain_row(0).tolist() == [list(raw.prompt_ids + raw.target_ids)]


def test_a_raw_workload_has_the_rows_that_the_bars_speak_of(editor, data):
    """One row as wide as the prompt and its target; in both renderings two, as wide as the template's."""
    edits = questions(data, editor.encoder, 2)
    raw = BaftEditor(editor.host, replace(editor.config, chat=False))
    both, alone = Workload.of(editor, edits), Workload.of(raw, edits)
    for number in range(2):
        [text] = alone.texts(number)
        assert text == both.texts(number)[0]
        assert alone.row_tokens(number) == [len(text.prompt_ids) + len(text.target_ids)]
        assert alone.plain_row(number).tolist() == both.plain_row(number).tolist()
        [width], wide = alone.row_tokens(number), max(both.row_tokens(number))
        assert rows_of(alone.texts(number), editor.encoder.pad_id)[0].shape == (1, width)
        assert rows_of(both.texts(number), editor.encoder.pad_id)[0].shape == (2, wide)
        assert wide > width + 10  # control: the template costs what it costs


def test_a_preset_that_trains_raw_rows_alone_is_measured_once():
    assert edit_speed.wanted(["default", "paper"], ["raw", "both"]) == [
        ("default", "raw"),
        ("default", "both"),
        ("paper", "raw"),
    ]


def test_the_bytes_above_a_site_are_those_of_its_later_blocks_the_norm_and_the_head(editor):
    model = editor.host.model
    block = sum(p.numel() for p in model.model.layers[2].parameters())
    rest = model.model.norm.weight.numel() + model.lm_head.weight.numel()
    first, last = (bytes_above(model, site) for site in (editor.sites[0], editor.sites[-1]))
    assert [site.layer for site in editor.sites] == [2] or first > last
    assert bytes_above(model, editor.sites[0]._replace(layer=2)) == 4 * rest
    assert bytes_above(model, editor.sites[0]._replace(layer=1)) == 4 * (rest + block)


def quick(script, tmp_path, *options):
    path = tmp_path / f"{script}.json"
    source = str(Path(baft.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--threads", "1", "--json", str(path)]
        + [str(option) for option in options],
        env={**os.environ, "PYTHONPATH": source, "BAFT_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["benchmark"] == script
    assert found["quick"] is True
    return found["results"]


@pytest.mark.slow
def test_edit_speed(host_folder, data, tmp_path):
    results = quick("edit_speed", tmp_path, "--model", host_folder, "--data", data, "--without", "pyreft")
    forms = ("raw/short", "raw/long", "both/short", "both/long")
    assert list(results) == [f"default/{form}" for form in forms]
    for name, found in results.items():
        assert {"our cheap pass", "our full pass", "LoRA", "plain forward"} <= set(found["seconds"])
        assert all(spread["n"] == 2 and spread["minimum"] > 0 for spread in found["seconds"].values())
        assert (found["prompt_tokens"][0] == 128) is name.endswith("long")
        assert found["n_rows"] == (1 if "/raw/" in name else 2)
        assert all(len(row) == found["n_rows"] for row in found["row_tokens"])
        assert found["width"]["maximum"] == max(max(row) for row in found["row_tokens"])
        assert found["ratios"]["our cheap pass / memory bound"]["median"] > 0
        assert found["edits"]["whole edit"]["decoded"] == found["edits"]["whole edit, full pass"]["decoded"]


@pytest.mark.slow
def test_step_profile(host_folder, data, tmp_path):
    results = quick("step_profile", tmp_path, "--model", host_folder, "--data", data)
    assert sum(results["share"].values()) == pytest.approx(1.0)
    assert results["share"]["products with frozen weights"] > 0
    assert results["products_alone_s"]["median"] > 0


def test_stacked_speed(host_folder, data, tmp_path):
    results = quick("stacked_speed", tmp_path, "--model", host_folder, "--data", data)
    assert set(results) == {"alone", "stack of 1", "stack of 10"}
    assert results["alone"]["alone / this"]["median"] == 1.0
    assert all(found["seconds_an_edit"]["minimum"] > 0 for found in results.values())


@pytest.mark.slow
def test_generate_speed(host_folder, data, tmp_path):
    results = quick("generate_speed", tmp_path, "--model", host_folder, "--data", data)
    assert set(results["edited / host, tokens per s"]) == {"shut", "open"}
    shares = results["share_of_tokens_with_an_open_gate"]
    assert shares["open"] > shares["shut"]


@pytest.mark.slow
def test_bank_scale(host_folder, tmp_path):
    kept = tmp_path / "all.baft"
    results = quick("bank_scale", tmp_path, "--model", host_folder, "--keep", kept)
    assert set(results["seconds to"]) == {"save all", "load", "remove one"}
    written = {file.name: file.stat().st_mtime_ns for file in kept.iterdir()}
    results = quick("bank_scale", tmp_path, "--model", host_folder, "--keep", kept)
    assert results["n_edits"] == results["n_distinct_prompts"] + 1 == 20  # one was removed
    assert set(results["tokens per s, with all / with none"]) == {"none acts", "one acts"}
    assert set(results["seconds to"]) == {"load", "remove one"}
    assert {file.name: file.stat().st_mtime_ns for file in kept.iterdir()} == written


@pytest.mark.slow
def test_memory(host_folder, data, tmp_path):
    results = quick("memory", tmp_path, "--model", host_folder, "--data", data)
    names = ["first edit ever, empty cache", "first edit", "second edit"]
    assert list(results) == [f"{name}, short prompt" for name in names]
    assert all(found["resident_before"]["minimum"] > found["host_bytes"] for found in results.values())


def test_an_edit_on_an_empty_cache_finds_nothing_of_an_earlier_one(host_folder, data, tmp_path, monkeypatch):
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path))
    monkeypatch.setattr(background, "_WORTH_KEEPING_S", 0.0)
    made, compute = [], background._compute

    def counted(*given):
        made.append(given)
        return compute(*given)

    monkeypatch.setattr(background, "_compute", counted)
    options = ["--model", str(host_folder), "--data", str(data), "--threads", str(torch.get_num_threads())]
    for contender, n_made in ((memory.FIRST, 1), (memory.FIRST, 1), (memory.EVER, 2), (memory.FIRST, 2)):
        memory.main([*options, "--contender", contender])
        assert len(made) == n_made, contender
    assert len(list((tmp_path / "background").iterdir())) == 1


@pytest.mark.slow
def test_scale_7b(tmp_path):
    results = quick("scale_7b", tmp_path)
    for found in results["settings"].values():
        assert found["n_steps"] == [15, 15, 15]
        assert found["why_full"] is None
        assert 0 < found["share_of_bound"]["median"] < 1, "nothing is faster than the memory"
    assert results["peak_of_process"] > results["host_bytes"]
