"""What killed processes of this package left half made in a folder, wherever that is: it is removed."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from mlc_ray.storage.atomic import ABANDONED_SECONDS, TEMPORARY, remove_abandoned_here
from mlc_ray.storage.base import Place


def remove_abandoned(folder: Place) -> None:
    """Remove what killed processes left directly in a folder; on this machine as `remove_abandoned_here` does.

    Elsewhere no process can be seen to be gone: what was written a day ago is removed. Where the storage does not say
    when that was, or is away, nothing is.
    """
    if folder.is_local:
        remove_abandoned_here(Path(folder))
        return
    with suppress(OSError):
        for place in folder.iterdir():
            if TEMPORARY.fullmatch(place.name) and _is_old(place):
                place.remove()


def _is_old(place: Place) -> bool:
    files = [place] if place.is_file() else [place / name for name in place.sizes()]
    now = time.time()
    return all((written := file.modified()) is not None and now - written > ABANDONED_SECONDS for file in files)
