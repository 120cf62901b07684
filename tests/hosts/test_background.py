"""States of text that no edit is about: which they are, and that the cache changes nothing."""

import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from baft.errors import InputError, UnsupportedHostError
from baft.evals.cost import peak_above
from baft.hosts import background as module
from baft.hosts.architecture import Site
from baft.hosts.background import Background, Slot, background, background_text, fitting, prompt_states
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from tiny import CHATML, D_MODEL, states_at, tiny_host, tiny_tokenizer

SITES = (Site(0), Site(2))
SMALL = {
    "sentences": ("A river runs far.", "Bread."),
    "prompts": ("The capital of it", "Who"),
    "chat_prompts": ("Who",),
    "canaries": ("A",),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "background"


@pytest.fixture(scope="module")
def host():
    return Host("tiny", tiny_host("llama"), tiny_tokenizer(chat_template=CHATML), "tiny")


@pytest.fixture(scope="module")
def encoder(host):
    return Encoder.for_host(host, max_tokens=64)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(module, "background_text", lambda: SMALL)


def same(one, other):
    states = all(torch.equal(one.states[site], other.states[site]) for site in SITES)
    return states and torch.equal(one.slots, other.slots)


def test_the_text_is_there_once_and_its_kinds_are_apart():
    text = background_text()
    assert text is background_text()
    assert set(text) == {"sentences", "prompts", "chat_prompts", "canaries"}
    assert len(text["chat_prompts"]) == module.N_CHAT_PROMPTS == len(set(text["chat_prompts"]))
    assert set(text["chat_prompts"]) <= set(text["prompts"])
    assert not set(text["canaries"]) & {*text["sentences"], *text["prompts"]}  # or they could not surprise
    everything = [*text["sentences"], *text["prompts"], *text["canaries"]]
    assert all(one.strip() == one != "" for one in everything)
    assert not [one for one in text["prompts"] if "{" in one or one[0] != one[0].upper()]  # all filled in


def test_states_are_those_of_the_host_at_the_right_tokens(host, encoder, small):
    found = background(host, encoder, SITES)
    for site in SITES:
        expected = []
        for sentence in sorted(SMALL["sentences"], key=lambda one: len(encoder.prompt(one))):
            expected.append(states_at(host.model, site, torch.tensor([encoder.prompt(sentence)]))[1:])
        for prompt in sorted(SMALL["prompts"], key=lambda one: len(encoder.prompt(one))):
            expected.append(states_at(host.model, site, torch.tensor([encoder.prompt(prompt)]))[-3:])
        chat = encoder.chat([{"role": "user", "content": "Who"}])
        expected.append(states_at(host.model, site, torch.tensor([chat]))[-3:])
        # Rounding: rows of a batch are summed in another order.
        torch.testing.assert_close(found.states[site], torch.cat(expected), rtol=0, atol=1e-9)
    n_text = sum(len(encoder.prompt(one)) - 1 for one in SMALL["sentences"])
    texts = found.slots[:n_text].tolist()
    assert set(texts) == {int(Slot.TEXT)}
    last_raw, last_chat = int(Slot.LAST_RAW), int(Slot.LAST_CHAT)
    assert found.slots[n_text:].tolist() == [0, 0, last_raw, 0, 0, last_raw, 0, 0, last_chat]
    assert not torch.equal(found.states[SITES[0]], found.states[SITES[1]])  # control


def test_prompts_of_a_user_are_added(host, encoder, small):
    more = prompt_states(host, encoder, SITES, ["The king of Spain was"])
    assert more.slots.tolist() == [int(Slot.UNRELATED)] * 6  # three raw, three in the template
    base = background(host, encoder, SITES)
    both = base.with_prompts(more)
    for site in SITES:
        assert torch.equal(both.states[site], torch.cat([base.states[site], more.states[site]]))
    assert len(both.slots) == len(base.slots) + 6
    raw = Encoder(tiny_tokenizer())
    assert prompt_states(host, raw, SITES, ["The king"]).slots.tolist() == [int(Slot.UNRELATED)] * 3
    with pytest.raises(InputError, match="context holds 64"):  # a user's text is never left out in silence
        prompt_states(host, encoder, SITES, ["x" * 100])


def test_texts_that_do_not_fit_are_left_out(host, small, monkeypatch):
    assert fitting(
        lambda text: Encoder(tiny_tokenizer(), max_tokens=6).prompt(text), ["Who", "x" * 9, "A"]
    ) == [
        Encoder(tiny_tokenizer()).prompt("Who"),
        Encoder(tiny_tokenizer()).prompt("A"),
    ]
    short = Encoder(tiny_tokenizer(chat_template=CHATML), max_tokens=14)  # one sentence, one prompt, no chat
    found = background(host, short, SITES)
    assert found.slots.tolist() == [0] * len("Bread.") + [0, 0, int(Slot.LAST_RAW)]
    tiny = Encoder(tiny_tokenizer(), max_tokens=3)
    with pytest.raises(
        UnsupportedHostError, match="context of 3 tokens is shorter than every background text"
    ):
        background(host, tiny, SITES)


def test_a_prompt_shorter_than_three_tokens_is_taken_but_for_its_first(host, encoder):
    bare = Encoder(tiny_tokenizer(bos=False))
    found = prompt_states(host, bare, SITES, ["A"])
    assert found.slots.tolist() == [int(Slot.UNRELATED)]
    assert len(prompt_states(host, Encoder(tiny_tokenizer()), SITES, ["A"]).slots) == 1


def test_nothing_is_kept_or_read_while_a_hook_may_change_the_host(host, encoder, small, cache, monkeypatch):
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)

    def change(_, __, output):
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    def changed():
        handle = host.model.model.layers[0].register_forward_hook(change)
        try:
            return background(host, encoder, SITES)
        finally:
            handle.remove()

    other = changed()
    assert not cache.exists()
    made = background(host, encoder, SITES)
    assert list(cache.iterdir())  # control
    assert same(changed(), other)
    assert not same(made, other)
    assert same(background(host, encoder, SITES), made)


