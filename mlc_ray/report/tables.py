"""A table as data, and its renderers for terminals and Markdown; on the page a template renders it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from mlc_ray.report.text import ABSENT, clean

Tone = Literal["", "alarm", "strong", "dim"]
_STYLES: dict[Tone, str] = {"": "", "alarm": "bold red", "strong": "bold", "dim": "dim"}


@dataclass(frozen=True)
class Cell:
    """A number or a word, and what belongs to it in smaller print: an interval, a count."""

    text: str
    more: tuple[str, ...] = ()
    tone: Tone = ""


@dataclass(frozen=True)
class Row:
    """A named row; `tone` is that of all its cells."""

    name: Cell
    cells: tuple[Cell, ...]
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """A table: its title with a `note`, a head for each column (the first heads the names), and rows."""

    title: str
    columns: tuple[Cell, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns) - 1:
                raise ValueError(f"row {row.name.text!r} has {len(row.cells)} cells under {len(self.columns)} columns")


NONE = Cell(ABSENT)


def cell(text: str, *more: str, tone: Tone = "") -> Cell:
    """A cell; what of `more` is empty is left out."""
    return Cell(text, tuple(filter(None, more)), tone)


def row(name: str | Cell, cells: Iterable[str | Cell], tone: Tone = "") -> Row:
    """A row of cells and plain texts."""
    return Row(_cell(name), tuple(map(_cell, cells)), tone)


def table(title: str, columns: Sequence[str | Cell], rows: Iterable[Row], note: str = "") -> Table:
    """A table whose heads may be plain texts."""
    return Table(title, tuple(map(_cell, columns)), tuple(rows), note)


def _cell(value: str | Cell) -> Cell:
    return Cell(value) if isinstance(value, str) else value


# --------------------------------------------------------------------------------------------------------- renderers


def console(shown: Table) -> RichTable:
    """For a terminal: heads in several lines, so that columns stay narrow."""
    title = Text(clean(shown.title), "bold", no_wrap=True, overflow="ignore")  # it may be wider than its table
    if shown.note:
        title.append(f"  {clean(shown.note)}", "dim")
    found = RichTable(title=title if shown.title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(shown.columns):
        lines = [*head.text.split(" ", 1), *head.more]
        side: Literal["left", "right"] = "right" if index else "left"
        found.add_column(Text(clean("\n".join(lines)), justify=side), justify=side, no_wrap=True)
    for each in shown.rows:
        found.add_row(*map(_on_console, (each.name, *each.cells)), style=_STYLES[each.tone])
    return found


def _on_console(value: Cell) -> Text:
    found = Text(clean(value.text), _STYLES[value.tone])
    if value.more:
        found.append(f" ({clean('; '.join(value.more))})", "dim")
    return found


def markdown(shown: Table) -> list[str]:
    """Lines of Markdown, with an empty one at the end."""
    title = [f"**{escape(shown.title)}**{f' ({escape(shown.note)})' if shown.note else ''}", ""] if shown.title else []
    lines = [[_in_markdown(head) for head in shown.columns], ["---", *["---:"] * (len(shown.columns) - 1)]]
    for each in shown.rows:
        cells = [_in_markdown(value) for value in (each.name, *each.cells)]
        lines.append([f"**{value}**" if each.tone == "strong" and value else value for value in cells])
    return [*title, *("| " + " | ".join(line) + " |" for line in lines), ""]


def _in_markdown(value: Cell) -> str:
    return escape(value.text + (f" ({'; '.join(value.more)})" if value.more else ""))


def escape(value: str) -> str:
    """`value` as plain text of a Markdown table."""
    return clean(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
