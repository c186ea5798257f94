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
_READ_BYTES = 1 << 20
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
        digest, line_breaks, left = hashlib.sha256(), 0, BLOCK_BYTES
        with Path(block.path).open("rb") as file:
            file.seek(block.start)
            while left and (piece := file.read(min(left, _READ_BYTES))):
                digest.update(piece)
                line_breaks += piece.count(b"\n")
                left -= len(piece)
        yield digest.hexdigest(), line_breaks


def contents_of(paths: Iterable[Path], read: BlockReader = read_blocks) -> dict[Path, Content]:
    """The content of files, by what is remembered in the user's cache for (path, size, time of change), or by `read`.

    Where that cache cannot be read or written, as without a home folder, nothing is remembered. Nor is a file that
    changed while it was read.

    Raises:
        OSError: a file cannot be read.
    """
    found: dict[Path, Content] = {}
    missing: dict[Path, list[Block]] = {}
    now, states = time.time(), {path: _state(path) for path in paths}
    for path, state in states.items():
        remembered = _recall(path, state)
        if remembered is not None:
            found[path] = remembered
        else:
            starts = range(0, max(1, state["size"]), BLOCK_BYTES)
            missing[path] = [Block(str(path.absolute()), start) for start in starts]
    results = iter(read([block for blocks in missing.values() for block in blocks]))
    for path, blocks in missing.items():
        digests, line_breaks = zip(*(next(results) for _ in blocks), strict=True)
        found[path] = Content(list(digests), list(line_breaks))
        if now - states[path]["mtime_ns"] / 1e9 > _SETTLED_SECONDS and _state(path) == states[path]:
            _remember(path, states[path], found[path])
    return found


def files_of(path: Path) -> list[Path]:
    """A file, or the files in a folder and its folders, sorted.

    Raises:
        MlcRayError: there is neither.
    """
    if path.is_dir():
        return sorted(inside for inside in path.rglob("*") if inside.is_file())
    if path.exists():
        return [path]
    raise MlcRayError(f"{str(path)!r} does not exist")


def fingerprint_of(path: Path, contents: dict[Path, Content]) -> str:
    """Of the names and contents of `files_of(path)`; a moved copy has the same."""
    root = path if path.is_dir() else path.parent
    return fingerprint([[file.relative_to(root).as_posix(), contents[file].digests] for file in files_of(path)])


def _recall(path: Path, state: dict[str, Any]) -> Content | None:
    try:
        known = Place(_memory(path)).read_json()
        if any(known[name] != value for name, value in state.items()):
            return None
        return Content(known["digests"], known["line_breaks"])
    except _NO_CACHE:
        return None
    except (ValueError, KeyError, TypeError):  # written by another version
        return None


def _remember(path: Path, state: dict[str, Any], content: Content) -> None:
    with suppress(*_NO_CACHE):
        memory = _memory(path)
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(memory, {**state, **vars(content)})


def _memory(path: Path) -> Path:
    return user_cache() / "contents" / f"{fingerprint(str(path.absolute()))}.json"


def _state(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "block_bytes": BLOCK_BYTES}
