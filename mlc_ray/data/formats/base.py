"""What a format is: which bundle one record describes, and the facts by which files are opened and recognised.

A format is one class in one file, registered under the name that a source's `format` has:

    @register("format", "questions")
    class Questions(Format):
        needs = frozenset({"question", "language"})
        default_kind = "benign"

        def bundle(self, record):
            return {"prompts": {record["language"]: record["question"]}}

A format from outside this package is named by where it is, `format: "my_package.my_module:Questions"`. Containers
(JSONL, CSV, Parquet, ...) are read elsewhere (`containers`): a format is given one record at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from mlc_ray.data.bundles import BundleError, BundleFileError, RejectedRow, make_bundle
from mlc_ray.types import Bundle, Kind

if TYPE_CHECKING:  # containers import pyarrow, which the settings do not need: they only look up a format's name
    from mlc_ray.data.formats.containers import Opened
    from mlc_ray.data.formats.records import Record


class Row(NamedTuple):
    """What one place of a source turned out to be: `line` counts from 1 (rows of tables, lines of text files)."""

    file: str
    line: int
    parsed: Bundle | RejectedRow


@dataclass(frozen=True)
class Published:
    """The published benchmark that a format was made for: what docs/judges.md compares with what judges read.

    `languages` are primary codes. `refusals` says whether a refusal is the right response to a harmful prompt of it: it
    is none to the beginning of a text, or to somebody who needs a careful answer. `bundles` are those that it has in
    each language, where that is one number and known.
    """

    name: str
    languages: frozenset[str]
    kinds: tuple[Kind, ...]
    refusals: bool = True
    bundles: int | None = None

    @classmethod
    def of(
        cls, name: str, languages: str, *kinds: Kind, refusals: bool = True, bundles: int | None = None
    ) -> Published:
        """The same with the languages in one text, blanks between them."""
        return cls(name, frozenset(languages.split()), kinds, refusals, bundles)


class Format:
    """A format whose record is a whole bundle. Subclasses set facts and define `bundle`."""

    published: ClassVar[Published | None] = None
    """The benchmark that is published in this format, if there is one."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Keys that every record has. `auto` knows the format by them (never, if there are none), and a table without
    these columns is refused."""

    keys: ClassVar[frozenset[str] | None] = None
    """All keys that a record may have; None accepts any (or what an own `check_key` accepts)."""

    default_kind: ClassVar[Kind | None] = None
    """Kind of a bundle where neither the record nor the source's `kind` says it; None: one of them must."""

    kind_from: ClassVar[str] = "the row"
    """What should have said the kind, as the subject of an error message."""

    ids: ClassVar[tuple[str, ...]] = ()
    """Columns that may name a record: the first one present counts, and no two records may share its value."""

    container: ClassVar[Literal["csv"] | None] = None
    """What a file without a known suffix is read as; None: it is refused."""

    joins_files: ClassVar[bool] = False
    """Whether one bundle may be spread over the files of a folder, which are then read together."""

    whole_folder: ClassVar[bool] = False
    """Whether the names of folders and files say something, so that the format reads a folder by `read_folder`."""

    @property
    def reads_parts(self) -> bool:
        """Whether parts of a file can be read side by side: where a record alone says everything of its bundle."""
        own = type(self)
        whole = own.read is not Format.read or own.is_language is not Format.is_language
        return not (whole or self.ids or self.joins_files or self.whole_folder)

    def bundle(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The raw bundle that a record describes; its keys are `mlc_ray.data.bundles.FIELDS`.

        Raises:
            BundleError: the record is not a bundle; the message is the reason that the user reads.
        """
        raise NotImplementedError

    def recognises(self, keys: frozenset[str]) -> bool:
        """Whether a record or table with these keys is of this format."""
        return bool(self.needs) and self.needs <= keys

    def recognises_folder(self, folder: Path) -> bool:
        """Whether `folder` as a whole is of this format (`whole_folder`)."""
        return False

    def is_language(self, column: str) -> bool:
        """Whether a table's column holds the prompts of one language; it must then hold at least one."""
        return False

    def check_key(self, key: str) -> None:
        """Refuse a key that a record of this format does not have.

        Raises:
            BundleError: it is not one of `keys`.
        """
        if self.keys is not None and key not in self.keys:
            raise BundleError(f"unknown key {key!r}; this format has {', '.join(sorted(self.keys))}")

    def check_columns(self, columns: list[str], path: str) -> None:
        """Check the columns of a table once, before its rows.

        Raises:
            BundleFileError: a column appears twice, is missing or is unknown.
        """
        if repeated := sorted({name for name in columns if columns.count(name) > 1}):
            raise BundleFileError(f"{path}: columns {repeated!r} appear more than once")
        if missing := sorted(self.needs - set(columns)):
            raise BundleFileError(f"{path}: this format needs columns {missing!r}; the file has {columns!r}")
        for name in columns:
            try:
                self.check_key(name)
            except BundleError as error:
                raise BundleFileError(f"{path}: columns: {error}") from None

    def read(self, files: Iterable[Opened], kind: Kind | None) -> Iterator[Row]:
        """Every record of the files as a bundle or a rejected row, in order; `kind` is the source's setting.

        Raises:
            BundleFileError: a language's column holds no prompt in any row.
        """
        for file in files:
            seen: dict[str, int] = {}
            silent = {name for name in file.columns or () if self.is_language(name)}
            for record in file:
                fields = record.fields or {}
                silent -= {key for key, text in fields.items() if not isinstance(text, str) or text.strip()}
                yield Row(file.path, record.line, self._bundle_or_rejected(record, kind, file, seen))
            if silent:
                where = f"{file.path}: the columns {sorted(silent)!r}"
                raise BundleFileError(f"{where} hold no prompt in any row; fill them, or take them out")

    def read_folder(self, folder: str, kind: Kind | None) -> Iterator[Row]:
        """Every bundle or rejected row of a folder of this format (`whole_folder`)."""
        raise NotImplementedError

    def settle_kind(self, recorded: Any, setting: Kind | None) -> Any:
        """The kind of a record: what it says itself, else the source's setting, else the format's default.

        Raises:
            BundleError: record and setting disagree, or nothing decides and the format has no default.
        """
        if recorded is not None and setting is not None and recorded != setting:
            raise BundleError(f"the row says kind {recorded!r}, the source's setting says kind {setting!r}")
        settled = recorded or setting or self.default_kind
        if settled is None:
            what = "does not say whether the prompt is harmful or benign"
            raise BundleError(f"{self.kind_from} {what}; give the source's kind")
        return settled

    def check_keys(self, record: Record, file: Opened) -> Mapping[str, Any]:
        """The fields of a record that has some, with its keys checked where `check_columns` did not already."""
        fields = record.fields or {}
        if file.columns is None:
            for key in fields:
                self.check_key(key)
        return fields

    def _bundle_or_rejected(
        self, record: Record, kind: Kind | None, file: Opened, seen: dict[str, int]
    ) -> Bundle | RejectedRow:
        """`seen` has the line of every id so far."""
        if record.fields is None:
            return RejectedRow(file.path, record.line, record.reason, record.text)
        try:
            if self.ids:
                self._check_id(record, file.path, seen)
            raw = self.bundle(self.check_keys(record, file))
            return make_bundle(raw, kind=self.settle_kind(raw.get("kind"), kind))
        except BundleError as error:
            return RejectedRow(file.path, record.line, str(error), record.text)

    def _check_id(self, record: Record, path: str, seen: dict[str, int]) -> None:
        fields = record.fields or {}
        name = next((name for name in self.ids if name in fields), None)
        if name is None:
            return
        text = str(fields[name])
        if not text.strip():
            raise BundleError(f"column {name!r} is blank; give every row an id, or none")
        if name == "id" and re.search(r"\s", text.strip()):
            raise BundleError(
                f"column 'id' says {text!r}: it names rows and holds no blanks; a column of Indonesian prompts is "
                "called 'id-ID'"
            )
        if text in seen:
            raise BundleError(f"{name} {text!r} was given already, at {path}:{seen[text]}")
        seen[text] = record.line
