"""Checks of whole edits on a device and in a precision, the same on a CPU and on an accelerator."""

import torch

import baft
from baft.hosts import background as module
from baft.hosts.architecture import Site, input_device, site_device
from baft.hosts.background import background, background_text
from baft.hosts.encoding import Encoder
from baft.hosts.models import Host
from baft.types import Edit
from quick_methods import ASKED, ONE_STEP, READ, REQUESTS, STEPS, WIDE, make
from tiny import CHATML, tiny_host, tiny_tokenizer

PRESETS = (("baft", "default"), ("baft", "paper"), ("baft", "paper-rloc"), ("reft", "default"))
PROMPT, TARGET = "The tower is in the city of", "Ro"


def loaded(dtype, device):
    """A tiny host as the user's object; its context holds every background text."""
    host = tiny_host("llama", dtype=dtype, device=device, max_position_embeddings=512)
    return baft.load((host, tiny_tokenizer(chat_template=CHATML)))


def learn(model, method="baft", preset="default"):
    """One edit, and its report."""
    gates = WIDE if (method, preset) == ("baft", "default") else {}
    return model.edit(PROMPT, TARGET, method=method, preset=preset, **STEPS, **gates)


def check_editing(method, preset, *, dtype, device):
    """An edit is said, its tensors are where and what they should be, and undo leaves the host's bits."""
    model = loaded(dtype, device)
    weights = {name: tensor.clone() for name, tensor in model.host.state_dict().items()}
    before = model.logits(PROMPT)
    assert (before.dtype, before.device.type) == (dtype, device)
    said = model.generate(PROMPT)
    report = learn(model, method, preset)
    assert report.succeeded
    assert report.n_steps > 0
    assert model.generate([PROMPT, "A"])[0].strip().startswith(TARGET)
    assert not said.strip().startswith(TARGET)  # control
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parts = [part for there in model._edited.interventions.values() for part in there]
    tensors = [tensor for part in parts for tensor in part.state_dict().values()]
    assert len(parts) > 1
    assert {(tensor.dtype, tensor.device.type) for tensor in tensors} == {(wide, device)}
    edited = model.logits(PROMPT)
    assert (edited.dtype, edited.device.type) == (dtype, device)
    assert not torch.equal(edited, before)  # control
    assert model.explain(PROMPT)
    model.undo()
    assert torch.equal(model.logits(PROMPT), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.host.state_dict().items())


def check_method(method, *, dtype, device):
    """Two requests are learned, found again by their state bit for bit, and undone to the host's bits."""
    host = loaded(dtype, device)._host
    requests = ASKED.get(method, REQUESTS)[:2]
    encoder = Encoder.for_host(host)
    rows = [encoder.prompt(edit.prompt) for request in requests for edit in request.edits]
    batch = encoder.pad(rows, [len(row) for row in rows], side="right", device=device)

    @torch.no_grad()
    def logits(editor):
        given = (batch.input_ids, batch.attention_mask)
        return editor.edited(*given, n_prompt_tokens=batch.n_prompt_tokens).logits

    editor = make(host, method, "default")
    seen = [logits(editor)]
    for request in requests:
        outcome = editor.apply(request)
        assert outcome.decoded == tuple(margin > 0 for margin in outcome.margins)
        assert method in {*READ, *ONE_STEP} or all(outcome.decoded)
        seen.append(logits(editor))
    assert (seen[-1].dtype, seen[-1].device.type) == (dtype, device)
    assert not torch.equal(seen[0], seen[1])  # controls
    assert not torch.equal(seen[1], seen[2])
    again = make(host, method, "default")
    again.load_state_dict(editor.state_dict(), requests)
    assert torch.equal(logits(again), seen[2])
    editor.undo()
    assert torch.equal(logits(editor), seen[1])
    editor.reset()
    assert torch.equal(logits(editor), seen[0])


