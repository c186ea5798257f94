"""What is in the files of a source: a digest and the line breaks of each block, known by one pass over a file.

The digests name the content, and the line breaks say which line each block begins with, so that parts of a file can be
read side by side and still name their lines.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_ray.errors import MlcRayError
from mlc_ray.storage import Place, fingerprint, user_cache, write_json_atomic

BLOCK_BYTES = 8 << 20
_SETTLED_SECONDS = 2.0
"""A file that changed less than this ago is not remembered: file systems' clocks tick in up to 10 ms, so it may change
again without a change of its time."""
_NO_CACHE = (OSError, RuntimeError)
"""What a missing or unwritable cache raises; `Path.home` a RuntimeError, where the user has no home folder."""


@dataclass(frozen=True)
class Block:
    """`BLOCK_BYTES` of a file from byte `start` on; the last one has what is left."""

    path: str
    start: int


@dataclass(frozen=True)
class Content:
    """A file by its blocks: the SHA-256 of each, and its number of line breaks."""

    digests: list[str]
    line_breaks: list[int]


BlockReader = Callable[[list[Block]], Iterable[tuple[str, int]]]


def read_blocks(blocks: list[Block]) -> Iterator[tuple[str, int]]:
    """SHA-256 and line breaks of each block."""
    for block in blocks:
        with Place(block.path).open() as file:
            file.seek(block.start)
            content = file.read(BLOCK_BYTES)  # of an object in a store one request
        yield hashlib.sha256(content).hexdigest(), content.count(b"\n")


def contents_of(paths: Iterable[Place], read: BlockReader = read_blocks) -> dict[Place, Content]:
    """The content of files, by `read`; of those larger than a block it is remembered in the user's cache.

    There it is found by (path, size, time of change, and the ETag of an object in a store). Where that cache cannot be
    read or written, as without a home folder, nothing is remembered. Nor is a file that changed while it was read, or
    whose storage does not say when it changed.

    Raises:
        OSError: a file cannot be read.
    """
    now, states = time.time(), {path: _state(path) for path in paths}
    large = {path: state for path, state in states.items() if state["size"] > BLOCK_BYTES}
    found = {path: known for path, state in large.items() if (known := _recall(path, state)) is not None}
    missing = {
        path: [Block(path.absolute().url, start) for start in range(0, max(1, state["size"]), BLOCK_BYTES)]
        for path, state in states.items()
        if path not in found
    }
    results = iter(read([block for blocks in missing.values() for block in blocks]))
    for path, blocks in missing.items():
        digests, line_breaks = zip(*(next(results) for _ in blocks), strict=True)
        found[path] = Content(list(digests), list(line_breaks))
        if path in large:
            _remember(path, states[path], found[path], now)
    return found


def files_of(path: Place) -> list[Place]:
    """A file, or the files in a folder and its folders, sorted.

    Raises:
        MlcRayError: there is neither.
    """
    if path.is_dir():
        return [path / name for name in sorted(path.sizes())]
    if path.exists():
        return [path]
    raise MlcRayError(f"{str(path)!r} does not exist")


def fingerprint_of(path: Place, contents: dict[Place, Content]) -> str:
    """Of the names and contents of `files_of(path)`; a moved copy has the same."""
    root = path if path.is_dir() else path.parent
    names = {file.url.removeprefix(root.url).lstrip("/"): contents[file].digests for file in files_of(path)}
    return fingerprint(sorted(names.items()))


def _recall(path: Place, state: dict[str, Any]) -> Content | None:
    try:
        known = Place(_memory(path)).read_json()
        if any(known[name] != value or value is None for name, value in state.items()):
            return None
        return Content(known["digests"], known["line_breaks"])
    except _NO_CACHE:
        return None
    except (ValueError, KeyError, TypeError):  # written by another version
        return None


def _remember(path: Place, state: dict[str, Any], content: Content, read_at: float) -> None:
    changed = state["modified"]
    if changed is None or read_at - changed <= _SETTLED_SECONDS or _state(path) != state:
        return
    with suppress(*_NO_CACHE):
        memory = _memory(path)
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(memory, {**state, **vars(content)})


def _memory(path: Place) -> Path:
    return user_cache() / "contents" / f"{fingerprint(path.absolute().url)}.json"


def _state(path: Place) -> dict[str, Any]:
    """Size, time of change (None where the storage does not say) and ETag, by which a file is known to be unchanged."""
    size, modified = path.parent.sizes([path.name]).get(path.name, 0), path.modified()
    etag = path.etag() if size > BLOCK_BYTES else ""  # of what may be remembered: it is a request more
    return {"size": size, "modified": modified, "etag": etag, "block_bytes": BLOCK_BYTES}
