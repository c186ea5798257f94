"""JSONL, JSON arrays, Parquet, CSV and Hugging Face datasets as records with their line or row numbers.

Nothing here knows what a bundle is. Nothing here runs code or unpickles: Parquet and Arrow are data formats, and
`datasets` (5 and later) runs no scripts.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, Literal, cast

from mlc_ray.data.bundles import BundleFileError
from mlc_ray.data.formats.columnar import open_dataset, open_parquet, parts_of_dataset, parts_of_parquet
from mlc_ray.data.formats.records import Part, Record
from mlc_ray.storage import Place

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_DELIMITERS = (",", ";", "\t")


@dataclass(eq=False)
class Opened:
    """A file's records, which can be gone through once, and the names of its columns (None for JSON).

    Of a file there must be some, of a part of it there need not.
    """

    path: str
    columns: list[str] | None
    records: Iterator[Record]
    may_be_empty: bool = False

    def keys(self) -> frozenset[str]:
        """The columns, or the keys of the first record that can be read; it is not lost.

        Raises:
            BundleFileError: there is no record, or none that can be read.
        """
        if self.columns is not None:
            return frozenset(self.columns)
        peeked: list[Record] = []
        for record in self.records:
            peeked.append(record)
            if record.fields is not None:
                self.records = chain(peeked, self.records)
                return frozenset(record.fields)
        found = f"no record of it can be read: line {peeked[0].line}: {peeked[0].reason}" if peeked else "no rows in it"
        raise BundleFileError(f"{self.path}: {found}")

    def __iter__(self) -> Iterator[Record]:
        empty = True
        for record in self.records:
            empty = False
            yield record
        if empty and not self.may_be_empty:
            raise BundleFileError(f"{self.path}: no rows in it")


def open_records(path: str, part: Part | None = None, *, container: Literal["csv"] | None = None) -> Opened:
    """The records of a file, folder or hub dataset, or of one of its `parts_of`.

    A file without a known suffix is read as `container`.

    Raises:
        BundleFileError: at once or while iterating, when the file cannot be read as what its suffix says.
    """
    if suffix_of(path) in (".jsonl", ".json") and not _is_dataset(path):
        return Opened(path, None, _json_records(path, part), may_be_empty=part is not None)
    return _open_table(path, part, container)


def _open_table(path: str, part: Part | None, container: Literal["csv"] | None) -> Opened:
    suffix = suffix_of(path)
    if _is_dataset(path):
        return Opened(path, *open_dataset(path, part), may_be_empty=part is not None)
    if suffix == ".parquet":
        return Opened(path, *open_parquet(path, part), may_be_empty=part is not None)
    if suffix in (".csv", ".tsv") or container == "csv":
        return Opened(path, *_open_csv(path))
    raise BundleFileError(f"{path}: the suffix {suffix!r} is not one of {', '.join(SUFFIXES)}")


def parts_of(path: str, line_breaks: list[int], block_bytes: int, blocks: int) -> list[Part]:
    """A file or dataset cut into parts of about `blocks * block_bytes` each; nothing where it is read in one go.

    Args:
        path: of a file, folder or hub dataset.
        line_breaks: in each block of the file (JSON lines only).
        block_bytes: the size of a block.
        blocks: how many blocks a part has.
    """
    suffix = suffix_of(path)
    if _is_dataset(path):
        return parts_of_dataset(path, block_bytes * blocks)
    if suffix == ".parquet":
        return parts_of_parquet(path, block_bytes * blocks)
    if suffix not in (".jsonl", ".json") or len(line_breaks) < 2 or _is_array(path):
        return []
    ends = range(blocks, len(line_breaks) + blocks, blocks)
    return [Part((n - blocks) * block_bytes, n * block_bytes, 1 + sum(line_breaks[: n - blocks])) for n in ends]


def suffix_of(path: str) -> str:
    """The ending of a file's name, by its path or URL: `.jsonl`."""
    return PurePath(path).suffix


def _is_dataset(path: str) -> bool:
    """Whether it is a folder or a hub name, and neither a file nor a pipe."""
    place = Place(path)
    return place.is_dir() or not place.exists()


# ----------------------------------------------------------------------------------------------------------- JSON


def _is_array(path: str) -> bool:
    with Place(path).open() as file:
        start = file.read(1 << 16)
    return start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _json_records(path: str, part: Part | None) -> Iterator[Record]:
    lines = _lines(path, part)
    is_first = part is None  # only a whole file can be an array
    for line, text in lines:
        if not text.strip():
            continue
        if is_first and text.lstrip().startswith("["):
            yield from _array_records(path, line, text + "".join(text for _, text in lines))
            return
        is_first = False
        yield _json_record(line, text.strip("\r\n"))


