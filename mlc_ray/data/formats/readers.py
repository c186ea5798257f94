"""Files -> records with their place -> bundles or rejected rows.

Two questions are kept apart. The *container* (JSONL, JSON array, Parquet, CSV, Hugging Face dataset) says where a
record stands; the *shape* says which bundle it describes. To add a format, write a function from one record to a raw
bundle mapping (`shapes`, `benchmark_shapes`) and register it in `SHAPES`; if a record is one language of a bundle,
write one to a `Piece` and register it in `ALIGNED`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlc_ray.config import SourceSection
from mlc_ray.data.bundles import BundleError, BundleFileError, RejectedRow, make_bundle
from mlc_ray.data.formats import benchmark_shapes, containers, shapes
from mlc_ray.data.formats.benchmark_shapes import AlignedShape
from mlc_ray.data.formats.containers import Record
from mlc_ray.data.formats.joined import Placed, Row, is_xsafety, join, xsafety_pieces
from mlc_ray.data.formats.shapes import Shape, settle_kind
from mlc_ray.types import Bundle

SAMPLES = ("train", "test")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w.-]+)?(:[\w.-]+)?")

# In the order in which an unknown file is compared with them: what has more marks goes first.
SHAPES: dict[str, Shape] = {
    "mlc": shapes.MLC,
    "sft": shapes.SFT,
    "xstest": benchmark_shapes.XSTEST,
    "aya": benchmark_shapes.AYA,
    "preference": shapes.PREFERENCE,
    "multijail": shapes.MULTIJAIL,
    "m-alert": benchmark_shapes.M_ALERT,
    "table": shapes.TABLE,
}
ALIGNED: dict[str, AlignedShape] = {"polyguard": benchmark_shapes.POLYGUARD, "rtp-lx": benchmark_shapes.RTP_LX}
XSAFETY = "xsafety"


@dataclass(frozen=True)
class SourceFile:
    """One thing to read in one go: a file, a saved dataset, a hub dataset (`NAME[@CONFIG][:SPLIT]`), or a folder whose
    files hold languages of the same bundles.
    """

    path: str
    format: str
    kind: str | None = None
    only: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is a path on disk, and not a name on the hub."""
        return Path(self.path).exists()


# ------------------------------------------------------------------------------------------- from source to files


def sample_path(name: str) -> Path:
    """The shipped sample `train` or `test`; raises `BundleFileError` for another name, or if the file is not there."""
    if name not in SAMPLES:
        raise BundleFileError(f"'sample:{name}' is not shipped; choose one of {[f'sample:{s}' for s in SAMPLES]}")
    path = Path(__file__).parents[1] / "sample" / f"{name}.jsonl"
    if not path.is_file():
        raise BundleFileError(f"'sample:{name}' should be at {str(path)!r}, but the installation lacks it")
    return path


def resolve_source(source: SourceSection) -> list[SourceFile]:
    """What a source of the config stands for, in a fixed order. Raises `BundleFileError` if there is nothing there."""
    name = source.path
    if name.startswith("sample:"):
        return [SourceFile(str(sample_path(name.removeprefix("sample:"))), "mlc", source.kind, source.only)]
    path = Path(name).expanduser().absolute()  # tasks run elsewhere, with another working directory
    if path.is_file():
        if source.format == "dataset":
            raise BundleFileError(
                f"{name!r} is a file; format 'dataset' is a folder saved by save_to_disk or a hub name"
            )
        return [SourceFile(str(path), source.format, source.kind, source.only)]
    if path.is_dir():
        if containers.is_saved_dataset(path):
            return [SourceFile(str(path), source.format, source.kind, source.only)]
        if source.format == XSAFETY or (source.format == "auto" and is_xsafety(path)):
            return [SourceFile(str(path), XSAFETY, source.kind, source.only)]
        files = _files_of(path)
        if not files:
            raise BundleFileError(
                f"folder {name!r} holds no {', '.join(containers.SUFFIXES)} file and no saved dataset"
            )
        if (joined := _joined_format(files, source.format)) is not None:
            return [SourceFile(str(path), joined, source.kind, source.only)]
        return [SourceFile(str(p), source.format, source.kind, source.only) for p in files]
    if source.format != XSAFETY and path.suffix not in containers.SUFFIXES and _HUB_NAME.fullmatch(name):
        return [SourceFile(name, "dataset" if source.format == "auto" else source.format, source.kind, source.only)]
    raise BundleFileError(f"{name!r} does not exist")


