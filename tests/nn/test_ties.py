"""TIES against cases by hand and a slow loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baft.nn.ties import ties, trimmed


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def slow(deltas, density):
    """The three steps, number by number."""
    rows = [one.flatten().tolist() for one in deltas]
    n = len(rows[0])
    for row in rows:
        kept = sorted(range(n), key=lambda i: -abs(row[i]))[: max(1, int(density * n))]
        row[:] = [x if i in kept else 0.0 for i, x in enumerate(row)]
    merged = []
    for column in zip(*rows, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        chosen = [x for x in column if x * sign > 0]
        merged.append(sum(chosen) / len(chosen) if chosen else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(deltas[0])


def test_a_case_by_hand():
    """Trimmed to three of five; at the second place plus wins, at the last minus."""
    a = tensor(1.0, -2.0, 3.0, 0.1, -0.2)
    b = tensor(0.3, 5.0, 1.0, 0.0, -4.0)
    torch.testing.assert_close(trimmed(a, 0.6), tensor(1.0, -2.0, 3.0, 0.0, 0.0), rtol=0, atol=0)
    torch.testing.assert_close(trimmed(b, 0.6), tensor(0.0, 5.0, 1.0, 0.0, -4.0), rtol=0, atol=0)
    torch.testing.assert_close(ties([a, b], 0.6), tensor(1.0, 5.0, 2.0, 0.0, -4.0), rtol=0, atol=0)
    assert not torch.equal(ties([a, b], 1.0), ties([a, b], 0.6))  # control: trimming does something


def test_changes_of_disjoint_places_are_put_side_by_side():
    a, b = tensor(1.0, 0.0, -2.0, 0.0), tensor(0.0, 3.0, 0.0, 0.0)
    assert torch.equal(ties([a, b], 0.5), a + b)


def test_where_changes_cancel_plus_wins():
    assert torch.equal(ties([tensor(2.0), tensor(-2.0)], 1.0), tensor(2.0))


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([0.1, 0.53, 1.0]))
@settings(max_examples=40, deadline=None)
def test_it_is_the_slow_loop(seed, n, density):
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(n)]
    torch.testing.assert_close(ties(deltas, density), slow(deltas, density), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("density", [0.2, 0.53])
def test_what_is_sparse_enough_is_not_trimmed(density):
    sparse = torch.zeros(100, dtype=torch.float64).index_fill(0, torch.arange(0, 100, 5), 2.0)
    assert trimmed(sparse, density) is sparse
