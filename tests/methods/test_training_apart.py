"""Edits trained apart in one batch, and many edits in mini-batches, on a host of one matrix."""

from dataclasses import replace

import pytest
import torch

from baft.errors import EditError
from baft.hosts.architecture import Site
from baft.hosts.passes import Predictions, TargetPass, Targets
from baft.methods.optimizer import TrainingConfig
from baft.methods.training import TrainingResult, train, train_apart, train_in_batches
from baft.nn.gates import ConditionedGate, LogisticGate, OpenGate
from baft.nn.interventions import SubspaceIntervention, concatenate, intervene
from baft.nn.losses import locality

D, RANK, VOCAB, N_EDITS = 12, 2, 11, 5
SHARED_RANK = 8
SITE = Site(0)
CONFIG = TrainingConfig(learning_rate=5e-2, max_steps=80, stop_margin=1.0)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Rows:
    """A host of one matrix; each edit has two texts, the first of two tokens and the second of one."""

    def __init__(self, n_edits=N_EDITS, *, bend=lambda logits, rows: logits):
        n = 3 * n_edits
        self.rows = torch.arange(2 * n_edits).repeat_interleave(torch.tensor([2, 1] * n_edits))
        self.edits = torch.arange(n_edits).repeat_interleave(2)
        self.states, self.targets = normal(n, D, seed=0), torch.arange(n) % VOCAB
        self.head, self.bend = normal(D, VOCAB, seed=1), bend
        self.names = torch.arange(2 * n_edits)  # of the rows, when all were there
        self.sizes, self.chosen = [], []

    def __call__(self, parts, own=None):
        self.sizes.append(len(self.rows.unique()))
        mine = None if own is None else (own[0][SITE], own[1][self.rows])
        h, _ = intervene(parts.get(SITE, ()), self.states, mine)
        logits = self.bend(h @ self.head, self.names[self.rows])
        return Predictions(logits, {SITE: self.states}, self.rows)

    def select(self, rows):
        where = Targets(self.rows, torch.zeros_like(self.rows), torch.arange(len(self.rows))).select(rows)
        found = object.__new__(Rows)
        found.__dict__.update(self.__dict__)
        found.rows, found.states, found.targets = where.rows, self.states[where.ids], self.targets[where.ids]
        found.names = self.names[rows]
        self.chosen.append(found.names.tolist())
        return found


def blocks_of(n, gate="open", rank=RANK):
    """Random bases for every edit, which change nothing yet."""
    made = {
        "open": lambda: OpenGate(n, rank),
        "logistic": lambda: LogisticGate(
            normal(n, RANK, D, seed=3), 3.0 + normal(n, RANK, seed=4), threshold=0.1
        ),
        "all shut": lambda: LogisticGate(
            normal(n, RANK, D, seed=3), torch.full((n, RANK), -100.0).double(), threshold=0.1
        ),
        "one shut": lambda: LogisticGate(
            normal(n, RANK, D, seed=3),
            torch.full((n, RANK), 3.0).double().index_fill(0, torch.tensor([1]), -100.0),
            threshold=0.1,
        ),
        "conditioned": lambda: ConditionedGate(
            n, RANK, mean=normal(D, seed=5), scale=0.5 + normal(D, seed=6).abs()
        ),
    }[gate]()
    generator = torch.Generator().manual_seed(9)
    return SubspaceIntervention.identity(n, rank, D, made, generator=generator, dtype=torch.float64)


def one_by_one(config, gate, *, others=None, penalty=None, bend=lambda logits, rows: logits):
    results, parts = [], []
    for i in range(N_EDITS):
        part = blocks_of(N_EDITS, gate).select(torch.tensor([i]))
        run = Rows(bend=bend).select(torch.tensor([2 * i, 2 * i + 1]))
        try:
            results.append(train(run, {SITE: part}, others or {}, config, penalty=penalty))
        except EditError as error:
            results.append(error)
        parts.append(part)
    return results, parts


def in_one_batch(config, gate, *, others=None, penalty=None, bend=lambda logits, rows: logits, **more):
    run = Rows(bend=bend)
    assert isinstance(run, TargetPass)
    results, layers = train_apart(
        run, {SITE: blocks_of(N_EDITS, gate)}, others or {}, config, run.edits, penalty=penalty, **more
    )
    return results, layers[SITE], run


def check_the_same(one, other):
    assert isinstance(one, TrainingResult)
    assert isinstance(other, TrainingResult)
    assert (one.n_steps, one.stopped) == (other.n_steps, other.stopped)
    assert one.losses == pytest.approx(other.losses, rel=1e-9)
    assert one.margins == pytest.approx(other.margins, rel=1e-9)


