"""GRACE: nothing outside its radius, the codebook's rules by hand, and the lookup against a slow loop."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baft.errors import ConfigError, EditError
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.patches import Seen
from baft.methods.base import methods
from baft.methods.descent import Descent
from baft.methods.grace import GAP, Codebook, CodebookPatch, GraceConfig, taken_in
from baft.methods.texts import renderings
from baft.types import Edit, EditRequest
from tiny import tiny_host, tiny_tokenizer

FIRST = EditRequest((Edit("The tower is in the city of ", "R"),))
OTHER = Edit("A river ", "d")


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_book(*keys, radii):
    values = 10.0 * (1 + torch.arange(len(keys), dtype=torch.float64)).unsqueeze(-1)
    return Codebook(tensor(*keys), values, tensor(*radii))


def editor(host, **settings):
    kind = methods.get("grace")
    quick = {"learning_rate": 0.2, "max_steps": 60, "stop_margin": 0.7, "train_eos": False, "chat": False}
    return kind(host, dataclasses.replace(kind.preset("default"), **{**quick, **settings}))


@torch.no_grad()
def last_logits(edited, encoder, *prompts):
    batch = encoder.pad(
        [encoder.prompt(one) for one in prompts],
        [len(encoder.prompt(one)) for one in prompts],
        side="right",
    )
    return edited(batch.input_ids, batch.attention_mask, n_prompt_tokens=batch.n_prompt_tokens).logits


class TestTheRules:
    """The nearest key is at 0 with radius 1, another far away; a new key would have the radius 1."""

    book = a_book([0.0, 0.0], [100.0, 0.0], radii=(1.0, 0.5))

    def take(self, key, *, same, epsilon=1.0):
        book, place = taken_in(self.book, tensor(*key), tensor(7.0), epsilon, 1e-9, [same, False])
        return book, place

    @pytest.mark.parametrize("same", [True, False])
    def test_far_away_a_key_is_added(self, same):
        book, place = self.take((0.0, 2.5), same=same)
        assert place == 2
        assert torch.equal(book.radii, tensor(1.0, 0.5, 1.0))
        assert torch.equal(book.keys, tensor([0.0, 0.0], [100.0, 0.0], [0.0, 2.5]))
        assert torch.equal(book.values[:, 0], tensor(10.0, 20.0, 7.0))

    @pytest.mark.parametrize(("distance", "radius"), [(0.5, 1.0), (1.5, 1.5 + 1e-9), (2.0, 2.0 + 1e-9)])
    def test_with_the_same_target_the_radius_grows(self, distance, radius):
        book, place = self.take((0.0, distance), same=True)
        assert place == 0
        assert torch.equal(book.radii, tensor(radius, 0.5))
        assert book.keys is self.book.keys
        beside = tensor([0.0, distance + 5e-10])  # what rounding makes of the state in another batch
        assert book.lookup(beside)[1].tolist() == [True]

    @pytest.mark.parametrize("distance", [0.4, 1.5, 2.0])
    def test_with_another_target_the_distance_is_shared(self, distance):
        book, place = self.take((0.0, distance), same=False)
        assert place == 2
        torch.testing.assert_close(book.radii, tensor(distance / 2 - GAP, 0.5, distance / 2))
        found, inside = book.lookup(tensor([0.0, 0.0], [0.0, distance], [0.0, distance / 2 - 1e-6]))
        assert found.tolist() == [0, 2, 0]
        assert inside.tolist() == [True, True, False]  # in the gap there is nobody

    @pytest.mark.parametrize("same", [True, False])
    def test_at_a_key_itself_the_edit_takes_it_over(self, same):
        book, place = self.take((0.0, 1e-10), same=same)
        assert place == 0
        assert torch.equal(book.radii, self.book.radii)
        assert book.keys is self.book.keys

    @pytest.mark.parametrize("same", [True, False])
    def test_a_key_that_was_split_to_nothing_holds_its_own_state_again(self, same):
        tiny = a_book([0.0, 0.0], [100.0, 0.0], radii=(1e-12, 0.5))
        book, place = taken_in(tiny, tensor(0.0, 1e-10), tensor(7.0), 1.0, 1e-9, [same, False])
        assert place == 0
        assert book.lookup(tensor([0.0, 0.0], [0.0, 1e-10]))[1].tolist() == [True, True]

    def test_the_first_key(self):
        nothing = Codebook(torch.zeros(0, 2).double(), torch.zeros(0, 1).double(), torch.zeros(0).double())
        book, place = taken_in(nothing, tensor(1.0, 2.0), tensor(7.0), 0.3, 1e-9, [])
        assert place == 0
        assert torch.equal(book.radii, tensor(0.3))

    def test_the_old_codebook_stays(self):
        self.take((0.0, 0.5), same=False)
        self.take((0.0, 1.5), same=True)
        assert torch.equal(self.book.radii, tensor(1.0, 0.5))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_lookup_is_that_of_a_slow_loop(seed, n_keys, n_queries):
    keys, queries = 1000.0 + normal(n_keys, 5, seed=seed), 1000.0 + normal(n_queries, 5, seed=seed + 1)
    radii = 2.0 * normal(n_keys, seed=seed + 2).abs()
    found, inside = Codebook(keys, keys[:, :1], radii).lookup(queries)
    for query, place, is_in in zip(queries.tolist(), found.tolist(), inside.tolist(), strict=True):
        distances = [math.dist(query, key) for key in keys.tolist()]
        assert place == distances.index(min(distances))
        assert is_in == (min(distances) <= radii[place].item())


def test_the_patch_is_that_of_a_slow_loop():
    """Three rows: the end known and near a key; known and far; unknown, so that each token is looked up."""
    book = a_book([0.0, 0.0], [10.0, 0.0], radii=(1.0, 1.0))
    inputs = tensor(
        [[0.0, 0.0], [50.0, 0.0], [10.5, 0.0], [0.0, 0.0]],
        [[0.0, 0.0], [10.0, 0.0], [11.5, 0.0], [0.0, 0.0]],
        [[0.0, 0.0], [0.0, 0.9], [30.0, 0.0], [9.5, 0.0]],
    )
    edited = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1]]).bool()
    prompt = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    output = normal(3, 4, 1, seed=0)
    at = {"last": {(0, 2): 20.0}, "prompt": {(0, 1): 20.0, (0, 2): 20.0}}
    for replacement, changed in at.items():
        expected = output.clone()
        for place, value in {**changed, (2, 1): 10.0, (2, 3): 20.0}.items():
            expected[place] = value
        patch = CodebookPatch(book, replacement)
        found = patch(torch.nn.Identity(), inputs, output, Seen(edited, prompt, {}))
        assert torch.equal(found, expected)
        flat = patch(
            torch.nn.Identity(), inputs.flatten(0, 1), output.flatten(0, 1), Seen(edited, prompt, {})
        )
        assert torch.equal(flat, expected.flatten(0, 1))
    assert patch(torch.nn.Identity(), inputs[1:2], output[1:2], Seen(edited[1:2], prompt[1:2], {})) is None


def test_outside_the_radius_every_bit_is_the_hosts(host):
    encoder = Encoder.for_host(host)
    prompts = ("The tower is in the city of ", "The tower is in the village of ", "Nine hats")
    plain = last_logits(editor(host).edited, encoder, *prompts)
    for share, n_changed in ((1e-6, 1), (100.0, 3)):  # the second is the control: all are inside
        one = editor(host, epsilon=share)
        assert one.apply(FIRST).decoded == (True,)
        edited = last_logits(one.edited, encoder, *prompts)
        changed = [not torch.equal(a, b) for a, b in zip(plain, edited, strict=True)]
        assert changed == [i < n_changed for i in range(3)]
        n = len(encoder.prompt(prompts[0]))
        assert torch.equal(edited[0, : n - 1], plain[0, : n - 1])  # before the last prompt token, too


@pytest.mark.parametrize("replacement", ["last", "prompt"])
def test_batches_and_padding_change_nothing(host, replacement):
    encoder = Encoder.for_host(host)
    one = editor(host, epsilon=0.05, replacement=replacement)
    one.apply(FIRST)
    prompts = (FIRST.edits[0].prompt, "Something that is a good deal longer than the others", OTHER.prompt)
    together = last_logits(one.edited, encoder, *prompts)
    for i, prompt in enumerate(prompts):
        alone = last_logits(one.edited, encoder, prompt)[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("replacement", ["last", "prompt"])
def test_a_cached_generation_is_that_of_whole_passes(host, replacement):
    encoder = Encoder.for_host(host)
    one = editor(host, replacement=replacement)
    one.apply(FIRST)
    prompt = encoder.prompt(FIRST.edits[0].prompt)
    ids, n = torch.tensor([prompt]), torch.tensor([len(prompt)])
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 2}
    cached = one.edited.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    plain = host.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert not torch.equal(cached, plain)  # control
    while ids.shape[1] < cached.shape[1]:
        with torch.no_grad():
            following = one.edited(ids, n_prompt_tokens=n).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
    assert torch.equal(cached, ids)


@pytest.mark.parametrize("unit", ["key_length", "distance"])
def test_a_radius_is_a_share_of_the_keys_length_or_a_distance(host, unit):
    one = editor(host, epsilon=0.3, epsilon_unit=unit)
    one.apply(FIRST)
    in_units = {"key_length": one.state["keys"][0].norm().item(), "distance": 1.0}
    assert one.state["radii"].item() == pytest.approx(0.3 * in_units[unit], rel=1e-12)
    assert abs(in_units["key_length"] - 1.0) > 0.1  # control


def test_a_warm_value_is_trained_from_the_hosts_output(host):
    """So that before the first step the target is as likely as on the host; from a cold one it is not."""
    [edit] = FIRST.edits
    encoder = Encoder.for_host(host)
    [token] = encoder.edit(edit.prompt, edit.target, eos=False).target_ids
    plain = -last_logits(editor(host).edited, encoder, edit.prompt)[0, -1].log_softmax(-1)[token].item()
    first = {start: editor(host, start=start).apply(FIRST).losses[0] for start in ("warm", "cold")}
    assert first["warm"] == pytest.approx(plain, rel=1e-9)
    assert abs(first["cold"] - plain) > 1e-2


def test_an_edit_within_the_radius_shares_the_key_or_splits_it(host):
    near = Edit("The tower is in the town of ", "R")
    for target, n_keys in (("R", 1), ("B", 2)):
        one = editor(host, epsilon=100.0)
        one.apply(FIRST)
        before = one.state
        outcome = one.apply(EditRequest((dataclasses.replace(near, target=target),)))
        assert outcome.decoded == (True,)
        assert len(one.state["keys"]) == n_keys
        assert one.state["owners"].tolist() == ([1] if target == "R" else [0, 1])
        if target == "B":
            distance = (one.state["keys"][0] - one.state["keys"][1]).norm()
            torch.testing.assert_close(one.state["radii"], torch.stack([distance / 2 - GAP, distance / 2]))
            assert torch.equal(one.state["values"][0], before["values"][0])  # the other's value rests
        one.undo()
        assert all(torch.equal(one.state[name], before[name]) for name in before)


def test_the_same_prompt_again_takes_its_key_over(host):
    encoder = Encoder.for_host(host)
    one = editor(host, epsilon=0.1)
    one.apply(FIRST)
    again = Edit(FIRST.edits[0].prompt, "B")
    assert one.apply(EditRequest((again,))).decoded == (True,)
    assert one.state["owners"].tolist() == [1]
    told = last_logits(one.edited, encoder, again.prompt)[0, -1].argmax()
    assert told == encoder.edit(again.prompt, again.target, eos=False).target_ids[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_makes_no_two_prompts_one(dtype):
    """In half precision, too, every edit has a key of its own and is found in a padded batch."""
    model = tiny_host("llama", dtype=dtype, max_position_embeddings=512)
    host = Host("tiny", model, tiny_tokenizer(), "tiny")
    encoder = Encoder.for_host(host)
    prompts = ("The tower is in the city of ", "A river of ", "The king of France was ", "Nine hats of ")
    one = editor(host, epsilon=1e-3, epsilon_unit="key_length")
    for prompt, target in zip(prompts, ("R", "B", "R", "B"), strict=True):
        assert one.apply(EditRequest((Edit(prompt, target),))).decoded == (True,)
    assert len(one.state["keys"]) == len(prompts)
    said = [encoder.edit(prompts[0], target, eos=False).target_ids[0] for target in ("R", "B")]
    told = last_logits(one.edited, encoder, *prompts)
    ends = [len(encoder.prompt(prompt)) - 1 for prompt in prompts]
    assert [int(told[i, end].argmax()) for i, end in enumerate(ends)] == [*said, *said]


def test_a_value_that_is_nowhere_in_force_is_an_error_that_says_so(host):
    one = editor(host)
    texts = renderings(one.encoder, FIRST.edits, chat=False, eos=False)
    shown, _ = one.pass_over(texts)
    far = Codebook(
        torch.full((1, one.shape[1]), 1e3).double(), torch.zeros(1, one.shape[0]).double(), tensor(1.0)
    )
    values = far.values.requires_grad_()
    shown.edited.patches = {one.module: CodebookPatch(far)}
    with pytest.raises(EditError, match="nothing that is trained reaches the targets"):
        Descent([values], one.config).run(shown, None)


def test_many_edits_stay_quick_and_share_what_they_can():
    """A thousand keys of a real width: taking one more in is a matter of milliseconds."""
    keys = normal(1000, 1536, seed=0).float()
    book = Codebook(keys, normal(1000, 576, seed=1).float(), torch.ones(1000))
    query = normal(1536, seed=2).float()
    with torch.profiler.profile() as told:
        made, place = taken_in(book, query, torch.zeros(576), 1.0, 1e-6, [False] * 1000)
    assert place == 1000
    assert len(made.keys) == 1001
    assert sum(one.self_cpu_time_total for one in told.key_averages()) < 1e6  # microseconds, on one slow core


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_a_radius_is_a_positive_number(epsilon):
    with pytest.raises(ConfigError, match="epsilon must be a positive number"):
        GraceConfig(epsilon=epsilon)
