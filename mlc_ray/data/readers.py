"""Files -> records with their place -> bundles or rejected rows.

Two questions are kept apart. The *container* (JSONL, JSON array, Parquet, CSV, Hugging Face dataset) says where a
record stands; the *shape* (`mlc`, `preference`, `sft`, `multijail`) says which bundle it describes. To add a format,
write a function from one record to a raw bundle mapping and register it in `SHAPES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_ray.config import SourceSection
from mlc_ray.data import containers
from mlc_ray.data.bundles import FIELDS, BundleError, BundleFileError, RejectedRow, check_language, make_bundle
from mlc_ray.types import Bundle

SAMPLES = ("train", "test")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

# The published formats do not record the language of their answers and of the column `prompt`: it is English.
_ANSWER_LANGUAGE = "en"
_PROMPT_COLUMN = re.compile(r"prompt_(.+)")


@dataclass(frozen=True)
class SourceFile:
    """One thing to read in one go: a file, a saved dataset folder, or a hub dataset (`NAME` or `NAME:SPLIT`)."""

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
    path = Path(__file__).parent / "sample" / f"{name}.jsonl"
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
        files = sorted(p for p in path.iterdir() if p.suffix in containers.SUFFIXES and not p.name.startswith("."))
        if not files:
            raise BundleFileError(
                f"folder {name!r} holds no {', '.join(containers.SUFFIXES)} file and no saved dataset"
            )
        return [SourceFile(str(p), source.format, source.kind, source.only) for p in files]
    if source.format in ("auto", "dataset") and path.suffix not in containers.SUFFIXES and _HUB_NAME.fullmatch(name):
        return [SourceFile(name, "dataset", source.kind, source.only)]
    raise BundleFileError(f"{name!r} does not exist")


# --------------------------------------------------------------------------------------------- from file to bundles


def read_file(file: SourceFile) -> Iterator[tuple[int, Bundle | RejectedRow]]:
    """Every record of a file in order, as (line or row number from 1, bundle or rejected row).

    Raises `BundleFileError` for what concerns the whole file: missing, not UTF-8, no rows, unknown columns, or a
    format that cannot be told. Unknown keys of single JSON records reject those records only.
    """
    columns, records = containers.open_records(file.path, csv_expected=file.format == "multijail")
    shape = None if file.format in ("auto", "dataset") else file.format
    rows = kept = 0
    if columns is not None:
        shape = shape or _detect(columns, file.path)
        _check_columns(columns, shape, file.path)
    for record in records:
        rows += 1
        if record.fields is None:
            kept += 1
            yield record.line, RejectedRow(file.path, record.line, record.reason, record.text)
            continue
        shape = shape or _detect(record.fields, file.path)
        parsed: Bundle | RejectedRow
        try:
            parsed = make_bundle(_with_kind(SHAPES[shape].convert(record.fields), file.kind, shape))
        except BundleError as error:
            parsed = RejectedRow(file.path, record.line, str(error), record.text)
        if isinstance(parsed, RejectedRow) or file.only in (None, parsed.kind):
            kept += 1
            yield record.line, parsed
    if not rows:
        raise BundleFileError(f"{file.path}: no rows in it")
    if not kept:
        raise BundleFileError(f"{file.path}: none of its {rows} bundles is of kind {file.only!r}, as `only` asks")


def _detect(keys: Iterable[str], path: str) -> str:
    present = set(keys)
    for name, shape in SHAPES.items():
        if shape.marks <= present:
            return name
    raise BundleFileError(
        f"{path}: cannot tell the format from the first record's keys {sorted(present)!r}; expected one of "
        + ", ".join(f"{name} (has {', '.join(sorted(shape.marks))})" for name, shape in SHAPES.items())
        + "; or set the source's format"
    )


def _check_columns(columns: Iterable[str], shape: str, path: str) -> None:
    names = list(columns)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BundleFileError(f"{path}: columns {repeated!r} appear more than once")
    if missing := sorted(SHAPES[shape].marks - set(names)):
        raise BundleFileError(f"{path}: format {shape!r} needs columns {missing!r}; the file has {names!r}")
    for name in names:
        try:
            SHAPES[shape].check_key(name)
        except BundleError as error:
            raise BundleFileError(f"{path}: columns: {error}") from None


def _with_kind(raw: dict[str, Any], kind: str | None, shape: str) -> dict[str, Any]:
    recorded = raw.get("kind")
    if recorded is not None and kind is not None and recorded != kind:
        raise BundleError(f"the row says kind {recorded!r}, the source's setting says kind {kind!r}")
    return {**raw, "kind": recorded or kind or (None if shape == "mlc" else "harmful")}


# ------------------------------------------------------------------------------------------------------- the shapes


def from_mlc(record: Mapping[str, Any]) -> dict[str, Any]:
    """Our own format: the fields of a bundle; `pair` and `split`, which tie matched bundles together, are ignored."""
    return {key: value for key, value in record.items() if key not in _MLC_IGNORED}


def from_preference(record: Mapping[str, Any]) -> dict[str, Any]:
    """Published preference format: `prompt`, `prompt_xx`, `chosen`, `rejected` as messages {from, value} or text."""
    _check_keys(record, _check_preference_key)
    return {
        "prompts": {_ANSWER_LANGUAGE: _said(record.get("prompt"), "prompt", _USER), **_other_prompts(record)},
        **{
            name: _said(record[name], name, _ASSISTANT)
            for name in ("chosen", "rejected")
            if record.get(name) is not None
        },
        **_labels(record),
    }


def from_sft(record: Mapping[str, Any]) -> dict[str, Any]:
    """Published SFT format: `instruction` and `input` (joined by a line break), `output`, and `prompt_xx`."""
    _check_keys(record, _check_sft_key)
    parts = [_said(record[name], name, _USER) for name in ("instruction", "input") if record.get(name)]
    if odd := [part for part in parts if not isinstance(part, str)]:
        raise BundleError(f"instruction and input are texts, not {odd[0]!r}")
    return {
        "prompts": {_ANSWER_LANGUAGE: "\n".join(parts), **_other_prompts(record)},
        "chosen": record.get("output"),
        **_labels(record),
    }


def from_multijail(record: Mapping[str, Any]) -> dict[str, Any]:
    """MultiJail's CSV: one column per language; an empty cell is a language that the bundle lacks."""
    texts = {key: text for key, text in record.items() if key not in _MULTIJAIL_LABELS}
    prompts = {key: text for key, text in texts.items() if not isinstance(text, str) or text.strip()}
    return {"prompts": prompts, "source": record.get("source"), "category": record.get("tags")}


