"""Benchmarks whose splits are public files, in a folder that the user names or on the hub."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from baft.data.base import Benchmark, Loaded
from baft.data.cases import Cases
from baft.data.files import Record, find, read_records
from baft.errors import DataError

HUB = "zjunlp/KnowEdit"
REVISION = "c3a6bccb5fc37a59dea3197ac36526d44606acd0"  # of April 2024; no data file was changed after January


@dataclass(frozen=True, slots=True)
class SplitFile:
    """Where the records of a split are.

    Args:
        split: The split.
        path: The original file, under the data folder.
        stand_in: A file that is read where the original is not there: a cut of it, or one made again.
        hub: The original file in the repository `HUB`; empty if it is not there.
    """

    split: str
    path: str
    stand_in: str = ""
    hub: str = ""


class PublicBenchmark(Benchmark):
    """Reads each split from one public file."""

    files: ClassVar[tuple[SplitFile, ...]]  # one a split

    _revision: str | None = None

    @classmethod
    def from_hub(cls, *, revision: str = REVISION) -> "PublicBenchmark":
        """The benchmark read from the hub, by the `datasets` library, which keeps what it fetched.

        A split is fetched when it is first asked for.

        Args:
            revision: Branch, tag or commit of the repository.

        Raises:
            DataError: If this benchmark is not on the hub; later, if `datasets` is not installed or a file
                cannot be fetched.
        """
        if not all(file.hub for file in cls.files):
            raise DataError(f"benchmark {cls.name} cannot be had from the hub: give the folder of its files")
        found = cls()
        found._revision = revision
        return found

    def _load(self, split: str) -> Loaded:
        cases = Cases(self.name, split)
        file = next(file for file in self.files if file.split == split)
        if self._revision is None:
            path = find(self.folder, (file.path, file.stand_in), self.name)
        else:
            path = _fetch(file.hub, self._revision)
        records = read_records(path)
        if file.stand_in and path.name == Path(file.stand_in).name:
            cases.odd(f"record of {path.name}, which stands in for the original file: read", len(records))
        for index in range(len(records)):
            self._add(cases, index, records, split)
        return cases.loaded()

    @abstractmethod
    def _add(self, cases: Cases, index: int, records: Sequence[Record], split: str) -> None:
        """Adds the case of one record.

        Raises:
            DataError: If a field is missing or malformed.
        """


def _fetch(name: str, revision: str) -> Path:
    address = f"hf://datasets/{HUB}@{revision}/{name}"
    try:
        import datasets  # type: ignore  # has no types, and is not installed everywhere
    except ImportError:
        raise DataError(f"{address} needs the datasets library: pip install 'baft[data]'") from None
    try:
        return Path(datasets.DownloadManager().download(address))
    except Exception as error:  # those of the library and of its clients share no root
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        mend = "check the revision and the network, and that HF_HUB_OFFLINE is not set"
        raise DataError(f"{address} could not be fetched: {reason}; {mend}") from error
