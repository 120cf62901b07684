"""What must hold on every architecture: edits act where they should, and nowhere else, however it is run."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from baft.hosts.architecture import Site, find_architecture
from baft.hosts.calls import Recording
from baft.hosts.edited_model import EditedModel
from baft.hosts.positions import PositionSpec
from baft.nn.interventions import intervene
from tiny import (
    BOS_ID,
    D_MODEL,
    HOSTS,
    N_LAYERS,
    PAD_ID,
    SLIDING_WINDOW,
    half_open_part,
    open_part,
    pad_rows,
    positions_of,
    random_ids,
    shared_host,
    shut_part,
    some_interventions,
    states_at,
)

N_NEW = 4


@pytest.fixture(params=HOSTS, ids=lambda pair: "-".join(pair), scope="module")
def host(request):
    return shared_host(*request.param)


def tolerance(host):
    """Rounding through three blocks: the same sums in another order. Measured below 1e-12 and 1e-5."""
    return 1e-9 if host.dtype == torch.float64 else 1e-4


@pytest.fixture(scope="module")
def edited(host):
    return EditedModel(host, some_interventions(host))


def rows(*lengths, seed=0):
    return [random_ids(1, n, seed=seed + n)[0] for n in lengths]


def counts(*numbers):
    return torch.tensor(numbers)


def greedy_by_hand(model, ids, mask, n_new, **arguments):
    """Greedy generation without a cache: the whole text again for every token."""
    logits = []
    n_prompt_tokens = mask.sum(-1)
    for _ in range(n_new):
        out = model(
            ids,
            mask,
            position_ids=positions_of(mask),
            use_cache=False,
            **arguments,
            **prompts(model, n_prompt_tokens),
        )
        logits.append(out.logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], -1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
    return ids, torch.stack(logits)


def prompts(model, n_prompt_tokens):
    return {"n_prompt_tokens": n_prompt_tokens} if isinstance(model, EditedModel) else {}


def generated(model, ids, mask=None, n_new=N_NEW, **arguments):
    """Greedy generation, and the logits of each of its steps as the host gave them (its own are float32)."""
    logits = []
    host = model.host if isinstance(model, EditedModel) else model
    handle = host.register_forward_hook(lambda _, __, out: logits.append(out.logits[:, -1]))
    try:
        ids = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, **arguments
        )
    finally:
        handle.remove()
    return ids, torch.stack(logits[-n_new:])


def n_hooks(host):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules())


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_every_site_resolves_to_its_own_block(host):
    architecture = find_architecture(host)
    assert (architecture.n_layers, architecture.d_model) == (N_LAYERS, D_MODEL)
    blocks = [architecture.block(Site(layer)) for layer in range(N_LAYERS)]
    assert len({id(block) for block in blocks}) == N_LAYERS
    ids = random_ids(1, 9)
    after = [states_at(host, Site(layer), ids) for layer in range(N_LAYERS)]
    shown = host(ids, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):
        assert torch.equal(after[layer], shown[layer + 1][0])
    assert not torch.equal(after[0], after[1])


def test_nothing_in_force_is_the_host_bit_for_bit(host, edited):
    ids, mask = pad_rows(rows(12, 7), "left")
    given = {"attention_mask": mask, "position_ids": positions_of(mask)}
    want = host(ids, **given).logits
    with edited.disabled():
        assert torch.equal(edited(ids, n_prompt_tokens=counts(9, 5), **given).logits, want)
    assert torch.equal(EditedModel(host)(ids, n_prompt_tokens=counts(9, 5), **given).logits, want)
    shut = EditedModel(host, {Site(layer): [shut_part(dtype=host.dtype)] for layer in range(N_LAYERS)})
    assert torch.equal(shut(ids, n_prompt_tokens=counts(9, 5), **given).logits, want)
    assert torch.equal(shut(ids, **given).logits, want)
    # Control: the same parts with their gates open.
    acts = edited(ids, n_prompt_tokens=counts(9, 5), **given).logits
    assert far(acts, want) > 1e-2
    open_ = EditedModel(host, {Site(layer): [open_part(dtype=host.dtype)] for layer in range(N_LAYERS)})
    assert far(open_(ids, **given).logits, want) > 1e-2


def test_a_half_open_gate_leaves_the_states_it_shuts_out(host):
    site = Site(1)
    part = half_open_part(host, site)
    ids = random_ids(4, 12, seed=31)
    states = states_at(host, site, ids)
    seen = states_at_of(EditedModel(host, {site: [part]}), site, ids)
    moved = (seen != states).any(-1).view(4, 12)
    opened = (part.gate.weights(states) > 0).flatten(1).any(-1).view(4, 12)
    opened[:, 0] = False  # BOS
    assert torch.equal(moved, opened)
    assert 0.2 < moved.double().mean() < 0.8


def states_at_of(model, site, ids, **arguments):
    """What leaves a block when an edited model runs."""
    caught = []
    block = model.architecture.block(site)
    handle = block.register_forward_hook(
        lambda _, __, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        model(ids, **arguments)
    finally:
        handle.remove()
    return caught[0].flatten(0, 1)


def test_the_edited_tokens_are_the_last_of_the_prompt_and_the_outputs(host):
    site = Site(0)
    part = open_part(dtype=host.dtype)
    ids = random_ids(2, 12, seed=5)
    states = states_at(host, site, ids).view(2, 12, -1)
    model = EditedModel(host, {site: [part]}, PositionSpec(last_prompt=2))
    seen = states_at_of(model, site, ids, n_prompt_tokens=counts(9, 2)).view(2, 12, -1)
    moved = (seen != states).any(-1)
    want = torch.zeros(2, 12, dtype=torch.bool)
    want[0, 7:], want[1, 1:] = True, True
    assert torch.equal(moved, want)
    expected, _ = intervene([part], states[want])
    assert torch.equal(seen[want], expected)


def test_hidden_states_are_shown_edited(host):
    site = Site(0)
    ids = random_ids(1, 8)
    model = EditedModel(host, {site: [open_part(dtype=host.dtype)]})
    host(ids, output_hidden_states=True)  # transformers hangs its own hooks the first time
    shown = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(shown[1][0], states_at_of(model, site, ids))
    plain = host(ids, output_hidden_states=True).hidden_states
    assert torch.equal(shown[0], plain[0])
    assert torch.equal(shown[1][:, 0], plain[1][:, 0])  # BOS
    assert far(shown[1][:, 1:], plain[1][:, 1:]) > 1e-2


def test_hidden_states_are_shown_edited_on_a_fresh_host(host):
    ids = random_ids(1, 8)
    model = EditedModel(host, {Site(0): [open_part(dtype=host.dtype)]})
    shown = model(ids, output_hidden_states=True).hidden_states
    assert far(shown[1], host(ids, output_hidden_states=True).hidden_states[1]) > 1e-2


def test_with_and_without_a_cache_it_says_the_same(host, edited):
    ids = random_ids(2, SLIDING_WINDOW + 5, seed=3)
    mask = torch.ones_like(ids)
    want, want_logits = greedy_by_hand(edited, ids, mask, N_NEW)
    for arguments in (
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
    ):
        got, logits = generated(edited, ids, **arguments)
        assert torch.equal(got, want), arguments
        assert far(logits, want_logits) < tolerance(host), arguments
    # Controls: the host says something else, and so does a rule that edits the prompt alone.
    assert not torch.equal(generated(host, ids)[0], want)
    prompt_only = EditedModel(host, edited.interventions, PositionSpec(outputs=False))
    assert far(generated(prompt_only, ids)[1], want_logits) > 1e-3


def test_the_prompt_alone_can_be_edited(host, edited):
    prompt_only = EditedModel(host, edited.interventions, PositionSpec(outputs=False))
    ids = random_ids(1, 9, seed=4)
    want, want_logits = greedy_by_hand(prompt_only, ids, torch.ones_like(ids), N_NEW)
    got, logits = generated(prompt_only, ids)
    assert torch.equal(got, want)
    assert far(logits, want_logits) < tolerance(host)


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_the_shortest_prompts(host, edited, n_tokens):
    for first in (BOS_ID, 50):
        ids = random_ids(1, n_tokens, seed=8)
        ids[0, 0] = first
        want, want_logits = greedy_by_hand(edited, ids, torch.ones_like(ids), 4)
        got, logits = generated(edited, ids, n_new=4)
        assert torch.equal(got, want)
        assert far(logits, want_logits) < tolerance(host)
    alone = torch.tensor([[BOS_ID]])
    assert torch.equal(edited(alone, n_prompt_tokens=counts(1)).logits, host(alone).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(host, edited, side):
    texts = rows(14, 5, 9, 2)
    n_prompt = [10, 3, 9, 1]
    ids, mask = pad_rows(texts, side)
    batch = edited(
        ids, mask, n_prompt_tokens=counts(*n_prompt), position_ids=positions_of(mask), use_cache=False
    ).logits
    for i, (text, n) in enumerate(zip(texts, n_prompt, strict=True)):
        alone = edited(text[None], n_prompt_tokens=counts(n)).logits[0]
        assert far(batch[i][mask[i].bool()], alone) < tolerance(host)
    # Control: with one prompt's end elsewhere, the same comparison fails.
    wrong = edited(texts[0][None], n_prompt_tokens=counts(7)).logits[0]
    assert far(batch[0][mask[0].bool()], wrong) > 1e-3


def test_a_left_padded_batch_generates_what_each_prompt_does(host, edited):
    texts = rows(13, 4, 8, 1, seed=2)
    ids, mask = pad_rows(texts, "left")
    want = [generated(edited, text[None]) for text in texts]
    for given in ({"mask": mask}, {}):  # without a mask, generation guesses it from the pad token
        got, logits = generated(edited, ids, **given)
        for i, (sequence, alone) in enumerate(want):
            assert torch.equal(got[i, -N_NEW:], sequence[0, -N_NEW:])
            assert far(logits[:, i], alone[:, 0]) < tolerance(host)
    assert any(not torch.equal(generated(host, t[None])[0], s) for t, (s, _) in zip(texts, want, strict=True))


def test_forward_goes_on_from_a_cache(host, edited):
    ids, mask = pad_rows(rows(12, 8, seed=6), "left")
    n_prompt_tokens, positions = counts(7, 3), positions_of(mask)
    given = {"n_prompt_tokens": n_prompt_tokens, "position_ids": positions}
    whole = edited(ids, mask, use_cache=False, **given).logits
    cache = DynamicCache(config=host.config)
    pieces = []
    for start, end in ((0, 7), (7, 9), (9, 10), (10, 12)):
        given["position_ids"] = positions[:, start:end]
        past = {"past_key_values": cache, "use_cache": True}
        pieces.append(edited(ids[:, start:end], mask[:, :end], **past, **given).logits)
    real = mask.bool()
    assert far(torch.cat(pieces, 1)[real], whole[real]) < tolerance(host)
    assert far(whole[real], host(ids, attention_mask=mask, position_ids=positions).logits[real]) > 1e-2


def test_beams_are_those_of_an_uncached_search(host, edited):
    ids, mask = pad_rows(rows(11, 6, seed=9), "left")
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": N_NEW, "do_sample": False}
    cached = edited.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, edited.generate(ids, attention_mask=mask, use_cache=False, **options))
    alone = edited.generate(rows(6, seed=9)[0][None], **options)
    assert torch.equal(cached[2:, -N_NEW:], alone[:, -N_NEW:])
    one = edited.generate(ids, attention_mask=mask, **{**options, "num_beams": 1, "num_return_sequences": 1})
    assert torch.equal(one, generated(edited, ids, mask)[0])
    assert not torch.equal(cached, host.generate(ids, attention_mask=mask, **options))  # control


def test_samples_of_one_seed_are_the_same(host, edited):
    ids, mask = pad_rows(rows(10, 5, seed=11), "left")

    def sample(seed, **arguments):
        torch.manual_seed(seed)
        return edited.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=N_NEW,
            top_k=5,
            **arguments,
        )

    with torch.random.fork_rng(devices=[]):
        first = sample(1)
        assert first.shape[0] == 6
        assert torch.equal(first, sample(1))
        assert torch.equal(first, sample(1, use_cache=False))
        assert not torch.equal(first, sample(2))  # control


def test_every_hook_is_taken_down_whatever_happens(host, edited):
    ids = random_ids(1, 6)
    edited(ids)
    before = n_hooks(host)
    inside = []

    def fail(*_):
        inside.append(n_hooks(host))
        raise RuntimeError("on purpose")

    handle = edited.architecture.blocks[1].register_forward_hook(fail)
    try:
        for run in (lambda: edited(ids), lambda: generated(edited, ids)):
            with pytest.raises(RuntimeError, match="on purpose"):
                run()
            assert n_hooks(host) == before + 1
    finally:
        handle.remove()
    assert inside[0] > before + 1  # control: during the call there were hooks
    generated(edited, ids)
    assert n_hooks(host) == before
    assert far(edited(ids).logits, host(ids).logits) > 1e-2


def test_the_recording_holds_the_states_before_the_edit(host, edited):
    ids, mask = pad_rows(rows(8, 5), "right")
    recording = Recording()
    edited(ids, mask, n_prompt_tokens=counts(8, 3), recording=recording)
    (edits,) = recording.masks
    assert edits.tolist() == [[False] * 5 + [True] * 3, [False] + [True] * 4 + [False] * 3]
    site = Site(0)
    states = host_states(host, site, ids, mask)
    assert torch.equal(recording.at(site), states[edits])
    with edited.disabled():  # what would have been edited is seen too
        silent = Recording()
        edited(ids, mask, n_prompt_tokens=counts(8, 3), recording=silent)
    assert torch.equal(silent.at(site), states[edits])
    last = Site(N_LAYERS - 1)
    assert torch.equal(silent.at(last), host_states(host, last, ids, mask)[edits])
    assert not torch.equal(
        recording.at(last), silent.at(last)
    )  # control: the first site's edit reaches the last


def host_states(host, site, ids, mask):
    caught = []
    handle = (
        find_architecture(host)
        .block(site)
        .register_forward_hook(lambda _, __, out: caught.append(out[0] if isinstance(out, tuple) else out))
    )
    host(ids, attention_mask=mask)
    handle.remove()
    return caught[0]


def test_the_pad_token_is_never_real(host, edited):
    ids, mask = pad_rows(rows(9, 4), "left")
    other = torch.where(mask.bool(), ids, torch.full_like(ids, 77))
    assert (ids == PAD_ID).any()
    given = {"n_prompt_tokens": counts(9, 4), "position_ids": positions_of(mask)}
    want, got = edited(ids, mask, **given).logits, edited(other, mask, **given).logits
    assert far(want[mask.bool()], got[mask.bool()]) < tolerance(host)
