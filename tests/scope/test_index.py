"""The index of many edits says what late interaction says of each pair, whatever the order and the pieces."""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from baft.errors import DamagedArtifactError
from baft.nn.scope import ScopeHead, ScopeKeys, late_interaction
from baft.scope import index as module
from baft.scope.index import Asked, EditKeys, ScopeIndex, likeliest, spelled
from baft.scope.names import Names, cost_of

DIM = 5


class Head:
    """Judges scores; keys are given here."""

    def __init__(self):
        self.net = ScopeHead(7, n_dims=DIM).double().requires_grad_(False)
        self.fingerprint, self.discounts, self.n_dims = 0, self.net.discounts, DIM
        self.vectors = self.keys = self.thresholds = self.log_probability  # never asked

    def log_probability(self, scores):
        return self.net.log_probability(scores)


@pytest.fixture
def head():
    return Head()


NOBODY = Names((), ())


def keys_of(lengths, seed, threshold=-1e9, names=None):
    draw = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    vectors = normalize(torch.randn(2, n, DIM, generator=draw, dtype=torch.float64), dim=-1)
    raw = torch.rand(2, n, generator=draw, dtype=torch.float64) + 0.1
    weights = torch.cat([one / one.sum(-1, keepdim=True) for one in raw.split(list(lengths), 1)], 1)
    strict = torch.full((len(lengths),), threshold, dtype=torch.float64)
    named = names or [NOBODY] * len(lengths)
    return EditKeys(vectors, weights, torch.tensor(lengths), strict, torch.tensor(0), *spelled(named))


def prompts(lengths, seed=9, names=lambda row: NOBODY):
    draw = torch.Generator().manual_seed(seed)
    vectors = normalize(
        torch.randn(2, len(lengths), max(lengths), DIM, generator=draw, dtype=torch.float64), dim=-1
    )
    return Asked(vectors, torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1), names)


def by_hand(head, keys, asked):
    """Each wording by itself, the best of an edit's."""
    found = []
    for one in keys:
        parts = zip(
            one.vectors.split(one.lengths.tolist(), 1),
            one.weights.split(one.lengths.tolist(), 1),
            strict=True,
        )
        scores = [
            late_interaction(ScopeKeys(v[:, None], w[:, None]), asked.vectors, asked.real, head.discounts)
            for v, w in parts
        ]
        found.append(torch.cat([head.log_probability(one) for one in scores], 1))
    return torch.cat(found, 1)


KEYS = [((4,), 1), ((2, 5), 2), ((1, 1, 3), 3), ((6,), 4)]


