"""The native format: the fields of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.bundles import FIELDS, BundleError
from mlc_ray.data.formats.base import Format

_IGNORED = frozenset({"split"})


@register("format", "mlc")
class Mlc(Format):
    """The fields of a bundle; `split`, the part of a data set that it is of, is ignored."""

    needs = frozenset({"prompts"})
    kind_from = "the row (it has no `kind`)"

    def check_key(self, key: str) -> None:
        """A field of a bundle, or what is ignored."""
        if key not in _IGNORED and key not in FIELDS:
            raise BundleError(f"unknown key {key!r}; a bundle has {', '.join(FIELDS)}")

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record without what is ignored."""
        return {key: value for key, value in record.items() if key not in _IGNORED}
