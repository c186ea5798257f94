"""Small pieces of HTML. Whatever comes from outside passes through `text`; everything else here is our own markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

# What HTML cannot hold, and what would turn the text after it around; shown as the replacement character.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def text(value: object) -> str:
    """`value` as text that is safe in HTML and in attributes."""
    return escape(_FORBIDDEN.sub("�", str(value)))


def spoken(value: str, language: str, tag: str) -> str:
    """Text in a language, whose direction the browser takes from its first strong letter."""
    return f'<{tag} lang="{text(language)}" dir="auto">{text(value)}</{tag}>'


def head(cells: Iterable[str]) -> str:
    """A header row; the first cell heads the row names."""
    return "<thead><tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in cells) + "</tr></thead>"


def row(name: str, cells: Iterable[str]) -> str:
    """A row with its header."""
    return f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def table(caption: str, header: Sequence[str], rows: Iterable[str]) -> str:
    """A table that scrolls in itself where it is wider than the page. All parts are HTML."""
    body = f"<caption>{caption}</caption>{head(header)}<tbody>{''.join(rows)}</tbody>"
    return scroll(f'<table class="pin">{body}</table>')


def scroll(content: str) -> str:
    """A region that scrolls sideways, also with the keyboard."""
    return f'<div class="scroll" tabindex="0">{content}</div>'


def details(summary: str, content: str) -> str:
    """A part that is folded away."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def figure(caption: str, more: str, svg: str) -> str:
    """A chart under its caption."""
    note = f"<small>{more}</small>" if more else ""
    return f"<figure><figcaption>{caption}{note}</figcaption>{svg}</figure>"


def section(name: str, title: str, content: str) -> str:
    """A section with its heading; empty if it has no content."""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{content}</section>' if content else ""
