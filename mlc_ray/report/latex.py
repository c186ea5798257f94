"""Tables for LaTeX, with the rules of the package booktabs; every text is escaped."""

from __future__ import annotations

import re

from mlc_ray.report.tables import Cell, Table
from mlc_ray.report.text import ABSENT, clean

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "−": "$-$",
    "→": r"$\rightarrow$",
    "†": r"\textdagger{}",
    ABSENT: "--",
    "\n": " ",
}
_ANY = re.compile("|".join(map(re.escape, _SPECIAL)))


def escape(value: str) -> str:
    """`value` as plain text of a LaTeX document: nothing in it is a command."""
    return _ANY.sub(lambda found: _SPECIAL[found[0]], clean(value))


def latex(shown: Table) -> list[str]:
    """Lines of a `table` environment with a `tabular`, and an empty one at the end; needs booktabs and T1 fonts.

    Smaller print of cells, such as intervals, follows in brackets.
    """
    width = len(shown.columns)
    lines = [
        r"\begin{table}",
        rf"\caption{{{escape(shown.title)}{f' ({escape(shown.note)})' if shown.note else ''}.}}",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        " & ".join(map(_cell, shown.columns)) + r" \\",
        r"\midrule",
    ]
    for each in shown.rows:
        lines.append(" & ".join(_cell(value) for value in (each.name, *each.cells)) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]


def _cell(value: Cell) -> str:
    text = escape(value.text)
    if value.tone == "strong":
        text = rf"\textbf{{{text}}}"
    return text + (rf" {{\footnotesize({escape('; '.join(value.more))})}}" if value.more else "")
