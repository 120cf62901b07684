"""What the adapters add is what peft's own model of the host adds, and what LoRA says by hand."""

import copy
import math
import sys
import warnings

import peft
import pytest
import torch

from baft.errors import ConfigError, UnsupportedHostError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.methods.adapters import AdapterConfig, projections, seeded
from baft.methods.base import methods
from baft.methods.lora import AdaLoraConfig, AdaLoraEditor, LoraEditor
from baft.methods.texts import renderings
from baft.types import Edit, EditRequest
from tiny import HOSTS, N_LAYERS, tiny_host, tiny_tokenizer

EDITS = (Edit("The tower is in the city of", "Rome"), Edit("A river runs", "dry"))
REQUEST, MORE = EditRequest(EDITS), EditRequest((Edit("Nine hats of", "x"),))
STEPS = {"learning_rate": 1e-2, "max_steps": 5, "stop_margin": None, "schedule": "constant"}
LORA = AdapterConfig(**STEPS, rank=4, alpha=6.0)
ADALORA = AdaLoraConfig(**STEPS, rank=2, initial_rank=4, alpha=6.0, warmup_steps=1, final_steps=1)


def edited(kind, host, config, *requests, seed=0):
    editor = kind(host, config, seed=seed)
    for request in requests:
        editor.apply(request)
    return editor


def some_ids(host):
    return torch.tensor([Encoder.for_host(host).prompt("The tower is in the city of Rome")])


def peft_of(editor, host, family="llama"):
    """Peft's own model around a copy of the host, with the factors of an editor."""
    targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[family]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # peft asks transformers by an old name, and tells of transposed layers
        model = peft.get_peft_model(copy.deepcopy(host.model), editor.peft_config(list(targets))).eval()
    with torch.no_grad():
        for name in editor.modules:
            layer = model.base_model.model.get_submodule(name)
            for key, parameter in editor.parameters(layer).items():
                parameter.copy_(editor.state[f"{name}.{key}"])
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "config"), [(LoraEditor, LORA), (AdaLoraEditor, ADALORA)])
def test_the_edited_model_is_pefts_own(kind, config, family):
    host = Host("tiny", tiny_host(family), tiny_tokenizer(), family)
    editor, ids = edited(kind, host, config, REQUEST, MORE), some_ids(host)
    model = peft_of(editor, host, family)
    torch.testing.assert_close(editor.edited(ids).logits, model(ids).logits, atol=1e-9, rtol=0)
    assert float((model(ids).logits - host.model(ids).logits).abs().max()) > 1e-3  # control


def test_lora_is_what_it_is_by_hand(host):
    """Hu et al., section 4.1, from the same start: the loss at every step, and the factors after the last."""
    editor = LoraEditor(host, LORA)
    outcome = editor.apply(REQUEST)
    model = copy.deepcopy(host.model).requires_grad_(False)
    texts = renderings(Encoder.for_host(host), EDITS, chat=False, eos=False)
    with seeded("lora 0 0", torch.device("cpu")):
        starts = {}
        for (
            name
        ) in editor.modules:  # the order in which peft draws: an A, whose first draw is thrown away, a B
            d_out, d_in = model.get_submodule(name).weight.shape
            drawn = [torch.nn.Linear(d_in, 4, bias=False), torch.nn.Linear(4, d_out, bias=False)]
            torch.nn.init.kaiming_uniform_(drawn[0].weight, a=math.sqrt(5))
            starts[name] = drawn[0].weight.detach().double()
    factors = {
        name: (
            A.clone().requires_grad_(),
            A.new_zeros(len(model.get_submodule(name).weight), 4).requires_grad_(),
        )
        for name, A in starts.items()
    }
    for name, (A, B) in factors.items():
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, A=A, B=B: output + 6.0 / 4 * args[0] @ A.T @ B.T
        )
    adam = torch.optim.Adam([one for pair in factors.values() for one in pair], lr=1e-2)
    losses = []
    for step in range(6):
        loss = sum(loss_of(model, text) for text in texts) / len(texts)
        losses.append(loss.detach().item())
        if step < 5:
            adam.zero_grad()
            loss.backward()
            adam.step()
    torch.testing.assert_close(outcome.losses, tuple(losses), atol=1e-9, rtol=0)
    for name, (A, B) in factors.items():
        torch.testing.assert_close(editor.state[f"{name}.A"], A.detach(), atol=1e-9, rtol=0)
        torch.testing.assert_close(editor.state[f"{name}.B"], B.detach(), atol=1e-9, rtol=0)
        assert float((A.detach() - starts[name]).abs().max()) > 1e-3  # control: it moved
    assert losses[-1] < losses[0]


