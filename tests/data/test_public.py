"""What holds for every registered benchmark, and the way from the hub."""

import sys
from types import ModuleType

import pytest

from baft.data.base import Benchmark, benchmarks
from baft.data.knowedit import WikidataRecent
from baft.data.public import HUB, REVISION, PublicBenchmark
from baft.data.zsre import Zsre
from baft.errors import ConfigError, DataError, UnknownNameError

READERS = [
    "convsent",
    "counterfact",
    "counterfact-flat",
    "jsonl",
    "knowedit-zsre",
    "wikibio",
    "wikidata-counterfact",
    "wikidata-recent",
    "zsre",
]
ROW = {"subject": "Ann", "prompt": "Ann plays", "target_new": "cello", "portability": {}, "locality": {}}
TRAIN = "knowedit/wiki_recent/recent_train.json"


@pytest.mark.parametrize("name", READERS)
def test_a_registered_reader_says_what_it_is(name: str) -> None:
    reader = benchmarks.get(name)
    assert reader.name == name
    assert reader.summary.strip()
    assert reader.source.strip()
    assert reader.splits
    if issubclass(reader, PublicBenchmark):
        assert tuple(file.split for file in reader.files) == reader.splits


def test_the_summary_says_that_the_recent_test_is_rebuilt() -> None:
    assert "test is rebuilt" in WikidataRecent.summary


@pytest.mark.parametrize(
    ("name", "split"),
    [("zsre", "inverse"), ("wikidata-recent", "train"), ("convsent", "test")],
)
def test_ids_are_distinct_and_a_second_reading_is_the_same(real, data_dir, name: str, split: str) -> None:
    ids = [case.id for case in real(name).cases(split)]
    assert len(set(ids)) == len(ids)
    assert all(one.startswith(f"{name}/{split}/") for one in ids)
    again: Benchmark = benchmarks.get(name)(data_dir)
    assert again.fingerprint(split) == real(name).fingerprint(split)
    assert again.cases(split) == real(name).cases(split)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "Ann played"},
        {"target_new": "harp"},
        {"subject": "Ann p"},
        {"ground_truth": "oboe"},
        {"locality": {"Forgetfulness": [{"prompt": "Ann, who plays cello, is", "ground_truth": "here"}]}},
    ],
)
def test_a_changed_case_changes_the_fingerprint(put, change) -> None:
    before = WikidataRecent(put(TRAIN, [ROW])).fingerprint("train")
    assert WikidataRecent(put(TRAIN, [ROW | change])).fingerprint("train") != before
    assert WikidataRecent(put(TRAIN, [ROW | {"not read": 1}])).fingerprint("train") == before


def test_cases_can_be_limited_and_drawn(put) -> None:
    rows = [ROW | {"target_new": f"{n}"} for n in range(30)]
    recent = WikidataRecent(put(TRAIN, rows))
    everything = recent.cases("train")
    assert recent.cases("train", limit=4) == everything[:4]
    drawn = recent.cases("train", limit=4, seed=1)
    assert drawn == recent.cases("train", limit=4, seed=1) != recent.cases("train", limit=4, seed=2)
    assert set(recent.cases("train", seed=1)) == set(everything)
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        recent.cases("train", limit=0)
    with pytest.raises(
        UnknownNameError, match="unknown split of wikidata-recent 'trains'; did you mean 'train'"
    ):
        recent.cases("trains")


# --- the hub ---


def stand_in(monkeypatch, download) -> None:
    """Puts a module in the place of `datasets`, with the one call that is made of it."""
    module = ModuleType("datasets")
    module.DownloadManager = type("DownloadManager", (), {"download": staticmethod(download)})
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_split_is_fetched_when_it_is_asked_for(put, monkeypatch) -> None:
    path = put(TRAIN, [ROW]) / TRAIN
    asked: list[str] = []
    stand_in(monkeypatch, lambda address: asked.append(address) or str(path))
    recent = WikidataRecent.from_hub()
    assert asked == []
    assert [case.id for case in recent.cases("train")] == ["wikidata-recent/train/0"]
    assert recent.cases("test")[0].edit == recent.cases("train")[0].edit
    assert recent.anomalies() == {
        "no locality probe in the record: kept": 1,
        "no portability probe in the record: kept": 1,
    }
    at = f"hf://datasets/{HUB}@{REVISION}/benchmark/wiki_recent"
    assert asked == [f"{at}/recent_train.json", f"{at}/recent_test.json"]
    WikidataRecent.from_hub(revision="main").cases()
    assert asked[2] == f"hf://datasets/{HUB}@main/benchmark/wiki_recent/recent_test.json"


def test_what_goes_wrong_on_the_way_is_told(monkeypatch) -> None:
    def fail(address: str) -> str:
        raise ConnectionError("out of reach\nand more")

    stand_in(monkeypatch, fail)
    with pytest.raises(
        DataError, match=r"^hf://.*recent_test\.json could not be fetched: out of reach; check the"
    ):
        WikidataRecent.from_hub().cases()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the datasets library: pip install 'baft\[data\]'$"):
        WikidataRecent.from_hub().cases()


def test_what_is_not_on_the_hub_says_so_at_once() -> None:
    with pytest.raises(DataError, match="benchmark zsre cannot be had from the hub: give the folder"):
        Zsre.from_hub()