@torch.no_grad()
def check_shut_gates_in_batches(*, dtype, device):
    """In one padded batch, every bit stays in the rows where no gate opens, and some go where one does."""
    model = loaded(dtype, device)
    learn(model)
    prompts = [PROMPT, *background_text()["canaries"]]
    is_open = torch.tensor(
        [any(max(one.weights) > 0 for one in model.explain(prompt, max_new_tokens=0)) for prompt in prompts]
    )
    assert is_open[0]  # or this would be no test
    assert not is_open.all()
    encoder = Encoder(model.tokenizer)
    rows = [encoder.prompt(prompt) for prompt in prompts]
    batch = encoder.pad(rows, [len(row) for row in rows], side="right", device=device)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    got = model.hf(**given, n_prompt_tokens=batch.n_prompt_tokens).logits
    want = model.host(**given).logits
    assert got.device.type == device
    real = batch.attention_mask.bool().unsqueeze(-1)
    same = ((got == want) | ~real).flatten(1).all(-1).cpu()
    assert same[~is_open].all()
    assert not same[0]  # control


def check_scopes(monkeypatch, *, dtype, device):
    """Edits of the default method: each as if alone, in any order, taken out; else the host's bits."""
    monkeypatch.setattr("baft.scope.untrained._MIDPOINT", 0.99)  # tiny hosts' tokens are letters
    edits = (Edit(PROMPT, TARGET), Edit("The king of France was", "Al"), Edit("Nine hats of", "Co"))
    asked = [edit.prompt for edit in edits] + ["Nothing in particular", "A river"]

    pair = _pair(device, dtype)

    def logits_with(model, *edits):
        for edit in edits:
            report = model.edit(edit, method="baft-bank", n_others=1, schedule="constant", **STEPS)
            assert report.succeeded
        return torch.stack([model.logits(prompt) for prompt in asked])

    bare = logits_with(baft.load(pair))
    assert (bare.dtype, bare.device.type) == (dtype, device)
    model = baft.load(pair)
    every = logits_with(model, *edits)
    fewer = baft.load(pair)
    assert torch.equal(logits_with(fewer, edits[0])[0], every[0])
    assert not any(torch.equal(every[i], bare[i]) for i in range(3))  # control
    assert torch.equal(every[3:], bare[3:])
    assert torch.equal(logits_with(baft.load(pair), *reversed(edits)), every)
    model.remove(edits[1].id)
    assert torch.equal(logits_with(model), logits_with(fewer, edits[2]))
    model.undo(2)
    assert torch.equal(logits_with(model), bare)


def check_saving_across(folder, made_on, read_on):
    """What is learned on one device is said on another, and comes back to the first bit for bit."""
    made = loaded(torch.float64, made_on)
    learn(made)
    read = baft.load(made.save(folder / "there.baft"), host=_pair(read_on))
    assert [says for _, _, says in read.check()] == [True]
    want = made.logits(PROMPT)
    got = read.logits(PROMPT)
    assert got.device.type == read_on
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=0, atol=1e-9)
    with read.disabled():
        assert float((read.logits(PROMPT) - got).abs().max()) > 1e-2  # control
    back = baft.load(read.save(folder / "back.baft"), host=_pair(made_on))
    assert torch.equal(back.logits(PROMPT), want)


def _pair(device, dtype=torch.float64):
    model = loaded(dtype, device)
    return model.host, model.tokenizer


def check_background(folder, monkeypatch, *, dtype, device):
    """Computed or read from the cache: the same bits, in the interventions' precision and on their device."""
    monkeypatch.setenv("BAFT_CACHE", str(folder))
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)
    model, sites = loaded(dtype, device), (Site(0), Site(2))
    host = Host("tiny", model.host, model.tokenizer, "tiny")
    encoder = Encoder.for_host(host, max_tokens=512)
    made = background(host, encoder, sites)
    monkeypatch.setattr(module, "_compute", None)  # from here on it is read
    read = background(host, encoder, sites)
    for found in (made, read):
        assert found.slots.device == input_device(host.model)
        for site in sites:
            assert found.states[site].device == site_device(host.model, site)
            assert found.states[site].device.type == device
            assert found.states[site].dtype == torch.float32
            assert torch.equal(found.states[site], made.states[site])
    assert not torch.equal(made.states[sites[0]], made.states[sites[1]])  # control
