"""Files -> Arrow tables of bundles: what a Ray Data task runs; it imports neither Ray nor torch, and so starts fast."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from mlc_ray.data.bundles import BundleError, BundleFileError, RejectedRow, select_languages, to_row
from mlc_ray.data.formats.readers import SourceFile, read_file

_ROWS_AT_ONCE = 512
_TEXT = pa.string()

# One schema for bundles and for what is none, so that blocks of any file concatenate.
PARSED = pa.schema(
    {
        "bundle_id": _TEXT, "kind": _TEXT, "languages": pa.list_(_TEXT), "texts": pa.list_(_TEXT), "chosen": _TEXT,
        "rejected": _TEXT, "response_language": _TEXT, "source": _TEXT, "category": _TEXT,
        "file": _TEXT, "line": pa.int64(),
        # `reason` and `text` are of a rejected row; `fault` concerns the whole file. `row` numbers what a source gave:
        # a line does not, where a source is a folder of files.
        "reason": _TEXT, "text": _TEXT, "fault": _TEXT, "file_index": pa.int64(), "row": pa.int64(),
    }
)  # fmt: skip
NOT_OF_A_BUNDLE = ["reason", "text", "fault", "file_index", "row"]


def parse_file(task: pa.Table, languages: list[str] | None) -> Iterator[pa.Table]:
    """Parse the one file of `task` (the fields of `SourceFile`, and `file_index`); streams tables of `PARSED`."""
    (item,) = task.to_pylist()
    file_index = item.pop("file_index")
    rows: list[dict[str, Any]] = []
    try:
        for number, (file, line, parsed) in enumerate(read_file(SourceFile(**item))):
            place = {"file": file, "line": line, "file_index": file_index, "row": number}
            rows.append({**place, **_columns(parsed, languages)})
            if len(rows) == _ROWS_AT_ONCE:
                yield pa.Table.from_pylist(rows, schema=PARSED)
                rows = []
    except BundleFileError as error:  # carried as data: raised here it would arrive wrapped in Ray's own traceback
        rows.append({"file": item["path"], "line": 0, "file_index": file_index, "fault": str(error)})
    yield pa.Table.from_pylist(rows, schema=PARSED)


def keep_valid(table: pa.Table, drop: set[tuple[int, int]]) -> pa.Table:
    """Bundles only: without the rows at the places (file_index, row) in `drop`, and without their columns."""
    places = zip(table["file_index"].to_pylist(), table["row"].to_pylist(), strict=True)
    return table.filter(pa.array([place not in drop for place in places], pa.bool_())).drop_columns(NOT_OF_A_BUNDLE)


def _columns(parsed: Any, languages: list[str] | None) -> dict[str, Any]:
    if isinstance(parsed, RejectedRow):
        # A lone surrogate that JSON escapes let through has no UTF-8 form; Arrow would refuse the whole table.
        return {"reason": parsed.reason, "text": parsed.text.encode("utf-8", "backslashreplace").decode("utf-8")}
    row = to_row(parsed)
    try:
        select_languages(parsed, languages)
    except BundleError as error:
        return {"reason": str(error), "text": json.dumps(row, ensure_ascii=False)}
    return row
