"""Hosts in every precision learn, save and forget; test_gpu.py makes the same checks on an accelerator."""

import pytest
import torch

from baft.methods.base import methods
from training_checks import (
    PRESETS,
    check_background,
    check_editing,
    check_method,
    check_saving_across,
    check_scopes,
    check_shut_gates_in_batches,
)

CPU = "cpu"


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("baft.hosts.background._WORTH_KEEPING_S", 0.0)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS, ids="/".join)
def test_an_edit_is_learned_and_taken_back(preset, dtype):
    check_editing(*preset, dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", methods.names())
def test_every_method_learns_and_takes_back(method, dtype):
    check_method(method, dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompts_on_which_no_gate_opens_keep_every_bit_in_a_batch(dtype):
    check_shut_gates_in_batches(dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_with_a_scope_do_not_know_each_other(monkeypatch, dtype):
    check_scopes(monkeypatch, dtype=dtype, device=CPU)


def test_an_artifact_goes_from_one_device_to_another(tmp_path):
    check_saving_across(tmp_path, CPU, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_background_stands_where_its_site_does(tmp_path, monkeypatch, dtype):
    check_background(tmp_path, monkeypatch, dtype=dtype, device=CPU)