def test_adalora_is_pefts_own_loop_around_the_host(host):
    """Peft's model of the host, trained as its guide says, from the same start: every factor after the last
    step, with a pruning in between. The distance from orthonormal is by Zhang et al., equation 7, with norms
    that are not squared, and averaged, as in peft."""
    config = AdaLoraConfig(
        **{**STEPS, "max_steps": 6}, rank=2, initial_rank=4, warmup_steps=1, final_steps=1, pruning_interval=2
    )
    editor = AdaLoraEditor(host, config)
    targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an old name
        with seeded("adalora 0 0", torch.device("cpu")):
            model = peft.get_peft_model(copy.deepcopy(host.model), editor.peft_config(list(targets)))
    outcome = editor.apply(REQUEST)
    texts = renderings(Encoder.for_host(host), EDITS, chat=False, eos=False)
    layers = {name: model.base_model.model.get_submodule(name) for name in editor.modules}
    trained = {
        f"{name}.{key}": one for name in layers for key, one in editor.parameters(layers[name]).items()
    }
    start = {name: one.detach().clone() for name, one in trained.items()}
    adam = torch.optim.Adam(trained.values(), lr=1e-2)
    losses = []
    for step in range(1, 8):
        apart = [
            torch.linalg.norm(product - torch.eye(4, dtype=product.dtype))
            for name in layers
            for product in (
                trained[f"{name}.P"].T @ trained[f"{name}.P"],
                trained[f"{name}.Q"] @ trained[f"{name}.Q"].T,
            )
        ]
        loss = sum(loss_of(model, text) for text in texts) / len(texts)
        loss = loss + config.orthogonality * sum(apart) / len(apart)
        losses.append(loss.item())
        if step < 7:
            adam.zero_grad()
            loss.backward()
            adam.step()
            model.base_model.update_and_allocate(step)
    torch.testing.assert_close(outcome.losses, tuple(losses), atol=1e-9, rtol=0)
    for name, one in trained.items():
        torch.testing.assert_close(editor.state[name], one.detach(), atol=1e-9, rtol=0)
    pruned = [name for name, one in trained.items() if name.endswith(".E") and bool((one == 0).any())]
    assert pruned  # controls: there was something to prune, and the factors moved
    assert any(float((one.detach() - start[name]).abs().max()) > 1e-3 for name, one in trained.items())


def loss_of(model, text):
    logits = model(torch.tensor([text.prompt_ids + text.target_ids])).logits[0]
    at = len(text.prompt_ids) - 1
    return torch.nn.functional.cross_entropy(
        logits[at : at + len(text.target_ids)], torch.tensor(text.target_ids)
    )


def test_adalora_keeps_the_ranks_it_may(host):
    """After the last pruning, `rank` triplets of a projection are left on average; before, all of them."""
    n_modules = 2 * N_LAYERS
    states = {}
    for steps, final in ((5, 1), (5, 3)):
        config = AdaLoraConfig(**{**STEPS, "max_steps": steps}, rank=2, initial_rank=4, final_steps=final)
        states[final] = edited(AdaLoraEditor, host, config, REQUEST).state
    for state in states.values():
        kept = sum(int((tensor != 0).sum()) for name, tensor in state.items() if name.endswith(".E"))
        assert kept == 2 * n_modules
    free = AdaLoraConfig(**STEPS, rank=4, initial_rank=4)
    kept = [
        one for name, one in edited(AdaLoraEditor, host, free, REQUEST).state.items() if name[-2:] == ".E"
    ]
    assert sum(int((tensor != 0).sum()) for tensor in kept) == 4 * n_modules  # control


def test_adaloras_loss_draws_its_factors_to_orthonormal(host):
    """Zhang's equation 4; peft takes the mean of the norms over all P and Q."""
    losses = {}
    for weight in (0.0, 0.5):
        config = AdaLoraConfig(**{**STEPS, "max_steps": 2}, initial_rank=8, orthogonality=weight)
        losses[weight] = AdaLoraEditor(host, config).apply(REQUEST).losses[0]
    config = AdaLoraConfig(**{**STEPS, "learning_rate": 1e-12, "max_steps": 2}, initial_rank=8)
    state = edited(AdaLoraEditor, host, config, REQUEST).state  # as good as where it began
    norms = []
    for name, one in state.items():
        if not name.endswith(".E"):
            rows = one.T if name.endswith(".P") else one
            norms.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(8, dtype=one.dtype)).item())
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * sum(norms) / len(norms), abs=1e-8)


