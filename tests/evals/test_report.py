"""Reports: the numbers in them, what they find, what they refuse, and the page they become."""

import json
import math
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser

import pytest

from baft.errors import ConfigError, DataError, UnknownNameError
from baft.evals.collect import Group, collect, pool
from baft.evals.differences import all_pairs, best
from baft.evals.experiment import BenchmarkSpec, Experiment, MethodSpec, ProtocolSpec
from baft.evals.records import ROWS, Record, read_manifest, read_rows
from baft.evals.report import comparison_rows, summary_rows, write_report
from baft.evals.runner import Bench
from baft.evals.stats import mean_interval
from baft.evals.worst import mark, worst_cases
from synthetic_record import Method, Plan, manifest, write_record

PERFECT = Method(1.0, 1.0, 1.0, 1.0)
SINGLE = (("single", 1),)


def small(**changes):
    return Plan(**{"methods": {"a": PERFECT}, "protocols": SINGLE, "n_cases": 2, "texts": 0, **changes})


def probe(kind="reliability", score="teacher_forced", value=1.0, host=0.0, tag="edit", **more):
    asked = {"kind": kind, "tag": tag, "prompt": f"a {kind} prompt {tag}", "target": "Rome"}
    return {**asked, "scores": {score: value}, "unedited": {score: host}, **more}


def row(case, probes, *, method="a", seed=0, stage="immediate", position=0, chunk=0, **more):
    return {
        "task": f"own/test:single:seed{seed}:{case}",
        "method": method,
        "benchmark": "own/test",
        "protocol": "single" if stage == "immediate" else "sequential(2)",
        "seed": seed,
        "chunk": chunk,
        "stage": stage,
        "position": position,
        "case": case,
        "edit": {"prompt": f"The capital of {case} is", "target": "Rome"},
        "decoded": True,
        "error": None,
        "n_steps": 10,
        "seconds_s": 1.0,
        "probes": probes,
        **more,
    }


def record(folder, rows, **changes):
    plan = small(methods={name: PERFECT for name in dict.fromkeys(one["method"] for one in rows)})
    made = Record(folder, manifest(plan, **changes))
    for one in rows:
        made.append([one])
    return folder


def cells(runs, method):
    header, rows = summary_rows(runs)
    return [dict(zip(header, one, strict=True)) for one in rows if one[3] == method]


def page_of(folder, out):
    markdown, html = write_report([folder], out)
    return markdown.read_text(encoding="utf-8"), html.read_text(encoding="utf-8")


# --- numbers ---


def test_a_score_is_the_mean_over_cases_of_the_mean_over_probes(tmp_path):
    rows = [
        row(
            "one",
            [probe(value=1.0), *(probe("generality", value=v, tag="rephrase") for v in (1.0, 0.0, 0.5))],
        ),
        row("two", [probe(value=0.0), probe("generality", value=0.25, tag="rephrase")], chunk=1),
    ]
    (found,) = cells([record(tmp_path / "run", rows)], "a")
    assert found["n"] == "2"
    assert found["reliability@teacher_forced"].startswith("0.50 [")
    assert found["generality@teacher_forced"].startswith("0.38 [")  # (0.5 + 0.25) / 2
    expected = mean_interval({"one": [1.0, 0.0, 0.5], "two": [0.25]})
    assert found["generality@teacher_forced"] == f"0.38 [{expected.low:.2f}, {expected.high:.2f}]"
    markdown, html = page_of(tmp_path / "run", tmp_path / "out")
    assert f"| 0.38 [{expected.low:.2f}, {expected.high:.2f}] |" in markdown
    assert f"0.38 <small>[{expected.low:.2f}, {expected.high:.2f}]</small>" in html