def _files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in containers.SUFFIXES and not p.name.startswith("."))


def _joined_format(files: list[Path], format: str) -> str | None:
    """The format whose rows are joined over all files of a folder, if it is one; `auto` looks at the first record.

    A file that cannot be read is left for the reading itself to report.
    """
    if format != "auto":
        return format if format in ALIGNED else None
    try:
        columns, records = containers.open_records(str(files[0]))
        keys = columns if columns is not None else next((r.fields for r in records if r.fields is not None), ())
    except BundleFileError:
        return None
    return next((name for name, shape in ALIGNED.items() if shape.recognises(frozenset(keys or ()))), None)


# --------------------------------------------------------------------------------------------- from file to bundles


def read_file(file: SourceFile) -> Iterator[Row]:
    """Every record of a source, each with its file and line: a bundle, or a rejected row.

    Where a record is a bundle they come in the file's order; where bundles are joined from several rows, rejected rows
    come first. Raises `BundleFileError` for what concerns a whole file: missing, not UTF-8, no rows, unknown columns, a
    language column without a single prompt, or a format that cannot be told. Unknown keys of single JSON records reject
    those records only.
    """
    rows = kept = 0
    for row in _all_rows(file):
        rows += 1
        if isinstance(row.parsed, RejectedRow) or file.only in (None, row.parsed.kind):
            kept += 1
            yield row
    if not rows:
        raise BundleFileError(f"{file.path}: no prompts in it")
    if not kept:
        raise BundleFileError(f"{file.path}: none of its {rows} bundles is of kind {file.only!r}, as `only` asks")


def _all_rows(file: SourceFile) -> Iterator[Row]:
    if file.format == XSAFETY:
        pieces = xsafety_pieces(file.path, settle_kind(None, file.kind, "harmful", "") or "harmful")
        return join(pieces, split_kinds=False)
    folder = Path(file.path)
    joined = folder.is_dir() and not containers.is_saved_dataset(folder)
    if joined and file.format not in ALIGNED:
        raise BundleFileError(f"{file.path}: a folder; its files hold whole bundles and are read one by one")
    opened = [_open(str(path), file.format) for path in (_files_of(folder) if joined else [file.path])]
    shape, first = opened[0]
    if isinstance(shape, AlignedShape):
        return join(_pieces((item for _, item in opened), shape, file.kind), split_kinds=shape.split_kinds)
    return _bundles(first, shape, file)


@dataclass(frozen=True)
class _Opened:
    path: str
    columns: list[str] | None
    records: Iterator[Record]


def _open(path: str, format: str) -> tuple[Shape | AlignedShape, _Opened]:
    """The format of a file, and its records; raises `BundleFileError` if there are none or its columns do not fit."""
    columns, records = containers.open_records(path, csv_expected=format in ("multijail", "table"))
    name = None if format in ("auto", "dataset") else format
    shape = None if name is None else _shape(name)
    skipped: list[Record] = []
    if columns is None and shape is None:  # the first record that can be read tells
        for record in records:
            skipped.append(record)
            if record.fields is not None:
                break
        if not skipped:
            raise BundleFileError(f"{path}: no rows in it")
    keys = columns if columns is not None else next((r.fields for r in reversed(skipped) if r.fields is not None), None)
    if shape is None:
        if keys is None:
            raise BundleFileError(f"{path}: no record of it can be read: line {skipped[0].line}: {skipped[0].reason}")
        shape = _detect(keys, path)
    if columns is not None:
        _check_columns(columns, shape, path)
    return shape, _Opened(path, columns, _not_empty(path, skipped, records))


