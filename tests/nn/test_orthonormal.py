"""Orthonormal rows: drawn, projected, retracted, and kept through an optimizer's steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baft.errors import ConfigError
from baft.nn.orthonormal import random_orthonormal, retract, tangent
from references import draws, loops

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(5, 9))  # blocks, rank, d_model
quick = settings(max_examples=30, deadline=None)


def defect(R: Tensor) -> float:
    """How far `R R^T` is from the identity."""
    return float((R @ R.mT - torch.eye(R.shape[-2], dtype=R.dtype)).abs().max())


@quick
@given(draws.seeds, shapes)
def test_a_draw_has_orthonormal_rows(seed: int, shape: tuple[int, int, int]) -> None:
    R = draws.orthonormal(seed, *shape)
    assert R.shape == shape
    assert R.is_contiguous()
    assert defect(R) < 1e-14
    assert defect(draws.normal(seed, *shape)) > 1e-2  # control: a Gaussian has not


def test_a_seed_means_the_same_in_every_precision() -> None:
    exact = draws.orthonormal(3, 2, 4, 9)
    assert torch.equal(exact, draws.orthonormal(3, 2, 4, 9))
    assert torch.equal(exact.float(), draws.orthonormal(3, 2, 4, 9, dtype=torch.float32))
    assert not torch.equal(exact, draws.orthonormal(4, 2, 4, 9))
    assert not torch.equal(exact[0], exact[1])


def test_draws_are_uniform() -> None:
    """On the sphere the mean is 0 and every squared entry averages 1/d; in one dimension both signs occur."""
    n, rank, d_model = 20_000, 2, 4
    R = draws.orthonormal(0, n, rank, d_model)
    five_sigma = 5 / n**0.5  # an entry varies by less than 1
    assert float(R.mean(0).abs().max()) < five_sigma
    assert float((R.square().mean(0) - 1 / d_model).abs().max()) < five_sigma
    assert float(draws.orthonormal(0, n, 1, 1).mean().abs()) < five_sigma
    unsigned = torch.linalg.qr(draws.normal(0, n, 1, 1)).Q  # control: the factor as LAPACK leaves it
    assert float(unsigned.mean().abs()) == 1.0


@pytest.mark.parametrize("rank", [-1, 0, 6])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} is impossible: 5 hidden units"):
        random_orthonormal(1, rank, 5, generator=torch.Generator(), dtype=torch.float64)


def test_as_many_bases_as_hidden_units_are_possible() -> None:
    assert defect(draws.orthonormal(0, 1, 5, 5)) < 1e-14


@quick
@given(draws.seeds, shapes)
def test_tangent_is_the_orthogonal_projection(seed: int, shape: tuple[int, int, int]) -> None:
    R, G = draws.orthonormal(seed, *shape), draws.normal(seed + 1, *shape)
    T = tangent(R, G)
    assert (
        float((T @ R.mT + R @ T.mT).abs().max()) < 1e-13
    )  # tangent: to first order the rows stay orthonormal
    assert float((G @ R.mT + R @ G.mT).abs().max()) > 1e-8  # control: the gradient itself is not
    torch.testing.assert_close(tangent(R, T), T, rtol=0, atol=1e-13)
    other = tangent(R, draws.normal(seed + 2, *shape))
    assert abs(float(((G - T) * other).sum())) < 1e-12  # what it takes away is normal to every tangent


@quick
@given(draws.seeds, shapes)
def test_retract_is_gram_schmidt(seed: int, shape: tuple[int, int, int]) -> None:
    near = draws.orthonormal(seed, *shape) + 0.2 * draws.normal(seed + 1, *shape) / shape[2]
    back = retract(near)
    slow = torch.tensor([loops.gram_schmidt(block) for block in near.tolist()], dtype=torch.float64)
    torch.testing.assert_close(back, slow, rtol=0, atol=1e-12)
    assert defect(back) < 1e-13
    assert defect(near) > 1e-8  # control
    projector = back.mT @ back
    torch.testing.assert_close(near @ projector, near, rtol=0, atol=1e-12)  # the same row space
    torch.testing.assert_close(retract(back), back, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retract_keeps_the_precision_it_is_given(dtype: torch.dtype) -> None:
    back = retract(draws.normal(0, 2, 4, 9, dtype=dtype))
    assert back.dtype == dtype
    assert defect(back) < 4 * torch.finfo(dtype).eps


def test_retract_refuses_dependent_rows() -> None:
    R = draws.orthonormal(0, 1, 3, 6)
    R[0, 2] = 0.0
    with pytest.raises(torch.linalg.LinAlgError):
        retract(R)


@quick
@given(draws.seeds)
def test_retract_follows_a_tangent_to_first_order(seed: int) -> None:
    """`retract(R + t T) = R + t T + O(t^2)`: a tenth of the step, a hundredth of the error."""
    R, G = draws.orthonormal(seed, 1, 3, 7), draws.normal(seed + 1, 1, 3, 7)

    def error(direction: Tensor, t: float) -> float:
        return float((retract(R + t * direction) - R - t * direction).norm())

    T = tangent(R, G)
    assert 80 < error(T, 1e-3) / error(T, 1e-4) < 125
    assert (
        8 < error(G, 1e-3) / error(G, 1e-4) < 12.5
    )  # control: along the gradient itself, to order zero only


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_rows_stay_orthonormal_through_every_step(dtype: torch.dtype, tolerance: float) -> None:
    goal = draws.orthonormal(7, 2, 4, 12, dtype=dtype)

    def train(*, retracted: bool) -> tuple[list[float], float]:
        R = torch.nn.Parameter(draws.orthonormal(1, 2, 4, 12, dtype=dtype))
        optimizer = torch.optim.Adam([R], lr=3e-2)
        defects = []
        for _ in range(60):
            optimizer.zero_grad()
            (R.mT @ R - goal.mT @ goal).square().sum().backward()
            assert R.grad is not None
            R.grad = tangent(R.detach(), R.grad)
            optimizer.step()
            if retracted:
                R.data = retract(R.data)
            defects.append(defect(R.detach()))
        return defects, float((R.mT @ R - goal.mT @ goal).detach().norm())

    defects, distance = train(retracted=True)
    assert max(defects) < tolerance
    assert distance < 0.2 * float(goal.norm())  # and it arrives
    defects, _ = train(retracted=False)  # control
    assert max(defects[1:]) > 1e-3
