"""A block of bases for every row: each row is the model with that block alone, however it is run."""

import pytest
import torch

from baft.errors import ConfigError
from baft.hosts.architecture import Site
from baft.hosts.calls import Recording
from baft.hosts.edited_model import EditedModel
from baft.nn.gates import LogisticGate
from baft.nn.interventions import SubspaceIntervention, concatenate
from tiny import D_MODEL, N_LAYERS, half_open_part, open_part, random_ids, shared_host, states_at

SITES = (Site(0), Site(N_LAYERS - 1))
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3_text"])
def host(request):
    return shared_host(request.param)


def one_block(site, seed):
    return open_part(seed=seed).select(torch.tensor([0]))


def layers(host):
    """Four blocks a site, each open everywhere."""
    return {site: concatenate([one_block(site, 10 * site.layer + i) for i in range(4)]) for site in SITES}


def alone(host, stacked, i, beside=None):
    parts = {site: [part.select(torch.tensor([i]))] for site, part in stacked.items()}
    for site, more in (beside or {}).items():
        parts[site] = [*more, *parts.get(site, [])]
    return EditedModel(host, parts)


def batch(n):
    ids = random_ids(n, 9, seed=2)
    return ids, torch.full((n,), 9)


@pytest.mark.parametrize("with_others", [False, True])
@pytest.mark.parametrize("blocks", [[0, 1, 2, 3], [3, 1, 3, 0], [2], [1, 1, 1, 1]], ids=str)
def test_each_row_of_a_call_is_the_model_with_its_block_alone(host, blocks, with_others):
    stacked = layers(host)
    beside = {Site(0): [half_open_part(host, Site(0))], Site(1): [open_part(seed=40)]} if with_others else {}
    ids, n = batch(len(blocks))
    plain = EditedModel(host, beside)
    apart = plain.apart(stacked, torch.tensor(blocks))
    got = apart(ids, n_prompt_tokens=n - 2).logits
    for row, i in enumerate(blocks):
        want = alone(host, stacked, i, beside)(ids[row : row + 1], n_prompt_tokens=n[:1] - 2).logits[0]
        torch.testing.assert_close(got[row], want, rtol=0, atol=1e-9)
        wrong = alone(host, stacked, (i + 1) % 4, beside)(
            ids[row : row + 1], n_prompt_tokens=n[:1] - 2
        ).logits[0]
        assert (got[row] - wrong).abs().max() > 1e-2  # control
    # The model that it was made from goes on without them.
    want = EditedModel(host, beside)(ids, n_prompt_tokens=n - 2).logits
    assert torch.equal(plain(ids, n_prompt_tokens=n - 2).logits, want)
    with apart.disabled():
        assert torch.equal(apart(ids).logits, host(ids).logits)
    assert apart.is_enabled
    assert not EditedModel(host).is_enabled


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_each_row_of_a_generation_is_the_model_with_its_block_alone(host, how):
    stacked, blocks = layers(host), [2, 0, 3]
    ids, _ = batch(3)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    apart = EditedModel(host).apart(stacked, torch.tensor(blocks))
    settings = {"max_new_tokens": 5, "do_sample": False, **how}
    got = apart.generate(ids, attention_mask=mask, **settings)
    n = how.get("num_return_sequences", 1)
    others = 0
    for row, i in enumerate(blocks):
        given = {"attention_mask": mask[row : row + 1], **settings}
        mine = got[n * row : n * row + n]
        assert torch.equal(mine, alone(host, stacked, i).generate(ids[row : row + 1], **given))
        others += not torch.equal(
            mine, alone(host, stacked, (i + 1) % 4).generate(ids[row : row + 1], **given)
        )
    assert others > 0  # control


def test_rows_whose_block_is_shut_are_the_host_s_bit_for_bit(host):
    """In the same batch as one that is open."""
    c = torch.tensor([[-20.0], [20.0]], dtype=torch.float64)
    stacked = {}
    for site in SITES:
        gate = LogisticGate(torch.zeros(2, 1, D_MODEL, dtype=torch.float64), c, threshold=0.5)
        generator = torch.Generator().manual_seed(site.layer)
        part = SubspaceIntervention.identity(2, 1, D_MODEL, gate, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            part.b.fill_(3.0)
        stacked[site] = part.requires_grad_(False)
    ids, n = batch(3)
    apart = EditedModel(host).apart(stacked, torch.tensor([0, 1, 0]))
    got, want = apart(ids, n_prompt_tokens=n).logits, host(ids).logits
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert not torch.equal(got[1], want[1])  # control
    mask = torch.ones_like(ids)
    said, plain = (one.generate(input_ids=ids, attention_mask=mask, **OPTIONS) for one in (apart, host))
    for a, b in zip(said.logits, plain.logits, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not torch.equal(said.logits[0][1], plain.logits[0][1])


def test_the_recording_holds_the_states_before_the_block(host):
    stacked = layers(host)
    ids, n = batch(2)
    seen = Recording()
    EditedModel(host).apart(stacked, torch.tensor([1, 3]))(ids, n_prompt_tokens=n, recording=seen)
    before = states_at(host, SITES[0], ids).unflatten(0, ids.shape)[:, 6:].flatten(0, 1)
    torch.testing.assert_close(seen.at(SITES[0]), before, rtol=0, atol=1e-12)
    later = states_at(host, SITES[1], ids).unflatten(0, ids.shape)[:, 6:].flatten(0, 1)
    assert not torch.allclose(seen.at(SITES[1]), later)  # control: above the first, states have moved


def test_a_layer_that_the_host_lacks_is_refused():
    edited = EditedModel(shared_host("llama"))
    with pytest.raises(ConfigError, match="out of range"):
        edited.apart({Site(N_LAYERS): open_part()}, torch.tensor([0]))
    assert not edited.is_enabled
