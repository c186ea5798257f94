"""A storage of your own in one class: `vault://...`, with the habits of an object store, here kept in one local folder.

Objects are written whole, under a key; there are no folders, and nothing can be renamed, linked or appended to. Import
this file (or announce the class as an entry point of the group `mlc_ray.storage`), and `vault://team/scores` can be the
`output_dir` of a score, and what `mlc-ray report` and `mlc-ray show` read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import quote, unquote

from mlc_ray import register
from mlc_ray.storage import Storage


@register("storage", "vault")
class VaultStorage(Storage):
    """One file per object in the folder `$VAULT`, named by its key."""

    def open(self, url: str, mode: Literal["rb", "wb"] = "rb") -> AbstractContextManager[BinaryIO]:
        """An object to read, or to write: it is stored when the block ends without an error."""
        return io.BytesIO(self._object(url).read_bytes()) if mode == "rb" else self._put(url)

    def exists(self, url: str) -> bool:
        """Whether there is an object of this key."""
        return self._object(url).is_file()

    def list(self, url: str) -> list[str]:
        """The next parts of all keys that begin with the folder's."""
        prefix = url.rstrip("/") + "/"
        return sorted({key.removeprefix(prefix).partition("/")[0] for key in _keys() if key.startswith(prefix)})

    def remove(self, url: str) -> None:
        """Remove an object, and all whose keys begin with it as a folder."""
        for key in _keys():
            if key == url or key.startswith(url.rstrip("/") + "/"):
                self._object(key).unlink()

    @contextmanager
    def _put(self, url: str) -> Iterator[BinaryIO]:
        content = io.BytesIO()
        yield content
        self._object(url).write_bytes(content.getvalue())

    def _object(self, url: str) -> Path:
        return _vault() / quote(url, safe="")


def _keys() -> list[str]:
    return [unquote(path.name) for path in _vault().iterdir()]


def _vault() -> Path:
    folder = Path(os.environ.get("VAULT", Path.home() / ".cache" / "vault"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
