"""Which of many edits a prompt is about: late interaction with the keys of all, in blocks of bounded size."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from baft.errors import DamagedArtifactError
from baft.nn.scope import ScopeKeys, before_end, distance_costs
from baft.scope.names import Names, cost_of

_AT_ONCE = 1 << 22  # cosines held in memory: 16 MB of them
_EDITS_IN_BLOCK = 1024
_EXCLUDED = -2.0  # below every cosine
_EQUAL = 1e-4  # of a log-probability; of equal keys it differed by 4e-6 of itself


@runtime_checkable
class Judge(Protocol):
    """What makes keys of prompts, and a judgment of scores; trained, or not (`untrained.py`)."""

    @property
    def fingerprint(self) -> int:
        """A number that tells this head from others; keys of one mean nothing to another."""

    @property
    def discounts(self) -> Float[Tensor, " channel"]:
        """What 24 tokens of distance from the end of a prompt cost."""

    @property
    def n_dims(self) -> int:
        """Width of the vectors."""

    def keys(
        self, features: Float[Tensor, "edit token n_features"], real: Bool[Tensor, "edit token"]
    ) -> ScopeKeys:
        """What edits are found by."""

    def thresholds(self, keys: ScopeKeys) -> Float[Tensor, " edit"]:
        """The log-probability above which each edit acts."""

    def log_probability(self, scores: Float[Tensor, "channel prompt edit"]) -> Float[Tensor, "prompt edit"]:
        """How sure it is that a prompt is about an edit; at most zero."""


@dataclass(frozen=True, slots=True)
class EditKeys:
    """What one edit is found by.

    Args:
        vectors: Unit vectors of the tokens of its prompt, then those of its rephrasings.
        weights: How much each counts; one in sum over each wording.
        lengths: Tokens of each wording.
        thresholds: Log-probability that a prompt must exceed to be about each wording.
        head: Fingerprint of the head that made these.
        spelling: The words of each wording, in UTF-8: a space between two, and a line for each wording.
        name_weights: How much each word is part of a name (`Names`), one wording after the other.
    """

    vectors: Float[Tensor, "channel token dim"]
    weights: Float[Tensor, "channel token"]
    lengths: Int[Tensor, " wording"]
    thresholds: Float[Tensor, " wording"]
    head: Int[Tensor, ""]
    spelling: UInt8[Tensor, " byte"]
    name_weights: Float[Tensor, " word"]

    def to(self, device: torch.device) -> "EditKeys":
        """The same, what takes part in products on a device; words stay where they are."""
        return replace(
            self,
            vectors=self.vectors.to(device),
            weights=self.weights.to(device),
            lengths=self.lengths.to(device),
            thresholds=self.thresholds.to(device),
        )

    def names(self) -> list[Names]:
        """The words of each wording.

        Raises:
            DamagedArtifactError: If they are not of these wordings.
        """
        try:
            text = bytes(self.spelling.tolist()).decode()
            lines = [tuple(line.split(" ")) if line else () for line in text.split("\n")]
            if len(lines) != len(self.lengths):
                raise ValueError(f"{len(lines)} lines for {len(self.lengths)} wordings")
            weights = self.name_weights.split([len(words) for words in lines])
            pairs = zip(lines, weights, strict=True)
            return [Names(words, tuple(of_words.tolist())) for words, of_words in pairs]
        except (ValueError, TypeError, RuntimeError) as error:
            raise DamagedArtifactError(f"the names of an edit's wordings cannot be read: {error}") from error


def spelled(names: Sequence[Names]) -> tuple[UInt8[Tensor, " byte"], Float[Tensor, " word"]]:
    """The words of wordings and their weights as `EditKeys` holds them."""
    text = "\n".join(" ".join(one.words) for one in names).encode()
    weights = [weight for one in names for weight in one.weights]
    return torch.tensor(list(text), dtype=torch.uint8), torch.tensor(weights, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts as a head reads them.

    Args:
        vectors: Of their tokens.
        real: Which of these count; one of each prompt at least.
        names: What the prompt with a number names; read where it is wanted.
    """

    vectors: Float[Tensor, "channel row token dim"]
    real: Bool[Tensor, "row token"]
    names: Callable[[int], Names]


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """63 bits of the SHA-256 of some tensors, as they are in float32."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return int.from_bytes(found.digest()[:8], "big") >> 1


@final
class ScopeIndex:
    """The keys of edits, side by side in blocks, so that one more edit costs no copy of all of them.

    Args:
        head: What made them.
        edits: The keys of each edit.
        before: An index after which these come; None for none.
    """

    def __init__(self, head: Judge, edits: Sequence[EditKeys], before: "ScopeIndex | None" = None):
        self._head, left = head, list(edits)
        self._blocks: tuple[_Block, ...]
        blocks = [] if before is None else list(before._blocks)
        if blocks and blocks[-1].n_edits < _EDITS_IN_BLOCK and left:
            n = _EDITS_IN_BLOCK - blocks[-1].n_edits
            blocks[-1] = blocks[-1].joined(_Block.of(left[:n]))
            left = left[n:]
        for start in range(0, len(left), _EDITS_IN_BLOCK):
            blocks.append(_Block.of(left[start : start + _EDITS_IN_BLOCK]))
        self._blocks = tuple(blocks)

    @property
    def n_edits(self) -> int:
        """How many edits there are."""
        return sum(block.n_edits for block in self._blocks)

    def first(self, n: int) -> "ScopeIndex":
        """The index of the first `n` edits."""
        found, blocks = ScopeIndex(self._head, []), list[_Block]()
        for block in self._blocks:
            if n > 0:
                blocks.append(block if n >= block.n_edits else block.first(n))
            n -= block.n_edits
        found._blocks = tuple(blocks)
        return found

    @torch.no_grad()
    def log_probability(self, asked: Asked) -> Float[Tensor, "row wording"]:
        """How sure it is that every prompt is about every wording; at most zero.

        Where the head is surer than the wording's threshold, and there alone, names are compared.

        Args:
            asked: The prompts.
        """
        costs = distance_costs(before_end(asked.real), self._head.discounts).unsqueeze(-1)
        scores = [block.scores(asked.vectors, asked.real, costs) for block in self._blocks]
        found = self._head.log_probability(torch.cat(scores, -1))
        thresholds = torch.cat([block.thresholds for block in self._blocks])
        above = (found > thresholds).nonzero().tolist()
        if above:
            names = [one for block in self._blocks for one in block.names]
            prompts = {row: asked.names(row) for row in {row for row, _ in above}}
            both = len(self._head.discounts) > 1
            taken = [cost_of(names[wording], prompts[row], both=both) for row, wording in above]
            found[tuple(zip(*above, strict=True))] -= found.new_tensor(taken)
        return found

    @torch.no_grad()
    def acts_on(self, other: "ScopeIndex") -> Bool[Tensor, "other edit"]:
        """Which edits here would act on a wording of which edits there, asked as it is."""
        met = [[mine.acts_on(theirs, self._head) for mine in self._blocks] for theirs in other._blocks]
        return torch.cat([torch.cat(row, 1) for row in met])

    @torch.no_grad()
    def passing(self, asked: Asked) -> Float[Tensor, "row edit"]:
        """The log-probability of every prompt and edit, minus infinity where it is not above the threshold.

        So each finite one is of an edit that would act, were it the only one.

        Args:
            asked: The prompts.
        """
        n_wordings = [len(block.edit) for block in self._blocks]
        of_wordings = self.log_probability(asked).split(n_wordings, 1)
        pairs = zip(self._blocks, of_wordings, strict=True)
        return torch.cat([block.passing(found) for block, found in pairs], 1)

    def find(self, asked: Asked, only: Int[Tensor, " row"] | None = None) -> Int[Tensor, " row"]:
        """The likeliest edit of each prompt among those above their threshold; -1 where there is none.

        Of equals it is the latest.

        Args:
            asked: The prompts.
            only: The one edit that a prompt may be about; None for any.
        """
        found = self.passing(asked)
        if only is not None:
            chosen = torch.zeros_like(found, dtype=torch.bool).scatter(1, only.unsqueeze(-1), True)
            found = found.masked_fill(~chosen, -torch.inf)
        return likeliest(found)


def likeliest(passing: Float[Tensor, "row edit"]) -> Int[Tensor, " row"]:
    """The edit with the highest log-probability, of equals the latest; -1 where all are minus infinity.

    Those of equal keys differ by rounding (`_EQUAL`), for each block of edits is a product of its own shape.
    """
    best = passing.amax(1, keepdim=True)  # at most zero
    equal = (passing >= best * (1 + _EQUAL)) & (best > -torch.inf)
    latest = passing.shape[1] - 1 - equal.flip(1).int().argmax(1)
    return torch.where(equal.any(1), latest, -1)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """The keys of some edits.

    Args:
        vectors: Of the tokens of their wordings.
        weights: How much each counts.
        wording: The wording of each token.
        edit: The edit of each wording.
        thresholds: Of each wording.
        names: Of each wording.
        n_edits: How many they are.
    """

    vectors: Float[Tensor, "channel token dim"]
    weights: Float[Tensor, "channel token"]
    wording: Int[Tensor, " token"]
    edit: Int[Tensor, " wording"]
    thresholds: Float[Tensor, " wording"]
    names: tuple[Names, ...]
    n_edits: int

    @classmethod
    def of(cls, edits: Sequence[EditKeys]) -> "_Block":
        lengths = torch.cat([one.lengths for one in edits])
        places = torch.arange(len(lengths), device=lengths.device)
        n_wordings = lengths.new_tensor([len(one.lengths) for one in edits])
        return cls(
            torch.cat([one.vectors for one in edits], 1),
            torch.cat([one.weights for one in edits], 1),
            places.repeat_interleave(lengths),
            places[: len(edits)].repeat_interleave(n_wordings),
            torch.cat([one.thresholds for one in edits]),
            tuple(names for one in edits for names in one.names()),
            len(edits),
        )

    def joined(self, other: "_Block") -> "_Block":
        """These, and then those of another block."""
        return _Block(
            torch.cat([self.vectors, other.vectors], 1),
            torch.cat([self.weights, other.weights], 1),
            torch.cat([self.wording, other.wording + len(self.edit)]),
            torch.cat([self.edit, other.edit + self.n_edits]),
            torch.cat([self.thresholds, other.thresholds]),
            self.names + other.names,
            self.n_edits + other.n_edits,
        )

    def first(self, n: int) -> "_Block":
        """Those of the first `n` edits."""
        n_wordings = int((self.edit < n).sum())
        n_tokens = int((self.wording < n_wordings).sum())
        return _Block(
            self.vectors[:, :n_tokens],
            self.weights[:, :n_tokens],
            self.wording[:n_tokens],
            self.edit[:n_wordings],
            self.thresholds[:n_wordings],
            self.names[:n_wordings],
            n,
        )

    def scores(
        self,
        vectors: Float[Tensor, "channel row token dim"],
        asked: Bool[Tensor, "row token"],
        costs: Float[Tensor, "channel row token 1"],
    ) -> Float[Tensor, "channel row wording"]:
        """Late interaction of prompts with every wording."""
        found = vectors.new_zeros(len(vectors), len(asked), len(self.edit))
        step = max(1, _AT_ONCE // asked.numel())
        for start in range(0, len(self.wording), step):
            piece = slice(start, start + step)
            for channel, of_channel in enumerate(vectors):
                cosines = of_channel @ self.vectors[channel, piece].T
                cosines -= costs[channel]
                best = cosines.masked_fill_(~asked.unsqueeze(-1), _EXCLUDED).amax(1)
                found[channel].index_add_(1, self.wording[piece], best * self.weights[channel, piece])
        return found

    def passing(self, of_wordings: Float[Tensor, "row wording"]) -> Float[Tensor, "row edit"]:
        """The best wording of each edit; minus infinity where none is above its threshold."""
        above = of_wordings.masked_fill(of_wordings <= self.thresholds, -torch.inf)
        found = above.new_full((len(above), self.n_edits), -torch.inf)
        return found.scatter_reduce(1, self.edit.expand(len(above), -1), above, "amax")

    def acts_on(self, other: "_Block", head: Judge) -> Bool[Tensor, "other edit"]:
        """As for the index."""
        n_wordings = len(other.edit)
        scores = self.vectors.new_zeros(len(self.vectors), len(self.edit), n_wordings)
        step = max(1, _AT_ONCE // len(other.wording))
        ends = other.wording.bincount(minlength=n_wordings).cumsum(0)[other.wording]
        n_after = ends - 1 - torch.arange(len(ends), device=ends.device)
        costs = distance_costs(n_after, head.discounts)
        for start in range(0, len(self.wording), step):
            piece = slice(start, start + step)
            for channel, of_channel in enumerate(other.vectors):
                cosines = self.vectors[channel, piece] @ of_channel.T
                cosines -= costs[channel]
                best = cosines.new_full((len(cosines), n_wordings), _EXCLUDED)
                best.scatter_reduce_(1, other.wording.expand(len(cosines), -1), cosines, "amax")
                weighed = best * self.weights[channel, piece].unsqueeze(1)
                scores[channel].index_add_(0, self.wording[piece], weighed)
        margins = head.log_probability(scores) - self.thresholds.unsqueeze(1)
        met = torch.zeros(other.n_edits, self.n_edits, dtype=torch.bool, device=margins.device)
        near = (margins > 0).nonzero()
        for (mine, theirs), margin in zip(near.tolist(), margins[margins > 0].tolist(), strict=True):
            if margin > cost_of(self.names[mine], other.names[theirs], both=len(head.discounts) > 1):
                met[other.edit[theirs], self.edit[mine]] = True
        return met
