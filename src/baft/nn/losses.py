"""The three terms of BaFT's loss: `CE + lambda_bal R_bal + lambda_loc R_loc`.

The paper names the terms; the exact forms of `R_bal` and `R_loc` are this project's reading of it.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

BalanceForm = Literal["running", "running_times_t", "exponential", "current"]


def target_cross_entropy(
    logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"], rows: Int[Tensor, " token"]
) -> Float[Tensor, ""]:
    """Mean over sequences of `row_cross_entropy`."""
    return row_cross_entropy(logits, targets, rows).mean()


def row_cross_entropy(
    logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"], rows: Int[Tensor, " token"]
) -> Float[Tensor, " row"]:
    """The mean cross-entropy, in nats, over the target tokens of each sequence.

    Args:
        logits: Predictions at the positions before each target token.
        targets: The target tokens.
        rows: Which sequence each token belongs to, counted from 0 without gaps.
    """
    losses = torch.nn.functional.cross_entropy(_precise(logits), targets, reduction="none")
    n_rows = int(rows.max()) + 1
    sums = losses.new_zeros(n_rows).index_add(0, rows, losses)
    counts = losses.new_zeros(n_rows).index_add(0, rows, torch.ones_like(losses))
    return sums / counts


def target_margins(
    logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """By how many nats each target token leads (or trails, if negative) the best other token."""
    logits = _precise(logits)
    own = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(-1, targets.unsqueeze(-1), float("-inf"))
    return own - others.amax(-1)


def _precise(logits: Float[Tensor, "token vocab"]) -> Float[Tensor, "token vocab"]:
    """In float32 at least: the half precisions are too coarse for a logarithm, float64 stays as it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def load_balance(
    current: Float[Tensor, "*block rank"], past: Float[Tensor, "*block rank"]
) -> Float[Tensor, "*block"]:
    """Squared coefficient of variation of the load on the bases: `Var_k(M + m) / (Mean_k(M + m)^2 + eps)`.

    Of each block by itself.

    Args:
        current: `m`, mean weight of every basis over the edited tokens of this edit; carries gradient.
        past: `M`, what earlier edits left on every basis; carries none.

    The population variance; `eps = 1e-10` as for the importance loss of Shazeer et al. 2017
    (arXiv 1701.06538, section 4), whose form this is.
    """
    load = past.detach() + current
    mean = load.mean(-1)
    return load.var(-1, correction=0) / (mean.square() + 1e-10)


def accumulate_load(
    past: Float[Tensor, "*block rank"], current: Float[Tensor, "*block rank"], form: BalanceForm
) -> Float[Tensor, "*block rank"]:
    """What the bases carry after an edit: the sum so far, its decayed form, or nothing.

    `exponential` keeps 0.9 of the past; `current` forgets it.
    """
    current = current.detach()
    if form == "current":
        return torch.zeros_like(past)
    return (0.9 * past if form == "exponential" else past) + current


def locality(w: Float[Tensor, "token block rank"]) -> Float[Tensor, " block"]:
    """`R_loc` of one layer: mean of `w_k(h)^2` over a block's bases and states of unrelated text."""
    return w.square().mean((0, -1))
