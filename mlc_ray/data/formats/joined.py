"""Formats whose bundles are spread over rows or files: pieces, one language each, joined by their ids.

Joining needs the whole source in memory; the benchmarks that need it are tens of thousands of short prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mlc_ray.data.bundles import BundleError, RejectedRow, make_bundle, place
from mlc_ray.data.formats.base import Format, Row
from mlc_ray.types import Kind

if TYPE_CHECKING:
    from mlc_ray.data.formats.containers import Opened


@dataclass(frozen=True)
class Piece:
    """One language of a bundle: pieces with the same `key` belong together. `kind` is None where none is recorded."""

    key: str
    language: str
    text: str
    kind: str | None = None
    category: str = ""


class Placed(NamedTuple):
    """A piece of a bundle, its kind settled, and where it stood."""

    file: str
    line: int
    piece: Piece
    kind: str | None

    def __str__(self) -> str:
        return place(self.file, self.line)


class JoinedFormat(Format):
    """A format whose record is one language of a bundle; subclasses define `piece` instead of `bundle`."""

    joins_files = True

    split_kinds: ClassVar[bool] = False
    """Whether languages of one key that differ in kind become two bundles; otherwise that is a contradiction."""

    def piece(self, record: Mapping[str, Any]) -> Piece | None:
        """The piece that a record is, or None for one that marks a missing prompt.

        Raises:
            BundleError: the record is not a piece; the message is the reason that the user reads.
        """
        raise NotImplementedError

    def read(self, files: Iterable[Opened], kind: Kind | None) -> Iterator[Row]:
        """Rejected rows as they come, then the bundles in the order of their first pieces."""
        return join(self._pieces(files, kind), split_kinds=self.split_kinds)

    def _pieces(self, files: Iterable[Opened], kind: Kind | None) -> Iterator[Placed | RejectedRow]:
        for file in files:
            for record in file:
                if record.fields is None:
                    yield RejectedRow(file.path, record.line, record.reason, record.text)
                    continue
                try:
                    piece = self.piece(self.check_keys(record, file))
                    if piece is not None:
                        yield Placed(file.path, record.line, piece, self.settle_kind(piece.kind, kind))
                except BundleError as error:
                    yield RejectedRow(file.path, record.line, str(error), record.text)


def join(pieces: Iterable[Placed | RejectedRow], *, split_kinds: bool) -> Iterator[Row]:
    """Rejected rows as they come, then the bundles in the order of their first pieces, each at the place of its first.

    A bundle may lack languages. A second piece of one (key, language) is a rejected row, and so is one that
    contradicts the kind of its bundle, unless `split_kinds`.
    """
    first: dict[tuple[str, str], Placed] = {}
    groups: dict[tuple[str, str | None], list[Placed]] = {}
    for item in pieces:
        if isinstance(item, RejectedRow):
            yield Row(item.file, item.line, item)
            continue
        piece = item.piece
        group = groups.setdefault((piece.key, item.kind if split_kinds else None), [])
        if earlier := first.get((piece.key, piece.language)):
            yield _rejected(item, f"id {piece.key!r} has a prompt in {piece.language!r} already, at {earlier}")
        elif group and group[0].kind != item.kind:
            yield _rejected(
                item, f"the row says kind {item.kind!r}, but id {piece.key!r} is {group[0].kind!r} at {group[0]}"
            )
        else:
            first[piece.key, piece.language] = item
            group.append(item)
    for group in filter(None, groups.values()):
        yield _bundle(group)


def _bundle(group: list[Placed]) -> Row:
    start = group[0]
    prompts = {placed.piece.language: placed.piece.text for placed in group}
    raw: dict[str, Any] = {"prompts": prompts, "kind": start.kind, "category": start.piece.category}
    try:
        return Row(start.file, start.line, make_bundle(raw))
    except BundleError as error:
        shown = json.dumps(prompts, ensure_ascii=False)
        return Row(start.file, start.line, RejectedRow(start.file, start.line, str(error), shown))


def _rejected(placed: Placed, reason: str) -> Row:
    return Row(placed.file, placed.line, RejectedRow(placed.file, placed.line, reason, placed.piece.text))
