"""WISE: routing, thresholds, masks, shards and memories, each against a slow loop or cases by hand."""

import copy
import dataclasses

import pytest
import torch

from baft.errors import ConfigError
from baft.hosts.encoding import Encoder
from baft.hosts.patches import Seen, weight_of
from baft.methods.base import methods
from baft.methods.texts import renderings
from baft.methods.wise import PAPER, WiseConfig
from baft.methods.wise_parts import (
    NOWHERE,
    Memory,
    PromptStates,
    WisePatch,
    activations,
    margin_loss,
    mask_of,
    route,
    shard_sizes,
)
from baft.nn.ties import ties
from baft.types import Edit, EditRequest

# A random host: see the conformance suite.
QUICK = {
    **{"alpha": 50.0, "beta": 0.1, "gamma": 1e-3, "norm_bound": None, "n_openings": 0, "layer": 0},
    **{"mask_ratio": 0.9, "learning_rate": 0.1, "optimizer": "adam", "max_steps": 40, "stop_margin": 0.7},
}
FACTS = [
    EditRequest((Edit("The tower is in the city of", "Ro"),)),
    EditRequest((Edit("Paris is in", "Be"),)),
    EditRequest((Edit("Nine hats of", "Co"),)),
    EditRequest((Edit("A river", " dry"),)),
    EditRequest((Edit("The king of France was", "Al"),)),
]


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def editor(host, *, seed=0, **settings):
    kind = methods.get("wise")
    return kind(host, dataclasses.replace(kind.preset("default"), **{**QUICK, **settings}), seed=seed)


def padded(encoder, *prompts, side="right"):
    rows = [encoder.prompt(one) for one in prompts]
    return encoder.pad(rows, [len(row) for row in rows], side=side)


@torch.no_grad()
def logits_of(model, batch):
    return model(batch.input_ids, batch.attention_mask, n_prompt_tokens=batch.n_prompt_tokens).logits


def slow_activation(delta, states):
    """The mean length of the change of the module's output, token by token."""
    return sum(((delta @ state) ** 2).sum().item() ** 0.5 for state in states) / len(states)


def inputs_of(host, module, prompt):
    """What a module is given at every token of a prompt, by a hook of our own."""
    caught = []
    handle = host.model.get_submodule(module).register_forward_hook(
        lambda _, given, __: caught.append(given[0])
    )
    try:
        with torch.no_grad():
            host.model(torch.tensor([Encoder.for_host(host).prompt(prompt)]))
    finally:
        handle.remove()
    return caught[0][0]


def test_activations_are_those_of_a_slow_loop():
    delta, states = normal(4, 6, seed=0), normal(7, 6, seed=1)
    prompts = PromptStates(states, torch.tensor([0, 0, 1, 1, 1, 1, 2]), 3)
    expected = [slow_activation(delta, states[i:j]) for i, j in ((0, 2), (2, 6), (6, 7))]
    torch.testing.assert_close(activations(delta, prompts).tolist(), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        activations(delta, prompts.select([2, 0])).tolist(),
        [expected[2], expected[0]],
        atol=1e-12,
        rtol=1e-12,
    )
    both = prompts.and_more(prompts)
    torch.testing.assert_close(activations(delta, both).tolist(), expected * 2, atol=1e-12, rtol=1e-12)


def test_margins_by_hand():
    """The edit's 12 and 25, others' 4 and 7: 7 is 2 too much, 12 is 8 too little and too near to both."""
    found = margin_loss(torch.tensor([12.0, 25.0]), torch.tensor([4.0, 7.0]), 5.0, 20.0, 10.0)
    assert found.item() == pytest.approx((0 + 2) / 2 + (8 + 0) / 2 + (2 + 5 + 0 + 0) / 4)
    assert margin_loss(torch.tensor([20.0]), torch.tensor([5.0]), 5.0, 20.0, 10.0).item() == 0.0


def test_routes_by_hand():
    """Thresholds 10 and 3: none reached, the second, the first, both and the greater wins, twice."""
    of_memories = torch.tensor([[9.9, 9.9, 10.0, 12.0, 11.0], [2.9, 3.0, 2.0, 11.0, 12.0]])
    assert route(of_memories, torch.tensor([10.0, 3.0])).tolist() == [NOWHERE, 1, 0, 0, 1]