def test_states_of_many_batches_are_those_of_each_one_bit_for_bit(host, encoder, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 2)
    texts = {
        Slot.TEXT: [encoder.prompt("A river runs far."[:length]) for length in (9, 3, 17, 6, 12)],
        Slot.LAST_RAW: [encoder.prompt("The capital of it"[:length]) for length in (1, 17, 4)],
    }
    found = module._collect(host, encoder, SITES, texts)
    pieces = []
    for slot, rows in texts.items():
        ordered = sorted(rows, key=len)
        pieces += [
            module._seen(host, encoder, SITES, ordered[i : i + 2], slot) for i in range(0, len(rows), 2)
        ]
    assert len(pieces) == 5
    assert torch.equal(found.slots, torch.cat([piece.slots for piece in pieces]))
    for site in SITES:
        assert torch.equal(found.states[site], torch.cat([piece.states[site] for piece in pieces]))
    n_short = 1 + 3 + 3  # the shortest prompt has one token beside BOS
    assert len(found.slots) == 9 + 3 + 17 + 6 + 12 + n_short
    backwards = torch.cat([piece.states[SITES[0]] for piece in reversed(pieces)])
    assert not torch.equal(found.states[SITES[0]], backwards)  # control


def test_states_are_held_once_while_they_are_collected(host, encoder, monkeypatch):
    """The host is left out: what it takes on the way is its own."""
    length, n_rows = 4001, 20 * module._ROWS
    n_bytes = n_rows * (length - 1) * D_MODEL * 8

    def seen(host, encoder, sites, rows, slot):
        n = len(rows) * (length - 1)
        return Background({site: torch.ones(n, D_MODEL) for site in sites}, torch.zeros(n, dtype=torch.long))

    monkeypatch.setattr(module, "_seen", seen)
    texts = {Slot.TEXT: [(1,) * length] * n_rows}
    peak = peak_above(lambda: module._collect(host, encoder, SITES[:1], texts)).above
    assert n_bytes < peak < 1.5 * n_bytes
    batches = [texts[Slot.TEXT][: module._ROWS]] * 20

    def at_the_end():
        return torch.cat(
            [seen(host, encoder, SITES[:1], some, 0).states[SITES[0]].double() for some in batches]
        )

    assert peak_above(at_the_end).above > 1.9 * n_bytes  # control


def test_the_cache_changes_nothing(host, encoder, small, cache, monkeypatch):
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 1e9)
    made = background(host, encoder, SITES)
    assert not cache.exists()  # too quick to be worth it
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)
    assert same(background(host, encoder, SITES), made)
    [file] = cache.iterdir()
    monkeypatch.setattr(module, "_compute", None)  # from here on it is read
    kept = background(host, encoder, SITES)
    assert same(kept, made)
    assert all(states.data_ptr() % 64 == 0 for states in kept.states.values())  # see _read
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    assert not same(background(host, encoder, SITES), made)  # control: it is this file that is read


