"""What an endpoint replied, and the cache that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlc_ray.errors import MlcRayError
from mlc_ray.storage import write_json_atomic

ERROR = "error"
"""Finish of a reply that never came, or could not be read."""
NOT_ASKED = "not_asked"
"""Finish of what was not asked because it could have broken the cost cap."""


class EndpointError(MlcRayError):
    """The endpoint cannot be used as configured; the message quotes base_url, model and api_key_env, never the key."""


@dataclass(frozen=True)
class Reply:
    """One reply. `fault` says why `text` is not a whole reply to be read; it is empty only if it is one.

    `finish` is the endpoint's reason (`stop`; `length`: cut off at max_reply_tokens; `content_filter`; ...), `refusal`
    where the model declined through the field of that name, `ERROR` or `NOT_ASKED`.
    """

    text: str
    finish: str
    fault: str = ""
    cached: bool = False


class ReplyCache:
    """Whole replies on disk, a JSON file per key, written atomically: processes may share it. It holds no API key.

    Raises:
        EndpointError: from any method, the folder cannot be read or written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with self._faults_named():  # before anything is paid for
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> Reply | None:
        """The reply of a key, if it is there; a damaged file counts as absent, and is then written again."""
        try:
            with self._faults_named():
                stored = json.loads(self._file(key).read_text(encoding="utf-8"))
            text, finish, fault = stored["text"], stored["finish"], stored["fault"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if not all(isinstance(item, str) for item in (text, finish, fault)):
            return None
        return Reply(text, finish, fault, cached=True)

    def write(self, key: str, reply: Reply, model: str) -> None:
        """Keep a reply."""
        with self._faults_named():
            self._file(key).parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(
                self._file(key), {"model": model, "text": reply.text, "finish": reply.finish, "fault": reply.fault}
            )

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise EndpointError(
                f"the cache of replies {str(self.folder)!r} cannot be used: {error.strerror}; free it, or set "
                "endpoint.cache_dir to another folder"
            ) from None

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
