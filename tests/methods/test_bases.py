"""The bases of edits: what shared ones are penalized for, and what own ones do not depend on."""

from dataclasses import replace

import pytest
import torch

from baft.hosts.architecture import Site
from baft.hosts.background import Background
from baft.hosts.encoding import Encoder
from baft.hosts.passes import FullPass, Predictions
from baft.hosts.positions import PositionSpec
from baft.hosts.suffix import SuffixPass
from baft.methods.baft import BaftEditor
from baft.methods.baft_config import DEFAULT, PAPER
from baft.methods.bases import Frame, SharedBases
from baft.nn.gates import ConditionedGate, LogisticGate
from baft.nn.interventions import SubspaceIntervention
from baft.types import Edit, EditRequest
from tiny import D_MODEL

SITES = (Site(1), Site(2))
RANK = 4
TOWER, KING, PARIS = Edit("The tower is in", "Ro"), Edit("The king was", "Al"), Edit("Paris is in", "Be")
FEW = {"rank": RANK, "max_steps": 3, "learning_rate": 5e-2}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shared(host, **changes):
    config = replace(PAPER, rank=RANK, **changes)
    return SharedBases(Frame(host, config, SITES, D_MODEL, 0))


def trained(*, tilt=None):
    """A part at each site; `tilt` moves the gates' intercepts apart."""
    parts = {}
    for i, site in enumerate(SITES):
        gate = ConditionedGate(
            1, RANK, mean=torch.zeros(D_MODEL).double(), scale=torch.ones(D_MODEL).double()
        )
        part = SubspaceIntervention.identity(
            1, RANK, D_MODEL, gate, generator=torch.Generator().manual_seed(i), dtype=torch.float64
        )
        if tilt is not None:
            with torch.no_grad():
                part.gate.v.copy_(torch.tensor([tilt]))
        parts[site] = part
    return parts


def predictions():
    states = {site: normal(6, D_MODEL, seed=i) for i, site in enumerate(SITES)}
    return Predictions(torch.zeros(1, 2), states, torch.tensor([0, 0, 0, 0, 1, 1]))


def with_loads(bases, *loads):
    layers = {site: part.frozen() for site, part in trained().items()}
    bases._now = (
        layers,
        {site: torch.tensor([load]).double() for site, load in zip(SITES, loads, strict=True)},
    )
    return bases


def pull(bases, parts, n_requests=2):
    """How descent on the penalty moves the intercepts of the first layer's gates."""
    penalty = bases.penalty(None, n_requests)
    return -torch.autograd.grad(penalty(0, predictions(), parts, None), [parts[SITES[0]].gate.v])[0][0]


def test_balance_uses_the_bases_that_did_least(host):
    even = [1.0] * RANK
    pulled = pull(with_loads(shared(host), [3.0, 1.0, 1.0, 0.0], even), trained())
    assert pulled[0] < 0 < pulled[3]
    assert pulled.argmax() == 3
    assert pulled.argmin() == 0
    reverse = pull(with_loads(shared(host), [0.0, 1.0, 1.0, 3.0], even), trained())
    torch.testing.assert_close(reverse, pulled.flip(0), rtol=1e-9, atol=1e-12)
    assert (
        float(pull(with_loads(shared(host), even, even), trained()).abs().max()) < 1e-12
    )  # control: no load leads
    assert float(pull(shared(host), trained()).abs().max()) < 1e-12  # nor before the first edit


def test_the_balance_is_its_formula(host):
    loads = ([3.0, 1.0, 1.0, 0.0], [0.5, 2.0, 1.0, 0.0])
    parts, shown = trained(tilt=[1.0, 0.0, -1.0, 2.0]), predictions()
    terms = []
    for site, load in zip(SITES, loads, strict=True):
        gate = parts[site].gate
        w = torch.sigmoid(shown.states[site] / D_MODEL**0.5 @ gate.V[0].T + gate.v[0])
        m = (w[:4].mean(0) + w[4:].mean(0)) / 2  # two texts weigh the same, whatever their length
        total = [past + float(now.detach()) for past, now in zip(load, m, strict=True)]
        mean = sum(total) / RANK
        terms.append(sum((one - mean) ** 2 for one in total) / RANK / mean**2)
    for form, factor in (("running", 1), ("running_times_t", 5), ("exponential", 1)):
        bases = with_loads(shared(host, load_balance=0.3, balance_form=form), *loads)
        found = float(bases.penalty(None, 5)(0, shown, parts, None).detach())
        assert found == pytest.approx(factor * 0.3 * sum(terms) / 2, rel=1e-9)


