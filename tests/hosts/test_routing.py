"""What a router chooses acts on its rows alone, from the prompt to the end of what follows in the cache."""

import copy

import pytest
import torch
from transformers import DynamicCache

from baft.errors import ConfigError, InputError
from baft.hosts.architecture import Site
from baft.hosts.calls import Recording, Stack
from baft.hosts.early import early_features
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.live_view import live_view
from baft.hosts.models import Host
from baft.nn.interventions import concatenate
from tiny import N_LAYERS, open_part, random_ids, shared_host, tiny_tokenizer

SITES = (Site(0), Site(N_LAYERS - 1))
A, B = 7, 9  # a prompt that holds one of these tokens is about the first or the second edit


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def host(request):
    return shared_host(request.param)


def layers():
    blocks = {
        site: [open_part(seed=10 * site.layer + i).select(torch.tensor([0])) for i in range(2)]
        for site in SITES
    }
    return {site: concatenate(parts) for site, parts in blocks.items()}


class ByToken:
    """Chooses by a token in the prompt, and remembers what it was asked."""

    def __init__(self, of_all):
        self.of_all, self.asked = of_all, []

    def __call__(self, prompts):
        self.asked.append([tuple(prompt) for prompt in prompts])
        found = [0 if A in prompt else 1 if B in prompt else -1 for prompt in prompts]
        if max(found) < 0:
            return None
        kept = sorted({i for i in found if i >= 0})
        chosen = {site: part.select(torch.tensor(kept)) for site, part in self.of_all.items()}
        return Stack(chosen, torch.tensor([kept.index(i) if i >= 0 else -1 for i in found]))


def routed(host):
    edited = EditedModel(host)
    edited.router = ByToken(layers())
    return edited


def alone(host, i):
    return EditedModel(host, {site: [part.select(torch.tensor([i]))] for site, part in layers().items()})


def early_features_of(host, ids):
    encoder = Encoder(tiny_tokenizer())
    rows = ids.tolist()
    return early_features(
        Host("tiny", host, encoder.tokenizer, "tiny"), encoder, rows, [slice(len(row)) for row in rows]
    )


def prompts(*marks, n=8):
    ids = random_ids(len(marks), n, seed=3)
    ids[(ids == A) | (ids == B)] = A + 1
    for row, mark in enumerate(marks):
        if mark is not None:
            ids[row, 2] = mark
    return ids


@pytest.mark.parametrize("marks", [(A,), (A, None), (None, B, A), (B, None, B)], ids=str)
def test_every_row_is_edited_by_what_its_prompt_is_about(host, marks):
    ids, edited = prompts(*marks), routed(host)
    n = torch.full((len(marks),), 6)
    got, plain = edited(ids, n_prompt_tokens=n).logits, host(ids).logits
    for row, mark in enumerate(marks):
        if mark is None:
            assert torch.equal(got[row], plain[row])
        else:
            want = alone(host, [A, B].index(mark))(ids[row : row + 1], n_prompt_tokens=n[:1]).logits[0]
            torch.testing.assert_close(got[row], want, rtol=0, atol=1e-9)
            assert (got[row] - plain[row]).abs().max() > 1e-2
    assert edited.router.asked == [[tuple(row[:6].tolist()) for row in ids]]


def test_with_nothing_chosen_the_host_runs_bit_for_bit(host):
    ids, edited = prompts(None, None), routed(host)
    assert torch.equal(edited(ids).logits, host(ids).logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(edited.generate(ids, **settings), host.generate(ids, **settings))


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_a_generation_keeps_to_what_its_prompt_was_about(host, how):
    marks = (None, A, B)
    ids, edited = prompts(*marks), routed(host)
    settings = {"max_new_tokens": 5, "do_sample": False, **how}
    got = edited.generate(ids, **settings)
    assert len(edited.router.asked) == 1
    n, others = how.get("num_return_sequences", 1), 0
    for row, mark in enumerate(marks):
        one = ids[row : row + 1]
        plain = host.generate(one, **settings)
        want = plain if mark is None else alone(host, [A, B].index(mark)).generate(one, **settings)
        assert torch.equal(got[row * n : (row + 1) * n], want)
        others += int(not torch.equal(plain, want))
    assert others


def test_left_padding_is_no_part_of_a_prompt(host):
    ids, edited = prompts(A, None), routed(host)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # hides the mark
    got = edited.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(got, host.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False))
    assert edited.router.asked == [[tuple(ids[0, 3:].tolist()), tuple(ids[1].tolist())]]


