"""Copies on this machine of models that are elsewhere: fetched once a node, whatever the number of its processes.

A copy lies in `models` of the user's cache, under a name made from the model's content. It appears whole or not at all.
Whoever fetches one holds its lock, and the others wait; the lock of a process that died is free.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from mlc_ray.config.paths import real_path, scheme_of
from mlc_ray.errors import MlcRayError
from mlc_ray.storage.atomic import atomic_folder
from mlc_ray.storage.base import Place
from mlc_ray.storage.fingerprints import WEIGHT_SUFFIXES, fingerprint, fingerprint_files
from mlc_ray.storage.hub import HubModel, is_commit, snapshot

_AT_ONCE = 8  # files that are fetched side by side


class CacheError(MlcRayError, ValueError):
    """`MLC_RAY_CACHE` is no folder on this machine, or what is to be copied there does not exist."""


def user_cache() -> Path:
    """`$MLC_RAY_CACHE`, else `~/.cache/mlc_ray`: for what each machine keeps of its own.

    Raises:
        CacheError: `MLC_RAY_CACHE` is a URL.
    """
    configured = os.environ.get("MLC_RAY_CACHE")
    if not configured:
        return Path.home() / ".cache" / "mlc_ray"
    try:
        return Path(real_path(configured)).expanduser()
    except ValueError as error:
        raise CacheError(f"MLC_RAY_CACHE={configured!r}: {error}") from None


def local_side(place: Place) -> Path:
    """Where this machine keeps its own files of a folder: that folder itself, or for a URL one in the user's cache."""
    if place.is_local:
        return Path(place)
    return user_cache() / "folders" / f"{place.name}-{fingerprint(place.url)}"


def local_model(path: str, *, weights: bool = True) -> str:
    """The folder of a model on this machine: of a URL or a hub name with its commit a copy, fetched once.

    A folder is `path` itself, and so is a hub name without a commit.

    Args:
        path: folder, hub name, or URL of a folder with a model's files.
        weights: whether the weights are needed; config and tokenizer alone are a copy of their own.

    Raises:
        CacheError: nothing is at the URL.
        HubError: the hub cannot give it.
        StorageError: the storage cannot be read.
    """
    if scheme_of(path) is None:
        named = HubModel.parse(path)
        return str(_snapshot(named, weights=weights)) if named is not None and is_commit(named.revision) else path
    place = Place(path)
    folder, names = _copy(place, weights=weights)
    if not folder.is_dir():
        with locked(folder, fcntl.LOCK_EX):
            fetch_files(place, names, folder)
    return str(folder)


@contextmanager
def model_for_now(path: str) -> Iterator[str]:
    """As `local_model`, of a model that is needed within the block alone, such as a checkpoint that is to be scored.

    Its copy is removed after it, by the last of the processes of this machine that use it.
    """
    if scheme_of(path) is None:
        yield local_model(path)
        return
    place = Place(path)
    whole, names = _copy(place, weights=True)
    folder = whole.with_name(f"{whole.name}-now")
    with locked(folder, fcntl.LOCK_SH) as lock:
        while not folder.is_dir():
            # From shared to exclusive a lock is not changed at once: another process may fetch, or remove, meanwhile.
            fcntl.flock(lock, fcntl.LOCK_EX)
            fetch_files(place, names, folder)
            fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield str(folder)
        finally:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                removing = folder.with_name(f".{folder.name}.removing")
                shutil.rmtree(removing, ignore_errors=True)  # of a process that died in the next line but one
                os.rename(folder, removing)
                shutil.rmtree(removing, ignore_errors=True)


def _snapshot(model: HubModel, *, weights: bool) -> Path:
    """A hub's model at its commit: whoever is first on this machine fetches it, and the hub is asked by no other.

    Where it lies in the hub's cache is noted in the user's cache once all of it is there.
    """
    from huggingface_hub import constants

    where = fingerprint([constants.HF_HUB_CACHE, weights])
    note = user_cache() / "hub" / f"{model.name.replace('/', '--')}-{model.revision}-{where}"
    with locked(note, fcntl.LOCK_EX):
        with suppress(FileNotFoundError):
            folder = Path(note.read_text(encoding="utf-8"))
            if folder.is_dir() and all(file.exists() for file in folder.iterdir()):  # links into the hub's cache
                return folder
        folder = snapshot(model, weights=weights)
        temporary = note.with_name(f".{note.name}.writing")
        temporary.write_text(str(folder), encoding="utf-8")
        temporary.replace(note)
        return folder


def fetched_bytes() -> int:
    """Bytes of all models in the user's cache, and of those that are being fetched: it grows while one is."""
    folder = user_cache() / "models"
    found = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        with suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


def _copy(place: Place, *, weights: bool) -> tuple[Path, list[str]]:
    """Where the copy of a model lies, by its content as it is now, and the names of its files."""
    sizes = {
        name: size
        for name, size in place.sizes().items()
        if "/" not in name and (weights or not name.endswith(WEIGHT_SUFFIXES))
    }
    if not sizes:
        raise CacheError(f"model={place.url!r}: nothing is there; give the folder with config.json and its weights")
    return user_cache() / "models" / f"{place.name}-{fingerprint_files(place, sizes)}", list(sizes)


def fetch_files(place: Place, names: Sequence[str], folder: Path, *, replace: bool = False) -> None:
    """Copy files of a folder elsewhere to a new one, unless it is there; its lock is held.

    With `replace` it is made anew.
    """
    replaced = atomic_folder(folder, replace=replace)
    with suppress(FileExistsError), replaced as temporary, ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: place.storage.fetch(str(place / name), temporary / name), names))


@contextmanager
def locked(folder: Path, kind: int) -> Iterator[int]:
    """Hold the lock on a copy; yields its file's descriptor. The file stays: removed, another one could be locked."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, kind)
        yield lock
    finally:
        os.close(lock)