@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "gone"])
def test_a_damaged_cache_is_made_anew(host, encoder, small, cache, monkeypatch, damage):
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)
    made = background(host, encoder, SITES)
    [file] = cache.iterdir()
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:-5])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other":
        save_file({"layer0": torch.zeros(1)}, file)
    else:
        file.unlink()
    assert same(background(host, encoder, SITES), made)
    assert file.read_bytes() == whole
    assert [one.name for one in cache.iterdir()] == [file.name]


def test_what_the_cache_is_named_by(host, encoder, small, cache, monkeypatch):
    """Another host, other layers, another tokenizer or text: another file."""
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)
    background(host, encoder, SITES)
    background(host, encoder, SITES)
    assert len(list(cache.iterdir())) == 1
    [name] = [path.stem.split("-") for path in cache.iterdir()]

    def differs(changed, in_encoder, sites=SITES):
        """Which of the two hashes of the name are others than the first host's."""
        before = set(cache.iterdir())
        background(changed, in_encoder, sites)
        [new] = set(cache.iterdir()) - before
        return [one != other for one, other in zip(new.stem.split("-"), name, strict=True)]

    assert differs(host, encoder, (Site(1),)) == [False, True]
    assert differs(host, Encoder.for_host(host, max_tokens=18)) == [False, True]  # fewer texts fit
    raw = Host("raw", host.model, tiny_tokenizer(), "raw")
    assert differs(raw, Encoder.for_host(raw, max_tokens=64)) == [False, True]
    changes = ({"seed": 1}, {"dtype": torch.float32}, {"rms_norm_eps": 1e-3})
    for change in changes:
        other = Host("other", tiny_host("llama", **change), host.tokenizer, "other")
        assert differs(other, encoder) == [True, False]
    monkeypatch.setattr(module, "background_text", lambda: SMALL | {"sentences": ("Else.",)})
    assert differs(host, encoder) == [False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_takes_no_more_room_than_the_host_s_precision(encoder, small, cache, monkeypatch, dtype):
    """And gives every bit back."""
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)
    host = Host("tiny", tiny_host("llama", dtype=dtype), tiny_tokenizer(chat_template=CHATML), "tiny")
    made = background(host, encoder, SITES)
    [file] = cache.iterdir()
    kept = load_file(file)
    assert {kept[f"layer{site.layer}"].dtype for site in SITES} == {dtype}
    monkeypatch.setattr(module, "_compute", None)  # from here on it is read
    read = background(host, encoder, SITES)
    assert same(read, made)
    assert {states.dtype for states in read.states.values()} == {
        states.dtype for states in made.states.values()
    }
    assert not same(read.with_prompts(read), made)  # control


def test_what_was_used_longest_ago_makes_room(host, encoder, small, cache, monkeypatch):
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)
    files = []
    for layer in range(3):
        background(host, encoder, (Site(layer),))
        [new] = set(cache.iterdir()) - set(files)
        os.utime(new, ns=(layer, layer))
        files.append(new)
    background(host, encoder, (Site(0),))  # read, and so used last
    monkeypatch.setattr(module, "_KEPT_BYTES", int(3.5 * files[0].stat().st_size))
    background(host, encoder, SITES)  # of two layers: one more file fits beside it
    left = set(cache.iterdir())
    assert files[0] in left
    assert not {files[1], files[2]} & left
    monkeypatch.setattr(module, "_KEPT_BYTES", 1)
    background(host, encoder, (Site(1),))
    assert list(cache.iterdir()) == [files[1]]  # by itself too large, and kept all the same


def test_a_cache_that_cannot_be_written_costs_time_alone(host, encoder, small, cache, monkeypatch, caplog):
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)
    cache.parent.mkdir()
    cache.write_text("a file is in the way")
    with caplog.at_level(logging.WARNING, logger="baft.hosts.kept"):
        made = background(host, encoder, SITES)
    assert "could not keep the background states" in caplog.text
    assert made.states[SITES[0]].shape[1] == D_MODEL
    assert cache.read_text() == "a file is in the way"


def test_states_have_the_precision_of_interventions(small):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = tiny_host("llama", dtype=dtype)
        one = Host("tiny", model, tiny_tokenizer(), "tiny")
        found = background(one, Encoder.for_host(one), SITES)
        assert {states.dtype for states in found.states.values()} == {expected}
