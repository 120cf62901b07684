"""Hosts that cannot be run in parts are trained by full passes: the edit is right, and it says why."""

from dataclasses import replace

import pytest
import torch

from baft.hosts import passes, suffix
from baft.hosts.architecture import Site, find_architecture
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.hosts.passes import why_full
from baft.hosts.positions import PositionSpec
from baft.methods.baft import ReftEditor
from baft.types import Edit, EditRequest
from tiny import HOSTS, shared_host, tiny_host, tiny_tokenizer

TOWER = EditRequest((Edit("The tower is in the city of", "Ro"),))


def as_host(model):
    return Host("tiny", model, tiny_tokenizer(), "a tiny random host")


def each_attention(model, change):
    """Every attention of a host calls its own forward with other arguments."""
    for block in find_architecture(model).blocks:
        attention = block.self_attn
        forward = attention.forward
        attention.forward = lambda *args, forward=forward, **named: forward(*args, **change(named))


def ignores_its_cache(model):
    """It keeps keys like any other host, and looks at none of them."""

    def change(named):
        cache, mask = named.get("past_key_values"), named.get("attention_mask")
        if cache is None or not isinstance(cache.layers[0], suffix._PrefixLayer):
            return named
        new = named["hidden_states"].shape[1]
        return {
            **named,
            "past_key_values": None,
            "attention_mask": None if mask is None else mask[..., -new:],
        }

    each_attention(model, change)


def keeps_nothing(model):
    """It keeps no keys at all."""
    each_attention(model, lambda named: {**named, "past_key_values": None})


def looks_at_its_blocks(model):
    """Its own code asks its blocks for what a stand-in is not."""
    stack = find_architecture(model).stack

    class Picky(type(stack)):
        def forward(self, input_ids=None, past_key_values=None, **named):
            if len({type(block) for block in self.layers}) > 1:
                raise TypeError("a block of another kind")
            return super().forward(input_ids, past_key_values=past_key_values, **named)

    stack.__class__ = Picky


BREAKS = {
    ignores_its_cache: "both passes differ by ",
    keeps_nothing: "UnsupportedHostError: layer 1 of this host keeps no keys of every token",
    looks_at_its_blocks: "TypeError: a block of another kind",
}


@pytest.fixture
def passes_made(monkeypatch):
    """How many passes of each kind an editor made."""
    made = []
    for name in ("FullPass", "SuffixPass"):
        kind = getattr(suffix, name)

        def make(*args, kind=kind, name=name, **named):
            made.append(name)
            return kind(*args, **named)

        monkeypatch.setattr(suffix, name, make)
    return made


def editor_of(model, **settings):
    quick = {"learning_rate": 5e-2, "max_steps": 40, "stop_margin": 0.7, "layers": (0, 2), **settings}
    return ReftEditor(as_host(model), replace(ReftEditor.preset("default"), **quick))


@pytest.mark.parametrize("breaks", BREAKS, ids=lambda one: one.__name__)
def test_a_host_that_cannot_be_split_is_edited_all_the_same(breaks, passes_made):
    model = tiny_host("llama")
    breaks(model)
    editor = editor_of(model)
    outcome = editor.apply(TOWER)
    assert outcome.why_full is not None
    assert BREAKS[breaks] in outcome.why_full
    assert passes_made == ["SuffixPass", "FullPass"]  # the first is the trial
    assert outcome.decoded == (True,)
    text = Encoder.for_host(editor.host).edit("The tower is in the city of", "Ro")
    ids = torch.tensor([text.prompt_ids + text.target_ids])
    n = torch.tensor([len(text.prompt_ids)])
    plain = {"use_cache": False}
    with torch.no_grad():
        said = editor.edited(ids, n_prompt_tokens=n, **plain).logits[0, n - 1 : -1].argmax(-1)
        host_says = model(ids, **plain).logits[0, n - 1 : -1].argmax(-1)
    assert said.tolist() == list(text.target_ids)
    assert host_says.tolist() != list(text.target_ids)
    apart = editor_of(model).apart([TOWER])
    assert [one.why_full for one in apart.outcomes] == [outcome.why_full]
    passes_made.clear()
    whole = editor_of(tiny_host("llama")).apply(TOWER)  # control
    assert whole.why_full is None
    assert passes_made == ["SuffixPass", "SuffixPass"]
    assert whole.losses == pytest.approx(outcome.losses, rel=1e-9)  # it is the same edit, made more dearly


@pytest.mark.parametrize("pair", HOSTS, ids="-".join)
def test_every_architecture_here_can_be_split(pair):
    host = as_host(shared_host(*pair))
    encoder = Encoder.for_host(host)
    texts = [encoder.edit("The tower is in the city of", "Ro")]
    for first in range(3):
        assert why_full(host, encoder, PositionSpec(), texts, (Site(first), Site(2))) is None


def test_it_is_tried_once_for_a_host_and_its_first_layer(monkeypatch, caplog):
    model, tried = tiny_host("llama"), []
    keeps_nothing(model)
    host = as_host(model)
    kind = passes.FullPass
    monkeypatch.setattr(passes, "FullPass", lambda *args: tried.append(args[-1]) or kind(*args))
    encoder = Encoder.for_host(host)
    texts = [encoder.edit("The tower is in the city of", "Ro")]
    with caplog.at_level("INFO", "baft.hosts.passes"):
        found = [
            why_full(host, encoder, PositionSpec(), texts, sites)
            for sites in [(Site(0),), (Site(0), Site(2))]
        ]
        assert len(tried) == 1
        assert found[0] == found[1] is not None
        assert [one.message for one in caplog.records] == [f"tiny is trained by full passes: {found[0]}"]
        assert why_full(host, encoder, PositionSpec(), texts, (Site(2),)) is None  # nothing is kept above it
        assert len(tried) == 2
        other = as_host(tiny_host("llama"))  # control: another host is another question
        assert why_full(other, encoder, PositionSpec(), texts, (Site(0),)) is None
        assert len(tried) == 3
        assert len(caplog.records) == 1


def test_what_says_nothing_about_the_host_is_asked_again(monkeypatch):
    model = tiny_host("llama")
    asked = (as_host(model), Encoder.for_host(as_host(model)), PositionSpec())
    texts = [asked[1].edit("The tower is in the city of", "Ro")]
    real = suffix.SuffixPass

    def fail(*_):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(suffix, "SuffixPass", fail)
    assert why_full(*asked, texts, [Site(0)]) == "RuntimeError: can't allocate memory"
    monkeypatch.setattr(suffix, "SuffixPass", real)
    assert why_full(*asked, texts, [Site(0)]) is None
    monkeypatch.setattr(suffix, "SuffixPass", fail)
    assert why_full(*asked, texts, [Site(0)]) is None  # this is known
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert why_full(*asked, texts, [Site(0)]) is not None  # with somebody's hook it is not
    handle.remove()


def test_the_trial_fits_where_the_edit_fits():
    model = tiny_host("gpt2")
    host = as_host(model)
    encoder, limit = Encoder.for_host(host), find_architecture(model).max_positions
    longest = encoder.edit("The tower", "x" * (limit - len(encoder.prompt("The tower")) - 2))
    assert len(longest.prompt_ids + longest.target_ids) in (limit - 2, limit - 1, limit)
    assert why_full(host, encoder, PositionSpec(), [longest], [Site(0)]) is None