def test_all_seeds_of_a_case_are_one_cluster(tmp_path):
    values = {
        ("one", 0): 1.0,
        ("one", 1): 0.0,
        ("one", 2): 0.0,
        ("two", 0): 1.0,
        ("two", 1): 1.0,
        ("two", 2): 1.0,
    }
    rows = [row(case, [probe(value=value)], seed=seed) for (case, seed), value in values.items()]
    results = collect([record(tmp_path / "run", rows)])
    scores = results.scores(Group("own/test", "single", "immediate", "a"), "reliability@teacher_forced")
    assert {case: sorted(found) for case, found in pool(scores).items()} == {
        "one": [0, 0, 1],
        "two": [1, 1, 1],
    }
    (found,) = cells([tmp_path / "run"], "a")
    assert found["n"] == "2"
    assert found["reliability@teacher_forced"].startswith("0.67 [")


def test_the_unedited_host_is_one_row_whatever_ran_beside_it(tmp_path):
    write_record(tmp_path / "run", small(methods={"a": PERFECT, "b": Method(0.1)}, seeds=(0, 1), n_cases=4))
    (host,) = cells([tmp_path / "run"], "unedited")
    assert (host["stage"], host["n"]) == ("–", "4")
    assert host["reliability@generate"].startswith("0.00 [0.00, ")
    assert host["locality@argmax"].startswith("1.00 [")
    group = Group("zsre/test", "single", "", "unedited")
    assert (
        mean_interval(pool(collect([tmp_path / "run"]).scores(group, "reliability@generate"))).n_values == 4
    )


def test_hosts_that_disagree_are_refused(tmp_path):
    rows = [row("one", [probe(host=0.0)]), row("one", [probe(host=1.0)], method="b")]
    with pytest.raises(
        DataError, match=r"unedited host scores differently on case 'one' beside a and beside b"
    ):
        collect([record(tmp_path / "run", rows)])
    rounded = [
        row("one", [probe(score="margin", host=-2.0)]),
        row("one", [probe(score="margin", host=-2.0001)], method="b"),
    ]
    assert len(collect([record(tmp_path / "rounded", rounded)]).rows) == 2


def test_less_may_be_asked_right_after_an_edit(tmp_path):
    asked = [probe(value=1.0), probe("locality", "argmax", 0.5, 1.0)]
    first = row("one", asked[:1], protocol="sequential(2)")
    rows = [first, {**row("one", asked, stage="final"), "task": first["task"] + "-final"}]
    folder = record(tmp_path / "run", rows)
    (host,) = cells([folder], "unedited")
    assert host["locality@argmax"].startswith("1.00 [")
    found = {one["stage"]: one["locality@argmax"][:4] for one in cells([folder], "a")}
    assert found == {"immediate": "–", "final": "0.50"}
    assert "Retention" in page_of(folder, tmp_path / "out")[1]


def test_another_order_of_cases_may_round_otherwise(tmp_path):
    rows = [row("one", [probe(host=0.0)]), row("one", [probe(host=1.0)], seed=1)]
    (host,) = cells([record(tmp_path / "run", rows)], "unedited")
    assert host["reliability@teacher_forced"].startswith("0.00 [")


def test_scores_of_one_tag(tmp_path):
    probes = [
        probe("locality", "argmax", 0.0, 1.0, "same_relation"),
        probe("locality", "argmax", 1.0, 1.0, "unrelated"),
    ]
    markdown, _ = page_of(record(tmp_path / "run", [row("one", [probe(), *probes])]), tmp_path / "out")
    by_tag = markdown[markdown.index("### By tag") :]
    assert re.search(r"\| locality@argmax \| same_relation \| 1 \| 1\.00 \[.*\] \| 0\.00 \[", by_tag)
    assert re.search(r"\| locality@argmax \| unrelated \| 1 \| 1\.00 \[.*\] \| 1\.00 \[", by_tag)
    assert "reliability@teacher_forced" not in by_tag[: by_tag.index("###", 5)]  # it has one tag alone


