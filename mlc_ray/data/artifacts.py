"""Artefacts, which are folders with a manifest, where processes on several machines make and read them.

On this machine, or on storage mounted on it, an artefact is made in a sibling folder that is renamed, and mapped where
it lies. Elsewhere nothing can be renamed or mapped: files are written in their place, the manifest last, and each
machine that reads the artefact fetches it once. Runs that make the same one write files of the same names and content,
and remove none of these. What the reference says is written in its place everywhere, for a later pass to go on with.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlc_ray.storage import (
    MANIFEST,
    SEAL,
    IncompleteArtifactError,
    Place,
    artifact_folder,
    fault_of,
    remove_abandoned,
    user_cache,
    verify_checksums,
    verify_files,
)
from mlc_ray.storage.copies import fetch_files, locked

logger = logging.getLogger(__name__)


def is_made(place: Place) -> bool:
    """Whether a complete artefact is there; a warning says what an incomplete one lacks."""
    if not place.exists():
        return False
    if (fault := fault_of(place)) is not None:
        logger.warning("%s; making it again", fault)
    return fault is None


@contextmanager
def new_artifact(place: Place) -> Iterator[Place]:
    """Yield the folder whose files become the artefact `place` when the block ends, with the manifest as the last.

    A complete artefact that another run made meanwhile stays as it is. After an error nothing is there; elsewhere there
    may be files without a manifest, which the next run writes again.
    """
    if place.is_local:
        with artifact_folder(Path(place)) as temporary:
            yield Place(temporary)
    else:
        remove_abandoned(place.parent)
        yield place


def local_artifact(place: Place, manifest: dict[str, Any]) -> Path:
    """The folder of an artefact on this machine; one from elsewhere is fetched unless it was.

    A copy lies in `artifacts` of the user's cache, under the checksum of its manifest. The first process that needs it
    fetches it, and others wait; it appears whole, and is fetched again where files of it were lost.

    Args:
        place: the artefact.
        manifest: what `read_manifest` says of it.

    Raises:
        IncompleteArtifactError: files of the artefact are missing, short, or not what its checksums say, if it has any.
        StorageError: its storage cannot be read.
    """
    if place.is_local:
        verify_files(place, manifest)
        return Path(place)
    return _copied(place, manifest)


def _copied(place: Place, manifest: dict[str, Any]) -> Path:
    """This machine's copy of an artefact from elsewhere."""
    folder = user_cache() / "artifacts" / f"{place.name}-{manifest[SEAL]}"
    with locked(folder, fcntl.LOCK_EX):
        if not is_made(Place(folder)):
            verify_files(place, manifest)
            fetch_files(place, [*manifest["files"], MANIFEST], folder, replace=True)
            try:
                verify_checksums(folder, manifest, manifest.get("checksums", {}))
            except IncompleteArtifactError as error:
                shutil.rmtree(folder)
                raise IncompleteArtifactError(f"{error}; remove {str(place)!r}, and it is made again") from None
    return folder
