"""The two Arrow tables that data are in between tasks: bundles as text, and bundles as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from mlc_ray.types import Bundle, TokenRow

_TEXT = pa.string()
_IDS = pa.list_(pa.int32())

BUNDLES = pa.schema(
    {
        "bundle_id": _TEXT,
        "kind": _TEXT,
        "languages": pa.list_(_TEXT),
        "texts": pa.list_(_TEXT),
        "chosen": _TEXT,
        "rejected": _TEXT,
        "response_language": _TEXT,
        "source": _TEXT,
        "category": _TEXT,
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
        pa.field("kind", _TEXT, nullable=False),
        pa.field("languages", pa.list_(_TEXT), nullable=False),
        pa.field("prompts", pa.list_(_IDS), nullable=False),
        pa.field("tapped", _IDS, nullable=False),
        pa.field("response_prompt", pa.int32(), nullable=False),
        pa.field("chosen", _IDS),
        pa.field("rejected", _IDS),
        pa.field("truncated_prompt_tokens", pa.int32(), nullable=False),
        pa.field("truncated_response_tokens", pa.int32(), nullable=False),
        pa.field("cut", _IDS, nullable=False),  # tokens each prompt lost, parallel to languages
    ]
)
"""A row per bundle, with the fields of `TokenRow`, and `cut`."""

_ROW_FIELDS = tuple(name for name in TOKENS.names if name != "cut")


def bundle_columns(bundle: Bundle, languages: Sequence[str] | None = None) -> dict[str, Any]:
    """A bundle as a row of `BUNDLES`, without its place; restricted to `languages` (sorted; None: all)."""
    kept = sorted(bundle.prompts) if languages is None else list(languages)
    return {
        "bundle_id": bundle.bundle_id,
        "kind": bundle.kind,
        "languages": kept,
        "texts": [bundle.prompts[code] for code in kept],
        "chosen": bundle.chosen,
        "rejected": bundle.rejected,
        "response_language": bundle.response_language,
        "source": bundle.source,
        "category": bundle.category,
    }


def rows_to_table(rows: Sequence[TokenRow]) -> pa.Table:
    """Token rows as a table of `TOKENS`, for small calls; which prompt lost tokens is no longer known (`cut` is 0)."""
    columns = {name: [getattr(row, name) for row in rows] for name in _ROW_FIELDS}
    return pa.table({**columns, "cut": [[0] * len(row.languages) for row in rows]}, schema=TOKENS)


def table_to_rows(table: pa.Table | pa.RecordBatch) -> list[TokenRow]:
    """The token rows of a table that has (at least) the columns of `TOKENS`, for small calls."""
    return [TokenRow(**row) for row in table.select(_ROW_FIELDS).to_pylist()]