def _not_empty(path: str, skipped: list[Record], records: Iterator[Record]) -> Iterator[Record]:
    empty = not skipped
    yield from skipped
    for record in records:
        empty = False
        yield record
    if empty:
        raise BundleFileError(f"{path}: no rows in it")


def _bundles(opened: _Opened, shape: Shape, file: SourceFile) -> Iterator[Row]:
    seen: dict[str, int] = {}
    silent = {name for name in opened.columns or () if shape.languages is not None and shape.languages(name)}
    for record in opened.records:
        silent -= {key for key, text in (record.fields or {}).items() if not isinstance(text, str) or text.strip()}
        yield Row(opened.path, record.line, _bundle_or_rejected(record, shape, file.kind, opened.path, seen))
    if silent:
        raise BundleFileError(
            f"{opened.path}: the columns {sorted(silent)!r} hold no prompt in any row; fill them, or take them out"
        )


def _bundle_or_rejected(
    record: Record, shape: Shape, kind: str | None, path: str, seen: dict[str, int]
) -> Bundle | RejectedRow:
    """The record as a `Bundle`, or as a `RejectedRow` that says why it is none. `seen` has the line of every id."""
    if record.fields is None:
        return RejectedRow(path, record.line, record.reason, record.text)
    try:
        _check_id(record, shape.ids, path, seen)
        raw = shape.convert(record.fields)
        settled = settle_kind(raw.get("kind"), kind, shape.default_kind, shape.kind_from)
        return make_bundle({**raw, "kind": settled})
    except BundleError as error:
        return RejectedRow(path, record.line, str(error), record.text)


def _check_id(record: Record, names: tuple[str, ...], path: str, seen: dict[str, int]) -> None:
    fields = record.fields or {}
    name = next((name for name in names if name in fields), None)
    if name is None:
        return
    value = fields[name]
    text = str(value)
    if not text.strip():
        raise BundleError(f"column {name!r} is blank; give every row an id, or none")
    if name == "id" and re.search(r"\s", text.strip()):
        raise BundleError(
            f"column 'id' says {text!r}: it names rows and holds no blanks; a column of Indonesian prompts is called "
            "'id-ID'"
        )
    if text in seen:
        raise BundleError(f"{name} {text!r} was given already, at {path}:{seen[text]}")
    seen[text] = record.line


def _pieces(opened: Iterable[_Opened], shape: AlignedShape, kind: str | None) -> Iterator[Placed | RejectedRow]:
    for file in opened:
        for record in file.records:
            if record.fields is None:
                yield RejectedRow(file.path, record.line, record.reason, record.text)
                continue
            try:
                piece = shape.convert(record.fields)
                if piece is not None:
                    yield Placed(file.path, record.line, piece, settle_kind(piece.kind, kind, None, shape.kind_from))
            except BundleError as error:
                yield RejectedRow(file.path, record.line, str(error), record.text)


def _shape(name: str) -> Shape | AlignedShape:
    return SHAPES[name] if name in SHAPES else ALIGNED[name]


def _detect(keys: Iterable[str], path: str) -> Shape | AlignedShape:
    present = frozenset(keys)
    formats: Mapping[str, Shape | AlignedShape] = {**ALIGNED, **SHAPES}
    for shape in formats.values():
        if shape.recognises(present):
            return shape
    known = [f"{name} (has {', '.join(sorted(shape.marks))})" for name, shape in formats.items() if shape.marks]
    raise BundleFileError(
        f"{path}: cannot tell the format from the first record's keys {sorted(present)!r}; expected one of "
        f"{', '.join(known)}, table (a column per language code, and any of id, kind, source, category); or set the "
        "source's format"
    )


def _check_columns(columns: Iterable[str], shape: Shape | AlignedShape, path: str) -> None:
    names = list(columns)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BundleFileError(f"{path}: columns {repeated!r} appear more than once")
    if missing := sorted(shape.marks - set(names)):
        raise BundleFileError(f"{path}: this format needs columns {missing!r}; the file has {names!r}")
    for name in names:
        try:
            shape.check_key(name)
        except BundleError as error:
            raise BundleFileError(f"{path}: columns: {error}") from None
