"""What every benchmark offers, and the registry that names them."""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from baft.errors import ConfigError
from baft.registry import Registry, unknown_name
from baft.types import EditCase


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a reader made of one split.

    Args:
        cases: In the order of the file.
        anomalies: What was odd in the file and what was done about it, with how often; never zero.
    """

    cases: tuple[EditCase, ...]
    anomalies: Mapping[str, int]


class Benchmark(ABC):
    """A set of cases with fixed splits.

    Args:
        folder: Where the public files lie; None for benchmarks that need none.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]  # who made it, where it is published, under which license
    splits: ClassVar[tuple[str, ...]]  # the first one is scored by default

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._loaded: dict[str, Loaded] = {}

    @abstractmethod
    def _load(self, split: str) -> Loaded:
        """Reads a split.

        Raises:
            DataError: If a file is missing or malformed.
        """

    def cases(
        self, split: str | None = None, *, limit: int | None = None, seed: int | None = None
    ) -> tuple[EditCase, ...]:
        """The cases of a split, in the order of the file, or in one drawn from `seed`; the first `limit`.

        Raises:
            UnknownNameError: If there is no such split.
            ConfigError: If the limit is not positive.
            DataError: If a file is missing or malformed.
        """
        if limit is not None and limit < 1:
            raise ConfigError(f"limit must be at least 1, got {limit}")
        cases = list(self._split(split).cases)
        if seed is not None:
            random.Random(seed).shuffle(cases)
        return tuple(cases[:limit])

    def anomalies(self, split: str | None = None) -> Mapping[str, int]:
        """What was odd in the file and what was done about it, with how often."""
        return self._split(split).anomalies

    def fingerprint(self, split: str | None = None) -> str:
        """16 hex digits of the SHA-256 of all cases of a split, as they are asked."""
        rows = [_as_asked(case) for case in self._split(split).cases]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def _split(self, split: str | None) -> Loaded:
        split = self.splits[0] if split is None else split
        if split not in self.splits:
            raise unknown_name(f"split of {self.name}", split, list(self.splits))
        if split not in self._loaded:
            self._loaded[split] = self._load(split)
        return self._loaded[split]


def _as_asked(case: EditCase) -> dict[str, Any]:
    """A case as plain data, without ids; what an edit or a probe may bring is left out where absent."""
    row = asdict(case)
    del row["edit"]["id"]
    for probe in row["probes"]:
        if not probe["earlier"]:
            del probe["earlier"]
    return {**row, "edit": {name: value for name, value in row["edit"].items() if value != ()}}


benchmarks: Registry[type[Benchmark]] = Registry("benchmark", base=Benchmark, group="baft.benchmarks")
benchmarks.add("convsent", "baft.data.convsent:ConvSent")
benchmarks.add("counterfact", "baft.data.counterfact:CounterFact")
benchmarks.add("counterfact-flat", "baft.data.counterfact:CounterFactFlat")
benchmarks.add("jsonl", "baft.data.jsonl:Jsonl")
benchmarks.add("knowedit-zsre", "baft.data.knowedit:KnowEditZsre")
benchmarks.add("wikibio", "baft.data.knowedit:WikiBio")
benchmarks.add("wikidata-counterfact", "baft.data.knowedit:WikidataCounterfact")
benchmarks.add("wikidata-recent", "baft.data.knowedit:WikidataRecent")
benchmarks.add("zsre", "baft.data.zsre:Zsre")

benchmarks.add("facts", "baft.data.facts:Facts")
