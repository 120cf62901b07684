"""Routes worked out by hand, and blocks that leave each other and all other prompts alone."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baft.errors import ConfigError, UnsupportedHostError
from baft.hosts.encoding import Encoder
from baft.hosts.patches import down_projection, up_projection, weight_shape
from baft.methods.melo import MeloConfig, MeloEditor
from baft.methods.texts import renderings
from baft.methods.vector_database import NO_BLOCK, VectorDatabase
from baft.types import Edit, EditRequest
from tiny import HOSTS, tiny_host

FIRST, SECOND = (
    EditRequest((Edit("The tower is in the city of", "Rome"),)),
    EditRequest((Edit("A hat", "x"),)),
)
ROME, PARIS = 1, 2
QUICK = MeloConfig(
    learning_rate=2e-2, schedule="constant", max_steps=40, scale=4.0, rank=16, key_layer=0, stop_margin=0.7
)


def database(*added, radius=1.0):
    """Keys on the axis of x, each with what it says; each has the block of its number."""
    found = VectorDatabase.empty(torch.zeros(2, dtype=torch.float64))
    for block, (x, label) in enumerate(added):
        found = found.add(at(x), label, block, radius)
    return found


def at(x, y=0.0):
    return torch.tensor([x, y], dtype=torch.float64)


def routes(found, *places):
    return found.route(
        torch.stack([at(*place) if isinstance(place, tuple) else at(place) for place in places])
    )


class TestDatabase:
    def test_a_key_alone_owns_what_lies_within_the_radius(self):
        found = database((0.0, ROME))
        assert routes(found, 0.0, 1.0, -1.0, (0.6, 0.8), 1.001, (0.8, 0.8)).tolist() == [0, 0, 0, 0, -1, -1]
        assert routes(database(), 0.0).tolist() == [NO_BLOCK]

    def test_a_key_far_away_begins_a_cluster(self):
        found = database((0.0, ROME), (2.5, ROME))
        assert found.centers[:, 0].tolist() == [0.0, 2.5]
        assert found.radii.tolist() == [1.0, 1.0]
        assert routes(found, 0.9, 1.25, 1.6).tolist() == [0, -1, 1]

    def test_a_near_key_that_says_the_same_joins(self):
        """The center moves to the mean, 0.9, and the radius stays at 1, above 0.9, or grows to hold both."""
        found = database((0.0, ROME), (1.8, ROME))
        assert found.centers[:, 0].tolist() == [0.9]
        assert found.radii.tolist() == [1.0]
        assert routes(found, -0.05, 0.8, 1.0, 1.85, 1.95).tolist() == [0, 0, 1, 1, -1]
        # 2.8 is 1.9 from the center 0.9, within 1 + 1; the mean is 4.6 / 3 and 0.0 the farthest from it.
        grown = database((0.0, ROME), (1.8, ROME), (2.8, ROME))
        assert grown.centers[0, 0].item() == pytest.approx(4.6 / 3)
        assert grown.radii.tolist() == pytest.approx([4.6 / 3 * (1 + 1e-5)])
        assert routes(grown, 0.0, 1.7, 3.0, 3.1).tolist() == [0, 1, 2, -1]
        assert routes(grown, -5e-6).tolist() == [0]  # what rounding makes of the farthest key

    def test_a_near_key_that_says_something_else_splits_the_distance(self):
        found = database((0.0, ROME), (1.2, PARIS))
        assert found.radii.tolist() == pytest.approx([0.6, 0.6], abs=2e-5)
        assert routes(found, 0.59, 0.61, -0.61, 1.8, 1.81).tolist() == [0, 1, -1, 1, -1]

    def test_keys_that_the_old_cluster_no_longer_holds_are_forgotten(self):
        """0 and 1.8 are 0.9 from their center 0.9; the split with 1.5, 0.6 away, leaves a radius of 0.3."""
        found = database((0.0, ROME), (1.8, ROME), (1.5, PARIS))
        assert found.radii.tolist() == pytest.approx([0.3, 0.3], abs=2e-5)
        assert found.blocks.tolist() == [2]
        assert routes(found, 0.0, 0.9, 1.5, 1.8).tolist() == [-1, -1, 2, 2]

    def test_the_same_key_again_takes_the_place_of_what_it_said(self):
        found = database((0.0, ROME), (0.0, PARIS))
        assert routes(found, 0.0).tolist() == [1]
        assert found.blocks.tolist() == [1]

    # Steps of 0.37 put no key on a border, where rounding would decide.
    @given(st.lists(st.tuples(st.integers(-8, 8), st.sampled_from([ROME, PARIS])), min_size=1, max_size=8))
    def test_it_says_what_the_rules_say_one_by_one(self, added):
        added = [(0.37 * steps, label) for steps, label in added]
        found = database(*added)
        clusters = by_the_rules(added, 1.0)
        assert found.centers[:, 0].tolist() == pytest.approx([one["center"] for one in clusters])
        assert found.radii.tolist() == pytest.approx([one["radius"] for one in clusters])
        ours = [found.blocks[found.owners == i].tolist() for i in range(len(clusters))]
        assert ours == [[block for _, block in one["keys"]] for one in clusters]


def by_the_rules(added, radius):
    """The authors' rules in plain numbers, but for clusters at one distance, of which the latest counts, and
    for a hair beyond the farthest key."""
    clusters = []
    for block, (x, label) in enumerate(added):
        near = min(reversed(clusters), key=lambda one: abs(one["center"] - x), default=None)
        new = {"center": x, "radius": radius, "label": label, "keys": [(x, block)]}
        distance = math.inf if near is None else abs(near["center"] - x)
        if near is None or distance > near["radius"] + radius:
            clusters.append(new)
        elif near["label"] == label:
            near["keys"].append((x, block))
            near["center"] = sum(key for key, _ in near["keys"]) / len(near["keys"])
            farthest = max(abs(key - near["center"]) for key, _ in near["keys"])
            near["radius"] = max(radius, farthest + 1e-5 * max(1.0, abs(near["center"])))
        else:
            tie = 1e-5 * max(1.0, abs(x))
            new["radius"], near["radius"] = distance / 2 + tie, distance / 2 - tie
            near["keys"] = [key for key in near["keys"] if abs(key[0] - near["center"]) <= near["radius"]]
            clusters.append(new)
    return clusters


def logits(editor, text, n_prompt_tokens=None):
    ids = torch.tensor([Encoder.for_host(editor.host).prompt(text)])
    known = None if n_prompt_tokens is None else torch.tensor([n_prompt_tokens])
    with torch.no_grad():
        return editor.edited(ids, n_prompt_tokens=known).logits


@pytest.fixture(scope="module")
def editor(host):
    editor = MeloEditor(host, QUICK)
    for request in (FIRST, SECOND):
        assert editor.apply(request).stopped == "margin"
    return editor


def test_a_block_is_not_touched_by_another_edit(host, editor):
    alone = MeloEditor(host, QUICK)
    alone.apply(FIRST)
    assert all(torch.equal(editor.state[name], one) for name, one in alone.state.items() if name[:2] == "0.")
    prompt = FIRST.edits[0].prompt
    assert torch.equal(logits(alone, prompt), logits(editor, prompt))
    other = SECOND.edits[0].prompt
    assert not torch.equal(logits(alone, other), logits(editor, other))  # control


def test_other_prompts_are_the_hosts_bit_for_bit(host, editor):
    for text, is_far in (("Nothing in particular", True), (FIRST.edits[0].prompt, False)):
        ids = torch.tensor([Encoder.for_host(host).prompt(text)])
        with torch.no_grad():
            assert torch.equal(logits(editor, text), host.model(ids).logits) is is_far


def test_a_block_is_a_change_of_the_weights_above(host, editor):
    """At every token of the text, from the key's layer on."""
    model, text = copy.deepcopy(host.model), FIRST.edits[0].prompt
    ids = torch.tensor([Encoder.for_host(host).prompt(text)])
    with torch.no_grad():
        for name in editor.modules:
            product = editor.state[f"0.{name}.B"] @ editor.state[f"0.{name}.A"]
            model.get_submodule(name).weight.add_(4.0 * product)
        torch.testing.assert_close(logits(editor, text), model(ids).logits, atol=1e-9, rtol=0)
    assert len(editor.modules) == 2


