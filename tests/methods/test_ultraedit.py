"""UltraEdit's regression against its normal equations, its statistics and its gradients."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baft.errors import ConfigError
from baft.hosts.models import Host
from baft.hosts.patches import up_projections
from baft.methods.ultraedit import Running, UltraEditEditor, shift
from baft.types import Edit, EditRequest
from tiny import tiny_host, tiny_tokenizer

CONFIG = UltraEditEditor.preset("paper")
FIRST = EditRequest((Edit("The tower is in the city of", "Ro"), Edit("Paris is in", "Bern")))
SECOND = EditRequest((Edit("A river", " dry"),))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(n=st.integers(1, 12), d_in=st.integers(1, 8), d_out=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_shift_solves_its_normal_equations(n, d_in, d_out, seed):
    h, normalized = normal(n, d_in, seed=seed), normal(n, d_in + d_out, seed=seed + 1)
    up, down = shift(h, normalized, 0.3, 2.0)
    inputs, gradients = normalized[:, :d_in], normalized[:, d_in:]
    V = -0.3 * (inputs * inputs).sum(-1, keepdim=True) * gradients
    direct = torch.linalg.solve(h.T @ h + 2.0 * torch.eye(d_in, dtype=h.dtype), h.T @ V).T
    torch.testing.assert_close(up @ down, direct, atol=1e-9, rtol=1e-9)
    other = torch.linalg.solve(h.T @ h + torch.eye(d_in, dtype=h.dtype), h.T @ V).T
    assert not torch.allclose(up @ down, other, atol=1e-9)  # control


@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_running_statistics_are_those_of_all_features_together(cuts, seed):
    features = 3.0 + normal(sum(cuts), 4, seed=seed)
    running = Running.empty(4)
    for part in features.split(cuts):
        running = running.and_also(part)
    assert float(running.count) == len(features)
    torch.testing.assert_close(running.mean, features.mean(0), atol=1e-9, rtol=1e-9)
    if len(features) > 1:
        expected = (features - features.mean(0)) / (features.std(0) + 1e-8)
        torch.testing.assert_close(running.normalized(features), expected, atol=1e-9, rtol=1e-9)
    else:
        assert torch.equal(running.normalized(features), torch.zeros_like(features))


def test_features_are_inputs_and_gradients_where_targets_are_predicted(host):
    """Against gradients of the host's own outputs, text by text, by hooks of our own."""
    editor = UltraEditEditor(host, CONFIG)
    texts = [editor.encoder.edit(edit.prompt, edit.target, eos=False) for edit in FIRST.edits]
    features, loss = editor._features({}, texts)
    expected, losses = {module: [] for module in editor.modules}, []
    for text in texts:
        seen = {}

        def watch(module, given, output, seen=seen):
            output = output.detach().requires_grad_() if not output.requires_grad else output
            output.retain_grad()
            seen[module] = given[0], output
            return output

        handles = [host.model.get_submodule(one).register_forward_hook(watch) for one in editor.modules]
        logits = host.model(torch.tensor([text.prompt_ids + text.target_ids[:-1]])).logits[0]
        for handle in handles:
            handle.remove()
        predicted = logits[len(text.prompt_ids) - 1 :]
        one = torch.nn.functional.cross_entropy(predicted, torch.tensor(text.target_ids))
        one.backward()
        losses.append(one.item())
        for module in editor.modules:
            given, output = seen[host.model.get_submodule(module)]
            where = slice(len(text.prompt_ids) - 1, None)
            expected[module].append((given[0, where].detach(), output.grad[0, where]))
    assert loss == pytest.approx(sum(losses) / 2)
    for module, (h, g) in features.items():
        torch.testing.assert_close(h, torch.cat([h for h, _ in expected[module]]), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(g, torch.cat([g for _, g in expected[module]]), atol=1e-9, rtol=1e-9)
        assert float(g.abs().max()) > 0


def test_statistics_go_on_from_request_to_request_and_back(host):
    editor = UltraEditEditor(host, dataclasses.replace(CONFIG, learning_rate=1e-3))
    editor.apply(FIRST)
    first = editor.state_dict()
    n_first = sum(len(editor.encoder.edit(e.prompt, e.target, eos=False).target_ids) for e in FIRST.edits)
    n_second = len(editor.encoder.edit("A river", " dry", eos=False).target_ids)
    n_modules = len(editor.modules)
    assert n_modules == 2
    count = {n: f"{n}.shape48x32.count" for n in (0, 1)}
    assert float(first[count[0]]) == n_first * n_modules
    editor.apply(SECOND)
    assert float(editor.state_dict()[count[1]]) == (n_first + n_second) * n_modules
    editor.undo()
    assert editor.state_dict().keys() == first.keys()
    editor.apply(SECOND)
    again = UltraEditEditor(host, editor.config)
    again.apply(FIRST)
    again.apply(SECOND)
    assert all(torch.equal(again.state_dict()[name], one) for name, one in editor.state_dict().items())


def test_a_warm_up_changes_where_statistics_start(host):
    editor = UltraEditEditor(host, dataclasses.replace(CONFIG, warm_up=3))
    editor.apply(SECOND)
    counted = float(editor.state_dict()["0.shape48x32.count"])
    assert counted > 2 * len(editor.encoder.edit("A river", " dry", eos=False).target_ids)


def test_many_tokens_are_kept_as_the_matrix_they_come_to(host):
    edits = tuple(Edit(f"Number {i} of the list is", "Bern") for i in range(10))  # 50 tokens, of 32 inputs
    editor = UltraEditEditor(host, dataclasses.replace(CONFIG, learning_rate=1e-3))
    editor.apply(EditRequest(edits))
    assert editor.state_dict()["0.layer1.gate.down"].shape == (32, 32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "opt", "gemma3_text"])
def test_modules_are_found_by_structure(family):
    host = Host("tiny", tiny_host(family), tiny_tokenizer(), family)
    names = up_projections(host.model, 1)
    assert len(names) == (2 if family in ("llama", "gemma3_text") else 1)
    if family == "llama":
        assert [name.rpartition(".")[2] for name in names] == ["gate_proj", "up_proj"]
    editor = UltraEditEditor(host, CONFIG)
    editor.apply(SECOND)
    assert len(editor.edited.patches) == 2


def test_settings_out_of_range_are_refused(host):
    for settings in ({"learning_rate": 0.0}, {"ridge": -1.0}, {"warm_up": -1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            dataclasses.replace(CONFIG, **settings)
    with pytest.raises(ConfigError, match="nothing to edit"):
        dataclasses.replace(CONFIG, gate_layers=(), up_layers=())
    with pytest.raises(ConfigError, match="out of range"):
        UltraEditEditor(host, dataclasses.replace(CONFIG, up_layers=(3,)))