def test_locality_waits_for_its_step(host):
    parts = trained(tilt=[1.0, 0.0, -1.0, 2.0])
    unrelated = Background(
        {site: normal(50, D_MODEL, seed=7) for site in SITES}, torch.zeros(50, dtype=torch.long)
    )
    penalty = shared(host, load_balance=0.0, locality=0.5).penalty(unrelated, 1)
    assert [penalty(step, predictions(), parts, None) is None for step in range(5)] == [
        True,
        True,
        True,
        False,
        False,
    ]
    squares = [parts[site].gate.soft(unrelated.states[site]).square().mean() for site in SITES]
    expected = 0.5 * float(sum(squares).detach()) / 2
    assert float(penalty(3, predictions(), parts, None).detach()) == pytest.approx(expected, rel=1e-12)
    at_once = shared(host, load_balance=0.0, locality=0.5, locality_from_step=0).penalty(unrelated, 1)
    assert at_once(0, predictions(), parts, None) is not None  # control
    both = shared(host, load_balance=0.2, locality=0.5)
    alone = shared(host, load_balance=0.2).penalty(None, 1)
    total, balance = (
        float(one(3, predictions(), parts, None).detach()) for one in (both.penalty(unrelated, 1), alone)
    )
    assert total == pytest.approx(balance + expected, rel=1e-12)


@pytest.mark.parametrize("changes", [{"load_balance": 0.0}, {"load_balance": 0.0, "gate": "open"}])
def test_where_nothing_is_penalized(host, changes):
    assert shared(host, **changes).penalty(None, 1) is None
    assert shared(host).penalty(None, 1) is not None  # control


@pytest.mark.parametrize("form", ["running", "exponential", "current"])
def test_the_load_is_kept_from_edit_to_edit(host, form):
    """It is the mean weight over the edited tokens, at the end of each edit."""
    editor = BaftEditor(host, replace(PAPER, **FEW, balance_form=form, layers=(1, 2)))
    encoder, expected = Encoder.for_host(host), {1: torch.zeros(RANK), 2: torch.zeros(RANK)}
    for edit in (TOWER, KING):
        editor.apply(EditRequest((edit,)))
        text = encoder.edit(edit.prompt, edit.target, eos=False)
        readings = editor.explain((*text.prompt_ids, *text.target_ids[:-1]), len(text.prompt_ids))
        for layer in expected:
            m = torch.tensor([one.weights for one in readings if one.layer == layer]).mean(0)
            kept = {"running": 1.0, "exponential": 0.9, "current": 0.0}[form]
            expected[layer] = kept * expected[layer] + (0 if form == "current" else m)
        for layer, load in expected.items():
            torch.testing.assert_close(editor.state_dict()[f"shared.layer{layer}.load"].float(), load)
    assert form == "current" or float(expected[1].sum()) > 0.5  # control
    editor.reset()
    editor.apply(EditRequest((KING,)))
    assert (
        float(editor.state_dict()["shared.layer1.load"].max()) <= 1
    )  # one edit's, as a reset forgets the others


@pytest.mark.parametrize("kind", [FullPass, SuffixPass])
def test_the_load_of_a_large_request_is_seen_a_few_texts_at_a_time(host, kind, monkeypatch):
    encoder, sizes = Encoder.for_host(host), []
    edits = (TOWER, KING, PARIS, Edit("A much longer prompt than these", "so it is"), Edit("Who", "of it"))
    texts = [encoder.edit(one.prompt, one.target) for one in edits]
    run = kind(host, encoder, PositionSpec(), texts, SITES)
    call = kind.__call__

    def watched(self, *given):
        sizes.append(len(self.rows.unique()))
        return call(self, *given)

    monkeypatch.setattr(kind, "__call__", watched)

    def loads(at_once):
        bases = with_loads(shared(host, edits_at_once=at_once), [0.5] * RANK, [1.0] * RANK)
        sizes.clear()
        bases.commit(run, trained(tilt=[1.0, 0.0, -1.0, 2.0]))
        return bases.state[0][1], list(sizes)

    (few, in_pieces), (all_texts, at_once) = loads(2), loads(len(edits))
    assert (in_pieces, at_once) == ([2, 2, 1], [5])
    for site in SITES:
        torch.testing.assert_close(few[site], all_texts[site], rtol=0, atol=1e-9)
        assert float((few[site] - few[site].flip(-1)).abs().max()) > 0.1  # control: the gates differ