def check_block(whole, i, alone):
    want = alone.frozen().state_dict()
    for name, tensor in whole.select(torch.tensor([i])).state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-9, atol=1e-9)


def others_of():
    part = SubspaceIntervention.identity(
        1, RANK, D, OpenGate(1, RANK), generator=torch.Generator().manual_seed(77), dtype=torch.float64
    ).requires_grad_(False)
    part.b.fill_(0.3)
    return {SITE: (part,)}


@pytest.mark.parametrize("gate", ["open", "logistic", "conditioned"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "constant", "stop_margin": None, "stop_loss": 0.3},
        {"stop_margin": 30.0, "max_steps": 9},
    ],
    ids=["margin", "loss", "max_steps"],
)
@pytest.mark.parametrize("beside", [False, True])
def test_apart_in_one_batch_is_one_after_the_other(gate, changes, beside):
    config, others = replace(CONFIG, **changes), others_of() if beside else {}
    want, parts = one_by_one(config, gate, others=others)
    got, whole, run = in_one_batch(config, gate, others=others)
    assert len(got) == N_EDITS == whole.n_blocks
    for i in range(N_EDITS):
        check_the_same(got[i], want[i])
        check_block(whole, i, parts[i])
    steps = {one.n_steps for one in got}
    if "max_steps" not in changes:
        # Whoever has stopped has left the batch: every step runs the texts of those that are still trained.
        assert len(steps) > 1
        assert run.sizes == [2 * sum(one.n_steps >= step for one in got) for step in range(max(steps) + 1)]
        assert run.sizes[-1] < run.sizes[0]
    assert not whole.R.requires_grad
    joint = train(Rows(), {SITE: blocks_of(N_EDITS, gate)}, others, config)  # control: not the same at all
    assert joint.losses[-1] != pytest.approx(got[0].losses[-1], rel=1e-3)


def test_a_penalty_is_each_block_s_own():
    """And it is told which block each text belongs to, where there are several."""
    unrelated = normal(7, D, seed=20)

    def penalty(step, predictions, trained, blocks):
        if step < 2:
            return None
        seen.append(None if blocks is None else blocks.tolist())
        return 0.5 * locality(trained[SITE].gate.soft(unrelated))

    seen = []
    want, parts = one_by_one(CONFIG, "conditioned", penalty=penalty)
    assert set(map(str, seen)) == {"None"}
    seen.clear()
    got, whole, _ = in_one_batch(CONFIG, "conditioned", penalty=penalty)
    assert seen[0] == [i for i in range(N_EDITS) for _ in range(2)]
    assert all(one == sorted(one) and set(one) == set(range(len(set(one)))) for one in seen)
    for i in range(N_EDITS):
        check_the_same(got[i], want[i])
        check_block(whole, i, parts[i])
    without, _, _ = in_one_batch(CONFIG, "conditioned")
    assert without[0].losses[2] != pytest.approx(got[0].losses[2], rel=1e-3)  # control


def test_the_steps_are_told():
    told = []
    got, _, _ = in_one_batch(CONFIG, "open", on_step=lambda *one: told.append(one))
    assert [step for step, _, _ in told] == list(range(1, max(one.n_steps for one in got) + 1))
    assert {most for _, most, _ in told} == {CONFIG.max_steps}
    for step, (_, _, loss) in enumerate(told):
        still = [one.losses[step] for one in got if len(one.losses) > step]
        assert loss == pytest.approx(sum(still) / len(still), rel=1e-12)


class SpoilsGradient(torch.autograd.Function):
    """The same numbers, and no numbers on the way back."""

    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.masked_fill(ctx.where, float("nan")), None


def spoiled(how, row, after):
    """Spoils one row's logits from its call number `after` on."""
    calls = []

    def bend(logits, rows):
        calls.append(1)
        if len(calls) <= after:
            return logits
        one = (rows == row).unsqueeze(-1)
        return logits.masked_fill(one, float("nan")) if how == "loss" else SpoilsGradient.apply(logits, one)

    return bend