@pytest.mark.parametrize(("kind", "config"), [(LoraEditor, LORA), (AdaLoraEditor, ADALORA)])
def test_dropout_is_seeded_and_leaves_the_worlds_random_numbers_alone(host, kind, config):
    changed = {name: getattr(config, name) for name in config.__dataclass_fields__} | {"dropout": 0.5}
    noisy = type(config)(**changed)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = edited(kind, host, noisy, REQUEST).state
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again = edited(kind, host, noisy, REQUEST).state
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (edited(kind, host, noisy, REQUEST, seed=1), edited(kind, host, config, REQUEST)):
        assert not all(torch.equal(first[name], other.state[name]) for name in first)  # control


def test_under_dropout_the_margins_are_those_of_the_model_in_force(host):
    config = AdapterConfig(
        learning_rate=1e-2, max_steps=60, stop_margin=1.0, dropout=0.3, schedule="constant"
    )
    editor = LoraEditor(host, config)
    outcome = editor.apply(EditRequest(EDITS[:1]))
    (text,) = renderings(editor.encoder, EDITS[:1], chat=False, eos=False)
    with torch.no_grad():
        logits = editor.edited(torch.tensor([text.prompt_ids + text.target_ids])).logits[0]
    logits = logits[len(text.prompt_ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(text.target_ids).unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, torch.tensor(text.target_ids).unsqueeze(1), -math.inf).amax(1)
    assert outcome.stopped == "margin"
    assert outcome.margins[0] == pytest.approx(float((chosen - others).min()), abs=1e-9)
    assert outcome.margins[0] >= 1.0


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("family", "attention"), [one for one in HOSTS if one[0] != "phi3"])
def test_peft_knows_the_projections_of_a_family(family, attention):
    model = tiny_host(family, attention=attention)
    found = projections(model)
    assert {site.layer for site in found.values()} == set(range(N_LAYERS))
    targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[family]
    wrapped = peft.tuners.lora.LoraModel(model, peft.LoraConfig(target_modules=targets), "default")
    assert list(found) == wrapped.targeted_module_names


def test_a_host_without_known_projections_is_refused():
    with pytest.raises(UnsupportedHostError, match="no projections for a host of the family 'phi3'"):
        projections(tiny_host("phi3"))


def test_projections_of_a_family_without_a_name_in_peft_go_by_theirs(monkeypatch):
    model = tiny_host("llama")
    known = dict(projections(model))
    monkeypatch.setattr(model.config, "model_type", "new")
    assert projections(model) == known


def test_without_peft_it_says_what_to_install(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in ("lora", "adalora"):
        kind = methods.get(name)
        with pytest.raises(ConfigError, match=r"pip install 'baft\[lora\]'"):
            kind(host, kind.preset("default"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is out of range: got 0, expected 1 or more"),
        ({"alpha": 0.0}, "alpha is out of range"),
        ({"dropout": 1.0}, "dropout is out of range"),
        ({"initial_rank": 4}, r"initial_rank is out of range: got 4, expected rank \(8\) or more"),
        ({"warmup_steps": 20, "final_steps": 10}, "no step is left for pruning"),
        ({"pruning_interval": 0}, "pruning_interval is out of range"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdaLoraConfig(**settings)


def test_a_host_in_half_precision_is_trained_in_float32():
    host = Host("tiny", tiny_host(dtype=torch.bfloat16), tiny_tokenizer(), "bfloat16")
    for kind, config in ((LoraEditor, LORA), (AdaLoraEditor, ADALORA)):
        editor = edited(kind, host, config, REQUEST)
        assert {tensor.dtype for tensor in editor.state.values()} == {torch.float32}
        assert editor.edited(some_ids(host)).logits.dtype == torch.bfloat16


def test_adalora_refuses_a_host_that_is_split_over_devices(monkeypatch):
    host = Host("tiny", tiny_host(), tiny_tokenizer(), "split")
    devices = iter(("cuda:0", "cuda:1", "cuda:1"))
    monkeypatch.setattr("baft.methods.lora.site_device", lambda *_: torch.device(next(devices)))
    with pytest.raises(UnsupportedHostError, match="'tiny' is split over cuda:0, cuda:1: load it on one"):
        AdaLoraEditor(host, ADALORA)