def test_it_is_decided_once_for_a_prompt_and_kept_for_its_outputs(host, editor):
    encoder, n = Encoder.for_host(host), 6
    prompt = encoder.prompt(FIRST.edits[0].prompt)
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0, "eos_token_id": 2}
    reply = editor.edited.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0]
    slow = ids[0]
    with torch.no_grad():
        for _ in range(n):
            out = editor.edited(slow[None], n_prompt_tokens=torch.tensor([len(prompt)]), use_cache=False)
            slow = torch.cat([slow, out.logits[0, -1].argmax()[None]])
    assert torch.equal(reply, slow)
    assert not torch.equal(
        reply, host.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0]
    )
    # Control: asked anew at the last token of a longer prompt, it is another key.
    with torch.no_grad():
        whole = editor.edited(slow[None], n_prompt_tokens=torch.tensor([len(slow)])).logits
        assert torch.equal(whole, host.model(slow[None]).logits)


def test_each_row_of_a_batch_has_its_own_block(host, editor):
    encoder = Encoder.for_host(host)
    texts = [FIRST.edits[0].prompt, "Nothing in particular", SECOND.edits[0].prompt]
    rows = [encoder.prompt(text) for text in texts]
    for side in ("left", "right"):
        batch = encoder.pad(rows, [len(row) for row in rows], side=side)
        given = {"n_prompt_tokens": batch.n_prompt_tokens}
        if side == "left":
            given["position_ids"] = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            together = editor.edited(batch.input_ids, batch.attention_mask, **given).logits
        for i, text in enumerate(texts):
            found = together[i][batch.attention_mask[i].bool()]
            torch.testing.assert_close(found, logits(editor, text)[0], atol=1e-9, rtol=0)