_MLC_IGNORED = frozenset({"pair", "split"})
_MULTIJAIL_LABELS = frozenset({"id", "source", "tags"})
_LABELS = frozenset({"id", "source", "category"})
_USER = ("human", "user")
_ASSISTANT = ("gpt", "assistant")


def _check_mlc_key(key: str) -> None:
    if key not in _MLC_IGNORED and key not in FIELDS:
        raise BundleError(f"unknown key {key!r}; a bundle has {', '.join(FIELDS)}")


def _check_preference_key(key: str) -> None:
    _check_published_key(key, ("prompt", "chosen", "rejected"))


def _check_sft_key(key: str) -> None:
    _check_published_key(key, ("instruction", "input", "output"))


def _check_published_key(key: str, own: tuple[str, ...]) -> None:
    if key in own or key in _LABELS:
        return
    if not (match := _PROMPT_COLUMN.fullmatch(key)):
        raise BundleError(f"unknown key {key!r}; expected {', '.join(own)}, prompt_<language>")
    if check_language(match[1], f"key {key!r}") == _ANSWER_LANGUAGE:
        raise BundleError(f"key {key!r} repeats the prompt in {_ANSWER_LANGUAGE!r}, which this format keeps elsewhere")


def _check_multijail_key(key: str) -> None:
    if key not in _MULTIJAIL_LABELS:
        check_language(key, f"column {key!r}")


def _check_keys(record: Mapping[str, Any], check: Callable[[str], None]) -> None:
    for key in record:
        check(key)


def _other_prompts(record: Mapping[str, Any]) -> dict[str, str]:
    columns = {key: match[1] for key in record if (match := _PROMPT_COLUMN.fullmatch(key))}
    return {code: _said(record[key], key, _USER) for key, code in columns.items() if record[key] is not None}


def _labels(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("source", "category") if record.get(name) is not None}


def _said(value: Any, where: str, roles: tuple[str, ...]) -> Any:
    """The text of one message, given as text, as {from, value}, or as a list of one such message."""
    if isinstance(value, list):
        if len(value) != 1:
            raise BundleError(f"{where} has {len(value)} messages; only single-turn prompts can be aligned")
        value = value[0]
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"from", "value"}:
        raise BundleError(f"{where}: a message has the keys 'from' and 'value', not {sorted(value)!r}")
    if value["from"] not in roles:
        raise BundleError(f"{where}: the message is from {value['from']!r}, expected one of {list(roles)!r}")
    return value["value"]


@dataclass(frozen=True)
class Shape:
    """A format: the keys that give it away, what it accepts as a key, and how a record becomes a raw bundle."""

    marks: frozenset[str]
    check_key: Callable[[str], None]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]


SHAPES: dict[str, Shape] = {
    "mlc": Shape(frozenset({"prompts"}), _check_mlc_key, from_mlc),
    "preference": Shape(frozenset({"prompt"}), _check_preference_key, from_preference),
    "sft": Shape(frozenset({"instruction"}), _check_sft_key, from_sft),
    "multijail": Shape(frozenset({"id", "source", "tags"}), _check_multijail_key, from_multijail),
}
