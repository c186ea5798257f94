"""Manifests of checkpoints, as training writes them, for folders that tests fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlc_ray.storage import MANIFEST, Place, checksum, sealed


def manifest_of(folder: Path | Place, step: int, **fields: Any) -> dict[str, Any]:
    """The manifest of what is in a folder."""
    place = Place(folder)
    files = {name: size for name, size in sorted(place.sizes().items()) if name != MANIFEST}
    return sealed(
        {
            "config": {}, "resolved_config": {}, "fingerprints": {}, "step": step, "bundles_consumed": 4 * step,
            "validation_before": {}, "world_size": 1, "versions": {}, "files": files,
            "checksums": {name: checksum(place / name) for name in files}, **fields,
        }
    )  # fmt: skip


def complete(folder: Path | Place, step: int, **fields: Any) -> None:
    """Make a folder a complete checkpoint of a step."""
    (Place(folder) / MANIFEST).write_json(manifest_of(folder, step, **fields))
