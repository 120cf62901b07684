"""A report as a document of tables, plots and texts, and how it becomes Markdown or one HTML page.

Nothing here knows what a score is. Whatever comes in as text is escaped: prompts contain anything.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Args:
        text: What it says.
        aside: What is said beside it in smaller letters, such as an interval.
        share: Where the value lies between 0 and 1, drawn as a bar; None draws none.
        best: Whether it is marked as the best of its column.
    """

    text: str
    aside: str = ""
    share: float | None = None
    best: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Args:
        header: The names of its columns.
        rows: Its rows, each as long as the header.
        title: What stands above it.
        note: What stands below it.
        right: Whether all columns but those of `labels` are numbers, set to the right.
        labels: How many columns at the left name the row.
        wide: Whether cells hold running text, and may be broken into lines.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    labels: int = 1
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Plots:
    """Plots side by side, for the page alone.

    Args:
        figures: Captions, and drawings as inline SVG.
        note: What stands below them.
        columns: How many stand beside each other where there is room.
    """

    figures: Sequence[tuple[str, str]]
    note: str = ""
    title: str = ""
    columns: int = 3


@dataclass(frozen=True, slots=True)
class Fold:
    """What is folded away under a summary until it is asked for."""

    summary: str
    parts: Sequence["Part"]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the document with a heading.

    Args:
        title: The heading.
        parts: What is in it; a string is a paragraph.
        level: 2 for a chapter, 3 for a part of one.
    """

    title: str
    parts: Sequence["Part"]
    level: int = 2


Part = str | Table | Plots | Fold | Section


@dataclass(frozen=True, slots=True)
class Document:
    """A report: its title, a line below it, and its sections."""

    title: str
    subtitle: str
    sections: Sequence[Section]


# --- Markdown ---


def to_markdown(document: Document) -> str:
    """The document as Markdown, without its plots."""
    lines = [f"# {_mark(document.title)}", "", _paragraph(document.subtitle), ""]
    for section in document.sections:
        lines += _markdown(section)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _markdown(part: Part) -> Iterator[str]:
    if isinstance(part, str):
        yield from (_paragraph(part), "")
    elif isinstance(part, Section):
        if not all(isinstance(one, Plots) for one in part.parts):
            yield from (f"{'#' * part.level} {_mark(part.title)}", "")
            for one in part.parts:
                yield from _markdown(one)
    elif isinstance(part, Fold):
        yield from (f"**{_mark(part.summary)}**", "")
        for one in part.parts:
            yield from _markdown(one)
    elif isinstance(part, Table):
        if part.title:
            yield from (f"**{_mark(part.title)}**", "")
        yield _line(_mark(name) for name in part.header)
        yield _line(":--" if i < part.labels or part.wide else "--:" for i in range(len(part.header)))
        for row in part.rows:
            yield _line(_marked(cell) for cell in row)
        yield ""
        if part.note:
            yield from (_paragraph(part.note), "")


def _line(cells: Iterator[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _marked(cell: Cell) -> str:
    text = _mark(cell.text)
    text = f"**{text}**" if cell.best and text else text
    return f"{text} {_mark(cell.aside)}" if cell.aside else text


def _paragraph(text: str) -> str:
    """Text that begins a line, and no heading or list."""
    return re.sub(r"^(\d*)([#+.)-])", r"\1\\\2", _mark(text))


def _mark(text: str) -> str:
    """Text as Markdown shows it, in one line."""
    text = escape(" ".join(text.split()), quote=False)
    text = re.sub(r"[\\`*~|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return text.replace("](", "]\\(").replace("][", "]\\[").replace("]:", "]\\:")


# --- HTML ---


def to_html(document: Document) -> str:
    """The document as one page that loads nothing and runs nothing."""
    style = resources.files("baft.evals").joinpath("report.css").read_text(encoding="utf-8")
    contents = "".join(
        f'<a href="#{_anchor(i)}">{escape(section.title)}</a>' for i, section in enumerate(document.sections)
    )
    body = "".join(
        f'<section id="{_anchor(i)}"><h2>{escape(section.title)}</h2>\n{_all(section.parts)}</section>\n'
        for i, section in enumerate(document.sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(document.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(document.title)}</h1>\n<p>{escape(document.subtitle)}</p>\n"
        f"<nav>{contents}</nav></header>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _anchor(number: int) -> str:
    return f"part-{number + 1}"


def _all(parts: Sequence[Part]) -> str:
    return "".join(map(_html, parts))


def _html(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>\n"
    if isinstance(part, Section):
        return f"<h{part.level}>{escape(part.title)}</h{part.level}>\n{_all(part.parts)}"
    if isinstance(part, Fold):
        return f"<details><summary>{escape(part.summary)}</summary>\n{_all(part.parts)}</details>\n"
    if isinstance(part, Plots):
        return _plots(part)
    return _table(part)


def _plots(part: Plots) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>\n" for caption, svg in part.figures
    )
    title = f"<h4>{escape(part.title)}</h4>\n" if part.title else ""
    return f'{title}<div class="plots of{part.columns}">\n{figures}</div>\n{_note(part.note)}'


def _table(part: Table) -> str:
    caption = f"<caption>{escape(part.title)}</caption>" if part.title else ""
    head = "".join(
        f'<th scope="col"{_label(i, part)}>{_breakable(name)}</th>' for i, name in enumerate(part.header)
    )
    rows = "".join(
        f"<tr>{''.join(_cell(i, cell, part) for i, cell in enumerate(row))}</tr>\n" for row in part.rows
    )
    kind = ' class="wide"' if part.wide else ""
    return (
        f'<div class="scroll"><table{kind}>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>'
        f"</table></div>\n{_note(part.note)}"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n' if text else ""


def _label(column: int, table: Table) -> str:
    return ' class="label"' if column < table.labels else ""


def _breakable(name: str) -> str:
    """A name that may be broken behind an @ or a stroke."""
    return re.sub(r"(?<=[@/_])(?=\w)", "<wbr>", escape(name))


def _cell(column: int, cell: Cell, table: Table) -> str:
    text = _breakable(cell.text) if column < table.labels else escape(cell.text)
    if cell.best:
        text = f'<strong class="best">{text}</strong>'
    if cell.aside:
        text += f" <small>{escape(cell.aside)}</small>"
    if column < table.labels:
        return f'<th scope="row" class="label">{text}</th>'
    bar = "" if cell.share is None else f' class="bar" style="--v:{min(max(cell.share, 0), 1):.4f}"'
    return f"<td{bar}>{text}</td>"