def _json_record(line: int, text: str) -> Record:
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        return Record(line, text, None, f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except (_RepeatedKeyError, RecursionError) as error:
        return Record(line, text, None, f"not valid JSON: {error}")
    return _object_record(line, text, value)


def _object_record(line: int, text: str, value: Any) -> Record:
    if not isinstance(value, dict):
        return Record(line, text, None, f"a record is a JSON object, not {type(value).__name__}")
    return Record(line, text, value)


def _array_records(path: str, line: int, text: str) -> Iterator[Record]:
    """The elements of the JSON array `text`, which begins on `line`, each with the line it starts on."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    position = text.index("[") + 1
    counted = 0

    def skip_blanks(at: int) -> int:
        while at < len(text) and text[at].isspace():
            at += 1
        return at

    while True:
        position = skip_blanks(position)
        if text[position : position + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, _RepeatedKeyError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise BundleFileError(f"{path}:{line}: not valid JSON: {reason}") from None
        yield _object_record(line, text[position:end], value)
        position = skip_blanks(end)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            raise BundleFileError(f"{path}:{line}: not valid JSON: expected ',' or ']' after this record")


class _RepeatedKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:  # json would keep the last one in silence
            raise _RepeatedKeyError(f"key {key!r} appears twice")
        result[key] = value
    return result


# ------------------------------------------------------------------------------------------------------- CSV, text


def _lines(path: str, part: Part | None = None) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, a byte-order mark removed; of a part, those that start in it.

    Raises:
        BundleFileError: The file is not UTF-8.
    """
    number = offset = 0
    try:
        with Place(path).open() as opened:
            # Objects of a store are read by ranges, each of which is a request: lines are cut from 8 MiB at a time.
            file = opened if Place(path).is_local else io.BufferedReader(cast(Any, opened), 8 << 20)
            if part is not None and part.start:
                number, offset = _skip_to(part, file)
            for raw in file:
                if part is not None and offset >= part.stop:
                    return
                number += 1
                if number == 1:
                    _refuse_utf_16(path, raw)
                yield number, (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode("utf-8")
                offset += len(raw)
    except UnicodeDecodeError as error:
        raise BundleFileError(_not_utf_8(path, number, offset + len(raw) - len(error.object), error)) from None
    except OSError as error:
        raise BundleFileError(f"{path}: cannot be read: {error.strerror}") from None


def _skip_to(part: Part, file: Any) -> tuple[int, int]:
    """Go to the first line that starts in `part`; the number of the line before it, and the line's first byte."""
    file.seek(part.start - 1)
    rest = file.readline()  # of a line that the part before has; a mere line break is none
    return part.line - 1 + (rest != b"\n"), part.start - 1 + len(rest)


def _not_utf_8(path: str, number: int, offset: int, error: UnicodeDecodeError) -> str:
    """What is said of line `number`, whose text (without a byte-order mark) begins at byte `offset` of the file."""
    name = Path(path).name
    return (
        f"{path}:{number}: not UTF-8: byte {error.object[error.start]:#04x} at offset {offset + error.start} of the "
        f"file; find out its encoding and convert it, e.g. `iconv -f WINDOWS-1252 -t UTF-8 {name} > utf8-{name}`"
    )


def _refuse_utf_16(path: str, first: bytes) -> None:
    """Spreadsheets call it "Unicode text". Without its mark it is often valid UTF-8, full of zero bytes."""
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in first:
        how = f"`iconv -f UTF-16 -t UTF-8 {Path(path).name} > utf8-{Path(path).name}`"
        raise BundleFileError(
            f"{path}:1: not UTF-8 but UTF-16, by its byte-order mark or zero bytes; convert it: {how}"
        )


def _open_csv(path: str) -> tuple[list[str], Iterator[Record]]:
    rows = _csv_rows(path, _delimiter(path))
    header = next(rows, None)
    if header is None:
        raise BundleFileError(f"{path}: no rows in it")
    columns = header[1]

    def records() -> Iterator[Record]:
        for line, cells in rows:
            text = json.dumps(cells, ensure_ascii=False)
            if len(cells) != len(columns):
                yield Record(line, text, None, f"{len(cells)} cells instead of {len(columns)}")
            else:
                yield Record(line, text, dict(zip(columns, cells, strict=True)))

    return columns, records()


def headless_csv(path: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of a comma-separated file without column names, each with the line it starts on; empty lines are no rows."""
    return _csv_rows(path, ",")


def _delimiter(path: str) -> str:
    """What separates the column names of a CSV file: comma, semicolon or tab; a comma if there is one column alone.

    Raises:
        BundleFileError: More than one of them would.
    """
    header = next((text for _, text in _lines(path) if text.strip()), "")
    try:
        separating = [mark for mark in _DELIMITERS if len(next(csv.reader([header], delimiter=mark), [])) > 1]
    except csv.Error as error:
        raise BundleFileError(f"{path}: not valid CSV: {error}") from None
    if len(separating) > 1:
        raise BundleFileError(
            f"{path}: cannot tell the delimiter: the first line {header.strip()!r} has {separating!r}; use one of them "
            "and put column names that hold another in quotes"
        )
    return separating[0] if separating else ","


def _csv_rows(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Non-empty rows with the physical line each starts on: a quoted cell may hold line breaks."""
    reader = csv.reader((text for _, text in _lines(path)), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # where the next row would begin can no longer be known
            raise BundleFileError(f"{path}:{line}: not valid CSV: {error}") from None
        if cells:
            yield line, cells
