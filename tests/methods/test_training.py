"""The optimization loop, on a host of one matrix: what it minimizes, when it stops, and how it breaks off."""

from dataclasses import replace

import pytest
import torch

from baft.errors import ConfigError, EditError
from baft.hosts.architecture import Site
from baft.hosts.edited_model import EditedModel
from baft.hosts.encoding import Encoder
from baft.hosts.passes import FullPass, Predictions, TargetPass
from baft.hosts.positions import PositionSpec
from baft.methods.optimizer import TrainingConfig
from baft.methods.training import train
from baft.nn.gates import ConditionedGate, Gate, LogisticGate, OpenGate
from baft.nn.interventions import SubspaceIntervention, intervene
from baft.nn.losses import target_cross_entropy
from baft.types import Edit
from tiny import D_MODEL, N_LAYERS, open_part

D, RANK, VOCAB, N = 8, 3, 11, 4
SITE = Site(0)
CONFIG = TrainingConfig(learning_rate=5e-2, max_steps=100, stop_margin=1.0)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest(tensor):
    return tensor.detach().abs().max().item()


class Matrix:
    """A host of one matrix: four states, and what it says to each of them."""

    def __init__(self, *, seed=0, scale=1.0):
        self.states = normal(N, D, seed=seed)
        self.head = scale * normal(D, VOCAB, seed=seed + 1)
        self.targets = torch.tensor([1, 2, 3, 4])
        self.rows = torch.tensor([0, 0, 1, 1])
        self.n_calls = 0

    def select(self, rows):
        raise AssertionError("one optimization runs on all of its texts")

    def __call__(self, parts, own=None):
        self.n_calls += 1
        h, _ = intervene(parts[SITE], self.states)
        return Predictions(
            h @ self.head, {SITE: self.states}, torch.zeros(len(self.states), dtype=torch.long)
        )


