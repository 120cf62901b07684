"""The index of many edits says what late interaction says of each pair, whatever the order and the pieces."""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from baft.nn.scope import ScopeHead, ScopeKeys, late_interaction
from baft.scope import index as module
from baft.scope.index import EditKeys, ScopeIndex

DIM = 5


class Head:
    """Judges scores; keys are given here."""

    def __init__(self):
        self.net = ScopeHead(7, n_dims=DIM).double().requires_grad_(False)
        self.fingerprint, self.discounts = 0, self.net.discounts
        self.vectors = self.keys = self.thresholds = self.log_probability  # never asked

    def log_probability(self, scores):
        return self.net.log_probability(scores)


@pytest.fixture
def head():
    return Head()


def keys_of(lengths, seed, threshold=-1e9):
    draw = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    vectors = normalize(torch.randn(2, n, DIM, generator=draw, dtype=torch.float64), dim=-1)
    raw = torch.rand(2, n, generator=draw, dtype=torch.float64) + 0.1
    weights = torch.cat([one / one.sum(-1, keepdim=True) for one in raw.split(list(lengths), 1)], 1)
    strict = torch.full((len(lengths),), threshold, dtype=torch.float64)
    return EditKeys(vectors, weights, torch.tensor(lengths), strict, torch.tensor(0))


def prompts(lengths, seed=9):
    draw = torch.Generator().manual_seed(seed)
    vectors = normalize(
        torch.randn(2, len(lengths), max(lengths), DIM, generator=draw, dtype=torch.float64), dim=-1
    )
    return vectors, torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def by_hand(head, keys, vectors, asked):
    """Each wording by itself, the best of an edit's."""
    found = []
    for one in keys:
        parts = zip(
            one.vectors.split(one.lengths.tolist(), 1),
            one.weights.split(one.lengths.tolist(), 1),
            strict=True,
        )
        scores = [
            late_interaction(ScopeKeys(v[:, None], w[:, None]), vectors, asked, head.discounts)
            for v, w in parts
        ]
        found.append(torch.cat([head.log_probability(one) for one in scores], 1))
    return torch.cat(found, 1)


KEYS = [((4,), 1), ((2, 5), 2), ((1, 1, 3), 3), ((6,), 4)]


@pytest.mark.parametrize("at_once", [1, 40, 1 << 22])
def test_it_is_late_interaction_with_every_wording(head, at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    keys = [keys_of(*one) for one in KEYS]
    vectors, asked = prompts([3, 30, 1])
    got = ScopeIndex(head, keys).log_probability(vectors, asked)
    torch.testing.assert_close(got, by_hand(head, keys, vectors, asked), rtol=0, atol=1e-12)
    assert got.std() > 1e-3
    head.discounts = torch.zeros_like(head.discounts)
    anywhere = ScopeIndex(head, keys).log_probability(vectors, asked)
    assert not torch.allclose(anywhere[1], got[1])  # control: it counts where a token stands
    assert torch.equal(anywhere[::2], got[::2])


def test_an_edit_s_score_does_not_depend_on_others(head):
    keys = [keys_of(*one) for one in KEYS]
    vectors, asked = prompts([4, 6])
    whole = ScopeIndex(head, keys).log_probability(vectors, asked)
    for i, one in enumerate(keys):
        mine = slice(sum(len(other.lengths) for other in keys[:i]), None)
        torch.testing.assert_close(
            ScopeIndex(head, [one]).log_probability(vectors, asked),
            whole[:, mine][:, : len(one.lengths)],
            rtol=0,
            atol=1e-12,
        )


def test_the_likeliest_above_its_own_threshold_is_found(head):
    keys = [keys_of(*one) for one in KEYS]
    vectors, asked = prompts([5, 5])
    found = ScopeIndex(head, keys)
    of_edits = found.log_probability(vectors, asked).split([len(one.lengths) for one in keys], 1)
    scores = torch.stack([part.amax(1) for part in of_edits], 1)
    assert found.find(vectors, asked).tolist() == scores.argmax(1).tolist()
    assert found.find(vectors, asked, torch.tensor([2, 0])).tolist() == [2, 0]
    best = scores[0].argsort(descending=True)
    keys[best[0]] = keys_of(*KEYS[best[0]], threshold=float(scores[0, best[0]]))  # it must exceed it
    assert ScopeIndex(head, keys).find(vectors, asked)[0] == best[1]
    assert ScopeIndex(head, keys).find(vectors, asked, best[[0, 0]])[0] == -1
    shut = [keys_of(*one, threshold=0.0) for one in KEYS]
    assert ScopeIndex(head, shut).find(vectors, asked).tolist() == [-1, -1]


def test_each_wording_has_a_threshold_of_its_own(head):
    [one], (vectors, asked) = [keys_of((3, 4), 5)], prompts([5])
    scores = ScopeIndex(head, [one]).log_probability(vectors, asked)[0]
    better, worse = (int(i) for i in scores.argsort(descending=True))
    for shut, found in (((better,), 0), ((worse,), 0), ((better, worse), -1)):
        strict = torch.full((2,), -1e9, dtype=torch.float64)
        strict[list(shut)] = 0.0
        index = ScopeIndex(head, [dataclasses.replace(one, thresholds=strict)])
        assert index.find(vectors, asked).tolist() == [found]


def test_of_equals_it_is_the_latest(head):
    same = keys_of(*KEYS[0])
    assert ScopeIndex(head, [same, same, same]).find(*prompts([4])).tolist() == [2]


def test_an_index_goes_on_from_another(head):
    keys = [keys_of(*one) for one in KEYS]
    vectors, asked = prompts([4, 6])
    longer = ScopeIndex(head, keys[3:], ScopeIndex(head, keys[1:3], ScopeIndex(head, keys[:1])))
    whole = ScopeIndex(head, keys)
    assert torch.equal(longer.log_probability(vectors, asked), whole.log_probability(vectors, asked))
    assert torch.equal(longer.find(vectors, asked), whole.find(vectors, asked))


@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_who_acts_on_whom(head, at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    given = [*KEYS, ((40, 3), 5)]
    keys = [keys_of(*one) for one in given]
    met = torch.zeros(len(keys), len(keys), dtype=torch.bool)
    texts = [part[:, None] for one in keys for part in one.vectors.split(one.lengths.tolist(), 1)]
    every = [torch.ones(one.shape[1:3], dtype=torch.bool) for one in texts]
    index = ScopeIndex(head, keys)
    scores = [index.log_probability(one, real) for one, real in zip(texts, every, strict=True)]
    middle = float(torch.cat(scores).median())
    keys = [keys_of(*one, threshold=middle) for one in given]
    for i, one in enumerate(keys):
        for part in one.vectors.split(one.lengths.tolist(), 1):
            real = torch.ones(1, part.shape[1], dtype=torch.bool)
            of_wordings = (by_hand(head, keys, part[:, None], real)[0] > middle).split(
                [len(other.lengths) for other in keys]
            )
            met[i] |= torch.stack([one.any() for one in of_wordings])
    index = ScopeIndex(head, keys)
    assert index.acts_on(index).tolist() == met.tolist()
    assert index.acts_on(ScopeIndex(head, keys[2:])).tolist() == met[2:].tolist()
    assert met.any()
    assert not met.all()