def test_training_is_adam_on_the_block_with_a_rate_that_is_halved(host):
    config = MeloConfig(
        learning_rate=2e-2,
        schedule="constant",
        max_steps=5,
        scale=4.0,
        rank=3,
        key_layer=0,
        stop_margin=None,
        halve_every=2,
    )
    editor = MeloEditor(host, config)
    starts = {name: [one.clone().requires_grad_() for one in editor._first(name)] for name in editor.modules}
    outcome = editor.apply(FIRST)
    model = copy.deepcopy(host.model).requires_grad_(False)
    for name, (up, down) in starts.items():
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, up=up, down=down: output + 4.0 * args[0] @ down.T @ up.T
        )
    (text,) = renderings(editor.encoder, FIRST.edits, chat=False, eos=False)
    adam = torch.optim.Adam([one for pair in starts.values() for one in pair], lr=2e-2)
    plan = torch.optim.lr_scheduler.StepLR(adam, step_size=2, gamma=0.5)
    losses = []
    for _ in range(5):
        out = model(torch.tensor([text.prompt_ids + text.target_ids])).logits[
            0, len(text.prompt_ids) - 1 : -1
        ]
        loss = torch.nn.functional.cross_entropy(out, torch.tensor(text.target_ids))
        losses.append(loss.detach().item())
        adam.zero_grad()
        loss.backward()
        adam.step()
        plan.step()
    torch.testing.assert_close(outcome.losses[:-1], tuple(losses), atol=1e-9, rtol=0)
    for name, (up, down) in starts.items():
        torch.testing.assert_close(editor.state[f"0.{name}.B"], up.detach(), atol=1e-9, rtol=0)
        torch.testing.assert_close(editor.state[f"0.{name}.A"], down.detach(), atol=1e-9, rtol=0)
        assert float(up.detach().abs().max()) > 1e-2  # control


def test_an_edit_of_the_same_prompt_takes_the_place_of_the_last(host, editor):
    again = MeloEditor(host, QUICK)
    for target in ("Rome", "Bonn"):
        outcome = again.apply(EditRequest((Edit(FIRST.edits[0].prompt, target),)))
        assert outcome.decoded == (True,)
        n = len(Encoder.for_host(host).prompt(FIRST.edits[0].prompt))
        text = again.encoder.edit(FIRST.edits[0].prompt, target, eos=False)
        with torch.no_grad():
            ids = torch.tensor([text.prompt_ids + text.target_ids])
            out = again.edited(ids, n_prompt_tokens=torch.tensor([n])).logits[0, n - 1 : -1]
        assert out.argmax(-1).tolist() == list(text.target_ids)


@pytest.mark.parametrize(("family", "attention"), [one for one in HOSTS if one[0] != "mixtral"])
def test_the_up_projection_feeds_the_down_projection(family, attention):
    model = tiny_host(family, attention=attention)
    up, down = (model.get_submodule(find(model, 1)) for find in (up_projection, down_projection))
    (width, d_model), (d_out, d_in) = weight_shape(up), weight_shape(down)
    assert d_model == d_out
    assert width in (d_in, 2 * d_in)  # Phi-3 keeps the gate in the same matrix
    seen = []
    for name, module in (("up", up), ("down", down)):
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.tensor([[1, 5, 6]]))
    assert seen == ["up", "down"]


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(UnsupportedHostError, match="down-projections of a feed-forward part"):
        up_projection(tiny_host("mixtral"), 1)


def test_the_last_layer_gives_no_keys(host):
    with pytest.raises(ConfigError, match="key_layer=2 has no layer above it"):
        MeloEditor(host, MeloConfig(key_layer=2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("radius", 0.0), ("scale", 0.0), ("depth", 1.5), ("rank", 0), ("n_layers", 0), ("halve_every", 0)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is out of range: got {value}"):
        MeloConfig(**{name: value})
