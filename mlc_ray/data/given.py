"""Bundles that are in memory (a list of mappings, a `datasets.Dataset`, any iterable) as a source like any other.

They are written once, named by their content, into the folder where a run keeps what it prepares. So the run can be
resumed, its settings name data that can be inspected, and the bundles are read, checked, rejected and fingerprinted as
those of any file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlc_ray.config import SourceSection
from mlc_ray.data.bundles import GIVEN_PREFIX, BundleFileError
from mlc_ray.storage import Place
from mlc_ray.types import Bundle, Kind

_DIGITS = 16


def as_source(
    bundles: Iterable[Mapping[str, Any] | Bundle],
    folder: str | Path | Place,
    *,
    format: str = "mlc",
    kind: Kind | None = None,
    only: Kind | None = None,
) -> SourceSection:
    """Write `bundles` to `folder/given-FINGERPRINT.jsonl`, and return the source that reads them.

    Whether each is a valid bundle is found out when the source is read, as for any file; messages name its place as
    `row 3 of the bundles given`. The same bundles give the same file, which is then not written again.

    Args:
        bundles: mappings with the fields of `format` (by default those of a bundle: `kind`, `prompts`, `chosen`,
            `rejected`, ...), or `Bundle`s. Rows of a `datasets.Dataset` have a null where a language is absent, which
            is taken as absence.
        folder: where to keep them, by its path or URL; the cache of a run is `OUTPUT_DIR/cache`.
        format: as a source's `format`.
        kind: as a source's `kind`.
        only: as a source's `only`.

    Raises:
        BundleFileError: there are none, or one is not a mapping, or holds what JSON cannot.
    """
    digest = hashlib.sha256()
    table = _is_dataset(bundles)
    number = 0
    with tempfile.NamedTemporaryFile(prefix="mlc_ray-") as file:
        for number, bundle in enumerate(bundles, start=1):
            line = _line(bundle, number, table=table)
            digest.update(line)
            file.write(line)
        if not number:
            raise BundleFileError("no bundles were given: give at least one")
        file.flush()
        target = Place(folder).absolute() / f"{GIVEN_PREFIX}{digest.hexdigest()[:_DIGITS]}.jsonl"
        if not target.is_file():
            target.storage.publish(Path(file.name), target.url)
    return SourceSection(path=target.url, format=format, kind=kind, only=only)


def _line(bundle: Mapping[str, Any] | Bundle, number: int, *, table: bool) -> bytes:
    if isinstance(bundle, Bundle):
        bundle = asdict(bundle)
    if not isinstance(bundle, Mapping):
        raise BundleFileError(
            f"row {number} of the bundles given is {type(bundle).__name__}, not a mapping such as "
            '{"kind": "benign", "prompts": {"en": "..."}} (a table of pandas: give table.to_dict("records"))'
        )
    if table:
        from mlc_ray.data.formats.columnar import without_nulls

        bundle = without_nulls(bundle)
    try:
        try:
            return _json(bundle, escaped=False)
        except UnicodeEncodeError:  # half a surrogate pair has no UTF-8 form; rejecting the row is the reader's part
            return _json(bundle, escaped=True)
    except (TypeError, ValueError) as error:
        raise BundleFileError(f"row {number} of the bundles given holds what JSON cannot: {error}") from None


def _json(bundle: Mapping[str, Any], *, escaped: bool) -> bytes:
    text = json.dumps(dict(bundle), default=_mapping, allow_nan=False, ensure_ascii=escaped)
    return text.encode("utf-8") + b"\n"


def _mapping(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} ({type(value).__name__})")


def _is_dataset(bundles: Any) -> bool:
    """Whether it is a Hugging Face dataset, without importing `datasets` for it, which takes two seconds."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(bundles, (datasets.Dataset, datasets.IterableDataset))