def test_sentiment_comes_from_the_likelihoods_of_other_replies(tmp_path):
    probes = [
        probe(logprob=[-9.0, -1.0]),
        probe("generality", tag="same_sentiment", logprob=[-3.0, -1.0]),
        probe("generality", tag="same_sentiment", logprob=[-3.0, -2.0]),
        probe("generality", tag="other_sentiment", logprob=[-3.0, -2.5]),
    ]
    results = collect([record(tmp_path / "run", [row("one", probes)])])
    made = results.scores(Group("own/test", "single", "immediate", "a"), "sentiment")
    assert made == {("one", 0): [pytest.approx(1 / (1 + math.exp(-1.0)))]}  # z_topic is 1: nothing was lost
    host = results.scores(Group("own/test", "single", "", "unedited"), "sentiment")
    assert host == {("one", 0): [pytest.approx(0.5)]}


def test_false_fires_by_chunk(tmp_path):
    fires = {"n_changed": [3, 0], "n_fired": [1, 0], "n_tokens": [10, 10]}
    rows = [
        row("one", [probe()], false_fires=fires),
        row("two", [probe()], chunk=1, false_fires={**fires, "n_fired": [0, 0], "n_changed": [0, 0]}),
    ]
    markdown, _ = page_of(record(tmp_path / "run", rows), tmp_path / "out")
    (line,) = re.findall(r"\| a \| 2 \| 40 \|.*", markdown)
    shares = [cell.split()[0] for cell in line.strip("| ").split(" | ")[3:]]
    assert shares == ["0.03", "0.07", "0.25", "0.25", "–", "–"]  # rounded to even, and up


def test_perplexity_is_that_of_the_host_and_how_many_times_it(tmp_path):
    fires = {"n_changed": [0], "n_fired": [0], "n_tokens": [10]}

    def rows(*afters):
        losses = [{"before": [20.0, 10.0], "after": after, "n_tokens": [10, 5]} for after in afters]
        return [
            row(str(i), [probe()], chunk=i, false_fires=fires, perplexity=loss)
            for i, loss in enumerate(losses)
        ]

    doubled = 15 * math.log(2)
    for name, afters, expected in (
        ("same", [[20.0, 10.0]] * 2, "1.00"),
        ("worse", [[20.0, 10.0], [20.0, 10.0 + doubled]], "1.50"),
        ("broken", [[20.0, 10.0], [1e9, 1e9]], "1 of 2 not finite"),
    ):
        markdown, _ = page_of(record(tmp_path / name, rows(*afters)), tmp_path / f"{name}-out")
        (line,) = re.findall(r"\| a \| 2 \| 20 \|.*", markdown)
        host, ratio = line.strip("| ").split(" | ")[-2:]
        assert (host, ratio.partition(" [")[0]) == (f"{math.exp(2):.2f}", expected)


def test_fluency_is_a_score_of_each_case(tmp_path):
    rows = [
        row("one", [probe()], fluency=[5.0, 4.0]),
        row("two", [probe()], chunk=1, fluency=[6.0, 4.5]),
        row("three", [probe()], chunk=2),  # too long to be asked
    ]
    results = collect([record(tmp_path / "run", rows)])
    made = results.scores(Group("own/test", "single", "immediate", "a"), "fluency")
    assert made == {("one", 0): [4.0], ("two", 0): [4.5]}
    host = results.scores(Group("own/test", "single", "", "unedited"), "fluency")
    assert host == {("one", 0): [5.0], ("two", 0): [6.0]}
    markdown, _ = page_of(tmp_path / "run", tmp_path / "out")
    assert re.search(r"\| fluency \| higher \| immediate \| 5\.50 \[.*\] \| 4\.25 \[", markdown)


def test_harder_renderings_stand_by_tag_and_in_no_other_figure(tmp_path):
    hard = probe("generality", "generate", 0.0, tag="edit+distracting_prefix")
    for name, probes in (
        ("beside", [probe(), probe("generality", "generate", 1.0, tag="rephrase"), hard]),
        ("alone", [probe(), hard]),
    ):
        folder = record(tmp_path / name, [row("one", probes)])
        scores = collect([folder]).scores(
            Group("own/test", "single", "immediate", "a"), "generality@generate"
        )
        assert scores == ({("one", 0): [1.0]} if name == "beside" else {})
        markdown, _ = page_of(folder, tmp_path / f"{name}-out")
        by_tag = markdown[markdown.index("### By tag") :]
        tag = r"\| generality@generate \| edit\+distracting_prefix \| 1 \| .* \| 0\.00 \["
        assert re.search(tag, by_tag)