@pytest.mark.parametrize(
    ("how", "message"),
    [("loss", "broke down at step 3 with loss nan"), ("gradient", "broke down at step 4 with loss nan")],
)
def test_one_that_breaks_down_leaves_the_others_unharmed(how, message):
    healthy, parts, _ = in_one_batch(CONFIG, "open")
    assert min(one.n_steps for one in healthy) > 4
    got, whole, run = in_one_batch(CONFIG, "open", bend=spoiled(how, 3, 3))
    assert isinstance(got[1], EditError)
    assert message in str(got[1])
    assert "lower learning_rate (it is 0.05" in str(got[1])
    for i in (0, 2, 3, 4):
        check_the_same(got[i], healthy[i])
        check_block(whole, i, parts.select(torch.tensor([i])))
    assert run.sizes[4 if how == "loss" else 5] == 2 * (N_EDITS - 1)
    with pytest.raises(EditError):  # control: in one optimization it takes all down
        train(Rows(bend=spoiled(how, 3, 3)), {SITE: blocks_of(N_EDITS)}, {}, CONFIG)


@pytest.mark.parametrize("beside", [False, True])
def test_one_at_which_no_gate_opens_says_so_and_the_others_go_on(beside):
    """As it does alone, whatever else is open there."""
    others = others_of() if beside else {}
    want, parts = one_by_one(CONFIG, "one shut", others=others)
    got, whole, run = in_one_batch(CONFIG, "one shut", others=others)
    assert isinstance(got[1], EditError)
    assert "no gate opens at the edit, so there is nothing to train: lower gate_threshold" in str(got[1])
    assert isinstance(want[1], EditError)
    assert str(want[1]) == str(got[1])
    for i in (0, 2, 3, 4):
        check_the_same(got[i], want[i])
        check_block(whole, i, parts[i])
    assert run.sizes[:2] == [2 * N_EDITS, 2 * (N_EDITS - 1)]
    shut = blocks_of(N_EDITS, "one shut").select(torch.tensor([1]))
    alone = Rows().select(torch.tensor([2, 3]))
    (only,), _ = train_apart(alone, {SITE: shut}, others, CONFIG, torch.tensor([0, 0]))
    assert str(only) == str(got[1])
    healthy, _, _ = in_one_batch(CONFIG, "logistic", others=others)
    assert isinstance(healthy[1], TrainingResult)  # control


