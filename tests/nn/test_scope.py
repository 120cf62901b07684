"""Late interaction against loops written from the formulas, and what padding may not change."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from baft.nn import scope as module
from baft.nn.scope import ScopeHead, ScopeKeys, contrast, late_interaction

N_FEATURES, DIM = 12, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return ScopeHead(N_FEATURES, n_dims=DIM, n_hidden=7).double().requires_grad_(False)


@pytest.fixture
def edits():
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    return normal(3, 4, N_FEATURES), real


@pytest.fixture
def prompts():
    real = torch.arange(20) < torch.tensor([[20], [2]])
    return normal(2, 20, N_FEATURES, seed=1), real


def by_loops(head, edits, prompts):
    """The definition, one number at a time."""
    found = torch.zeros(2, len(prompts[0]), len(edits[0]), dtype=torch.float64)
    for c in range(2):
        for p in range(len(prompts[0])):
            for e in range(len(edits[0])):
                tokens = [i for i in range(edits[0].shape[1]) if edits[1][e, i]]
                raw = [math.log1p(math.exp(head.weightings[c](edits[0][e, i]).item())) for i in tokens]
                for i, weight in zip(tokens, raw, strict=True):
                    k = normalize(head.projections[c](edits[0][e, i]), dim=0)
                    n = int(prompts[1][p].sum())
                    q = [normalize(head.projections[c](prompts[0][p, j]), dim=0) for j in range(n)]
                    costs = [float(head.discounts[c]) * max(0, n - 1 - j - 12) / 24 for j in range(n)]
                    best = max(float(k @ one) - cost for one, cost in zip(q, costs, strict=True))
                    found[c, p, e] += weight / sum(raw) * best
    return found


def test_scores_are_those_of_the_definition(head, edits, prompts):
    keys, vectors = head.keys(*edits), head.vectors(prompts[0])
    scores = late_interaction(keys, vectors, prompts[1], head.discounts)
    torch.testing.assert_close(scores, by_loops(head, edits, prompts), rtol=0, atol=1e-12)
    anywhere = late_interaction(keys, vectors, prompts[1], torch.zeros_like(head.discounts))
    assert (anywhere[:, 0] > scores[:, 0]).any()  # control: it counts where a token stands
    assert torch.equal(anywhere[:, 1], scores[:, 1])
    want = torch.zeros(2, 3, dtype=torch.float64)
    for c in range(2):
        want += (1 / (1 + (-head.slopes[c] * (scores[c] - head.midpoints[c])).exp())).log()
    torch.testing.assert_close(head.log_probability(scores), want, rtol=0, atol=1e-12)
    assert not torch.allclose(scores[0], scores[1])  # control: two channels


def test_padding_changes_nothing(head, edits, prompts):
    want = late_interaction(head.keys(*edits), head.vectors(prompts[0]), prompts[1], head.discounts)
    other = [
        (torch.where(real.unsqueeze(-1), features, normal(*features.shape, seed=9)), real)
        for features, real in (edits, prompts)
    ]
    got = late_interaction(head.keys(*other[0]), head.vectors(other[1][0]), prompts[1], head.discounts)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    every = torch.ones_like(prompts[1])
    assert not torch.allclose(
        late_interaction(head.keys(*edits), head.vectors(other[1][0]), every, head.discounts), want
    )


def test_edits_are_compared_some_at_a_time(head, edits, prompts, monkeypatch):
    features, real = normal(40, 4, N_FEATURES, seed=2), torch.ones(40, 4).bool()
    prompts = [one[:, :5] for one in prompts]
    keys, vectors = head.keys(features, real), head.vectors(prompts[0])
    want, sizes, einsum = late_interaction(keys, vectors, prompts[1], head.discounts), [], torch.einsum

    def counted(*args):
        sizes.append((made := einsum(*args)).numel())
        return made

    monkeypatch.setattr(module, "_MOST_COSINES", 1000)
    monkeypatch.setattr(torch, "einsum", counted)
    torch.testing.assert_close(
        late_interaction(keys, vectors, prompts[1], head.discounts), want, rtol=0, atol=1e-12
    )
    assert len(sizes) == 4
    assert max(sizes) <= 1000
    none = ScopeKeys(keys.vectors[:, :0], keys.weights[:, :0])
    assert late_interaction(none, vectors, prompts[1], head.discounts).shape == (2, 2, 0)


def test_an_edit_says_all_of_itself_and_text_before_it_costs_nothing(head, edits):
    features, real = edits
    keys = head.keys(features, real)
    scores = late_interaction(keys, head.vectors(features), real, head.discounts)
    torch.testing.assert_close(scores.diagonal(dim1=1, dim2=2), torch.ones(2, 3, dtype=torch.float64))
    around = torch.cat([normal(3, 6, N_FEATURES, seed=4), features], 1)
    longer = late_interaction(
        keys, head.vectors(around), torch.cat([torch.ones(3, 6).bool(), real], 1), head.discounts
    )
    assert (longer >= scores - 1e-12).all()
    assert (longer > scores + 1e-3).any()  # control: other edits may be met there
    nothing = late_interaction(keys, head.vectors(features), torch.zeros_like(real), head.discounts)
    assert (nothing < -1).all()


def test_text_behind_an_edit_costs(head):
    long, real = normal(1, 40, N_FEATURES), torch.ones(1, 40).bool()
    few, behind = long[:, :13], torch.cat([long[:, :13], long[:, 13:20]], 1)
    own = [
        late_interaction(head.keys(one, real[:, :n]), head.vectors(text), real[:, :m], head.discounts)
        for one, n, text, m in ((few, 13, few, 13), (few, 13, behind, 20), (long, 40, long, 40))
    ]
    torch.testing.assert_close(own[0], torch.ones(2, 1, 1, dtype=torch.float64))
    assert (own[1] < own[0]).all()
    assert (own[2] < own[0]).all()  # the beginning of a long prompt is far from its end


def test_weights_are_positive_and_one_in_sum(head, edits):
    keys = head.keys(*edits)
    assert isinstance(keys, ScopeKeys)
    assert torch.equal(keys.weights > 0, edits[1].expand(2, -1, -1))
    torch.testing.assert_close(keys.weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(keys.vectors.norm(dim=-1), torch.ones(2, 3, 4, dtype=torch.float64))


def test_the_loss_is_that_of_the_definition():
    log_p = -normal(4, 2, seed=5).abs()
    is_about = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]]).bool()
    of_edits = [
        math.log(sum(math.exp(log_p[p, e]) for p in range(4)))
        - math.log(sum(math.exp(log_p[p, e]) for p in range(4) if is_about[p, e]))
        for e in range(2)
    ]
    of_prompts = [
        math.log(sum(math.exp(log_p[p, e]) for e in range(2))) - float(log_p[p][is_about[p]].item())
        for p in range(3)
    ]
    outside = sorted((-math.log(1 - math.exp(float(x))) for x in log_p[~is_about]), reverse=True)
    want = sum(of_edits) / 2 + sum(of_prompts) / 3 - float(log_p[is_about].mean()) + sum(outside[:3]) / 3
    assert contrast(log_p, is_about, n_hard=3).item() == pytest.approx(want, abs=1e-12)
    better = torch.where(is_about, log_p * 0.5, log_p * 2)
    assert contrast(better, is_about, n_hard=3) < contrast(log_p, is_about, n_hard=3)