def test_a_reply_that_was_not_doubted_is_told(tmp_path):
    blank = probe(undoubted="its reply in the chat was blank")
    rows = [row("one", [blank]), row("two", [probe()], chunk=1)]
    markdown, _ = page_of(record(tmp_path / "run", rows), tmp_path / "out")
    assert "| a | reply not doubted | 1 | its reply in the chat was blank |" in markdown


def test_failed_edits_count_and_are_told(tmp_path):
    error = "EditError: not finite"
    rows = [
        row("one", [probe(value=1.0)]),
        row("two", [probe(value=0.0)], chunk=1, decoded=False, error=error, n_steps=0),
        row("three", [{**probe(), "scores": {}, "unedited": {}, "skipped": "too long"}], chunk=2),
    ]
    folder = record(tmp_path / "run", rows)
    assert cells([folder], "a")[0]["reliability@teacher_forced"].startswith("0.50 [")
    markdown, _ = page_of(folder, tmp_path / "out")
    assert re.search(r"\| a \| 3 \| 1 of 3 \| 2 \| 1 of 3 \|", markdown)
    assert f"| a | edit failed | 1 | {error} |" in markdown
    assert "| a | probe skipped | 1 | too long |" in markdown
    assert "reliability@teacher_forced rests on 2" in markdown


def test_a_score_that_is_not_finite_is_told_and_not_averaged(tmp_path):
    rows = [row("one", [probe("locality", "logprob_max", math.inf, 0.0)]), row("two", [probe()], chunk=1)]
    markdown, _ = page_of(record(tmp_path / "run", rows), tmp_path / "out")
    assert "| locality@logprob_max | lower | immediate | 0.00" in markdown
    assert "| 1 of 1 not finite |" in markdown


# --- planted situations ---


def test_a_method_that_forgets_all_but_its_last_edit(tmp_path):
    methods = {"keeps": PERFECT, "forgets": Method(1.0, 1.0, 1.0, 1.0, holds=0.01)}
    plan = small(methods=methods, protocols=(("sequential", 20),), n_cases=60)
    write_record(tmp_path / "run", plan)
    found = {(one["method"], one["stage"]): one for one in cells([tmp_path / "run"], "forgets")}
    assert found["forgets", "immediate"]["reliability@teacher_forced"].startswith("1.00 ")
    assert float(found["forgets", "final"]["reliability@teacher_forced"][:4]) < 0.3
    (kept,) = (one for one in cells([tmp_path / "run"], "keeps") if one["stage"] == "final")
    assert kept["reliability@teacher_forced"].startswith("1.00 ")
    results = collect([tmp_path / "run"])
    final = Group("zsre/test", "sequential(20)", "final", "forgets")
    scores, places = results.scores(final, "reliability@teacher_forced"), results.positions[final]
    assert [scores[key] for key in scores if places[key] == 19] == [[1.0]] * 3
    assert max(sum(scores[key]) for key in scores if places[key] < 19) < 1
    html = page_of(tmp_path / "run", tmp_path / "out")[1]
    curve_of = {name: figure(html, f"reliability@teacher_forced of {name} by") for name in methods}
    assert heights(curve_of["keeps"])["final"] == heights(curve_of["keeps"])["immediate"]
    immediate, final = heights(curve_of["forgets"]).values()
    assert final[0] > immediate[0] + 50  # SVG counts downwards
    assert final[-1] > immediate[-1]  # the last bucket holds the last edit and one before it
    assert final[-1] < final[0] - 30


