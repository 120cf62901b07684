"""MELO's vector database: which block of ranks a prompt switches on.

Yu et al. 2024 (arXiv 2312.11795), where they tell of the neuron-indexed vector database; rules in detail are
those of the authors' code (https://github.com/ECNU-ICALK/MELO). Clusters of keys, each with a center, a
radius and the label of its edits; every key names the block that was trained with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

NO_BLOCK = -1
_TIE = (
    1e-5  # of a key's length: between the radii of two clusters that were split, and beyond the farthest key
)


@dataclass(frozen=True, slots=True)
class VectorDatabase:
    """Keys in clusters; `add` gives another one, and changes nothing.

    Args:
        keys: One for every text that was trained, `[key, d_key]`.
        owners: The cluster of each.
        blocks: The block that was trained with each.
        centers: Of the clusters: the mean of their keys, `[cluster, d_key]`.
        radii: Of the clusters, Euclidean.
        labels: What the edits of each cluster say, as a number.
    """

    keys: Float[Tensor, "key d_key"]
    owners: Int[Tensor, " key"]
    blocks: Int[Tensor, " key"]
    centers: Float[Tensor, "cluster d_key"]
    radii: Float[Tensor, " cluster"]
    labels: Int[Tensor, " cluster"]

    @classmethod
    def empty(cls, like: Float[Tensor, "*any d_key"]) -> "VectorDatabase":
        """Without keys, for keys of this width, precision and device."""
        nothing = like.new_zeros(0, like.shape[-1])
        number = torch.zeros(0, dtype=torch.long, device=like.device)
        return cls(nothing, number, number, nothing, like.new_zeros(0), number)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "VectorDatabase":
        """From what `tensors` gave."""
        whole = ("owners", "blocks", "labels")
        return cls(**{name: one.long() if name in whole else one for name, one in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Its tables, by their names."""
        return {name: getattr(self, name) for name in self.__slots__}

    def route(self, queries: Float[Tensor, "query d_key"]) -> Int[Tensor, " query"]:
        """The block of each query, or `NO_BLOCK`.

        That is the block of the nearest key of the nearest cluster, if the query lies within its radius.
        """
        found = [self._route(query) for query in queries.to(self.keys)]
        return torch.tensor(found, dtype=torch.long, device=queries.device)

    def add(self, query: Float[Tensor, " d_key"], label: int, block: int, radius: float) -> "VectorDatabase":
        """With one more key.

        A key farther from the nearest cluster than its radius and the initial one begins a cluster. A nearer
        one joins that cluster if its edits say the same, and the cluster moves its center to the mean of its
        keys and grows to hold them. If they say something else, the key begins a cluster, and the two split
        the distance between their centers; keys that the old one no longer holds are forgotten.

        Args:
            query: The key.
            label: What its edit says.
            block: The block trained with it.
            radius: The initial radius of a cluster.
        """
        query = query.to(self.keys)
        if not len(self.radii):
            return self._with_cluster(query, label, block, radius)
        cluster, distance = self._nearest(query)
        if distance > float(self.radii[cluster]) + radius:
            return self._with_cluster(query, label, block, radius)
        if int(self.labels[cluster]) == label:
            return self._with_key(query, cluster, block)._regrown(cluster, radius)
        half, tie = distance / 2, _tie(query)
        new = self._with_cluster(query, label, block, half + tie)
        return new._shrunken(cluster, half - tie)

    def _route(self, query: Float[Tensor, " d_key"]) -> int:
        if not len(self.radii):
            return NO_BLOCK
        cluster, distance = self._nearest(query)
        ours = (self.owners == cluster).nonzero()[:, 0]
        if distance > float(self.radii[cluster]) or not len(ours):
            return NO_BLOCK
        return int(self.blocks[ours[_distances(query, self.keys[ours]).argmin()]])

    def _nearest(self, query: Float[Tensor, " d_key"]) -> tuple[int, float]:
        """The nearest cluster, of several the latest, and how far it is.

        The authors' code takes the first of several: a prompt that is edited again then finds its old
        cluster, which has just lost its radius, and so neither edit.
        """
        distances = _distances(query, self.centers)
        found = int((distances == distances.min()).nonzero()[-1])
        return found, float(distances[found])

    def _with_key(self, query: Float[Tensor, " d_key"], cluster: int, block: int) -> "VectorDatabase":
        return replace(
            self,
            keys=torch.cat([self.keys, query[None]]),
            owners=_appended(self.owners, cluster),
            blocks=_appended(self.blocks, block),
        )

    def _with_cluster(
        self, query: Float[Tensor, " d_key"], label: int, block: int, radius: float
    ) -> "VectorDatabase":
        cluster = len(self.radii)
        return replace(
            self._with_key(query, cluster, block),
            centers=torch.cat([self.centers, query[None]]),
            radii=_appended(self.radii, radius),
            labels=_appended(self.labels, label),
        )

    def _regrown(self, cluster: int, radius: float) -> "VectorDatabase":
        ours = self.keys[self.owners == cluster]
        center = ours.mean(0)
        centers, radii = self.centers.clone(), self.radii.clone()
        centers[cluster] = center
        # The farthest key shall not lie on the border, where another batch's rounding loses it.
        radii[cluster] = (_distances(center, ours).max() + _tie(center)).clamp(min=radius)
        return replace(self, centers=centers, radii=radii)

    def _shrunken(self, cluster: int, radius: float) -> "VectorDatabase":
        radii = self.radii.clone()
        radii[cluster] = radius
        kept = (self.owners != cluster) | (_distances(self.centers[cluster], self.keys) <= radius)
        return replace(
            self, radii=radii, keys=self.keys[kept], owners=self.owners[kept], blocks=self.blocks[kept]
        )


def _distances(
    query: Float[Tensor, " d_key"], others: Float[Tensor, "other d_key"]
) -> Float[Tensor, " other"]:
    """Euclidean, by differences, so that a key is at no distance from itself."""
    return torch.linalg.vector_norm(others - query, dim=-1)


def _tie(key: Float[Tensor, " d_key"]) -> float:
    """A hair. The authors' is 1e-5, which of a long key float32 does not tell from its rounding."""
    return _TIE * max(1.0, float(key.norm()))


def _appended(tensor: Tensor, value: float | int) -> Tensor:
    return torch.cat([tensor, tensor.new_tensor([value])])
