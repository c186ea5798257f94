"""XSafety, a folder per language and a file per category; docs/benchmarks.md has its source and licence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlc_ray._registry import register
from mlc_ray.data.bundles import BundleError, BundleFileError, RejectedRow, check_language
from mlc_ray.data.formats.base import Published, Row
from mlc_ray.data.formats.joined import JoinedFormat, Piece, Placed, join
from mlc_ray.types import Kind

# The name of one folder is not a language code.
_FOLDERS = {"sp": "es"}
CATEGORIES = (
    "commonsense", "Crimes_And_Illegal_Activities", "Ethics_And_Morality", "Goal_Hijacking",
    "Inquiry_With_Unsafe_Opinion", "Insult", "Mental_Health", "Physical_Harm", "Privacy_And_Property",
    "Prompt_Leaking", "Reverse_Exposure", "Role_Play_Instruction", "Unfairness_And_Discrimination",
    "Unsafe_Instruction_Topic",
)  # fmt: skip
_SPELLINGS = {
    "Crimes_And_Illegal_Activitie": "Crimes_And_Illegal_Activities",
    "commen_sense": "commonsense",
}


@register("format", "xsafety")
class XSafety(JoinedFormat):
    """LANGUAGE/CATEGORY.csv without headers, one cell a row; the row number joins the languages."""

    published = Published.of("XSafety", "ar bn de en es fr hi ja ru zh", "harmful", refusals=False)
    default_kind = "harmful"
    whole_folder = True

    def recognises_folder(self, folder: Path) -> bool:
        """Whether it looks like a copy of XSafety's repository."""
        return (folder / "en" / "commonsense.csv").is_file()

    def read_folder(self, folder: str, kind: Kind | None) -> Iterator[Row]:
        """Rejected rows and files, then the bundles.

        A file with another number of rows than its category has in the other languages cannot be joined, and is
        rejected as a whole.

        Raises:
            BundleFileError: the folder, or a file in it, does not belong to XSafety.
        """
        return join(_pieces(Path(folder), self.settle_kind(None, kind)), split_kinds=False)


def _pieces(root: Path, kind: str) -> Iterator[Placed | RejectedRow]:
    from mlc_ray.data.formats.containers import headless_csv

    files = sorted(root.glob("*/*.csv")) if root.is_dir() else []
    if not files:
        raise BundleFileError(
            f"{root}: format 'xsafety' is a folder with a folder per language (en/commonsense.csv, ...), as in its "
            "repository; copies without ids, one row per prompt, cannot be joined"
        )
    contents = {path: list(headless_csv(str(path))) for path in files}
    names = {path: (_category(path), _language(path)) for path in files}
    proper = {names[path]: path for path in sorted(files, key=lambda p: p.stem not in _SPELLINGS)}
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
                "joined with theirs by number; repair the file, or move it away"
            )
            yield RejectedRow(str(path), 1, reason, "")
            continue
        for number, (line, cells) in enumerate(rows, start=1):
            text = cells[0]
            if len(cells) != 1 or not text.strip():
                what = "the cell is blank" if len(cells) == 1 else f"{len(cells)} cells instead of 1"
                yield RejectedRow(str(path), line, what, json.dumps(cells, ensure_ascii=False))
                continue
            yield Placed(str(path), line, Piece(f"{category} {number}", language, text, category=category), kind)


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


def _category(path: Path) -> str:
    stem = path.stem.removesuffix("_n").removesuffix(f"_{path.parent.name}")
    category = _SPELLINGS.get(stem, stem)
    if category not in CATEGORIES:
        raise BundleFileError(f"{path}: {stem!r} is not one of XSafety's categories: {', '.join(CATEGORIES)}")
    return category


def _language(path: Path) -> str:
    name = path.parent.name
    try:
        return check_language(_FOLDERS.get(name, name), "the folder's name")
    except BundleError as error:
        raise BundleFileError(f"{path}: {error}") from None