def figure(html, label):
    return re.search(rf'<svg [^>]*aria-label="{re.escape(label)}.*?</svg>', html, re.DOTALL).group()


def heights(svg):
    """The points of the two curves, by stage: the dashed one is the immediate."""
    found = {}
    for path in re.findall(r"<path d=\"([^\"]*)\"[^>]*style=\"fill: none; ([^\"]*)\"", svg):
        points = re.findall(r"[ML] [\d.]+ ([\d.]+)", path[0])
        if len(points) == 10:
            found["immediate" if "dasharray" in path[1] else "final"] = [float(y) for y in points]
    return found


def test_only_a_decided_winner_is_marked(tmp_path):
    methods = {"good": PERFECT, "bad": Method(0.2, 0.2, 0.2, 0.2), "as good": PERFECT}
    write_record(tmp_path / "two", small(methods=dict(list(methods.items())[:2]), n_cases=40))
    write_record(tmp_path / "three", small(methods=methods, n_cases=40))
    for name, winner in (("two", "good"), ("three", None)):
        results = collect([tmp_path / name])
        groups = results.last("zsre/test", "single")
        found = best(all_pairs(results, groups), groups, "reliability@teacher_forced")
        assert (found.method if found else None) == winner
    markdown, html = page_of(tmp_path / "two", tmp_path / "out")
    assert "| good | 40 | **1.00** [" in markdown
    assert '<strong class="best">1.00</strong>' in html
    assert "| bad | 40 | **" not in markdown


def test_the_worst_case_comes_first(tmp_path):
    rows = [
        row("fine", [probe(value=1.0)]),
        row("half", [probe(value=1.0), probe("locality", "argmax", 0.0, 1.0)], chunk=1),
        row("lost", [probe(value=0.0, raw=[" Paris", " Pa|ris <b>"]), probe(value=0.5)], chunk=2),
    ]
    results = collect([record(tmp_path / "run", rows)])
    worst = worst_cases(results, Group("own/test", "single", "immediate", "a"), n=2)
    assert [(one["case"], mark(one)) for one in worst] == [("lost", 0.25), ("half", 0.5)]
    markdown, html = page_of(tmp_path / "run", tmp_path / "out")
    assert "**1. The capital of lost is → Rome**" in markdown
    assert "| Paris → Pa\\|ris &lt;b&gt; |" in markdown
    assert "<td>Paris → Pa|ris &lt;b&gt;</td>" in html


# --- comparisons ---


def compared(*sides):
    header, rows = comparison_rows(*sides)
    return {one[3]: dict(zip(header, one, strict=True)) for one in rows}


def test_verdicts_of_a_comparison(tmp_path):
    write_record(tmp_path / "good", small(n_cases=40))
    write_record(tmp_path / "bad", small(n_cases=50, methods={"b": Method(0.1, 0.1, 0.1, 1.0)}))
    found = compared((tmp_path / "good", None), (tmp_path / "bad", "b"))
    decided = found["reliability@teacher_forced"]
    assert (decided["verdict"], decided["detectable"], decided["n"]) == ("A better", "", "40 (10 only B)")
    assert decided["A"] == "1.00"
    assert decided["A − B"].startswith("+0.")
    undecided = found["locality@argmax"]
    assert undecided["verdict"] == "undecided"
    assert float(undecided["detectable"]) > 0
    turned = compared((tmp_path / "bad", "b"), (tmp_path / "good", "a"))["reliability@teacher_forced"]
    assert (turned["verdict"], turned["n"]) == ("B better", "40 (10 only A)")


def test_a_difference_by_hand(tmp_path):
    values = {"one": (1.0, 0.0), "two": (1.0, 1.0), "three": (0.5, 0.0)}
    rows = [
        row(case, [probe(value=value)], method=name)
        for case, pair in values.items()
        for name, value in zip("ab", pair, strict=True)
    ]
    folder = record(tmp_path / "run", rows)
    (found,) = compared((folder, "a"), (folder, "b")).values()
    assert (found["A"], found["B"], found["A − B"][:5], found["n"]) == ("0.83", "0.33", "+0.50", "3")
    assert found["p (Holm)"] == "0.500"  # two of the four ways to flip two signs are as far from zero