@pytest.mark.parametrize("marks", [(A,), (None, B)], ids=str)
def test_a_cache_goes_on_as_its_prompt_was_judged(host, marks):
    ids, edited = prompts(*marks), routed(host)
    n = torch.full((len(marks),), 5)
    whole = edited(ids, n_prompt_tokens=n).logits
    cache = DynamicCache(config=host.config)
    parts = [edited(ids[:, :5], n_prompt_tokens=n, past_key_values=cache).logits]
    parts += [edited(ids[:, i : i + 1], n_prompt_tokens=n, past_key_values=cache).logits for i in range(5, 8)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    assert len(edited.router.asked) == 2  # the whole, and the beginning of the cache
    edited.router = ByToken(layers())  # other edits: judged anew, by what is shown
    edited(ids[:, 7:], past_key_values=cache)
    assert edited.router.asked == [[tuple(row.tolist()) for row in ids[:, 7:]]]


def test_what_was_chosen_goes_along_with_a_cache(host):
    """With a copy of it, and with one that a generation hands out."""
    ids, edited = prompts(A), routed(host)
    n = torch.full((1,), 5)
    whole = edited(ids, n_prompt_tokens=n).logits
    cache = DynamicCache(config=host.config)
    edited(ids[:, :5], n_prompt_tokens=n, past_key_values=cache)
    copied = copy.deepcopy(cache)
    rest = edited(ids[:, 5:], n_prompt_tokens=n, past_key_values=copied).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=0, atol=1e-9)
    asked = len(edited.router.asked)
    made = edited.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    edited(made.sequences[:, -1:], past_key_values=made.past_key_values)
    assert len(edited.router.asked) == asked + 1  # for the generation, and never again


def test_gradients_and_recordings_pass_through(host):
    ids, edited, seen = prompts(A, None), routed(host), Recording()
    n = torch.full((2,), 6)
    with torch.no_grad():
        quick = edited(ids, n_prompt_tokens=n).logits
        recorded = edited(ids, n_prompt_tokens=n, recording=seen).logits
    slow = edited(ids, n_prompt_tokens=n).logits
    torch.testing.assert_close(slow, quick, rtol=0, atol=1e-9)
    torch.testing.assert_close(recorded, quick, rtol=0, atol=1e-9)
    assert seen.masks[0].sum(-1).tolist() == [5, 0]
    assert seen.at(SITES[0]).shape[0] == 5


def test_a_live_view_is_routed(host):
    ids, edited = prompts(A), routed(host)
    torch.testing.assert_close(live_view(edited)(ids).logits, alone(host, 0)(ids).logits, rtol=0, atol=1e-9)
    with edited.disabled():
        assert torch.equal(live_view(edited)(ids).logits, host(ids).logits)


def test_a_router_acts_alone_and_needs_tokens(host):
    edited = routed(host)
    with pytest.raises(ConfigError, match="a router acts alone"):
        edited.interventions = {SITES[0]: [open_part()]}
    with pytest.raises(InputError, match="give input_ids"):
        live_view(edited)(inputs_embeds=host.get_input_embeddings()(prompts(A)))
    follower = EditedModel(host)
    follower.follow(edited)
    assert follower.is_enabled
    assert follower.router is edited.router


@pytest.mark.parametrize("inner", [A, None], ids=["about the same", "about nothing"])
def test_whoever_asks_in_the_middle_of_a_generation_is_answered_as_always(host, inner):
    edited, ids, asked = routed(host), prompts(A), prompts(inner)
    plain, want, heard = host(asked).logits, edited(asked).logits, []
    early = [one.clone() for one in early_features_of(host, asked)]

    def listen(_, scores):
        if not heard:
            with edited.disabled():
                disabled = edited(asked).logits
                generated = edited.generate(asked, max_new_tokens=1, do_sample=False)
            heard.append((disabled, generated, edited(asked).logits, early_features_of(host, asked)))
        return scores

    untouched = edited.generate(ids, max_new_tokens=4, do_sample=False)
    got = edited.generate(ids, max_new_tokens=4, do_sample=False, logits_processor=[listen])
    disabled, generated, edited_then, early_then = heard[0]
    assert torch.equal(disabled, plain)
    assert torch.equal(generated, host.generate(asked, max_new_tokens=1, do_sample=False))
    assert torch.equal(edited_then, want)
    assert (inner is None) == torch.equal(want, plain)
    assert all(torch.equal(one, other) for one, other in zip(early, early_then, strict=True))
    assert torch.equal(got, untouched)  # and the generation goes on as it would have


def test_a_generation_says_in_the_cache_it_was_given_what_acted(host):
    edited, given = routed(host), DynamicCache(config=host.config)
    edited(prompts(None, n=4), past_key_values=given)
    ids = torch.cat([prompts(None, n=4), prompts(A, n=4)], 1)
    edited.generate(ids, max_new_tokens=2, do_sample=False, past_key_values=given)
    n_asked = len(edited.router.asked)
    more = random_ids(1, 2, seed=5)
    got = edited(more, past_key_values=copy.deepcopy(given)).logits
    assert len(edited.router.asked) == n_asked  # what acted goes on to act, and is not judged anew
    plain = host(more, past_key_values=copy.deepcopy(given)).logits
    assert (got - plain).abs().max() > 1e-2
