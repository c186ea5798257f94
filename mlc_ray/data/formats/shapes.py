"""Shapes: which bundle one record describes, where a record holds a whole bundle. Our formats and the published ones.

A shape says nothing of files (`containers`) and reads one record at a time. Benchmarks have their own module,
`benchmark_shapes`; formats whose bundles are spread over several rows are joined by `aligned`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlc_ray.data.bundles import FIELDS, BundleError, check_language

# The published formats do not record the language of their answers and of the column `prompt`: it is English.
_ANSWER_LANGUAGE = "en"
_PROMPT_COLUMN = re.compile(r"prompt_(.+)")

_MLC_IGNORED = frozenset({"pair", "split"})
_MULTIJAIL_LABELS = frozenset({"id", "source", "tags"})
_TABLE_LABELS = frozenset({"id", "kind", "source", "category"})
_LABELS = frozenset({"id", "source", "category"})
_USER = ("human", "user")
_ASSISTANT = ("gpt", "assistant")

Convert = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """A format whose record is a bundle: the keys that give it away, what it accepts as a key, and the conversion.

    `default_kind` is the kind of bundles that neither the record nor the source's setting decides; None if one of them
    must, and then `kind_from` says where the record should have had it. `ids` are the columns that may name a record
    (the first that is there counts; no two records may share an id), and `languages` says whether a column of a table
    is a language.
    """

    marks: frozenset[str]
    check_key: Callable[[str], None]
    convert: Convert
    default_kind: str | None = "harmful"
    kind_from: str = ""
    ids: tuple[str, ...] = ()
    languages: Callable[[str], bool] | None = None
    fits: Callable[[frozenset[str]], bool] | None = None

    def recognises(self, keys: frozenset[str]) -> bool:
        """Whether a record or table with these keys is of this format."""
        return self.marks <= keys and (self.fits is None or self.fits(keys))


def settle_kind(recorded: str | None, setting: str | None, default: str | None, kind_from: str) -> str | None:
    """The kind of a record: what it says itself, else the source's setting, else the format's default.

    Raises `BundleError` when record and setting disagree, or when nothing decides and the format has no default.
    """
    if recorded is not None and setting is not None and recorded != setting:
        raise BundleError(f"the row says kind {recorded!r}, the source's setting says kind {setting!r}")
    settled = recorded or setting or default
    if settled is None and kind_from:
        raise BundleError(f"{kind_from} does not say whether the prompt is harmful or benign; give the source's kind")
    return settled


# ------------------------------------------------------------------------------------------ our own, and the published


def from_mlc(record: Mapping[str, Any]) -> dict[str, Any]:
    """Our own format: the fields of a bundle; `pair` and `split`, which tie matched bundles together, are ignored."""
    return {key: value for key, value in record.items() if key not in _MLC_IGNORED}


def from_preference(record: Mapping[str, Any]) -> dict[str, Any]:
    """Published preference format: `prompt`, `prompt_xx`, `chosen`, `rejected` as messages {from, value} or text."""
    check_keys(record, _check_preference_key)
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
    check_keys(record, _check_sft_key)
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
    prompts = prompts_of_columns(record, _MULTIJAIL_LABELS)
    return {"prompts": prompts, "source": record.get("source"), "category": record.get("tags")}


def from_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """Your own table: one column per language, and any of `id`, `kind`, `source`, `category`."""
    check_keys(record, check_table_key)
    labels = {name: record[name] for name in ("kind", "source", "category") if not _blank(record.get(name))}
    return {"prompts": prompts_of_columns(record, _TABLE_LABELS), **labels}


def prompts_of_columns(record: Mapping[str, Any], labels: Iterable[str]) -> dict[str, Any]:
    """The prompts of a record with a column per language; raises `BundleError` if every one of them is empty."""
    texts = {key: text for key, text in record.items() if key not in labels}
    prompts = {key: text for key, text in texts.items() if not _blank(text)}
    if not prompts:
        raise BundleError(f"no language has a prompt in this row; all of {sorted(texts)!r} are empty")
    return prompts


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


# ----------------------------------------------------------------------------------------------------------- the keys


def check_keys(record: Mapping[str, Any], check: Callable[[str], None]) -> None:
    """Raise `BundleError` for the first key of `record` that `check` does not accept."""
    for key in record:
        check(key)


def check_table_key(key: str) -> None:
    """Raise `BundleError` unless `key` is a language code or one of the labels of a table."""
    if key not in _TABLE_LABELS:
        check_language(
            key, f"column {key!r} (a table has a column per language, and {', '.join(sorted(_TABLE_LABELS))})"
        )


def _is_table(keys: frozenset[str]) -> bool:
    languages = keys - _TABLE_LABELS
    try:
        check_keys(dict.fromkeys(languages), check_table_key)
    except BundleError:
        return False
    return bool(languages)


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


# --------------------------------------------------------------------------------------------------------- the values


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


MLC = Shape(frozenset({"prompts"}), _check_mlc_key, from_mlc, default_kind=None)
PREFERENCE = Shape(frozenset({"prompt"}), _check_preference_key, from_preference)
SFT = Shape(frozenset({"instruction"}), _check_sft_key, from_sft)
MULTIJAIL = Shape(
    frozenset({"id", "source", "tags"}),
    _check_multijail_key,
    from_multijail,
    ids=("id",),
    languages=lambda key: key not in _MULTIJAIL_LABELS,
)
TABLE = Shape(
    frozenset(),
    check_table_key,
    from_table,
    default_kind=None,
    kind_from="the row (it has no `kind`)",
    ids=("id",),
    languages=lambda key: key not in _TABLE_LABELS,
    fits=_is_table,
)
