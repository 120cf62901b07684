"""The plots of a report, as inline SVG."""

import random
import statistics
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from baft.evals.collect import UNEDITED, Group, Results
from baft.evals.differences import FAMILIES
from baft.evals.drawing import FAINT, INK, MARKERS, Frame, color, draw
from baft.evals.metrics import metric
from baft.evals.numbers import interval_of
from baft.evals.page import Plots
from baft.evals.stats import curve

Arena = tuple[str, str]

RETAINED = (
    "reliability@teacher_forced",
    "reliability@generate",
    "generality@generate",
    "locality@argmax",
    "locality@text",
)
_MANY_POINTS = 400
_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_LEGEND_COLUMNS = 4
_Probe = tuple[str, str]


class Painter:
    """Draws the plots of one report.

    Args:
        results: What is drawn.
    """

    def __init__(self, results: Results):
        self._results = results
        methods = dict.fromkeys(group.method for group in results.values if group.method != UNEDITED)
        self._number = {method: i for i, method in enumerate(methods)}
        self._n_drawn = 0

    def retention(self, arena: Arena) -> list[Plots]:
        """Scores by the place of an edit in its chunk, right after it was made and after the last one."""
        groups = self._results.last(*arena)
        if not any(group.stage == "final" for group in groups):
            return []
        plots = []
        for name in RETAINED:
            shown = [group for group in groups if self._results.scores(group, name)]
            figures = [(group.method, self._retention(group, name)) for group in shown]
            if figures:
                plots.append(Plots(figures, title=name))
        return plots

    def scatter(self, arena: Arena) -> Plots | None:
        """Locality against what edits are for, by method."""
        figures = []
        for family, (reliability, generality, _, locality) in FAMILIES.items():
            for name in (reliability, generality):
                svg = self._scatter(arena, locality, name)
                if svg:
                    figures.append((f"{family}: locality against {name.partition('@')[0]}", svg))
        note = (
            "Each method with the 95 % intervals of both scores, after the last edit of a chunk; "
            "up and right is better. The cross is the unedited host."
        )
        return Plots(figures, note, columns=2) if figures else None

    def gates(self, arena: Arena) -> Plots | None:
        """How far the gates open at each kind of probe, by method."""
        figures = []
        for group in self._results.last(*arena):
            svg = self._gates(group)
            if svg:
                figures.append((group.method, svg))
        note = (
            "Each point is a probe: the mean gate of the edit that opens most, at the prompt's last token. "
            "The bar spans the middle half, the stroke is the median."
        )
        return Plots(figures, note, columns=2) if figures else None

    # --- one drawing ---

    def _retention(self, final: Group, name: str) -> str:
        bounds = metric(name).bounds
        immediate = Group(final.benchmark, final.protocol, "immediate", final.method)
        shade = color(self._number[final.method])

        def paint(axes: Axes) -> None:
            for group, style, label in ((immediate, "--", "immediate"), (final, "-", "final")):
                scores = self._results.scores(group, name)
                if not scores:
                    continue
                keys = {f"{seed}:{case}": (case, seed) for case, seed in scores}
                where = {one: self._results.positions[group][key] for one, key in keys.items()}
                points = curve({one: scores[key] for one, key in keys.items()}, where, bounds=bounds)
                middle = [(point.first + point.last) / 2 + 1 for point in points]
                means = [point.interval.estimate for point in points]
                low, high = ([getattr(point.interval, end) for point in points] for end in ("low", "high"))
                ink, depth = (shade, 0.22) if group is final else (INK, 0.1)
                axes.fill_between(middle, low, high, color=ink, alpha=depth, linewidth=0)
                dots = "." if len(points) > 1 else "o"
                axes.plot(middle, means, style, color=ink, marker=dots, label=label)
            axes.set(ylim=(-0.03, 1.03), yticks=_TICKS, xlabel="place of the edit in its chunk")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.legend(loc="lower left", ncols=2, bbox_to_anchor=(0, 1), borderaxespad=0.1)

        return self._draw(paint, f"{name} of {final.method} by the place of the edit")

    def _scatter(self, arena: Arena, x: str, y: str) -> str | None:
        groups = [one for one in self._results.groups(*arena) if not one.stage]
        groups += self._results.last(*arena)
        points = []
        for group in groups:
            found = [interval_of(self._results.scores(group, name), metric(name)) for name in (x, y)]
            if found[0] is not None and found[1] is not None:
                points.append((group, found[0], found[1]))
        if not any(group.stage for group, *_ in points):
            return None

        def paint(axes: Axes) -> None:
            for group, across, up in points:
                number = self._number.get(group.method, 0)
                ink = color(number) if group.stage else INK
                axes.errorbar(
                    across.estimate,
                    up.estimate,
                    xerr=[[across.estimate - across.low], [across.high - across.estimate]],
                    yerr=[[up.estimate - up.low], [up.high - up.estimate]],
                    fmt=MARKERS[number % len(MARKERS)] if group.stage else "x",
                    color=ink,
                    markersize=6,
                    elinewidth=1,
                    label=group.method,
                )
            axes.set(xlim=(-0.03, 1.05), ylim=(-0.03, 1.05), xticks=_TICKS, yticks=_TICKS)
            axes.set(xlabel=x, ylabel=y)
            axes.legend(
                loc="lower left",
                ncols=_LEGEND_COLUMNS,
                bbox_to_anchor=(-0.1, 1),
                borderaxespad=0.1,
                columnspacing=0.9,
                handletextpad=0.2,
            )

        more = 0.17 * ((len(points) - 1) // _LEGEND_COLUMNS)  # inches for further lines of the legend
        frame = Frame(4.2, 3.2 + more, left=0.58, above=0.28 + more)
        return self._draw(paint, f"{y} against {x}", frame)

    def _gates(self, group: Group) -> str | None:
        opened: dict[_Probe, list[float]] = {}
        for row in self._results.rows_of(group):
            for probe in row["probes"]:
                if "gate" in probe:
                    opened.setdefault((probe["kind"], probe["tag"]), []).append(probe["gate"])
        if not opened:
            return None
        kinds = ("reliability", "generality", "portability", "locality")
        ordered = sorted(opened, key=lambda one: (kinds.index(one[0]), one[1]))
        shade = color(self._number[group.method])
        names = [kind if tag in ("", "edit") else f"{kind}: {tag}" for kind, tag in ordered]

        def paint(axes: Axes) -> None:
            for place, probe in enumerate(ordered):
                values = _thinned(opened[probe])
                jitter = random.Random(place)
                heights = [place + jitter.uniform(-0.3, 0.3) for _ in values]
                axes.plot(values, heights, ".", color=shade, alpha=0.35, markersize=4, markeredgewidth=0)
                low, middle, high = _quartiles(opened[probe])
                axes.plot([low, high], [place, place], color=shade, linewidth=5, alpha=0.55)
                axes.plot([middle, middle], [place - 0.3, place + 0.3], color=INK, linewidth=1.6)
            axes.set_yticks(range(len(ordered)), names)
            axes.set(xlim=(-0.03, 1.03), ylim=(len(ordered) - 0.45, -0.55), xticks=_TICKS, xlabel="gate")
            axes.grid(visible=False, axis="y")
            axes.axvline(0, color=FAINT, linewidth=0.8)

        room = 0.2 + 0.074 * max(map(len, names))
        frame = Frame(4.4, 0.55 + 0.3 * len(ordered), left=min(room, 2.2), above=0.05)
        return self._draw(paint, f"gates of {group.method}", frame)

    def _draw(self, paint: Callable[[Axes], None], label: str, frame: Frame | None = None) -> str:
        self._n_drawn += 1
        return draw(paint, frame or Frame(), name=f"plot{self._n_drawn}", label=label)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _thinned(values: Sequence[float]) -> Sequence[float]:
    """No more points than a page can bear, drawn evenly from their order by size."""
    if len(values) <= _MANY_POINTS:
        return values
    ordered = sorted(values)
    return [ordered[i * (len(ordered) - 1) // (_MANY_POINTS - 1)] for i in range(_MANY_POINTS)]