def a_part(gate: Gate | None = None, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SubspaceIntervention.identity(
        1, RANK, D, gate or OpenGate(1, RANK), generator=generator, dtype=torch.float64
    )


def conditioned(run):
    return ConditionedGate(1, RANK, mean=run.states.mean(0), scale=run.states.std(0))


def rates(monkeypatch):
    """The learning rates of every group at every step that will be taken."""
    seen = []
    step = torch.optim.Adam.step

    def watched(self, *args, **named):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    return seen


def test_the_loss_falls_until_the_targets_lead():
    run, part = Matrix(), a_part()
    assert isinstance(run, TargetPass)
    result = train(run, {SITE: part}, {}, CONFIG)
    assert result.stopped == "margin"
    assert min(result.margins) >= 1.0
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert len(result.losses) == result.n_steps + 1 == run.n_calls
    logits = run({SITE: (part,)}).logits.detach()
    assert result.losses[-1] == target_cross_entropy(logits, run.targets, run.rows).item()
    lead = [
        float(row[t] - row[torch.arange(VOCAB) != t].max())
        for row, t in zip(logits, run.targets, strict=True)
    ]
    assert result.margins == pytest.approx([min(lead[:2]), min(lead[2:])], rel=1e-12)
    untrained = run({SITE: (a_part(),)}).logits  # control
    assert not torch.equal(untrained.argmax(-1), run.targets)


@pytest.mark.parametrize(
    ("changes", "stopped"),
    [
        ({"stop_margin": 0.1}, "margin"),
        ({"stop_margin": None, "stop_loss": 0.5}, "loss"),
        ({"stop_margin": 50.0, "stop_loss": 0.5}, "loss"),
        ({"stop_margin": 50.0, "stop_loss": 0.0}, "max_steps"),
        ({"stop_margin": None, "max_steps": 1, "learning_rate": 1e-9}, "max_steps"),
    ],
)
def test_it_stops_at_the_first_of_its_ends(changes, stopped):
    config = replace(CONFIG, **changes)
    result = train(Matrix(), {SITE: a_part()}, {}, config)
    assert result.stopped == stopped
    assert (result.n_steps == config.max_steps) == (stopped == "max_steps")
    if stopped == "loss":
        assert result.losses[-1] < 0.5 <= result.losses[-2]
    if stopped == "margin":
        shorter = train(Matrix(), {SITE: a_part()}, {}, replace(config, max_steps=result.n_steps - 1))
        assert shorter.stopped == "max_steps"
        assert min(shorter.margins) < 0.1 <= min(result.margins)


def test_what_is_right_already_takes_no_step():
    run, part = Matrix(scale=100.0), a_part()
    run.targets = (run.states @ run.head).argmax(-1)
    result = train(run, {SITE: part}, {}, CONFIG)
    assert (result.n_steps, result.stopped, len(result.losses)) == (0, "margin", 1)
    assert torch.equal(part.A, part.R)


def test_the_schedule(monkeypatch):
    seen = rates(monkeypatch)
    config = replace(CONFIG, max_steps=4, stop_margin=None)
    train(Matrix(), {SITE: a_part()}, {}, config)
    assert [lr for (lr,) in seen] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    seen.clear()
    train(Matrix(), {SITE: a_part()}, {}, replace(config, schedule="constant"))
    assert seen == [[0.05]] * 4


def test_gates_have_a_learning_rate_of_their_own(monkeypatch):
    seen = rates(monkeypatch)
    run = Matrix()
    config = replace(CONFIG, max_steps=2, stop_margin=None, gate_learning_rate=1e-4, schedule="constant")
    part = a_part(conditioned(run))
    train(run, {SITE: part}, {}, config)
    assert seen == [[0.05, 1e-4]] * 2
    # Adam's step is at most about its rate: in two steps a gate moves a fivehundredth of what a readout does.
    assert 0 < largest(part.gate.V) <= 2.2e-4
    assert largest(part.A - part.R) > 1e-2


def test_at_the_identity_the_gates_have_no_gradient():
    run = Matrix()
    part = a_part(conditioned(run))

    def gradients():
        loss = target_cross_entropy(run({SITE: (part,)}).logits, run.targets, run.rows)
        return torch.autograd.grad(loss, [part.gate.V, part.gate.v, part.A, part.R])

    V, v, A, R = gradients()
    assert not V.any()
    assert not v.any()
    assert largest(A) > 1e-3
    torch.testing.assert_close(R, -A, rtol=1e-12, atol=1e-15)
    train(run, {SITE: part}, {}, replace(CONFIG, max_steps=1, stop_margin=None))
    V, v, _, _ = gradients()
    assert V.any()  # control
    assert v.any()


def test_bases_are_orthonormal_after_every_step():
    part, drift = a_part(), []

    def on_step(*_):
        drift.append(largest(part.R[0] @ part.R[0].T - torch.eye(RANK)))

    start = part.R.detach().clone()
    train(Matrix(), {SITE: part}, {}, replace(CONFIG, stop_margin=None), on_step=on_step)
    assert len(drift) == 100
    assert max(drift) < 1e-12
    assert largest(part.R - start) > 1e-2  # control: it has moved
    assert largest(part.A[0] @ part.A[0].T - torch.eye(RANK)) > 1e-2  # what is not pulled back


def test_others_act_and_stay():
    other = a_part(seed=5)
    with torch.no_grad():
        other.b.fill_(1.0)
    other.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with_other = train(Matrix(), {SITE: a_part()}, {SITE: (other,)}, CONFIG)
    alone = train(Matrix(), {SITE: a_part()}, {}, CONFIG)
    assert with_other.losses[0] != alone.losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_a_penalty_is_minimized_but_does_not_say_when_to_stop():
    run, seen = Matrix(), []

    def penalty(step, predictions, trained, blocks):
        seen.append(step)
        assert torch.equal(predictions.states[SITE], run.states)
        return None if step < 2 else torch.tensor([100.0])

    config = replace(CONFIG, stop_margin=None, stop_loss=0.5)
    with_penalty = train(run, {SITE: a_part()}, {}, config, penalty=penalty)
    without = train(Matrix(), {SITE: a_part()}, {}, config)
    assert (with_penalty.stopped, with_penalty.n_steps) == ("loss", without.n_steps)
    assert seen == list(range(with_penalty.n_steps + 1))
    extra = [a - b for a, b in zip(with_penalty.losses, without.losses, strict=True)]
    assert extra == pytest.approx([0, 0] + [100] * (len(extra) - 2))


def test_a_block_that_no_state_reaches_stays():
    """Its gate is shut, so nothing asks it to move; in the same run an open one moves."""
    U, c = torch.zeros(2, RANK, D, dtype=torch.float64), torch.zeros(2, RANK, dtype=torch.float64)
    c[0], c[1] = -20.0, 20.0
    generator = torch.Generator().manual_seed(0)
    gate = LogisticGate(U, c, threshold=0.5)
    part = SubspaceIntervention.identity(2, RANK, D, gate, generator=generator, dtype=torch.float64)
    before = part.A.detach().clone()
    train(Matrix(), {SITE: part}, {}, replace(CONFIG, max_steps=3, stop_margin=None))
    assert torch.equal(part.A[0], before[0])
    torch.testing.assert_close(part.R[0], before[0], rtol=0, atol=1e-14)
    assert largest(part.A[1] - before[1]) > 1e-2  # control


def test_a_loss_that_is_not_finite_breaks_off():
    class Broken(Matrix):
        def __call__(self, parts):
            shown = super().__call__(parts)
            return replace(shown, logits=shown.logits * float("nan")) if self.n_calls == 3 else shown

    with pytest.raises(
        EditError, match=r"at step 2 with loss nan, .* expected: lower learning_rate \(it is 0.05"
    ):
        train(Broken(), {SITE: a_part()}, {}, CONFIG)


@pytest.mark.parametrize("rate", [1e160, 1e300])
def test_steps_beyond_all_numbers_break_off(rate):
    with pytest.raises(EditError, match="training broke down at step"):
        train(Matrix(), {SITE: a_part()}, {}, replace(CONFIG, learning_rate=rate))


def test_the_caller_may_have_gradients_switched_off():
    with torch.no_grad():
        result = train(Matrix(), {SITE: a_part()}, {}, CONFIG)
    assert result == train(Matrix(), {SITE: a_part()}, {}, CONFIG)


@pytest.mark.parametrize("name", ["learning_rate", "gate_learning_rate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_learning_rates_are_positive_numbers(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a positive number, got {value}"):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize("name", ["stop_loss", "stop_margin"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_ends_are_not_negative(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a number that is not negative, got {value}"):
        TrainingConfig(**{name: value})
    for count in ("max_steps", "edits_at_once"):
        with pytest.raises(ConfigError, match=f"{count} must be at least 1, got 0"):
            TrainingConfig(**{count: 0})
    assert TrainingConfig(**{name: 0.0, "max_steps": 1}).max_steps == 1


EDITS = (Edit("The tower", "Rome and more"), Edit("A longer prompt than that", "so"), Edit("Who", "of it"))


def test_the_full_pass_sees_what_each_text_alone_shows(host):
    encoder = Encoder.for_host(host)
    texts = [encoder.edit(one.prompt, one.target, chat=chat) for one in EDITS for chat in (False, True)]
    spec, sites = PositionSpec(), (Site(1), Site(N_LAYERS - 1))
    parts = {sites[0]: (open_part(seed=1),)}
    run = FullPass(host, encoder, spec, texts, sites)
    assert isinstance(run, TargetPass)
    with torch.no_grad():
        shown = run(parts)
    assert run.targets.tolist() == [token for text in texts for token in text.target_ids]
    assert run.rows.tolist() == [row for row, text in enumerate(texts) for _ in text.target_ids]
    alone = EditedModel(host.model, parts, spec)
    slow = []
    for text in texts:
        ids = torch.tensor([text.prompt_ids + text.target_ids])
        n_prompt = len(text.prompt_ids)
        with torch.no_grad():
            logits = alone(ids, n_prompt_tokens=torch.tensor([n_prompt])).logits[0]
        slow.append(logits[n_prompt - 1 : -1])
    # Rounding: the same sums in batches of another shape.
    torch.testing.assert_close(shown.logits, torch.cat(slow), rtol=0, atol=1e-9)
    plain = run.states()
    assert plain[sites[0]].shape == (len(run.state_rows), D_MODEL)
    assert torch.equal(plain[sites[0]], shown.states[sites[0]])  # before the intervention
    assert not torch.equal(plain[sites[1]], shown.states[sites[1]])  # and behind it
    last = [sum(len(text.target_ids) + 2 for text in texts[: i + 1]) for i in range(len(texts))]
    assert last[-1] == len(run.state_rows)  # three prompt tokens, and all targets but the last