def test_what_cannot_be_compared(tmp_path):
    write_record(tmp_path / "a", small(methods={"baft": PERFECT, "reft": PERFECT}))
    host = {**manifest(small())["host"], "weights": "0000000000000000"}
    write_record(tmp_path / "host", small(), host=host)
    cases = {"zsre/test": {"fingerprint": "1111111111111111", "anomalies": {}, "n_cases": 2}}
    write_record(tmp_path / "cases", small(), benchmarks=cases)
    write_record(tmp_path / "seed", small(seeds=(5,)))
    a = (tmp_path / "a", "baft")
    with pytest.raises(
        ConfigError, match=r"hosts differ in weights, 9f2c11aa07d3e845 .* and 0000000000000000"
    ):
        comparison_rows(a, (tmp_path / "host", None))
    with pytest.raises(
        ConfigError, match=r"the cases of zsre/test differ, fingerprints .* and 1111111111111111"
    ):
        comparison_rows(a, (tmp_path / "cases", None))
    with pytest.raises(ConfigError, match="cannot be compared"):
        write_report([tmp_path / "a", tmp_path / "host"], tmp_path / "out")
    with pytest.raises(UnknownNameError, match=r"did you mean 'baft'\? The methods? of .* are: baft, reft"):
        comparison_rows((tmp_path / "a", "bfat"), a)
    with pytest.raises(ConfigError, match=r"holds 2 methods: name one, as in .*a:baft; there are baft, reft"):
        comparison_rows((tmp_path / "a", None), a)
    with pytest.raises(ConfigError, match="both sides are baft"):
        comparison_rows(a, a)
    with pytest.raises(ConfigError, match="no case with the same benchmark, protocol and seed"):
        comparison_rows(a, (tmp_path / "seed", None))


