"""Which edit, if any, a prompt is about: late interaction of its tokens with those of an edit's prompt.

Our own construction, after late interaction in retrieval (Khattab and Zaharia 2020, arXiv 2004.12832). Two
channels ask two things, *whom* a prompt is about and *what* it asks of them; an edit is meant where both do.
In each, every token is a unit vector read off early states of the frozen host, and every token of an edit's
prompt has a weight. With `k_i` the edit's tokens and `q_j` those of the prompt, the score of channel c is

    s_c = sum_i v_i max_j (k_i^T q_j - gamma_c t_j),    sum_i v_i = 1,  v_i > 0:

how much of what the edit says the prompt says, too. What is asked stands at the end: `t_j` is zero for the
last tokens and grows with the distance before them, so that what a long text says in passing counts less.
Other text before the question costs nothing. Together they are

    log p = sum_c log sigmoid(alpha_c (s_c - theta_c)).
"""

from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, softplus

CHANNELS: Final = ("whom", "what")
_EXCLUDED = -2.0  # below every cosine of a token that counts
_NEAR, _UNIT = 12, 24  # tokens: so many may come after one that counts in full; what a discount is for
_MOST_COSINES = 1 << 22  # that are in memory at once


@dataclass(frozen=True, slots=True)
class ScopeKeys:
    """What edits are found by.

    Args:
        vectors: Unit vectors of the tokens of each edit's prompt, `[channel, edit, token, dim]`.
        weights: How much each counts, `[channel, edit, token]`: positive at real tokens, zero at padding,
            one in sum.
    """

    vectors: Float[Tensor, "channel edit token dim"]
    weights: Float[Tensor, "channel edit token"]


@final
class ScopeHead(nn.Module):
    """Linear maps of early states to unit vectors, and small networks for the weights of an edit's tokens.

    Args:
        n_features: Width of what is read of a token.
        n_dims: Width of the vectors.
        n_hidden: Width of the networks.
    """

    def __init__(self, n_features: int, *, n_dims: int = 64, n_hidden: int = 64):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(n_features, n_dims, bias=False) for _ in CHANNELS)
        self.weightings = nn.ModuleList(
            nn.Sequential(nn.Linear(n_features, n_hidden), nn.Tanh(), nn.Linear(n_hidden, 1))
            for _ in CHANNELS
        )
        self.discounts = nn.Parameter(torch.full((len(CHANNELS),), 0.3))  # gamma
        self.slopes = nn.Parameter(torch.full((len(CHANNELS),), 20.0))
        self.midpoints = nn.Parameter(torch.full((len(CHANNELS),), 0.7))

    def vectors(
        self, features: Float[Tensor, "row token n_features"]
    ) -> Float[Tensor, "channel row token dim"]:
        """The unit vectors of tokens."""
        return torch.stack([normalize(one(features), dim=-1) for one in self.projections])

    def keys(
        self, features: Float[Tensor, "edit token n_features"], real: Bool[Tensor, "edit token"]
    ) -> ScopeKeys:
        """What edits are found by, from the tokens of their prompts.

        Args:
            features: What is read of each token.
            real: Which of them count; at least one of each edit.
        """
        raw = torch.stack([softplus(one(features).squeeze(-1)) * real for one in self.weightings])
        return ScopeKeys(self.vectors(features), raw / raw.sum(-1, keepdim=True))

    def log_probability(self, scores: Float[Tensor, "channel prompt edit"]) -> Float[Tensor, "prompt edit"]:
        """How sure it is that a prompt is about an edit, both channels together; at most zero."""
        each = [self.log_of_channel(one, channel) for channel, one in enumerate(scores)]
        return torch.stack(each).sum(0)

    def log_of_channel(
        self, scores: Float[Tensor, "prompt edit"], channel: int
    ) -> Float[Tensor, "prompt edit"]:
        """How sure one channel is; at most zero."""
        return logsigmoid(self.slopes[channel] * (scores - self.midpoints[channel]))


