"""The two Arrow tables that data are in between tasks: bundles as text, and bundles as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlc_ray.data.bundles import KINDS
from mlc_ray.types import Bundle, TokenRow

ANSWERS = ("chosen", "rejected")
"""The columns of answers in the response language, in both tables, and the fields of each of the further `answers`."""

Keys: TypeAlias = npt.NDArray[np.uint64]

_TEXT = pa.string()
_IDS = pa.list_(pa.int32())
_FURTHER = pa.struct({"prompt": pa.int32(), "chosen": _IDS, "rejected": _IDS})

BUNDLES = pa.schema(
    {
        "bundle_id": _TEXT,
        "kind": _TEXT,
        "languages": pa.list_(_TEXT),
        "texts": pa.list_(_TEXT),
        "chosen": _TEXT,
        "rejected": _TEXT,
        "response_language": _TEXT,
        "answers": pa.list_(pa.struct({"language": _TEXT, "chosen": _TEXT, "rejected": _TEXT})),
        "source": _TEXT,
        "category": _TEXT,
        "pair": _TEXT,
        "file": _TEXT,
        "line": pa.int64(),
    }
)
"""A row per bundle: its prompts as two parallel lists, `languages` (sorted) and `texts`, and where it stood.

A struct column would need one field per language of the whole data set; lists need none.
"""

TOKENS = pa.schema(
    [
        pa.field("bundle_id", _TEXT, nullable=False),
        pa.field("key", pa.uint64(), nullable=False),
        pa.field("kind", pa.dictionary(pa.int8(), _TEXT), nullable=False),  # the dictionary is always KINDS
        pa.field("languages", pa.list_(_TEXT), nullable=False),
        pa.field("prompts", pa.list_(_IDS), nullable=False),
        pa.field("tapped", _IDS, nullable=False),
        pa.field("response_prompt", pa.int32(), nullable=False),
        pa.field("chosen", _IDS),
        pa.field("rejected", _IDS),
        pa.field("answers", pa.list_(_FURTHER), nullable=False),
        pa.field("truncated_prompt_tokens", pa.int32(), nullable=False),
        pa.field("truncated_response_tokens", pa.int32(), nullable=False),
        pa.field("pair", _TEXT, nullable=False),
        pa.field("cut", _IDS, nullable=False),  # tokens each prompt lost, parallel to languages
    ]
)
"""A row per bundle, with the fields of `TokenRow`, the `key` of its id (see `keys_of`), and `cut`."""

_ROW_FIELDS = tuple(name for name in TOKENS.names if name not in ("key", "cut"))


def keys_of(bundle_ids: Iterable[str]) -> Keys:
    """Bundle ids as numbers, [N]: the first 8 bytes of each one's BLAKE2b hash, little-endian.

    Where a data set is ordered, compared or searched for repeats, its ids are these: 8 bytes a bundle instead of a
    Python string's 65. Two of ten million ids collide with a probability of 3e-6; `prepare_token_rows` refuses that.
    """
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in bundle_ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def token_table(columns: dict[str, list[Any]]) -> pa.Table:
    """A table of `TOKENS` from lists of all its columns but `key`."""
    kinds = pa.array([KINDS.index(kind) for kind in columns["kind"]], pa.int8())
    arrays = {
        **columns,
        "key": keys_of(columns["bundle_id"]),
        "kind": pa.DictionaryArray.from_arrays(kinds, pa.array(KINDS)),
    }
    return pa.table({name: arrays[name] for name in TOKENS.names}, schema=TOKENS)


def bundle_columns(bundle: Bundle, languages: Sequence[str] | None = None) -> dict[str, Any]:
    """A bundle as a row of `BUNDLES`, without its place; restricted to `languages` (sorted; None: all)."""
    kept = sorted(bundle.prompts) if languages is None else list(languages)
    lists = {
        "languages": kept,
        "texts": [bundle.prompts[code] for code in kept],
        "answers": [{"language": code, **vars(pair)} for code, pair in bundle.answers.items() if code in kept],
    }
    names = [name for name in BUNDLES.names if name not in ("file", "line")]
    return {name: lists[name] if name in lists else getattr(bundle, name) for name in names}


def rows_to_table(rows: Sequence[TokenRow]) -> pa.Table:
    """Token rows as a table of `TOKENS`, for small calls; which prompt lost tokens is no longer known (`cut` is 0)."""
    columns = {name: [getattr(row, name) for row in rows] for name in _ROW_FIELDS}
    return token_table({**columns, "cut": [[0] * len(row.languages) for row in rows]})


def table_to_rows(table: pa.Table | pa.RecordBatch) -> list[TokenRow]:
    """The token rows of a table that has (at least) the columns of `TOKENS`, for small calls."""
    return [TokenRow(**row) for row in table.select(_ROW_FIELDS).to_pylist()]
