"""What an endpoint replied, and the cache that keeps it."""

from __future__ import annotations

import io
import json
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mlc_ray.errors import MlcRayError
from mlc_ray.storage import Place

ERROR = "error"
"""Finish of a reply that never came, or could not be read."""
NOT_ASKED = "not_asked"
"""Finish of what was not asked because it could have broken the cost cap."""
REPLIES = pa.schema(dict.fromkeys(("key", "model", "text", "finish", "fault"), pa.string()))
"""A cached reply; `key` is the fingerprint of the whole request and its address."""

BUSY = frozenset({408, 409, 429})
"""Statuses among 4xx that say nothing of the request: it is tried again."""

_COLUMNS = ", ".join(REPLIES.names)
_MESSAGE_CHARACTERS = 300
_KEYS_AT_ONCE = 500
_LOCK_SECONDS = 60.0  # a write takes less than a millisecond, restoring a million replies some seconds


class EndpointError(MlcRayError):
    """The endpoint cannot be used as configured; the message quotes base_url, model and api_key_env, never the key."""


@dataclass(frozen=True)
class Reply:
    """One reply. `fault` says why `text` is not a whole reply to be read; it is empty only if it is one.

    `finish` is the endpoint's reason (`stop`; `length`: cut off at max_reply_tokens; `content_filter`; ...), `refusal`
    where the model declined through the field of that name, `ERROR` or `NOT_ASKED`. `lost` is True if it never came
    because the endpoint was out, busy or out of order, so that one may come when it is asked again.
    """

    text: str
    finish: str
    fault: str = ""
    cached: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Fault:
    """A question that got no reply. `message` says why; `status` is the server's, None if it sent none.

    `reached` is False if there was no connection at all. `by_content` is True if the server refused what this question
    says (a content filter, too many tokens), so that it tells nothing about other questions.
    """

    message: str
    status: int | None = None
    reached: bool = True
    by_content: bool = False

    @property
    def refused(self) -> bool:
        """Whether the server calls the request wrong (4xx)."""
        return self.status is not None and 400 <= self.status < 500

    @property
    def outage(self) -> bool:
        """Whether it lies with the endpoint: none reached, time-outs, 5xx, 408, 409, 429, no chat completion."""
        return not self.refused or self.status in BUSY


class ReplyCache:
    """Whole replies in one SQLite file of this machine, and in a Parquet file beside a score for other machines.

    A reply is kept as soon as it is written: a process that is killed loses those in flight. The file bears the
    machine's name: several machines may mount the folder, and SQLite's write-ahead log works within one of them. It
    holds no API key.

    Raises:
        EndpointError: from any method, a file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / f"replies-{platform.node() or 'here'}.sqlite"
        self._used: set[str] = set()
        with self._faults_named():  # before anything is paid for
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.file, timeout=_LOCK_SECONDS, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            # No fsync per reply: only a power failure loses the last ones, not the death of the process.
            self._database.execute("PRAGMA synchronous = NORMAL")
            types = ", ".join(f"{name} TEXT NOT NULL" for name in REPLIES.names[1:])
            self._database.execute(
                f"CREATE TABLE IF NOT EXISTS replies ({REPLIES.names[0]} TEXT PRIMARY KEY, {types}) WITHOUT ROWID"
            )

    def read(self, key: str) -> Reply | None:
        """The reply of a key, if it is there."""
        with self._faults_named():
            query = "SELECT text, finish, fault FROM replies WHERE key = ?"
            found = self._database.execute(query, [key]).fetchone()
        if found is None:
            return None
        self._used.add(key)
        text, finish, fault = found
        return Reply(text, finish, fault, cached=True)

    def write(self, key: str, reply: Reply, model: str) -> None:
        """Keep a reply."""
        self._insert([(key, model, reply.text, reply.finish, reply.fault)])
        self._used.add(key)

    def restore(self, published: Place) -> None:
        """Take in the replies of a file that `publish` wrote, if it is there."""
        rows = _rows(published)
        with self._faults_named():
            self._database.execute("BEGIN")
            self._insert(rows)
            self._database.execute("COMMIT")

    def publish(self, published: Place) -> None:
        """Write the replies that were read or written since this cache was opened, beside those that are there."""
        if not self._used:
            return
        rows = _rows(published)
        missing = sorted(self._used.difference(row[0] for row in rows))
        with self._faults_named():
            for first in range(0, len(missing), _KEYS_AT_ONCE):
                keys = missing[first : first + _KEYS_AT_ONCE]
                query = f"SELECT {_COLUMNS} FROM replies WHERE key IN ({', '.join('?' for _ in keys)})"
                rows += self._database.execute(query, keys).fetchall()
        columns = zip(*sorted(rows), strict=True)
        content = io.BytesIO()
        pq.write_table(pa.table([list(column) for column in columns], schema=REPLIES), content)
        published.write_bytes(content.getvalue())

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _insert(self, rows: list[tuple[str, ...]]) -> None:
        marks = ", ".join("?" for _ in REPLIES.names)
        with self._faults_named():
            self._database.executemany(f"INSERT OR REPLACE INTO replies ({_COLUMNS}) VALUES ({marks})", rows)

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise EndpointError(
                f"the cache of replies {str(self.file)!r} cannot be used: {error}; free or remove it, or set "
                "endpoint.cache_dir to another folder"
            ) from None


def server_message(raw: bytes) -> str:
    """What the server says: OpenAI's `error.message`, other servers' `error`, `message` or `detail`, or its words."""
    text = raw.decode("utf-8", "replace")
    try:
        payload = json.loads(text)
    except ValueError:
        return one_line(text) or "(nothing)"
    for name in ("error", "message", "detail"):
        if isinstance(payload, dict) and payload.get(name):
            inner = payload[name]
            return one_line(str(inner["message"] if isinstance(inner, dict) and inner.get("message") else inner))
    return one_line(text)


def one_line(text: str) -> str:
    """`text` without line breaks, and not too long for a message."""
    line = " ".join(text.split())
    return line if len(line) <= _MESSAGE_CHARACTERS else line[:_MESSAGE_CHARACTERS] + "..."


def _rows(published: Place) -> list[tuple[str, ...]]:
    if not published.is_file():
        return []
    try:
        with published.open() as file:
            table = pq.read_table(file, columns=REPLIES.names).cast(REPLIES)
    except (pa.ArrowException, OSError) as error:
        raise EndpointError(f"the replies in {str(published)!r} cannot be read: {error}; remove the file") from None
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
