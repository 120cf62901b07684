"""What `wise` is made of: activations and their margins, random masks, shards, and the router."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from baft.hosts.patches import Seen

NOWHERE = -1  # the route of a prompt that no memory is about


@dataclass(frozen=True, slots=True)
class PromptStates:
    """What a module is given at the tokens of some prompts.

    Args:
        states: All of them, one prompt after the other, `[token, d_in]`.
        rows: The prompt of each, `[token]`.
        n_rows: How many prompts.
    """

    states: Float[Tensor, "token d_in"]
    rows: Int[Tensor, " token"]
    n_rows: int

    def select(self, rows: Sequence[int]) -> "PromptStates":
        """Those of some of the prompts, in that order."""
        kept = [(self.rows == row).nonzero()[:, 0] for row in rows]
        new = [torch.full_like(one, i) for i, one in enumerate(kept)]
        return PromptStates(self.states[torch.cat(kept)], torch.cat(new), len(kept))

    def and_more(self, more: "PromptStates") -> "PromptStates":
        """These, and then those of further prompts."""
        rows = torch.cat([self.rows, more.rows + self.n_rows])
        return PromptStates(torch.cat([self.states, more.states]), rows, self.n_rows + more.n_rows)

    def to(self, dtype: torch.dtype) -> "PromptStates":
        """The same in another precision."""
        return PromptStates(self.states.to(dtype), self.rows, self.n_rows)


class PromptReader:
    """A patch that keeps what a module is given at the tokens of prompts, and changes nothing."""

    def __init__(self) -> None:
        self.seen: PromptStates | None = None

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> None:
        """Keeps them."""
        prompt = seen.prompt.to(inputs.device)
        rows = prompt.nonzero()[:, 0]
        self.seen = PromptStates(inputs.view(*prompt.shape, -1)[prompt], rows, len(prompt))


def activations(delta: Float[Tensor, "d_out d_in"], prompts: PromptStates) -> Float[Tensor, " row"]:
    """`|| A(x) (W' - W) ||` of every prompt, the mean over its tokens.

    Args:
        delta: `W' - W`, outputs first.
        prompts: `A(x)`.
    """
    sums = _sums(delta, prompts)
    return sums / prompts.rows.bincount(minlength=prompts.n_rows).to(sums)


def margin_loss(
    of_edit: Float[Tensor, " edit_row"],
    irrelevant: Float[Tensor, " other_row"],
    alpha: float,
    beta: float,
    gamma: float,
) -> Float[Tensor, ""]:
    """The mean of `max(0, i - alpha) + max(0, beta - e) + max(0, gamma - (e - i))` over all pairs.

    Args:
        of_edit: Activations `e` of the edit's texts.
        irrelevant: Activations `i` of others.
        alpha: The most that others may have.
        beta: The least that the edit's must have.
        gamma: The least distance between them.
    """
    apart = of_edit.unsqueeze(-1) - irrelevant.unsqueeze(0)
    return F.relu(irrelevant - alpha).mean() + F.relu(beta - of_edit).mean() + F.relu(gamma - apart).mean()


def mask_of(shape: tuple[int, int], ratio: float, seed: int, shard: int) -> Bool[Tensor, "d_out d_in"]:
    """Which numbers of a shard are trained: each by chance `ratio`, drawn for that shard from the seed."""
    generator = torch.Generator().manual_seed(
        (seed * 0x9E3779B97F4A7C15 + shard * 0xBF58476D1CE4E5B9) % (1 << 63)
    )
    return torch.rand(shape, generator=generator) < ratio


def shard_sizes(n_edits: Sequence[int], save_freq: int) -> list[int]:
    """How many edits are in each shard; a shard is full from `save_freq` on, and a request is never parted.

    Args:
        n_edits: Edits of each request, in order.
        save_freq: Edits that fill a shard.
    """
    sizes: list[int] = []
    for n in n_edits:
        if sizes and sizes[-1] < save_freq:
            sizes[-1] += n
        else:
            sizes.append(n)
    return sizes


@dataclass(frozen=True, slots=True)
class Memory:
    """A side memory in force.

    Args:
        delta: `W' - W`, outputs first.
        threshold: The activation from which on a prompt is one of its own.
    """

    delta: Float[Tensor, "d_out d_in"]
    threshold: float


class WisePatch:
    """Routes each row to a side memory, or to the host's own weight, by its prompt.

    Where a prompt comes in parts, each part is routed by all that was seen of the prompt so far; tokens that
    come after it go where its last part went.

    Args:
        memories: The side memories.
    """

    def __init__(self, memories: Sequence[Memory]):
        self.memories = tuple(memories)
        self._deltas = torch.stack([one.delta for one in memories])
        self._thresholds = self._deltas.new_tensor([one.threshold for one in memories])

    def __call__(
        self,
        module: nn.Module,
        inputs: Float[Tensor, "*batch d_in"],
        output: Float[Tensor, "*batch d_out"],
        seen: Seen,
    ) -> Float[Tensor, "*batch d_out"] | None:
        """The output with each row's memory added to the weight; None where no row has one."""
        x = inputs.view(*seen.prompt.shape, -1).to(self._deltas.dtype)
        routes = self._routes(x, seen)
        found = output.view(*seen.prompt.shape, -1)
        for route in sorted(set(routes.tolist()) - {NOWHERE}):
            there = (routes == route).view(-1, 1, 1)
            changed = found + F.linear(x, self._deltas[route].to(x.device)).to(found)
            found = torch.where(there, changed, found)
        return None if bool((routes == NOWHERE).all()) else found.view_as(output)

    def _routes(self, x: Float[Tensor, "row pos d_in"], seen: Seen) -> Int[Tensor, " row"]:
        """The memory of each row, or `NOWHERE`."""
        memo, n_rows = seen.memo, len(x)
        prompt = seen.prompt.to(x.device)
        if bool(prompt.any()):
            rows = prompt.nonzero()[:, 0]
            here = PromptStates(x[prompt], rows, n_rows)
            counts = rows.bincount(minlength=n_rows).to(x)
            sums = torch.stack([_sums(delta.to(x.device), here) for delta in self._deltas])
            if "sums" in memo:
                sums, counts = sums + _spread(memo["sums"], n_rows), counts + _spread(memo["counts"], n_rows)
            memo["sums"], memo["counts"] = sums, counts
            memo["routes"] = route(sums / counts.clamp(min=1), self._thresholds.to(x.device))
        if "routes" not in memo:
            return torch.full((n_rows,), NOWHERE, device=x.device)
        return _spread(memo["routes"], n_rows)


def _sums(delta: Float[Tensor, "d_out d_in"], prompts: PromptStates) -> Float[Tensor, " row"]:
    lengths = torch.linalg.vector_norm(F.linear(prompts.states, delta), dim=-1)
    return lengths.new_zeros(prompts.n_rows).index_add(0, prompts.rows, lengths)


def _spread(known: Tensor, n_rows: int) -> Tensor:
    """As many rows as are shown, where beams or samples share a prompt."""
    return known.repeat_interleave(n_rows // known.shape[-1], dim=-1)


def route(
    of_memories: Float[Tensor, "memory row"], thresholds: Float[Tensor, " memory"]
) -> Int[Tensor, " row"]:
    """Of the memories whose threshold a row's activation reaches, the one with the greatest; else `NOWHERE`.

    Args:
        of_memories: The activation of each row in each memory.
        thresholds: Of the memories.
    """
    reached = of_memories >= thresholds.unsqueeze(-1)
    best = of_memories.masked_fill(~reached, float("-inf")).argmax(0)
    return torch.where(reached.any(0), best, NOWHERE)
