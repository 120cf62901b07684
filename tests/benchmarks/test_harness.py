"""What a benchmark's figures rest on: who ran when, and what is made of it."""

import argparse
import json
import statistics
import sys
from collections import Counter

import pytest

import harness
from harness import alternate, document, n_rounds, parser, ratios, summarize, times, write


class Machine:
    """A clock that runs slower and slower, as a machine does that others begin to use."""

    def __init__(self):
        self.load, self.order = 1.0, []

    def contender(self, name, cost):
        def run(number):
            self.order.append((number, name))
            self.load *= 1.05
            return cost * self.load

        return run


def test_every_contender_runs_once_a_round_and_each_begins_in_turn():
    machine = Machine()
    contenders = {name: machine.contender(name, 1.0) for name in "abc"}
    took = alternate(contenders, 6)
    assert {name: len(values) for name, values in took.items()} == {"a": 6, "b": 6, "c": 6}
    assert Counter(machine.order) == Counter({(number, name): 1 for number in range(6) for name in "abc"})
    assert [name for _, name in machine.order[::3]] == ["a", "b", "c", "a", "b", "c"]


def test_alternation_keeps_a_rising_load_out_of_a_ratio():
    """Two contenders of which one costs twice as much, on a machine that slows down all the while."""
    machine = Machine()
    contenders = {"cheap": machine.contender("cheap", 1.0), "dear": machine.contender("dear", 2.0)}
    took = alternate(contenders, 10)
    alternated = summarize(ratios(took["dear"], took["cheap"])).median
    assert alternated == pytest.approx(2.0, rel=0.01)
    # Control: one after the other, the same machine makes the second look far worse than it is.
    machine = Machine()
    cheap = [machine.contender("cheap", 1.0)(number) for number in range(10)]
    dear = [machine.contender("dear", 2.0)(number) for number in range(10)]
    assert statistics.median(dear) / statistics.median(cheap) > 3.0


def test_a_summary_is_the_median_its_quartiles_and_extremes():
    found = summarize([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.minimum, found.lower_quartile, found.median) == (1.0, 2.0, 3.0)
    assert (found.upper_quartile, found.maximum, found.n) == (4.0, 5.0, 5)
    assert summarize([7.0]).median == summarize([7.0]).lower_quartile == 7.0
    assert summarize([1.0, 1.0, 1.0, 1.0, 100.0]).median == 1.0, "an outlier does not move it"
    assert times(found) == "3.00 (2.00 to 4.00)"
    with pytest.raises(ValueError, match="nothing to summarize"):
        summarize([])


def test_ratios_are_taken_within_a_round():
    assert ratios([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter|longer"):
        ratios([1.0], [1.0, 2.0])


def test_too_few_rounds_are_refused_but_for_a_trial():
    options = parser("about")
    assert n_rounds(options.parse_args([])) == harness.MIN_ROUNDS == 7
    assert n_rounds(options.parse_args(["--quick"])) < 7
    with pytest.raises(SystemExit, match="at least 7, got 3"):
        n_rounds(options.parse_args(["--rounds", "3"]))


def test_the_json_says_what_was_measured_where_and_with_what(tmp_path):
    args = argparse.Namespace(quick=True, json=tmp_path / "deep" / "found.json", threads=2, data=tmp_path)
    found = document("some_speed", args, {"step": summarize([1.0, 2.0]), "layers": (8, 17)})
    write(args.json, found)
    read = json.loads(args.json.read_text(encoding="utf-8"))
    assert read == found, "it holds plain data alone"
    assert read["quick"] is True, "a trial can be told from a measurement"
    assert read["settings"] == {"quick": True, "threads": 2, "data": str(tmp_path)}
    assert read["results"]["step"]["median"] == 1.5
    assert read["results"]["layers"] == [8, 17]
    where = read["environment"]
    assert where["threads"] == 2
    assert where["cpu"]
    assert where["versions"]["torch"]
    assert where["versions"]["python"].startswith(f"{sys.version_info.major}.")
    assert where["date"].endswith("+00:00")
    write(None, found)  # nothing is written where nothing is asked for
    assert len(list(tmp_path.rglob("*.json"))) == 1
