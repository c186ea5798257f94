"""Bundles whose languages stand in different rows or files: pieces joined by their ids.

Joining needs the whole source in memory; the benchmarks that need it are tens of thousands of short prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlc_ray.data.bundles import BundleError, BundleFileError, RejectedRow, check_language, make_bundle
from mlc_ray.data.formats import containers
from mlc_ray.data.formats.benchmark_shapes import Piece
from mlc_ray.types import Bundle

# XSafety's repository has a folder per language and a file per category in each; one folder's name is no language code.
_XSAFETY_FOLDERS = {"sp": "es"}
XSAFETY_CATEGORIES = (
    "commonsense", "Crimes_And_Illegal_Activities", "Ethics_And_Morality", "Goal_Hijacking",
    "Inquiry_With_Unsafe_Opinion", "Insult", "Mental_Health", "Physical_Harm", "Privacy_And_Property",
    "Prompt_Leaking", "Reverse_Exposure", "Role_Play_Instruction", "Unfairness_And_Discrimination",
    "Unsafe_Instruction_Topic",
)  # fmt: skip
_XSAFETY_SPELLINGS = {
    "Crimes_And_Illegal_Activitie": "Crimes_And_Illegal_Activities",
    "commen_sense": "commonsense",
}


class Row(NamedTuple):
    """What one place of a source turned out to be: `line` counts from 1 (rows of tables, lines of text files)."""

    file: str
    line: int
    parsed: Bundle | RejectedRow


class Placed(NamedTuple):
    """A piece of a bundle, its kind settled, and where it stood."""

    file: str
    line: int
    piece: Piece
    kind: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def join(pieces: Iterable[Placed | RejectedRow], *, split_kinds: bool) -> Iterator[Row]:
    """Rejected rows as they come, then the bundles in the order of their first pieces, each at the place of its first.

    A bundle may lack languages. A second piece of one (key, language) is a rejected row, and so is one that
    contradicts the kind of its bundle, unless `split_kinds`.
    """
    first: dict[tuple[str, str], Placed] = {}
    groups: dict[tuple[str, str | None], list[Placed]] = {}
    for item in pieces:
        if isinstance(item, RejectedRow):
            yield Row(item.file, item.line, item)
            continue
        piece = item.piece
        group = groups.setdefault((piece.key, item.kind if split_kinds else None), [])
        if earlier := first.get((piece.key, piece.language)):
            yield _rejected(item, f"id {piece.key!r} has a prompt in {piece.language!r} already, at {earlier}")
        elif group and group[0].kind != item.kind:
            yield _rejected(
                item, f"the row says kind {item.kind!r}, but id {piece.key!r} is {group[0].kind!r} at {group[0]}"
            )
        else:
            first[piece.key, piece.language] = item
            group.append(item)
    for group in filter(None, groups.values()):
        yield _bundle(group)


def _bundle(group: list[Placed]) -> Row:
    start = group[0]
    prompts = {placed.piece.language: placed.piece.text for placed in group}
    raw: dict[str, Any] = {"prompts": prompts, "kind": start.kind, "category": start.piece.category}
    try:
        return Row(start.file, start.line, make_bundle(raw))
    except BundleError as error:
        shown = json.dumps(prompts, ensure_ascii=False)
        return Row(start.file, start.line, RejectedRow(start.file, start.line, str(error), shown))


def _rejected(placed: Placed, reason: str) -> Row:
    return Row(placed.file, placed.line, RejectedRow(placed.file, placed.line, reason, placed.piece.text))


# ------------------------------------------------------------------------------------------------------------ XSafety


def is_xsafety(folder: Path) -> bool:
    """Whether `folder` looks like a copy of XSafety's repository."""
    return (folder / "en" / "commonsense.csv").is_file()


def xsafety_pieces(folder: str, kind: str) -> Iterator[Placed | RejectedRow]:
    """XSafety: LANGUAGE/CATEGORY.csv without headers, one cell a row; the row number joins the languages.

    A file with another number of rows than its category has in the other languages cannot be joined, and is rejected
    as a whole. Raises `BundleFileError` for a folder or file that is none of XSafety's.
    """
    root = Path(folder)
    files = sorted(root.glob("*/*.csv")) if root.is_dir() else []
    if not files:
        raise BundleFileError(
            f"{folder}: format 'xsafety' is a folder with a folder per language (en/commonsense.csv, ...), as in its "
            "repository; copies without ids, one row per prompt, cannot be joined"
        )
    contents = {path: list(containers.headless_csv(str(path))) for path in files}
    names = {path: (_xsafety_category(path), _xsafety_language(path)) for path in files}
    proper = {names[path]: path for path in sorted(files, key=lambda p: p.stem not in _XSAFETY_SPELLINGS)}
    usual = _usual_lengths((names[path][0], len(contents[path])) for path in proper.values())
    for path, rows in contents.items():
        category, language = names[path]
        if proper[category, language] != path:
            reason = f"repeats {category} in {language!r}, which is in {str(proper[category, language])!r}; remove one"
            yield RejectedRow(str(path), 1, reason, "")
            continue
        if not rows:
            raise BundleFileError(f"{path}: no rows in it")
        if len(rows) != usual[category]:
            seen = usual[category] or "no usual number of"
            reason = (
                f"the file has {len(rows)} rows, {category} has {seen} rows in other languages: its rows cannot be "
                "joined with theirs by number; mend the file, or move it away"
            )
            yield RejectedRow(str(path), 1, reason, "")
            continue
        for number, (line, cells) in enumerate(rows, start=1):
            text = cells[0]
            if len(cells) != 1 or not text.strip():
                what = "the cell is blank" if len(cells) == 1 else f"{len(cells)} cells instead of 1"
                yield RejectedRow(str(path), line, what, json.dumps(cells, ensure_ascii=False))
                continue
            piece = Piece(f"{category} {number}", language, text, category=category)
            yield Placed(str(path), line, piece, kind)


def _usual_lengths(files: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The number of rows most files of a category have; 0 where no number is more frequent than the others."""
    counts: dict[str, Counter[int]] = {}
    for category, rows in files:
        counts.setdefault(category, Counter())[rows] += 1
    usual = {}
    for category, seen in counts.items():
        (length, most), *others = seen.most_common()
        usual[category] = 0 if others and others[0][1] == most else length
    return usual


def _xsafety_category(path: Path) -> str:
    stem = path.stem.removesuffix("_n").removesuffix(f"_{path.parent.name}")
    category = _XSAFETY_SPELLINGS.get(stem, stem)
    if category not in XSAFETY_CATEGORIES:
        raise BundleFileError(f"{path}: {stem!r} is none of XSafety's categories: {', '.join(XSAFETY_CATEGORIES)}")
    return category


def _xsafety_language(path: Path) -> str:
    name = path.parent.name
    try:
        return check_language(_XSAFETY_FOLDERS.get(name, name), "the folder's name")
    except BundleError as error:
        raise BundleFileError(f"{path}: {error}") from None
