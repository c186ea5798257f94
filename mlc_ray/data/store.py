"""Token rows on disk: an Arrow file that every process of a node maps into memory and shares through the page cache."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlc_ray.data.plan import Lengths
from mlc_ray.data.ragged import Ints, common_start, starts_of
from mlc_ray.data.tables import TOKENS, table_to_rows
from mlc_ray.storage import ArtifactError, read_manifest, verify_files, write_manifest
from mlc_ray.types import TokenRow

FORMAT = 2
ROWS_FILE = "rows.arrow"
REJECTS_FILE = "rejects.jsonl"


@dataclass
class TokenCounts:
    """What a data set weighs, and what was lost to the limits; everything in tokens unless it says otherwise.

    `truncated_prompts` counts prompts, `truncated_responses` bundles with an answer that lost its end.
    """

    rows: int = 0
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    response_tokens: int = 0
    truncated_prompts: Counter[str] = field(default_factory=Counter)
    truncated_prompt_tokens: Counter[str] = field(default_factory=Counter)
    truncated_responses: int = 0
    truncated_response_tokens: int = 0

    def add(self, table: pa.Table | pa.RecordBatch) -> None:
        """Count rows of `TOKENS`; only lengths become Python numbers, never the ids."""
        self.rows += table.num_rows
        codes = pc.list_flatten(table["languages"]).to_pylist()
        lengths = pc.list_value_length(pc.list_flatten(table["prompts"])).to_pylist()
        cuts = pc.list_flatten(table["cut"]).to_pylist()
        for code, length, cut in zip(codes, lengths, cuts, strict=True):
            self.prompt_tokens[code] += length
            if cut:
                self.truncated_prompts[code] += 1
                self.truncated_prompt_tokens[code] += cut
        for name in ("chosen", "rejected"):
            self.response_tokens += pc.sum(pc.list_value_length(table[name])).as_py() or 0
        for cut in table["truncated_response_tokens"].to_pylist():
            self.truncated_responses += cut > 0
            self.truncated_response_tokens += cut

    @property
    def languages(self) -> list[str]:
        """All languages of the data set, sorted."""
        return sorted(self.prompt_tokens)


def write_rows(folder: Path, tables: Iterable[pa.Table | pa.RecordBatch], **manifest: Any) -> TokenCounts:
    """Stream tables of `TOKENS` into `folder` and write its manifest last, with the counts and the given fields."""
    counts = TokenCounts()
    head: Ints | None = None
    # Uncompressed: a compressed column would have to be unpacked into each process, row by row of random access.
    with pa.OSFile(str(folder / ROWS_FILE), "wb") as sink, pa.ipc.new_file(sink, TOKENS) as writer:
        for table in tables:
            counts.add(table)
            head = _head(table, head)
            writer.write(table.select(TOKENS.names).cast(TOKENS))
    write_manifest(
        folder,
        artifact="tokens",
        format=FORMAT,
        languages=counts.languages,
        head=0 if head is None else len(head),
        counts={name: dict(v) if isinstance(v, Counter) else v for name, v in vars(counts).items()},
        **manifest,
    )
    return counts


def _head(table: pa.Table | pa.RecordBatch, before: Ints | None) -> Ints | None:
    """The ids that all prompts of `table` begin with, and `before` too (None: there was no prompt yet)."""
    prompts = pc.list_flatten(table["prompts"])
    prompts = prompts.combine_chunks() if isinstance(prompts, pa.ChunkedArray) else prompts
    if not len(prompts):
        return before
    ids, lengths = prompts.flatten().to_numpy(), pc.list_value_length(prompts).to_numpy(zero_copy_only=False)
    if before is None:
        before = ids[: lengths[0]]
    # `before` is one run more, in front.
    lengths = np.concatenate([[len(before)], lengths])
    return before[: common_start(np.concatenate([before, ids]), starts_of(lengths), lengths)].copy()


class TokenArtifact:
    """A finished folder of token rows; get one from `TokenArtifact.open`. Pickling it carries the path only."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        with pa.memory_map(str(folder / ROWS_FILE)) as source:
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts: list[int] = []
        self.rows_count = 0
        for batch in self._batches:
            self._starts.append(self.rows_count)
            self.rows_count += batch.num_rows

    @classmethod
    def open(cls, folder: str | Path) -> TokenArtifact:
        """Map a folder.

        Raises:
            IncompleteArtifactError: a file is missing or short.
            ArtifactError: the folder holds something else.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest.get("artifact") != "tokens" or manifest.get("format") != FORMAT:
            raise ArtifactError(
                f"{str(folder)!r} is not a folder of token rows in format {FORMAT}: it says artifact="
                f"{manifest.get('artifact')!r}, format={manifest.get('format')!r}"
            )
        verify_files(folder, manifest)
        return cls(folder, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenArtifact.open, (self.folder,))

    def __len__(self) -> int:
        return self.rows_count

    @property
    def fingerprint(self) -> str:
        """Fingerprint of sources, tokenizer and data settings."""
        return str(self.manifest["fingerprint"])

    @property
    def languages(self) -> list[str]:
        """All languages of the data set, sorted: the columns of the grid of a batch."""
        return list(self.manifest["languages"])

    @property
    def counts(self) -> TokenCounts:
        """Tokens per language, and what the limits cut."""
        stored: dict[str, Any] = self.manifest["counts"]
        fields: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in stored.items()}
        return TokenCounts(**fields)

    @property
    def rejected(self) -> dict[str, int]:
        """Number of rejected rows by reason (empty if all rows were valid)."""
        return dict(self.manifest["rejected"])

    @property
    def rejects_path(self) -> Path | None:
        """JSONL of the rejected rows, if there were any."""
        return self.folder / REJECTS_FILE if self.rejected else None

    @property
    def head(self) -> int:
        """How many tokens all prompts of the data set begin with: the template's, before the user's text."""
        return int(self.manifest["head"])

    def lengths(self, indices: Sequence[int] | None = None) -> Lengths:
        """Tokens of some rows, or of all; read from Arrow's offsets, no token is.

        Raises:
            IndexError: An index is outside 0..rows-1.
        """
        if indices is None:
            return Lengths(*np.concatenate([_lengths(batch, None) for batch in self._batches], axis=1))
        wanted = np.asarray(indices, dtype=np.int64)
        if len(outside := wanted[(wanted < 0) | (wanted >= self.rows_count)]):
            raise IndexError(f"row {outside[0]} of {self.rows_count} in {str(self.folder)!r}")
        parts = np.searchsorted(self._starts, wanted, side="right") - 1
        found = np.empty((len(fields(Lengths)), len(wanted)), dtype=np.int64)
        for part in np.unique(parts):
            here = parts == part
            found[:, here] = _lengths(self._batches[part], wanted[here] - self._starts[part])
        return Lengths(*found)

    @property
    def bundle_ids(self) -> list[str]:
        """Ids of all rows, in the order of the file."""
        return [name for batch in self._batches for name in batch.column("bundle_id").to_pylist()]

    @property
    def kinds(self) -> list[str]:
        """Kinds of all rows, in the order of the file."""
        return [name for batch in self._batches for name in batch.column("kind").to_pylist()]

    @property
    def distinct_kinds(self) -> set[str]:
        """The kinds that occur."""
        return {kind for batch in self._batches for kind in pc.unique(batch.column("kind")).to_pylist()}

    def table(self, indices: Iterable[int]) -> pa.Table:
        """Rows by index as a table of `TOKENS`, reading only those.

        Raises:
            IndexError: an index is outside 0..rows-1.
        """
        pieces = []
        for index in indices:
            if not 0 <= index < self.rows_count:
                raise IndexError(f"row {index} of {self.rows_count} in {str(self.folder)!r}")
            part = bisect_right(self._starts, index) - 1
            pieces.append(self._batches[part].slice(index - self._starts[part], 1))
        return pa.Table.from_batches(pieces, schema=TOKENS)

    def rows(self, indices: Iterable[int]) -> list[TokenRow]:
        """`table` as token rows, for small calls."""
        return table_to_rows(self.table(indices))


def _lengths(batch: pa.RecordBatch, rows: Ints | None) -> Ints:
    """The fields of `Lengths` for some rows of a record batch (None: all), [5, N]."""
    rows = np.arange(batch.num_rows) if rows is None else rows
    prompts = batch.column("prompts")
    first = prompts.offsets.to_numpy()
    starts, ends = first[rows], first[rows + 1]  # of the bundle's prompts
    tokens = prompts.values.offsets.to_numpy()
    answered = batch.column("response_prompt").to_numpy()[rows]
    one = np.minimum(starts + answered.clip(min=0), ends - 1)
    answers = []
    for name in ("chosen", "rejected"):  # an absent answer is null, and has no tokens
        offsets = batch.column(name).offsets.to_numpy()
        answers.append(offsets[rows + 1] - offsets[rows])
    own = np.where(answered >= 0, tokens[one + 1] - tokens[one], 0)
    return np.stack([ends - starts, tokens[ends] - tokens[starts], own, *answers]).astype(np.int64)