def test_shared_gates_go_on_from_where_they_stood(host):
    editor = BaftEditor(host, replace(PAPER, **FEW, gate_learning_rate=0.1))
    editor.apply(EditRequest((TOWER,)))
    before = editor.state_dict()
    texts = [Encoder.for_host(host).edit(KING.prompt, KING.target)]
    run = FullPass(host, Encoder.for_host(host), PositionSpec(), texts, editor.sites)
    started = editor._bases.start([KING], run, texts, editor._background)
    for site, part in started.items():
        folded = part.gate.fold()
        assert isinstance(part.gate, ConditionedGate)
        U, c = before[f"shared.layer{site.layer}.U"], before[f"shared.layer{site.layer}.c"]
        torch.testing.assert_close(folded.U[0], U, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(folded.c[0], c, rtol=1e-9, atol=1e-9)
        assert float(U.abs().max()) > 0  # control: they have learned something
        assert torch.equal(part.R[0], before[f"shared.layer{site.layer}.R"])
        assert part.R.requires_grad


def test_own_bases_do_not_depend_on_other_edits(host):
    """Random bases and gates are the edit's own; only what it learns may answer to those in force."""
    config = replace(DEFAULT, **FEW)

    def state(*requests):
        editor = BaftEditor(host, config)
        for edits in requests:
            editor.apply(EditRequest(edits))
        found = editor.state_dict()
        return {name: tensor for name, tensor in found.items() if name.startswith(KING.id)}, editor

    alone, _ = state((KING,))
    after, editor = state((TOWER,), (KING,))
    batched, _ = state((TOWER, KING, PARIS))
    for name, tensor in alone.items():
        if name.endswith((".U", ".c")):
            for other in (after, batched):
                # Rounding: the states of a batch are summed in another order.
                torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)
    crowded, _ = state((Edit(KING.prompt, "Be"),), (KING,))
    assert any(not torch.allclose(crowded[name], tensor) for name, tensor in alone.items())  # control
    for part, *_ in editor.edited.interventions.values():
        assert isinstance(part.gate, LogisticGate)
        assert part.n_blocks == 2
    two, _ = state((KING,), (TOWER,))
    assert all(
        torch.equal(two[name], tensor) for name, tensor in alone.items()
    )  # what comes later changes nothing


def test_a_part_of_a_saved_set_is_a_set(host):
    """Blocks are independent: any of them may be left out, in any order, and the others stay bit for bit."""
    editor = BaftEditor(host, replace(DEFAULT, **FEW))
    requests = [EditRequest((edit,)) for edit in (TOWER, KING, PARIS)]
    for one in requests:
        editor.apply(one)
    state = editor.state_dict()
    for kept in ([0, 2], [2], [1, 0], []):
        ids = [requests[i].edits[0].id for i in kept]
        part = {name: tensor for name, tensor in state.items() if name.split(".")[0] in ids}
        fresh = BaftEditor(host, editor.config)
        fresh.load_state_dict(part, [requests[i] for i in kept])
        again = fresh.state_dict()
        assert again.keys() == part.keys()
        assert all(torch.equal(again[name], part[name]) for name in part)
        assert fresh.edited.is_enabled == bool(kept)


def test_an_undo_that_breaks_off_changes_nothing(host, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    editor = BaftEditor(host, replace(DEFAULT, **FEW))
    for edit in (TOWER, KING, PARIS):
        editor.apply(EditRequest((edit,)))
    before, in_force = editor.state_dict(), dict(editor.edited.interventions)
    monkeypatch.setattr("baft.methods.bases.concatenate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        editor.undo()
    monkeypatch.undo()
    after = editor.state_dict()
    assert len(editor.requests) == 3
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert dict(editor.edited.interventions) == in_force
    assert [request.edits for request in editor.undo(2)] == [(PARIS,), (KING,)]
    assert {name.split(".")[0] for name in editor.state_dict()} == {TOWER.id}