def test_a_run_without_finished_rows(tmp_path):
    folder = write_record(tmp_path / "run", small(methods={"a": PERFECT}, protocols=(("sequential", 2),)))
    lines = (folder / ROWS).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / ROWS).write_text("".join(lines[:2]), encoding="utf-8")
    for call in (lambda: summary_rows([folder]), lambda: write_report([folder], tmp_path / "out")):
        with pytest.raises(ConfigError, match="holds no finished rows yet: let `baft bench`"):
            call()
    with pytest.raises(ConfigError, match="is no record of a run"):
        summary_rows([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="no run given"):
        summary_rows([])
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_says_so(tmp_path):
    folder = write_record(tmp_path / "run", small(n_cases=3))
    (folder / ROWS).write_text(
        "".join((folder / ROWS).read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8"
    )
    assert "run: 2 of 3 blocks: UNFINISHED" in page_of(folder, tmp_path / "out")[0]


def test_rows_of_another_version_are_refused_by_name(tmp_path):
    folder = record(tmp_path / "run", [row("one", [probe(score="tacher_forced")])])
    with pytest.raises(DataError, match=r"rows\.jsonl, task .*unknown metric 'reliability@tacher_forced'"):
        summary_rows([folder])
    bare = {name: value for name, value in row("one", [probe()]).items() if name != "probes"}
    with pytest.raises(DataError, match=r"not what `baft bench` writes \(KeyError: 'probes'\)"):
        summary_rows([record(tmp_path / "bare", [bare])])


def test_one_method_in_two_runs_keeps_two_names(tmp_path):
    write_record(tmp_path / "first", small())
    write_record(tmp_path / "second", small(methods={"a": Method(0.0)}))
    runs = [tmp_path / "first", tmp_path / "second"]
    assert cells(runs, "a (first)")[0]["reliability@teacher_forced"].startswith("1.00")
    assert cells(runs, "a (second)")[0]["reliability@generate"].startswith("0.00")


# --- the page ---


class Page(HTMLParser):
    """What a page is made of."""

    EMPTY = frozenset({"meta", "wbr"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.links = Counter(), [], Counter(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        found = dict(attrs)
        self.ids.update([found["id"]] if "id" in found else [])
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "data")]
        assert not any(name.startswith("on") for name in found)
        if tag not in self.EMPTY:
            self.open.append(tag)
        super().handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag
        super().handle_endtag(tag)


def text_of(html):
    return unescape(re.sub(r"<[^>]*>", "", html))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    plan = Plan(n_cases=12, protocols=(("single", 1), ("sequential", 6)))
    write_record(folder / "run", plan)
    return page_of(folder / "run", folder / "out")


def test_the_page_is_whole_and_loads_nothing(page):
    _, html = page
    found = Page(html)
    assert found.open == []
    assert found.tags["svg"] > 10
    assert found.tags["table"] > 10
    assert not {"script", "link", "img", "iframe", "object", "image", "foreignobject"} & set(found.tags)
    assert max(found.ids.values()) == 1
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert "http" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {f"#{name}" for name in found.ids}
    assert not re.search(r"#0[0a]0[0-9a-f]{3}\b", html)  # no placeholder of a color is left


def test_page_and_markdown_tell_the_same(page):
    markdown, html = page
    texts = text_of(html)
    for said in (
        "SmolLM2-135M-Instruct (Q4_1)",
        "b3f6d81c52aa9e07",
        "9f2c11aa07d3e845",
        "0123456789ab-dirty",
        "torch 2.13.0",
        "blank rephrasing: probe left out",
        "zsre/test · sequential(6)",
        "Paired differences",
        "Ordinary text",
        "unedited",
    ):
        assert said in texts, said
        assert said in markdown, said
    assert "Retention" in texts
    assert "Retention" not in markdown  # plots are for the page


def test_teacher_forced_and_generated_share_no_column(page):
    for line in page[0].splitlines():
        if line.startswith("| method"):
            names = {name.strip().partition("@")[2] for name in line.split("|") if "@" in name}
            assert not ({"teacher_forced", "argmax"} & names and {"generate", "text"} & names)


def test_the_same_record_gives_the_same_bytes(page, tmp_path):
    write_record(tmp_path / "run", Plan(n_cases=12, protocols=(("single", 1), ("sequential", 6))))
    assert page_of(tmp_path / "run", tmp_path / "out") == page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]


NASTY = "<script>alert(1)</script> & \"'|`*_x_* $x^2$ [a](http) 東京 \x00\x07 </table>\n# no"


def test_whatever_a_prompt_holds_is_text(tmp_path):
    probes = [probe(value=0.0, raw=[NASTY, NASTY]), probe("generality", value=0.0, tag=NASTY, gate=0.5)]
    probes += [probe("generality", value=0.0, tag="b", skipped=NASTY, gate=0.5)]
    nasty = row(
        "one", [{**one, "prompt": NASTY, "target": NASTY} for one in probes], method=NASTY, error=NASTY
    )
    nasty["edit"] = {"prompt": NASTY, "target": NASTY, "ground_truth": NASTY}
    rows = [nasty, {**nasty, "stage": "final", "protocol": "sequential(2)", "task": "another"}]
    anomalies = {"own/test": {"fingerprint": "f", "anomalies": {NASTY: 1}, "n_cases": 1}}
    markdown, html = page_of(record(tmp_path / "run", rows, benchmarks=anomalies), tmp_path / "out")
    found = Page(html)
    assert found.open == []
    assert "script" not in found.tags
    assert "<script" not in markdown
    assert "](http" not in markdown
    assert "\x00" not in html + markdown
    assert "$x^2$ [a](http) 東京" in text_of(html[html.index("<svg") :])
    assert "\n# no" not in markdown
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert all(
        len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1 for block in blocks
    )


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = write_record(tmp_path / "run", small())
    write_report([folder], tmp_path / "out")
    before = (tmp_path / "out" / "report.html").read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(DataError, match=r"could not be written: No space left on device"):
        write_report([folder], tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == before
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_real_run_is_reported_and_the_synthetic_record_has_its_fields(host, tmp_path):
    asked = {"locality": [{"prompt": "Bread and", "target": "milk", "tag": "near"}, {"prompt": "A hat"}]}
    cases = [{"prompt": prompt, "target": "Ro", **asked} for prompt in ("The tower is in", "Paris is in")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    (tmp_path / "general").mkdir()
    (tmp_path / "general" / "wikitext-2-test.txt").write_text("bread and milk " * 40 + "\n")
    experiment = Experiment(
        name="tiny",
        benchmarks=(BenchmarkSpec(name="jsonl", file=str(tmp_path / "mine.jsonl")),),
        methods=(MethodSpec(name="reft", settings={"max_steps": 3, "layers": [1]}),),
        protocols=(ProtocolSpec(kind="single"), ProtocolSpec(kind="sequential", size=2)),
        max_new_tokens=4,
        texts=1,
    )
    Bench(experiment, data=tmp_path, host=host).run(tmp_path / "run")
    markdown, html = page_of(tmp_path / "run", tmp_path / "out")
    assert Page(html).open == []
    assert "jsonl/all · sequential(2)" in markdown
    assert re.search(r"\| reft \| 2 \| [0-9]+ \| \d\.\d\d \[", markdown)  # ordinary text
    assert "gates of reft" in html
    real, made = (
        {(row["protocol"].partition("(")[0], row["stage"]): row for row in rows}
        for rows in (read_rows(tmp_path / "run"), read_rows(write_record(tmp_path / "made", Plan(n_cases=2))))
    )
    assert real.keys() == made.keys()
    for key, row in real.items():
        assert row.keys() == made[key].keys()
        for kind in ("reliability", "locality"):
            one, other = (next(p for p in r["probes"] if p["kind"] == kind) for r in (row, made[key]))
            assert one["scores"].keys() == other["scores"].keys()
            assert one["unedited"].keys() == other["unedited"].keys()
    last = real["sequential", "final"]["false_fires"]
    assert last.keys() == made["sequential", "final"]["false_fires"].keys()
    first, second = (read_manifest(tmp_path / name) for name in ("run", "made"))
    assert first.keys() == second.keys()


def rewritten(folder, change):
    """The record with every row changed."""
    rows = [change(row) for row in read_rows(folder)]
    (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_what_single_edits_do_to_text_is_told_by_edit_however_many_share_a_stack(tmp_path):
    plan = Plan(n_cases=12, protocols=(("single", 1),), texts=2)
    apart = page_of(write_record(tmp_path / "apart", plan), tmp_path / "1")[0]
    stacked = rewritten(write_record(tmp_path / "stacked", plan), lambda row: {**row, "chunk": 0})
    assert page_of(stacked, tmp_path / "2")[0] == apart.replace("apart", "stacked")
    one_edit = rewritten(write_record(tmp_path / "one", plan), lambda row: {**row, "case": row["case"][:5]})
    with pytest.raises(DataError, match="twice"):  # control: the case is what tells edits apart
        collect([one_edit])


def test_the_host_may_differ_where_it_was_asked_otherwise(tmp_path):
    """An edit that cannot join a stack is asked alone, where floating point rounds otherwise."""

    def moved(row, stack):
        if row["method"] == "reft":
            row = json.loads(json.dumps(row))
            row["stack"] = stack
            row["probes"][0]["unedited"] = {name: 0.5 for name in row["probes"][0]["unedited"]}
        return row

    plan = Plan(n_cases=3, protocols=(("single", 1),))
    alone = rewritten(write_record(tmp_path / "alone", plan), lambda row: moved(row, 25))
    assert collect([alone]).values
    same = rewritten(write_record(tmp_path / "same", plan), lambda row: moved(row, 1))
    with pytest.raises(DataError, match="scores differently"):  # control
        collect([same])