@pytest.mark.parametrize(("at_once", "in_block"), [(1, 9), (40, 9), (1 << 22, 9), (1 << 22, 2)])
def test_it_is_late_interaction_with_every_wording(head, at_once, in_block, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_EDITS_IN_BLOCK", in_block)
    keys = [keys_of(*one) for one in KEYS]
    asked = prompts([3, 30, 1])
    got = ScopeIndex(head, keys).log_probability(asked)
    torch.testing.assert_close(got, by_hand(head, keys, asked), rtol=0, atol=1e-12)
    assert got.std() > 1e-3
    head.discounts = torch.zeros_like(head.discounts)
    anywhere = ScopeIndex(head, keys).log_probability(asked)
    assert not torch.allclose(anywhere[1], got[1])  # control: it counts where a token stands
    assert torch.equal(anywhere[::2], got[::2])


def named(number, n_wordings):
    """Names of their own for the wordings of an edit."""
    return [Names((f"n{number}{i}", "park"), (0.5, 0.5)) for i in range(n_wordings)]


def with_names(given):
    return [keys_of(*one, names=named(number, len(one[0]))) for number, one in enumerate(given)]


def test_an_edit_s_score_does_not_depend_on_others(head):
    keys = with_names(KEYS)
    asked = prompts([4, 6], names=lambda row: named(row + 1, 1)[0])
    whole = ScopeIndex(head, keys).log_probability(asked)
    for i, one in enumerate(keys):
        mine = slice(sum(len(other.lengths) for other in keys[:i]), None)
        torch.testing.assert_close(
            ScopeIndex(head, [one]).log_probability(asked),
            whole[:, mine][:, : len(one.lengths)],
            rtol=0,
            atol=1e-12,
        )


def test_the_likeliest_above_its_own_threshold_is_found(head):
    keys = [keys_of(*one) for one in KEYS]
    asked = prompts([5, 5])
    found = ScopeIndex(head, keys)
    of_edits = found.log_probability(asked).split([len(one.lengths) for one in keys], 1)
    scores = torch.stack([part.amax(1) for part in of_edits], 1)
    assert found.find(asked).tolist() == scores.argmax(1).tolist()
    assert found.find(asked, torch.tensor([2, 0])).tolist() == [2, 0]
    best = scores[0].argsort(descending=True)
    keys[best[0]] = keys_of(*KEYS[best[0]], threshold=float(scores[0, best[0]]))  # it must exceed it
    assert ScopeIndex(head, keys).find(asked)[0] == best[1]
    assert ScopeIndex(head, keys).find(asked, best[[0, 0]])[0] == -1
    shut = [keys_of(*one, threshold=0.0) for one in KEYS]
    assert ScopeIndex(head, shut).find(asked).tolist() == [-1, -1]


def test_each_wording_has_a_threshold_of_its_own(head):
    [one], asked = [keys_of((3, 4), 5)], prompts([5])
    scores = ScopeIndex(head, [one]).log_probability(asked)[0]
    better, worse = (int(i) for i in scores.argsort(descending=True))
    for shut, found in (((better,), 0), ((worse,), 0), ((better, worse), -1)):
        strict = torch.full((2,), -1e9, dtype=torch.float64)
        strict[list(shut)] = 0.0
        index = ScopeIndex(head, [dataclasses.replace(one, thresholds=strict)])
        assert index.find(asked).tolist() == [found]


def test_of_equals_it_is_the_latest(head):
    same = keys_of(*KEYS[0])
    assert ScopeIndex(head, [same, same, same]).find(prompts([4])).tolist() == [2]


@pytest.mark.parametrize("in_block", [1, 2, 3, 1024])
def test_an_index_goes_on_from_another(head, in_block, monkeypatch):
    monkeypatch.setattr(module, "_EDITS_IN_BLOCK", in_block)
    keys = with_names((*KEYS, *KEYS))
    asked = prompts([4, 6], names=lambda row: named(6 + row, 1)[0])
    shorter = ScopeIndex(head, keys[1:6], ScopeIndex(head, keys[:1]))
    whole = ScopeIndex(head, keys)
    for found, n in ((ScopeIndex(head, keys[6:], shorter), 8), (shorter, 6), (whole.first(5), 5)):
        fresh = ScopeIndex(head, keys[:n])
        assert found.n_edits == n
        assert torch.equal(found.log_probability(asked), fresh.log_probability(asked))
        assert torch.equal(found.find(asked), fresh.find(asked))
        assert torch.equal(found.acts_on(whole), fresh.acts_on(whole))
    grown = ScopeIndex(head, keys[:3], whole.first(5))  # and what it was cut from is as it was
    assert torch.equal(
        grown.log_probability(asked),
        ScopeIndex(head, [*keys[:5], *keys[:3]]).log_probability(asked),
    )
    assert torch.equal(whole.log_probability(asked), ScopeIndex(head, keys).log_probability(asked))
    assert whole.first(0).n_edits == 0


@pytest.mark.parametrize(("at_once", "in_block"), [(1, 9), (1 << 22, 9), (1 << 22, 2)])
def test_who_acts_on_whom(head, at_once, in_block, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    monkeypatch.setattr(module, "_EDITS_IN_BLOCK", in_block)
    given = [*KEYS, ((40, 3), 5)]
    keys = [keys_of(*one) for one in given]
    met = torch.zeros(len(keys), len(keys), dtype=torch.bool)
    texts = [part[:, None] for one in keys for part in one.vectors.split(one.lengths.tolist(), 1)]
    every = [torch.ones(one.shape[1:3], dtype=torch.bool) for one in texts]
    index = ScopeIndex(head, keys)
    scores = [
        index.log_probability(Asked(one, real, lambda row: NOBODY))
        for one, real in zip(texts, every, strict=True)
    ]
    middle = float(torch.cat(scores).median())
    keys = [keys_of(*one, threshold=middle) for one in given]
    for i, one in enumerate(keys):
        for part in one.vectors.split(one.lengths.tolist(), 1):
            real = torch.ones(1, part.shape[1], dtype=torch.bool)
            of_wordings = (
                by_hand(head, keys, Asked(part[:, None], real, lambda row: NOBODY))[0] > middle
            ).split([len(other.lengths) for other in keys])
            met[i] |= torch.stack([one.any() for one in of_wordings])
    index = ScopeIndex(head, keys)
    assert index.acts_on(index).tolist() == met.tolist()
    assert index.acts_on(ScopeIndex(head, keys[2:])).tolist() == met[2:].tolist()
    assert met.any()
    assert not met.all()


def test_where_it_would_act_names_are_compared(head):
    """What one names counts against another's names, and nothing is looked at where no edit would act."""
    ada, bob = (Names(("the", one, "park"), (0.25, 0.5, 0.25)) for one in ("ada", "bob"))
    keys = [keys_of(((4, 2)), 1, names=[ada, bob]), keys_of((3,), 2, names=[ada])]
    looked = []
    of_rows = {0: ada, 1: bob, 2: NOBODY}
    plain, asked = (
        prompts([5, 5, 5]),
        prompts([5, 5, 5], names=lambda row: looked.append(row) or of_rows[row]),
    )
    before = ScopeIndex(head, keys).log_probability(plain)
    got = ScopeIndex(head, keys).log_probability(asked)
    cost = cost_of(ada, bob)
    assert cost == pytest.approx(6 * 0.5)
    want = before - cost * torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert sorted(looked) == [0, 1, 2]
    strict = [dataclasses.replace(one, thresholds=torch.zeros_like(one.thresholds)) for one in keys]
    assert torch.equal(ScopeIndex(head, strict).log_probability(asked), before)
    assert len(looked) == 3
    passing = ScopeIndex(head, [keys[1]]).passing(asked)[:, 0]
    assert passing.tolist() == pytest.approx(want[:, 2].tolist())


def test_names_keep_edits_from_meeting(head):
    same = keys_of((3,), 2, threshold=-1.0)
    probability = float(
        ScopeIndex(head, [same]).log_probability(
            Asked(same.vectors[:, None], torch.ones(1, 3).bool(), lambda row: NOBODY)
        )
    )
    met = {}
    for theirs in ("ada", "adah", "bob"):
        one, other = (
            keys_of((3,), 2, threshold=probability - 1e-3, names=[Names((name,), (1.0,))])
            for name in ("ada", theirs)
        )
        met[theirs] = ScopeIndex(head, [one]).acts_on(ScopeIndex(head, [other])).item()
    assert met == {"ada": True, "adah": True, "bob": False}


def test_keys_tell_the_names_they_were_made_of():
    given = [Names(("ada", "élan", "木"), (0.5, 0.25, 0.0)), NOBODY, Names(("x",), (1.0,))]
    assert keys_of((1, 1, 1), 0, names=given).names() == given


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spelling", torch.tensor([255, 254], dtype=torch.uint8)),
        ("spelling", torch.tensor(list(b"a b\nc"), dtype=torch.uint8)),
        ("name_weights", torch.ones(1)),
        ("name_weights", torch.ones(3)),
    ],
)
def test_names_that_are_not_of_the_wordings_are_refused(field, value):
    sound = keys_of((1, 1), 0, names=[Names(("ada",), (1.0,)), Names(("bob",), (1.0,))])
    with pytest.raises(DamagedArtifactError, match="names of an edit's wordings cannot be read"):
        dataclasses.replace(sound, **{field: value}).names()


