"""Drawing with matplotlib into inline SVG: the same bytes every time, for light and dark pages alike.

No color is fixed. What is drawn carries placeholders, which become the page's own: `currentColor` for ink,
`var(--m0)` to `var(--m7)` for methods.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

N_COLORS = 8
INK, FAINT = "#010203", "#040506"
MARKERS = "osD^vPX*"

_PAGE_COLORS = {INK: "currentColor", FAINT: "var(--faint)"} | {
    f"#0a0b{i:02x}": f"var(--m{i})" for i in range(N_COLORS)
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "baft",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.parse_math": False,
    "text.usetex": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "path.simplify": False,
}
_METADATA = {name: None for name in ("Date", "Creator", "Format", "Type")}


def color(number: int) -> str:
    """The placeholder of a method's color."""
    return f"#0a0b{number % N_COLORS:02x}"


@dataclass(frozen=True, slots=True)
class Frame:
    """The size of a drawing, and the room at the left for labels and above for a legend; all in inches."""

    width: float = 3.5
    height: float = 2.5
    left: float = 0.42
    above: float = 0.28


def draw(paint: Callable[[Axes], None], frame: Frame, *, name: str, label: str) -> str:
    """Inline SVG of what `paint` draws.

    Args:
        paint: Draws on the axes.
        frame: Its size; the page scales it.
        name: A word that no other plot of the page has; begins every id in the drawing.
        label: What a screen reader says.
    """
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_SETTINGS, "backend": "svg"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")  # the browser has a font for what is missing
        figure = Figure(figsize=(frame.width, frame.height))
        figure.patch.set_visible(False)
        across = (frame.left / frame.width, 1 - 0.08 / frame.width)
        up = (0.42 / frame.height, 1 - frame.above / frame.height)
        axes = figure.add_axes((across[0], up[0], across[1] - across[0], up[1] - up[0]))
        axes.patch.set_visible(False)
        paint(axes)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata=_METADATA)  # type: ignore[no-untyped-call]
    return _inline(file.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
    """SVG as part of a page: no head, no style of its own, ids that are nobody else's, the page's colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (id="|xlink:href="#)', rf" \1{name}-", svg).replace("xlink:href=", "href=")
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for placeholder, found in _PAGE_COLORS.items():
        svg = svg.replace(placeholder, found)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib gives every drawing a viewBox"
    svg = re.sub(r"<svg[^>]*>", f'<svg {box.group()} role="img" aria-label="{escape(label)}">', svg, count=1)
    return re.sub(r"\n\s*", "\n", svg).strip()
