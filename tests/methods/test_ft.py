"""Fine-tuning by what is added to a weight is fine-tuning of the weight."""

import copy

import pytest
import torch

from baft.hosts import kernels
from baft.hosts.encoding import Encoder
from baft.hosts.kernels import has_fast_linears
from baft.hosts.models import Host
from baft.methods.ft import DELTA, FtConfig, FtLEditor
from baft.methods.texts import renderings
from baft.types import Edit, EditRequest
from tiny import tiny_host, tiny_tokenizer

LAYER, N_STEPS = 1, 6
EDITS = (Edit("The tower is in the city of", "Rome"), Edit("A river runs", "dry"), Edit("Nine hats of", "x"))


def settings(**changes):
    fixed = {"layer": LAYER, "learning_rate": 1e-2, "max_steps": N_STEPS, "schedule": "constant"}
    return FtConfig(**{**fixed, "stop_margin": None, **changes})


def trained(host, config, *requests):
    editor = FtLEditor(host, config)
    outcomes = [editor.apply(request) for request in requests]
    return editor.state_dict()[DELTA], outcomes


def slow_loss(model, texts, objective):
    """One text after the other, one token after the other, without padding."""
    of_texts = []
    for text in texts:
        logits = model(torch.tensor([text.prompt_ids + text.target_ids])).logits[0]
        last = len(text.prompt_ids) - 1
        places = [last + i if objective == "target" else last for i in range(len(text.target_ids))]
        chosen = [
            logits[at].log_softmax(-1)[token] for at, token in zip(places, text.target_ids, strict=True)
        ]
        of_texts.append(-sum(chosen) / len(chosen))
    return sum(of_texts) / len(of_texts)


def weight_of(model):
    return model.model.layers[LAYER].mlp.down_proj.weight


def tuned_by_hand(host, edits, objective, bound, n_steps=N_STEPS):
    """The weight itself under torch's own Adam, on a copy of the host: how far it moved, and the losses."""
    model = copy.deepcopy(host.model).requires_grad_(False)
    weight = weight_of(model).requires_grad_()
    start = weight.detach().clone()
    texts = renderings(Encoder.for_host(host), edits, chat=False, eos=False)
    adam, losses = torch.optim.Adam([weight], lr=1e-2), []
    for _ in range(n_steps):
        loss = slow_loss(model, texts, objective)
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
        if bound is not None:
            with torch.no_grad():
                weight.copy_(torch.maximum(torch.minimum(weight, start + bound), start - bound))
    losses.append(slow_loss(model, texts, objective).item())
    return weight.detach() - start, losses


@pytest.mark.parametrize("bound", [None, 0.02])
@pytest.mark.parametrize("objective", ["target", "last_prompt"])
def test_it_is_the_weight_that_is_trained(host, objective, bound):
    delta, (outcome,) = trained(host, settings(objective=objective, norm_bound=bound), EditRequest(EDITS))
    moved, losses = tuned_by_hand(host, EDITS, objective, bound)
    torch.testing.assert_close(delta, moved, atol=1e-9, rtol=0)
    torch.testing.assert_close(outcome.losses, tuple(losses), atol=1e-9, rtol=0)
    other = {"target": "last_prompt", "last_prompt": "target"}[objective]
    assert float((delta - tuned_by_hand(host, EDITS, other, bound)[0]).abs().max()) > 1e-3  # control


def test_the_bound_is_kept_over_all_requests(host):
    requests = [EditRequest((edit,)) for edit in EDITS]
    free, _ = trained(host, settings(), *requests)
    assert float(free.abs().max()) > 0.03  # control
    bounded, _ = trained(host, settings(norm_bound=0.03), *requests)
    assert float(bounded.abs().max()) == 0.03


def test_the_edited_model_is_the_host_with_the_weight_changed(host):
    editor = FtLEditor(host, settings())
    editor.apply(EditRequest(EDITS))
    model, ids = copy.deepcopy(host.model), torch.tensor([Encoder.for_host(host).prompt("A river runs")])
    with torch.no_grad():
        plain = model(ids).logits
        weight_of(model).add_(editor.state[DELTA])
        torch.testing.assert_close(editor.edited(ids).logits, model(ids).logits, atol=1e-9, rtol=0)
    assert float((plain - model(ids).logits).abs().max()) > 1e-2  # control


def test_a_request_goes_on_where_the_last_one_ended(host):
    """The second request starts at the first one's weight, with a fresh optimizer."""
    delta, _ = trained(host, settings(), *(EditRequest((edit,)) for edit in EDITS[:2]))
    first, _ = tuned_by_hand(host, EDITS[:1], "target", None)
    on_top = copy.deepcopy(host.model)
    with torch.no_grad():
        weight_of(on_top).add_(first)
    second, _ = tuned_by_hand(Host("on top", on_top, host.tokenizer, ""), EDITS[1:2], "target", None)
    torch.testing.assert_close(delta, first + second, atol=1e-9, rtol=0)


@pytest.mark.skipif(not has_fast_linears(), reason="products are rerouted on CPUs whose torch has oneDNN")
def test_gradients_reach_the_weight_where_products_are_rerouted(monkeypatch):
    monkeypatch.setattr(kernels, "_is_intel", lambda: False)
    model = tiny_host("llama", dtype=torch.float32)
    host = Host("tiny", model, tiny_tokenizer(), "float32")
    delta, _ = trained(host, settings(max_steps=2), EditRequest(EDITS))
    moved, _ = tuned_by_hand(host, EDITS, "target", None, n_steps=2)
    close = (delta - moved).abs() < 1e-3  # where a gradient is nearly zero, its sign is rounding
    assert float(close.double().mean()) > 0.99
    assert float(delta.abs().max()) > 1e-2  # control