def test_the_patch_is_that_of_a_slow_loop():
    """Prompts of several lengths, with padding and replies; the prompt alone decides."""
    first, second = normal(3, 5, seed=0), 2.0 * normal(3, 5, seed=1)
    inputs, output = normal(4, 6, 5, seed=2), normal(4, 6, 3, seed=3)
    prompt = torch.tensor(
        [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    ).bool()
    acts = [
        [slow_activation(one, x[keep]) for one in (first, second)]
        for x, keep in zip(inputs, prompt, strict=True)
    ]
    thresholds = sorted(a for a, _ in acts)[2], sorted(b for _, b in acts)[2]
    expected, routes = output.clone(), []
    for row, both in enumerate(acts):
        reached = [(act, i) for i, act in enumerate(both) if act >= thresholds[i] - 1e-12]
        routes.append(max(reached)[1] if reached else NOWHERE)
        if reached:
            expected[row] += inputs[row] @ (first, second)[routes[-1]].T
    assert NOWHERE in routes
    assert len(set(routes)) > 1
    memories = [Memory(first, thresholds[0] - 1e-12), Memory(second, thresholds[1] - 1e-12)]
    module, memo = torch.nn.Identity(), {}
    found = WisePatch(memories)(module, inputs, output, Seen(prompt, prompt, memo))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    untouched = [row for row, where in enumerate(routes) if where == NOWHERE]
    assert torch.equal(found[untouched], output[untouched])
    flat = WisePatch(memories)(module, inputs.flatten(0, 1), output.flatten(0, 1), Seen(prompt, prompt, {}))
    assert torch.equal(flat, found.flatten(0, 1))
    # A token of the reply, two beams a prompt: it goes where its prompt went.
    reply, put_out = normal(8, 1, 5, seed=4), normal(8, 1, 3, seed=5)
    nothing = torch.zeros(8, 1, dtype=torch.bool)
    found = WisePatch(memories)(module, reply, put_out, Seen(~nothing, nothing, memo))
    for row in range(8):
        where = routes[row // 2]
        change = 0.0 if where == NOWHERE else reply[row] @ (first, second)[where].T
        torch.testing.assert_close(found[row], put_out[row] + change, atol=1e-12, rtol=1e-12)


def test_a_prompt_in_parts_is_routed_as_a_whole():
    delta, inputs, output = normal(3, 5, seed=0), normal(1, 4, 5, seed=1), normal(1, 4, 3, seed=2)
    prompt = torch.ones(1, 4, dtype=torch.bool)
    act = slow_activation(delta, inputs[0])
    for threshold, is_routed in ((act * 0.999, True), (act * 1.001, False)):
        patch, memo = WisePatch([Memory(delta, threshold)]), {}
        for part in (slice(0, 3), slice(3, 4)):
            seen = Seen(prompt[:, part], prompt[:, part], memo)
            found = patch(torch.nn.Identity(), inputs[:, part], output[:, part], seen)
        assert (found is not None) == is_routed


def test_masks_are_as_drawn():
    shape = (200, 300)
    masks = [mask_of(shape, 0.2, 0, shard) for shard in range(3)]
    for mask in masks:
        assert mask.double().mean().item() == pytest.approx(0.2, abs=0.01)
    overlap = (masks[0] & masks[1]).double().mean().item()
    assert overlap == pytest.approx(0.04, abs=0.005)  # drawn apart, as in the paper: by chance, not disjoint
    assert torch.equal(masks[1], mask_of(shape, 0.2, 0, 1))
    assert not torch.equal(masks[0], mask_of(shape, 0.2, 1, 0))


def test_shards_by_hand():
    assert shard_sizes([], 3) == []
    assert shard_sizes([1, 1, 1, 1], 3) == [3, 1]
    assert shard_sizes([2, 5, 1], 3) == [7, 1]  # a request is never parted
    assert shard_sizes([3, 3], 3) == [3, 3]


def test_only_masked_numbers_move(host):
    one = editor(host, save_freq=1, mask_ratio=0.3, max_steps=4)
    for request in FACTS[:2]:
        one.apply(request)
    for shard in range(2):
        delta, mask = one.state[f"shard{shard}"], mask_of(one.state["shard0"].shape, 0.3, 0, shard)
        assert torch.equal(delta != 0, mask)  # and all of those do
    assert not torch.equal(one.state["shard0"], one.state["shard1"])


def test_the_threshold_is_the_least_activation_of_the_edits(host):
    one = editor(host, chat=False)
    least = []
    for request in FACTS[:3]:
        one.apply(request)
        states = inputs_of(host, one.module, request.edits[0].prompt)
        least.append(slow_activation(one.state["shard0"], states))
        assert one.state["thresholds"].item() == pytest.approx(min(least), rel=1e-9)
    assert len({round(x, 6) for x in least}) == 3  # control: they differ
    (memory,) = one.memories(one.state, one.requests)
    assert memory.threshold == pytest.approx(one.config.act_ratio * min(least), rel=1e-9)


@pytest.mark.parametrize("memory", ["merge", "retrieve"])
def test_full_shards_become_memories(host, memory):
    one = editor(host, memory=memory, save_freq=1, shards=2, max_steps=6)
    for request in FACTS[:3]:
        one.apply(request)
    a, b, c = (one.state[f"shard{i}"] for i in range(3))
    x, y, z = (one.config.act_ratio * one.state["thresholds"]).tolist()
    found = one.memories(one.state, one.requests)
    if memory == "merge":
        assert [one.threshold for one in found] == [min(x, y, z)]
        assert torch.equal(found[0].delta, ties([a, b, c], one.config.density))
    else:
        assert [one.threshold for one in found] == [min(x, y), z]
        assert torch.equal(found[0].delta, ties([a, b], one.config.density))
        assert torch.equal(found[1].delta, c)
    open_shard = editor(host, memory=memory, save_freq=2, shards=2)
    deltas = {"shard0": a, "shard1": b, "shard2": c, "thresholds": one.state["thresholds"]}
    found = open_shard.memories(deltas, FACTS)  # two, two and one
    assert len(found) == 2
    assert torch.equal(found[0].delta, ties([a, b], one.config.density))
    assert torch.equal(found[1].delta, c)


def test_the_edit_is_that_of_a_host_with_the_changed_weight(host):
    """For its own prompt it is the host with the side memory in its weight."""
    one = editor(host, chat=False)
    one.apply(FACTS[0])
    encoder = Encoder.for_host(host)
    weight = weight_of(host.model.get_submodule(one.module))
    batch = padded(encoder, FACTS[0].edits[0].prompt)
    plain, edited = logits_of(lambda *a, n_prompt_tokens: host.model(*a), batch), logits_of(one.edited, batch)
    kept = weight.clone()
    try:
        weight += one.state["shard0"]
        changed = logits_of(lambda *a, n_prompt_tokens: host.model(*a), batch)
    finally:
        weight.copy_(kept)
    torch.testing.assert_close(edited, changed, atol=1e-9, rtol=1e-9)
    assert (changed - plain).abs().max() > 0.1  # control


def test_a_prompt_that_is_not_routed_is_the_hosts_bit_for_bit(host):
    one = editor(host, chat=False)
    one.apply(FACTS[0])
    encoder = Encoder.for_host(host)
    prompts = ("Nothing in particular", FACTS[0].edits[0].prompt, "It rained")
    batch = padded(encoder, *prompts)
    plain = logits_of(lambda *a, n_prompt_tokens: host.model(*a), batch)
    acts = [slow_activation(one.state["shard0"], inputs_of(host, one.module, prompt)) for prompt in prompts]
    between = (max(acts[0], acts[2]) + acts[1]) / 2
    assert between < acts[1], "the others must be told apart from the edit"
    shut = {**one.state, "thresholds": one.state["thresholds"].new_tensor([between / one.config.act_ratio])}
    one.load_state_dict(shut, one.requests)
    for row, routed in enumerate((False, True, False)):
        edited = logits_of(one.edited, batch)
        assert torch.equal(edited[row], plain[row]) == (not routed)
    greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": 2}
    left = padded(encoder, *prompts, side="left")
    given = {"attention_mask": left.attention_mask, **greedy}
    replies, before = (
        one.edited.generate(left.input_ids, **given),
        host.model.generate(left.input_ids, **given),
    )
    assert [torch.equal(a, b) for a, b in zip(replies, before, strict=True)] == [True, False, True]


def test_a_cached_generation_is_that_of_whole_passes(host):
    one = editor(host, chat=False)
    one.apply(FACTS[0])
    encoder = Encoder.for_host(host)
    ids = torch.tensor([encoder.prompt(FACTS[0].edits[0].prompt)])
    n = torch.tensor([ids.shape[1]])
    greedy = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 2}
    cached = one.edited.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    while ids.shape[1] < cached.shape[1]:
        with torch.no_grad():
            following = one.edited(ids, n_prompt_tokens=n).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
    assert torch.equal(cached, ids)


def test_openings_are_what_the_host_says(host):
    one = editor(host, n_openings=7)
    texts, n_own = one._texts(FACTS[0])
    assert n_own == 2  # raw and chat
    assert len(texts) == 2 + 7
    assert len(set(one._openings)) == 7
    assert [opening.split()[0][0] for opening in one._openings[:5]] == ["I", "Y", "B", "Y", "Q"]
    prompt = FACTS[0].edits[0].prompt
    assert all(one.encoder.text(text.prompt_ids).endswith(" " + prompt) for text in texts[2:])


def test_unrelated_texts_are_kept_apart(host):
    plain = editor(host, n_irrelevant=3)
    given = EditRequest(FACTS[0].edits, unrelated=("It rained",))
    assert plain._irrelevant(FACTS[0]).n_rows == 3
    assert plain._irrelevant(given).n_rows == 3 + 2  # raw and chat
    states = plain._irrelevant(given).select([3]).states
    torch.testing.assert_close(states, inputs_of(host, plain.module, "It rained"), atol=1e-9, rtol=1e-9)


def test_training_ends_when_the_margins_are_kept_too(host):
    easy = editor(host, chat=False).apply(FACTS[0])
    assert easy.stopped == "margin"
    hard = editor(host, chat=False, gamma=1e6).apply(FACTS[0])
    assert hard.stopped == "max_steps"


def test_what_is_published_is_descent_by_sgd():
    assert (PAPER.optimizer, PAPER.learning_rate, PAPER.max_steps) == ("sgd", 1.0, 70)
    assert (PAPER.alpha, PAPER.beta, PAPER.gamma) == (5.0, 20.0, 10.0)


@pytest.mark.parametrize(("optimizer", "rate", "bound"), [("sgd", 1.0, 0.05), ("adam", 0.02, 0.05)])
def test_it_is_the_weight_that_is_trained(host, optimizer, rate, bound):
    """Its masked numbers, on a copy of the host, by torch's own optimizer, held within the bound."""
    n_steps, alpha, beta, gamma = 5, 0.1, 20.0, 10.0
    settings = {"max_steps": n_steps, "stop_margin": None, "schedule": "constant", "chat": False}
    one = editor(
        host,
        **{**settings, "optimizer": optimizer, "learning_rate": rate, "norm_bound": bound},
        **{"alpha": alpha, "beta": beta, "gamma": gamma, "n_irrelevant": 1, "mask_ratio": 0.5},
    )
    outcome = one.apply(FACTS[0])
    model, [edit] = copy.deepcopy(host.model), FACTS[0].edits
    [text] = renderings(one.encoder, [edit], chat=False, eos=True)
    own, other = inputs_of(host, one.module, edit.prompt), one._irrelevant(FACTS[0]).states
    weight = model.get_submodule(one.module).weight.requires_grad_()
    start, mask = weight.detach().clone(), mask_of(one.shape, 0.5, 0, 0)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    by_hand, losses, n_prompt = kind([weight], lr=rate), [], len(text.prompt_ids)
    for _ in range(n_steps + 1):
        found = model(torch.tensor([text.prompt_ids + text.target_ids])).logits[0].log_softmax(-1)
        of_tokens = [found[n_prompt - 1 + i, token] for i, token in enumerate(text.target_ids)]
        e, i = (((weight - start) @ states.T).norm(dim=0).mean() for states in (own, other))
        margins = (i - alpha).clamp(min=0) + (beta - e).clamp(min=0) + (gamma - (e - i)).clamp(min=0)
        loss = margins - sum(of_tokens) / len(of_tokens)
        losses.append(loss.item())
        if len(losses) <= n_steps:
            by_hand.zero_grad()
            loss.backward()
            weight.grad *= mask
            by_hand.step()
            with torch.no_grad():
                weight.copy_(weight.clamp(start - bound, start + bound))
    moved = weight.detach() - start
    torch.testing.assert_close(one.state["shard0"], moved, atol=1e-9, rtol=0)
    torch.testing.assert_close(outcome.losses, tuple(losses), atol=1e-9, rtol=1e-9)
    at_bound = float((moved[mask].abs() > bound - 1e-12).double().mean())
    assert 0.1 < at_bound < 0.9  # control: it bites, and not everywhere


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("alpha", 0.0), ("beta", -1.0), ("norm_bound", 0.0), ("act_ratio", 1.0), ("mask_ratio", 0.0)],
        *[("density", 1.1), ("save_freq", 0), ("shards", 0), ("n_irrelevant", 0), ("n_openings", 11)],
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        WiseConfig(**{name: value})
