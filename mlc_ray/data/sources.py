"""Sources of the settings -> files -> parts of files -> bundles or rejected rows, as tables.

It imports neither Ray nor torch, so that the tasks which read start fast.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlc_ray._registry import names, resolve
from mlc_ray.config import SourceSection
from mlc_ray.data.bundles import BundleError, BundleFileError, RejectedRow, pair_number, select_languages
from mlc_ray.data.contents import BLOCK_BYTES, Content, contents_of, files_of, fingerprint_of
from mlc_ray.data.formats import columnar, containers
from mlc_ray.data.formats.base import Format, Row
from mlc_ray.data.formats.containers import Opened
from mlc_ray.data.formats.records import Part
from mlc_ray.data.hub import HubName
from mlc_ray.data.tables import BUNDLES, bundle_columns
from mlc_ray.storage import Place, fingerprint
from mlc_ray.types import Bundle, Kind

AUTO = "auto"
SAMPLES = ("train", "large", "select", "test")
_SHIPPED = "mlc_ray.data.formats."
_ROWS_AT_ONCE = 512
_TEXT = pa.string()

PARSED = pa.schema([*BUNDLES, ("reason", _TEXT), ("text", _TEXT)])
"""A row of `BUNDLES`, or a rejected one: its file and line, the reason, and its text."""


@dataclass(frozen=True)
class SourceFile:
    """One thing to read in one go: a file, a saved dataset, one of the hub at a commit (`hub.HubName`), or a folder
    whose files hold languages of the same bundles.
    """

    path: str
    format: str = AUTO
    kind: Kind | None = None
    only: Kind | None = None
    share: float = 1.0

    def takes(self, bundle: Bundle) -> bool:
        """Whether a bundle is of those that `only` and `share` ask for."""
        if self.only not in (None, bundle.kind):
            return False
        return self.share == 1 or pair_number(bundle) < self.share * 2**64

    def files(self) -> list[Place]:
        """All files that belong to it; a hub dataset has none."""
        return files_of(Place(self.path)) if Place(self.path).exists() else []

    def fingerprint(self, contents: dict[Place, Content] | None = None) -> str:
        """Of the content, of how it is read, and of the code of a format from outside this package.

        `contents` are those of its `files`; without them, they are read.
        """
        path = Place(self.path)
        # A name of the hub says its commit.
        content = fingerprint_of(path, contents or contents_of(self.files())) if path.exists() else self.path
        return fingerprint([content, self.format, self.kind, self.only, self.share, _code_of(self.format)])


# ------------------------------------------------------------------------------------------- from source to files


def sample_path(name: str) -> Path:
    """A file of the shipped sample: `train`, `large`, `select` or `test`.

    Raises:
        BundleFileError: it has another name, or the file is not there.
    """
    if name not in SAMPLES:
        near = difflib.get_close_matches(name, SAMPLES, n=1)
        hint = f"; did you mean 'sample:{near[0]}'?" if near else ""
        shipped = ", ".join(f"'sample:{each}'" for each in SAMPLES)
        raise BundleFileError(f"'sample:{name}' is not shipped{hint} (shipped: {shipped})")
    path = Path(__file__).parent / "sample" / f"{name}.jsonl"
    if not path.is_file():
        raise BundleFileError(f"'sample:{name}' should be at {str(path)!r}, but the installation lacks it")
    return path


def resolve_source(source: SourceSection) -> list[SourceFile]:
    """What a source of the settings stands for, in a fixed order; a name of the hub is pinned to a commit.

    Raises:
        BundleFileError: there is nothing there, or the hub cannot say which commit a name stands for.
    """
    name, format = source.path, source.format

    def file(path: str | Path | Place, as_format: str = format) -> SourceFile:
        return SourceFile(str(path), as_format, source.kind, source.only, source.share)

    if name.startswith("sample:"):
        return [file(sample_path(name.removeprefix("sample:")), "mlc")]
    path = Place(name)
    if path.is_local:
        path = Place(Path(name).expanduser().absolute())  # tasks run elsewhere, with another working directory
    if path.is_file():
        return [file(path)]
    if path.is_dir():
        return [file(found, as_format) for found, as_format in _in_folder(path, name, format)]
    if (hub_name := _hub_name(source)) is not None:
        return [file(str(hub_name.pinned()))]
    raise _no_source(name, path)


def _no_source(name: str, path: Place) -> BundleFileError:
    return BundleFileError(
        f"source {name!r} does not exist (looked for {str(path)!r}); a source is a file or folder, `sample:train`, or "
        "a data set of the hub, ORGANISATION/NAME"
    )


def _in_folder(folder: Place, name: str, format: str) -> list[tuple[Place, str]]:
    """What a folder of the `name` that the user gave holds, and the format of each: a dataset, one thing, or files."""
    if columnar.is_saved_dataset(folder):
        if not folder.is_local:
            raise BundleFileError(f"{name!r} is a saved dataset; give it as a path, or its rows as Parquet files")
        return [(folder, format)]
    if (whole := _format_of_folder(folder, format)) is not None:
        return [(folder, whole)]
    files = _files_of(folder)
    if not files:
        raise BundleFileError(f"folder {name!r} holds no {', '.join(containers.SUFFIXES)} file and no saved dataset")
    if (joined := _joined_format(files, format)) is not None:
        return [(folder, joined)]
    return [(inside, format) for inside in files]


def is_here(source: SourceSection) -> bool:
    """Whether it is on this machine: a shipped sample, or a file or folder of its disk."""
    return source.path.startswith("sample:") or Path(source.path).expanduser().exists()


def pinned(sources: Sequence[SourceSection]) -> list[SourceSection]:
    """The same sources, with each name of the hub at the commit that it stands for now; one at a commit stays.

    Raises:
        BundleFileError: the hub cannot say which.
    """
    return [source if Path(source.path).expanduser().exists() else _pinned(source) for source in sources]


def _pinned(source: SourceSection) -> SourceSection:
    name = _hub_name(source)
    return source if name is None else source.model_copy(update={"path": str(name.pinned())})


def _hub_name(source: SourceSection) -> HubName | None:
    """What a source that is not there names on the hub, if anything."""
    if source.path.startswith("sample:") or containers.suffix_of(source.path) in containers.SUFFIXES:
        return None
    if source.format != AUTO and make_format(source.format).whole_folder:
        return None
    return HubName.parse(source.path)


def _files_of(folder: Place) -> list[Place]:
    return [
        file
        for file in folder.iterdir()
        if containers.suffix_of(file.name) in containers.SUFFIXES and not file.name.startswith(".")
    ]


def _format_of_folder(folder: Place, format: str) -> str | None:
    """The format that reads the folder as a whole, if one does."""
    if format != AUTO:
        whole = make_format(format).whole_folder
        if whole and not folder.is_local:
            raise BundleFileError(
                f"{str(folder)!r}: format {format!r} reads folders by their path alone; copy it to one"
            )
        return format if whole else None
    if not folder.is_local:
        return None
    return next((name for name, known in _known_formats().items() if known.recognises_folder(Path(folder))), None)


def _joined_format(files: list[Place], format: str) -> str | None:
    """The format that joins bundles over all files of a folder, if one does; `auto` looks at the first record.

    A file that cannot be read is left for the reading itself to report.
    """
    if format != AUTO:
        return format if make_format(format).joins_files else None
    try:
        name, found = _recognise(containers.open_records(str(files[0])))
    except BundleFileError:
        return None
    return name if found.joins_files else None


# ----------------------------------------------------------------------------------------------------- which format


def make_format(name: str) -> Format:
    """The format of a name.

    Raises:
        UnknownComponentError: there is no such format; the message lists the known ones.
    """
    component = resolve("format", name)
    if not issubclass(component, Format):
        raise BundleFileError(f"format {name!r} is {component!r}, which is not a mlc_ray.data.formats.base.Format")
    return component()


@cache
def _known_formats() -> dict[str, Format]:
    """What `auto` compares a file with: formats shipped or announced by an installed package, most needed keys first.

    A format that some module has merely registered is not among them: another process may not have imported it.
    """
    announced = {entry.name for entry in importlib.metadata.entry_points(group="mlc_ray.format")}
    found = {name: make_format(name) for name in names("format")}
    found = {n: f for n, f in found.items() if n in announced or type(f).__module__.startswith(_SHIPPED)}
    return dict(sorted(found.items(), key=lambda item: (-len(item[1].needs), item[0])))


def _recognise(opened: Opened) -> tuple[str, Format]:
    """The format of a file by the keys of its first record."""
    keys = opened.keys()
    formats = _known_formats()
    fitting = [name for name, known in formats.items() if known.recognises(keys)]
    best = [name for name in fitting if len(formats[name].needs) == len(formats[fitting[0]].needs)]
    if len(best) != 1:
        raise BundleFileError(_unrecognised(opened.path, keys, best))
    return best[0], formats[best[0]]


def _unrecognised(path: str, keys: frozenset[str], best: Sequence[str]) -> str:
    found = f"the first record's keys {sorted(keys)!r}"
    if best:
        return f"{path}: cannot tell the format: {found} are of {' and of '.join(best)}; set the source's format"
    known = [f"{name} (has {', '.join(sorted(one.needs))})" for name, one in _known_formats().items() if one.needs]
    return (
        f"{path}: cannot tell the format from {found}; expected one of {', '.join(known)}, table (a column per "
        "language code, and any of id, kind, source, category); or set the source's format"
    )


def _code_of(format: str) -> str | None:
    """Fingerprint of the module of a format from outside this package: token rows made by other code are stale."""
    if format == AUTO or (component := resolve("format", format)).__module__.startswith(_SHIPPED):
        return None
    return _fingerprint_of_code(format, component)


def _fingerprint_of_code(format: str, component: type) -> str:
    try:
        return fingerprint(Path(inspect.getfile(component)).read_text(encoding="utf-8"))
    except (TypeError, OSError):
        raise BundleFileError(f"format {format!r} has no source file; put the class into a module on disk") from None


# --------------------------------------------------------------------------------------------- from file to bundles


@dataclass
class Seen:
    """How many records a source, or a part of it, had, and how many of them are of the kind that `only` asks for."""

    records: int = 0
    kept: int = 0

    def add(self, other: Seen) -> None:
        """Count another part of the source too."""
        self.records += other.records
        self.kept += other.kept

    def check(self, file: SourceFile) -> None:
        """Refuse a source of which nothing can be used.

        Raises:
            BundleFileError: there is no record, or none of the kind.
        """
        if not self.records:
            raise BundleFileError(f"{file.path}: no prompts in it")
        if not self.kept:
            raise BundleFileError(
                f"{file.path}: only={file.only!r}, share={file.share:g} leave none of its {self.records} bundles"
            )


@dataclass(frozen=True)
class Reading:
    """What one task reads: a source, or a part of it."""

    file: SourceFile
    part: Part | None = None
    seen: Seen = field(default_factory=Seen)

    def rows(self) -> Iterator[Row]:
        """Every record, each with its file and line: a bundle, or a rejected row; `seen` counts them.

        Where a record is a bundle they come in the file's order; where bundles are joined from several rows, rejected
        rows come first. Unknown keys of single JSON records reject those records only.

        Raises:
            BundleFileError: the whole file is at fault: missing, not UTF-8, no rows, unknown columns, a language's
                column without a single prompt, or a format that cannot be told.
        """
        for row in _rows(self.file, self.part):
            self.seen.records += 1
            if isinstance(row.parsed, RejectedRow) or self.file.takes(row.parsed):
                self.seen.kept += 1
                yield row


def readings_of(file: SourceFile, contents: dict[Place, Content], *, blocks: int) -> list[Reading]:
    """A source cut into parts of about `blocks` blocks, where its format reads parts; else one reading of the whole."""
    path = Place(file.path)
    small = path in contents and len(contents[path].digests) <= blocks
    return [Reading(file)] if small else _parts_of(file, contents.get(path), blocks) or [Reading(file)]


def _parts_of(file: SourceFile, content: Content | None, blocks: int) -> list[Reading]:
    """The parts of a source; none where it is read in one go."""
    path, name = Place(file.path), file.format
    if path.is_dir() and not columnar.is_saved_dataset(path):
        return []
    try:
        if name == AUTO:
            name, _ = _recognise(containers.open_records(file.path))
        if not make_format(name).reads_parts:
            return []
    except BundleFileError:  # for the reading itself to report
        return []
    line_breaks = content.line_breaks if content is not None else []
    parts = containers.parts_of(file.path, line_breaks, BLOCK_BYTES, blocks)
    return [Reading(replace(file, format=name), part) for part in parts]


def _rows(file: SourceFile, part: Part | None) -> Iterator[Row]:
    if file.format != AUTO and (reader := make_format(file.format)).whole_folder:
        return reader.read_folder(file.path, file.kind)
    folder = Place(file.path)
    if folder.is_dir() and not columnar.is_saved_dataset(folder):
        return _rows_of_folder(folder, file)
    form, opened = _open(file.path, part, file.format)
    return form.read([opened], file.kind)


def _rows_of_folder(folder: Place, file: SourceFile) -> Iterator[Row]:
    opened = [_open(str(path), None, file.format) for path in _files_of(folder)]
    form = opened[0][0]
    if not form.joins_files:
        raise BundleFileError(f"{file.path}: a folder; its files hold whole bundles and are read one by one")
    return form.read([one for _, one in opened], file.kind)


def _open(path: str, part: Part | None, format: str) -> tuple[Format, Opened]:
    """The format of a file, and the records of it, or of a part of it."""
    form = None if format == AUTO else make_format(format)
    opened = containers.open_records(path, part, container=form.container if form is not None else None)
    if form is None:
        _, form = _recognise(opened)
    if opened.columns is not None:
        form.check_columns(opened.columns, path)
    return form, opened


# ------------------------------------------------------------------------------------------------ bundles as tables


def parse(reading: Reading, languages: list[str] | None, others: int | None = None) -> Iterator[pa.Table]:
    """What `reading` reads as tables of `PARSED`, 512 rows each.

    Bundles are restricted as by `select_languages`; their ids stay those of the whole content.

    Raises:
        BundleFileError: as `Reading.rows`.
    """
    rows = (
        {"file": file, "line": line, **_columns(parsed, languages, others)} for file, line, parsed in reading.rows()
    )
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        yield pa.Table.from_pylist(some, schema=PARSED)


def _columns(parsed: Bundle | RejectedRow, languages: list[str] | None, others: int | None) -> dict[str, Any]:
    if isinstance(parsed, RejectedRow):
        # A lone surrogate that JSON escapes let through has no UTF-8 form; Arrow would refuse the whole table.
        return {"reason": parsed.reason, "text": parsed.text.encode("utf-8", "backslashreplace").decode("utf-8")}
    try:
        return bundle_columns(parsed, select_languages(parsed, languages, others))
    except BundleError as error:
        return {"reason": str(error), "text": json.dumps(bundle_columns(parsed), ensure_ascii=False)}