def before_end(real: Bool[Tensor, "prompt token"]) -> Int[Tensor, "prompt token"]:
    """How many tokens of its prompt come after each; those that count stand at the left."""
    return real.sum(1, keepdim=True) - 1 - torch.arange(real.shape[1], device=real.device)


def distance_costs(
    n_after: Int[Tensor, " *tokens"], discounts: Float[Tensor, " channel"]
) -> Float[Tensor, " channel *tokens"]:
    """`gamma_c t_j`: nothing for the last 13 tokens of a prompt, one discount for the 24th before these.

    Args:
        n_after: How many tokens come after each.
        discounts: What 24 tokens cost in each channel, at least zero.
    """
    beyond = (n_after - _NEAR).clamp(min=0)
    return torch.stack([one * beyond / _UNIT for one in discounts])


def late_interaction(
    keys: ScopeKeys,
    vectors: Float[Tensor, "channel prompt token dim"],
    real: Bool[Tensor, "prompt token"],
    discounts: Float[Tensor, " channel"],
) -> Float[Tensor, "channel prompt edit"]:
    """The scores of every prompt for every edit in every channel, at most one.

    Edits are compared some at a time, so that ten thousand take no more memory than a hundred.

    Args:
        keys: The edits'.
        vectors: Of the tokens of each prompt.
        real: Which of them count, at the left; a prompt of which none does scores below -1.
        discounts: See `distance_costs`.
    """
    n_tokens = max(keys.weights.shape[-1], 1)
    n_at_once = max(1, _MOST_COSINES // (len(CHANNELS) * real.numel() * n_tokens))
    parts = zip(keys.vectors.split(n_at_once, 1), keys.weights.split(n_at_once, 1), strict=True)
    costs = distance_costs(before_end(real), discounts)
    return torch.cat([_scores(ScopeKeys(*part), vectors, real, costs) for part in parts], -1)


def _scores(
    keys: ScopeKeys,
    vectors: Float[Tensor, "channel prompt token dim"],
    real: Bool[Tensor, "prompt token"],
    costs: Float[Tensor, "channel prompt token"],
) -> Float[Tensor, "channel prompt edit"]:
    n_edits, n_tokens = keys.weights.shape[1:]
    cosines = torch.einsum("cpjd,ckd->cpjk", vectors, keys.vectors.flatten(1, 2)) - costs.unsqueeze(-1)
    best = cosines.masked_fill(~real.unsqueeze(-1), _EXCLUDED).amax(2)
    return (best.unflatten(-1, (n_edits, n_tokens)) * keys.weights.unsqueeze(1)).sum(-1)


def contrast(
    log_probability: Float[Tensor, "prompt edit"], is_about: Bool[Tensor, "prompt edit"], *, n_hard: int
) -> Float[Tensor, ""]:
    """What the head is trained with: cross-entropy both ways among a batch, and one for every pair.

    The first two put the edit that a prompt is about before the others, and its prompts before other edits';
    the third makes the probability one, for all edits on one scale.

    Args:
        log_probability: Of every prompt for every edit. Prompts about none are negatives of all.
        is_about: Which prompt is about which edit; every edit has one.
        n_hard: Of the pairs that do not belong together, the mean is over so many, the worst.
    """
    own = log_probability.masked_fill(~is_about, -torch.inf)
    of_edits = log_probability.logsumexp(0) - own.logsumexp(0)
    among = is_about.any(-1)
    of_prompts = log_probability[among].logsumexp(-1) - own[among].logsumexp(-1)
    outside = -torch.log1p(-log_probability[~is_about].exp().clamp(max=1.0 - 1e-6))
    hard = outside.topk(min(n_hard, len(outside))).values
    return of_edits.mean() + of_prompts.mean() - log_probability[is_about].mean() + hard.mean()