def test_a_gradient_of_exactly_zero_is_no_shut_gate():
    """Rounding may leave none of a small loss: the edit stays as it is, in a stack as alone."""

    def bend(logits, rows):
        return torch.where((rows // 2 == 1).unsqueeze(-1), logits.detach(), logits)

    want, parts = one_by_one(CONFIG, "logistic", bend=bend)
    got, whole, _ = in_one_batch(CONFIG, "logistic", bend=bend)
    for i in range(N_EDITS):
        check_the_same(got[i], want[i])
        check_block(whole, i, parts[i])
    assert (got[1].stopped, got[1].losses[0]) == ("max_steps", pytest.approx(got[1].losses[-1], rel=1e-12))
    assert got[0].stopped == "margin"  # control


def test_steps_beyond_all_numbers_break_every_one():
    got, _, _ = in_one_batch(replace(CONFIG, learning_rate=1e300), "open")
    assert all(isinstance(one, EditError) for one in got)
    fine, _, _ = in_one_batch(CONFIG, "open")
    assert not any(isinstance(one, EditError) for one in fine)  # control


# --- mini-batches


def batched(config, run=None, *, own=True, **more):
    """Trains all edits, in bases of their own behind gates or in shared ones."""
    run = run or Rows()
    part = blocks_of(N_EDITS, "logistic") if own else blocks_of(1, rank=SHARED_RANK)
    result = train_in_batches(run, {SITE: part}, {}, config, run.edits, **more)
    return result, part, run


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_mini_batches_learn_every_edit(own, at_once):
    config = replace(CONFIG, edits_at_once=at_once, max_steps=200, learning_rate=2e-2, stop_margin=0.5)
    told = []
    result, part, run = batched(config, own=own, on_step=lambda *one: told.append(one))
    n_batches = -(-N_EDITS // at_once)
    assert result.stopped == "margin"
    assert min(result.margins) >= 0.5
    assert len(result.margins) == 2 * N_EDITS
    assert result.n_steps == len(result.losses) * n_batches
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert told == [(i + 1, 200, loss) for i, loss in enumerate(result.losses)]
    with torch.no_grad():
        logits = Rows()({SITE: (part,)}).logits
    lead = logits.gather(1, run.targets[:, None])[:, 0]
    rest = logits.scatter(1, run.targets[:, None], -torch.inf).amax(-1)
    want = [float((lead - rest)[run.rows == row].min()) for row in range(2 * N_EDITS)]
    assert result.margins == pytest.approx(want, rel=1e-9)  # under the final bases, in order of the texts
    fresh = blocks_of(N_EDITS, "logistic") if own else blocks_of(1, rank=SHARED_RANK)
    before = Rows()({SITE: (fresh,)}).logits
    assert not torch.equal(before.argmax(-1), run.targets)  # control


def test_every_round_goes_once_through_all_edits_in_another_order():
    config = replace(CONFIG, edits_at_once=2, max_steps=3, stop_margin=None)
    result, _, run = batched(config)
    assert (result.stopped, result.n_steps, len(result.losses)) == ("max_steps", 9, 3)
    rounds = [run.chosen[3 * i : 3 * i + 3] for i in range(3)]
    for one in rounds:
        assert sorted(row for rows in one for row in rows) == list(range(2 * N_EDITS))
        assert [len(rows) for rows in one] == [4, 4, 2]
        assert all(rows[i + 1] == rows[i] + 1 for rows in one for i in range(0, len(rows), 2))  # whole edits
    assert rounds[0] != rounds[1]
    again = batched(config)[0]
    assert again == result  # the order is no chance


def test_one_batch_that_holds_all_is_the_plain_loop():
    config = replace(CONFIG, edits_at_once=N_EDITS, max_steps=6, stop_margin=None)
    result, part, run = batched(config)
    plain_part = blocks_of(N_EDITS, "logistic")
    plain = train(Rows(), {SITE: plain_part}, {}, config)
    assert result.losses == pytest.approx(plain.losses[:-1], rel=1e-9)
    assert (result.n_steps, result.stopped) == (plain.n_steps, plain.stopped)
    assert result.margins == pytest.approx(plain.margins, rel=1e-9)
    for name, tensor in part.state_dict().items():
        torch.testing.assert_close(tensor, plain_part.state_dict()[name], rtol=0, atol=1e-9)
    assert len(run.chosen) == 6 + 1  # each round, and one more look
    smaller, _, _ = batched(replace(config, edits_at_once=2))  # control
    assert smaller.losses != pytest.approx(plain.losses[:-1], rel=1e-6)


def test_it_stops_only_if_all_hold_under_the_final_bases():
    """In shared bases a mini-batch may undo what the one before it had learned."""
    config = replace(CONFIG, edits_at_once=1, max_steps=60, stop_margin=0.2, learning_rate=2e-2)
    run, looked = Rows(), []
    part = blocks_of(1, rank=SHARED_RANK)

    def on_step(*_):
        with torch.no_grad():
            logits = Rows()({SITE: (part,)}).logits
        lead = logits.gather(1, run.targets[:, None])[:, 0]
        looked.append(float((lead - logits.scatter(1, run.targets[:, None], -torch.inf).amax(-1)).min()))

    result = train_in_batches(run, {SITE: part}, {}, config, run.edits, on_step=on_step)
    assert result.stopped == "margin"
    assert min(result.margins) == pytest.approx(looked[-1], rel=1e-9)
    assert looked[-1] >= 0.2
    assert looked[0] < 0.2  # control
    short = train_in_batches(
        Rows(),
        {SITE: blocks_of(1, rank=SHARED_RANK)},
        {},
        replace(config, max_steps=len(result.losses) - 1),
        run.edits,
    )
    assert short.stopped == "max_steps"


def test_mini_batches_that_break_down_say_so():
    with pytest.raises(EditError, match=r"broke down at step 1 with loss nan"):
        batched(replace(CONFIG, edits_at_once=2), Rows(bend=spoiled("loss", 4, 4)))
    run, config = Rows(), replace(CONFIG, edits_at_once=1, max_steps=3)
    for others in ({}, others_of()):
        with pytest.raises(EditError, match="no gate opens"):
            train_in_batches(run, {SITE: blocks_of(N_EDITS, "all shut")}, others, config, run.edits)
    batched(replace(CONFIG, edits_at_once=2, max_steps=3))  # control


def test_blocks_join_again_in_the_order_of_the_edits():
    """Whoever stops first does not come first."""
    got, whole, _ = in_one_batch(CONFIG, "logistic")
    order = sorted(range(N_EDITS), key=lambda i: got[i].n_steps)
    assert order != list(range(N_EDITS))
    parts = [whole.select(torch.tensor([i])).requires_grad_(False) for i in range(N_EDITS)]
    assert torch.equal(concatenate(parts).R, whole.R)
    for i, one in enumerate(got):
        run = Rows().select(torch.tensor([2 * i, 2 * i + 1]))
        logits = run({SITE: (parts[i],)}).logits
        lead = logits.gather(1, run.targets[:, None])[:, 0]
        margin = lead - logits.scatter(1, run.targets[:, None], -torch.inf).amax(-1)
        assert float(margin.min()) == pytest.approx(min(one.margins), rel=1e-9)