def test_equal_keys_are_equal_whatever_block_they_are_in():
    """A product of one column rounds otherwise than one of a thousand: the later edit acts all the same."""
    net = ScopeHead(7, n_dims=64).requires_grad_(False)
    draw, head = torch.Generator().manual_seed(0), Head()
    head.net, head.discounts = net, net.discounts
    keys = []
    for _ in range(module._EDITS_IN_BLOCK):
        vectors = normalize(torch.randn(2, 6, 64, generator=draw), dim=-1)
        lengths, strict = torch.tensor([6]), torch.full((1,), -3.0)
        weights = torch.full((2, 6), 1 / 6)
        keys.append(EditKeys(vectors, weights, lengths, strict, torch.tensor(0), *spelled([NOBODY])))
    several = [keys[i] for i in range(0, 400, 10)]
    noise = torch.randn(2, len(several), 6, 64, generator=draw)
    near = normalize(torch.stack([one.vectors for one in several], 1) + 0.05 * noise, dim=-1)
    asked = Asked(near, torch.ones(len(several), 6).bool(), lambda row: NOBODY)
    whole, differ = ScopeIndex(head, keys), 0
    for i, one in enumerate(several):
        index = ScopeIndex(head, [one], whole)
        assert index.find(asked)[i] == len(keys)
        passing = index.passing(asked)[i]
        differ += int(passing[10 * i] != passing[-1])
    assert differ  # control: their scores are not the same bits


def test_what_differs_by_more_than_rounding_is_not_equal():
    passing = torch.tensor(
        [
            [-1e-4, -1.001e-4, -torch.inf],
            [-1e-4, -1.00001e-4, -torch.inf],
            [-2.0, -1.0, -1.1],
            [-torch.inf] * 3,
            [0.0, -1e-9, 0.0],
        ]
    )
    assert likeliest(passing).tolist() == [0, 1, 1, -1, 2]
