"""Token rows on disk: Arrow files that every process of a node maps into memory and shares through the page cache.

An artefact is a folder of *shards* `rows-NNNNN.arrow`, which tasks write side by side, and a manifest, written last.
What a process holds of it beside the maps is an object per shard, and 8 bytes a bundle where it asks for `keys`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field

from mlc_ray.data.artifacts import local_artifact
from mlc_ray.data.bundles import NAMED_FIRST, place
from mlc_ray.data.plan import Lengths
from mlc_ray.data.ragged import Ints, common_start, shared_start, starts_of
from mlc_ray.data.tables import ANSWERS, TOKENS, Keys, keys_of, table_to_rows
from mlc_ray.storage import ArtifactError, Place, read_manifest, write_manifest
from mlc_ray.types import TokenRow

FORMAT = 6
REJECTS_FILE = "rejects.jsonl"
EVERY = "every "
"""How the names of answers begin in `lacking` where each language of a bundle counts."""
GIVEN = "given "
"""The same where each language counts that a bundle has answers in."""
_BATCH_ROWS = 8192


def shard_file(number: int, *, without_repeats: bool = False) -> str:
    """The name of a shard; one that is written anew without repeated bundles has another."""
    return f"{'once' if without_repeats else 'rows'}-{number:05d}.arrow"


@dataclass
class TokenCounts:
    """What a data set weighs, and what was lost to the limits; everything in tokens unless it says otherwise.

    `kinds` counts bundles, `truncated_prompts` prompts, `truncated_responses` bundles with an answer that lost its end,
    and `lacking` bundles without a chosen (or with none that continues a prompt), or without a rejected answer, and
    under `every chosen` and `every rejected` those without one in each of their languages. `answered` counts bundles by
    their response language, those that have a prompt in it.
    """

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    response_tokens: int = 0
    truncated_prompts: Counter[str] = field(default_factory=Counter)
    truncated_prompt_tokens: Counter[str] = field(default_factory=Counter)
    truncated_responses: int = 0
    truncated_response_tokens: int = 0
    lacking: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, table: pa.Table) -> TokenCounts:
        """Count rows of `TOKENS`, by Arrow's own kernels."""
        codes = pc.list_flatten(table["languages"]).combine_chunks().dictionary_encode()
        names, code = codes.dictionary.to_pylist(), codes.indices.to_numpy()
        lengths = pc.list_value_length(pc.list_flatten(table["prompts"])).to_numpy()
        cuts = pc.list_flatten(table["cut"]).to_numpy()

        def by_language(weights: Ints) -> Counter[str]:
            sums = np.bincount(code, weights, len(names)).astype(int).tolist()
            return Counter({name: total for name, total in zip(names, sums, strict=True) if total})

        cut_answers = table["truncated_response_tokens"].to_numpy()
        response = table["response_prompt"].to_numpy()
        first = starts_of(pc.list_value_length(table["languages"]).to_numpy().astype(np.int64))
        return cls(
            rows=table.num_rows,
            kinds=Counter({each["values"]: each["counts"] for each in table["kind"].value_counts().to_pylist()}),
            prompt_tokens=by_language(lengths),
            response_tokens=sum(
                pc.sum(pc.list_value_length(ids)).as_py() or 0
                for name in ANSWERS
                for ids in (table[name], pc.struct_field(pc.list_flatten(table["answers"]), name))
            ),
            truncated_prompts=by_language(cuts > 0),
            truncated_prompt_tokens=by_language(cuts),
            truncated_responses=int((cut_answers > 0).sum()),
            truncated_response_tokens=int(cut_answers.sum()),
            lacking=Counter({name: int(lack.sum()) for name, lack in _lacking(table).items() if lack.any()}),
            answered=by_language(np.bincount((first + response)[response >= 0], minlength=len(code))),
        )

    def add(self, other: TokenCounts) -> None:
        """Count the rows of another part of the data set too."""
        for each in fields(self):
            mine, more = getattr(self, each.name), getattr(other, each.name)
            setattr(self, each.name, mine + more)

    @property
    def languages(self) -> list[str]:
        """All languages of the data set, sorted."""
        return sorted(self.prompt_tokens)


@dataclass(frozen=True)
class Lacking:
    """A bundle without answers that some losses need: where it stood (`data.jsonl:3`), and what is absent.

    `absent` are of the answers in the response language, `languages` those in which the answer is absent.
    """

    bundle_id: str
    place: str
    absent: list[str]
    languages: list[str]


@dataclass
class Shard:
    """What is known of a shard: its file and size, its counts, the ids that all its prompts begin with (None: it has
    none), and the first bundles that lack each answer."""

    file: str = ""
    bytes: int = 0
    counts: TokenCounts = field(default_factory=TokenCounts)
    head: Ints | None = None
    lacking: dict[str, list[Lacking]] = field(default_factory=dict)

    @classmethod
    def of(cls, table: pa.Table, before: int) -> Shard:
        """What is known of the rows of `table`, which come behind so many others."""
        prompts = pc.list_flatten(table["prompts"]).combine_chunks()
        ids, lengths = prompts.flatten().to_numpy(), pc.list_value_length(prompts).to_numpy(zero_copy_only=False)
        lacking = {
            name: [_named(table, row, before, name) for row in np.flatnonzero(lack)[:NAMED_FIRST]]
            for name, lack in _lacking(table).items()
            if lack.any()
        }
        head = ids[: common_start(ids, starts_of(lengths), lengths)].copy() if len(lengths) else None
        return cls(counts=TokenCounts.of(table), head=head, lacking=lacking)

    def add(self, other: Shard) -> None:
        """Take in what is known of the rows behind these."""
        self.counts.add(other.counts)
        if self.head is None or other.head is None:
            self.head = other.head if self.head is None else self.head
        else:
            self.head = shared_start(self.head, other.head)
        for name, found in other.lacking.items():
            self.lacking[name] = [*self.lacking.get(name, []), *found][:NAMED_FIRST]


def write_shard(folder: Place, file: str, tables: Iterable[pa.Table]) -> Shard:
    """Write tables of `TOKENS` as the shard `file`, which appears whole.

    The tables may have the columns `file` and `line`, by which bundles that lack an answer are named; without them they
    are named by their number in the shard.
    """
    shard = Shard(file)
    # Uncompressed: a compressed column would have to be unpacked into each process, row by row of random access.
    options = pa.ipc.IpcWriteOptions(unify_dictionaries=True)
    with (folder / file).open("wb") as sink:
        with pa.ipc.new_file(sink, TOKENS, options=options) as writer:
            for table in _joined(tables):
                shard.add(Shard.of(table, before=shard.counts.rows))
                writer.write_table(table.select(TOKENS.names).combine_chunks())
        shard.bytes = sink.tell()
    return shard


def rewrite_shard(folder: Place, number: int, drop: Ints, files: Sequence[str], lines: Sequence[int]) -> Shard:
    """Write a shard anew without its rows `drop`; `files` and `lines` say where each of its rows stood.

    It has another name then, and the first one stays: elsewhere a run that makes the same artefact may still read it.
    """
    keep = np.ones(len(lines), dtype=bool)
    keep[drop] = False

    def kept() -> Iterator[pa.Table]:
        start = 0
        with (folder / shard_file(number)).open() as source, pa.ipc.open_file(source) as reader:
            for index in range(reader.num_record_batches):
                table = pa.Table.from_batches([reader.get_batch(index)])
                here = slice(start, start + len(table))
                table = table.append_column("file", pa.array(files[here], pa.string()))
                table = table.append_column("line", pa.array(lines[here], pa.int64()))
                yield table.filter(keep[here])
                start += len(table)

    return write_shard(folder, shard_file(number, without_repeats=True), kept())


def bundle_ids_in(folder: Place, shards: Sequence[Shard], rows: Ints) -> list[str]:
    """The ids of rows of a folder that has all its shards, but no manifest yet; it reads their shards."""
    starts = np.cumsum([0, *(shard.counts.rows for shard in shards)])
    only_ids = pa.ipc.IpcReadOptions(included_fields=[TOKENS.names.index("bundle_id")])

    found = np.empty(len(rows), dtype=object)
    parts = np.searchsorted(starts, rows, side="right") - 1
    for part in np.unique(parts).tolist():
        with (folder / shards[part].file).open() as source:
            ids = pa.ipc.open_file(source, options=only_ids).read_all()["bundle_id"]
        here = parts == part
        found[here] = ids.take(rows[here] - starts[part]).to_pylist()
    return cast(list[str], found.tolist())


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of about `_BATCH_ROWS`: a record batch is 10 KB of objects in every process."""
    parts, rows = list[pa.Table](), 0
    for table in tables:
        parts.append(table)
        rows += len(table)
        if rows >= _BATCH_ROWS:
            yield pa.concat_tables(parts)
            parts, rows = [], 0
    if rows:
        yield pa.concat_tables(parts)


def _mapped(path: Path) -> list[pa.RecordBatch]:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def finish_artifact(folder: Place, shards: Sequence[Shard], **manifest: Any) -> None:
    """Write the manifest of a folder that has all its shards, in the order of its rows, with the given fields.

    It lists the shards and the rejected rows. What killed tasks left of a shard on this machine is removed.
    """
    whole = Shard()
    for shard in shards:
        whole.add(shard)
    for leftover in Path(folder).glob(".*.tmp-*") if folder.is_local else ():
        leftover.unlink(missing_ok=True)
    files = {shard.file: shard.bytes for shard in shards} | folder.sizes([REJECTS_FILE])
    write_manifest(
        folder,
        files=files,
        artifact="tokens",
        format=FORMAT,
        shards=[shard.file for shard in shards],
        languages=whole.counts.languages,
        head=0 if whole.head is None else len(whole.head),
        counts=vars(whole.counts),
        lacking={name: [asdict(one) for one in found] for name, found in whole.lacking.items()},
        **manifest,
    )


def _lacking(table: pa.Table) -> dict[str, npt.NDArray[np.bool_]]:
    """Which rows lack each answer."""
    absent = {name: pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy() == 0 for name in ANSWERS}
    absent["chosen"] = absent["chosen"] | (table["response_prompt"].to_numpy() < 0)
    further = pc.list_flatten(table["answers"])
    bundle = pc.list_parent_indices(table["answers"]).to_numpy()
    for name in ANSWERS:
        there = bundle[pc.fill_null(pc.list_value_length(pc.struct_field(further, name)), 0).to_numpy() > 0]
        number = np.bincount(there, minlength=len(table)) + ~absent[name]
        absent[EVERY + name] = number < pc.list_value_length(table["languages"]).to_numpy()
        absent[GIVEN + name] = number < 1 + pc.list_value_length(table["answers"]).to_numpy()
    return absent


def _named(table: pa.Table, row: int, before: int, kind: str) -> Lacking:
    where = f"row {before + row + 1}"
    if "file" in table.column_names:
        where = place(table["file"][row].as_py(), table["line"][row].as_py())
    absent = [name for name, lack in _lacking(table.slice(row, 1)).items() if lack[0] and name in ANSWERS]
    answers, answer = table["answers"][row].as_py(), kind.rpartition(" ")[2]
    own = table["response_prompt"][row].as_py()
    there = {further["prompt"] for further in answers if further[answer]} | ({own} if answer not in absent else set())
    codes = table["languages"][row].as_py()
    needed = {own, *(further["prompt"] for further in answers)} if kind.startswith(GIVEN) else set(range(len(codes)))
    languages = [codes[index] for index in sorted(needed - there - {-1})]
    return Lacking(table["bundle_id"][row].as_py(), where, absent, languages)


class _Manifest(BaseModel):
    """What `finish_artifact` writes; `files` is `write_manifest`'s."""

    fingerprint: str
    shards: list[str]
    languages: list[str]
    head: Annotated[int, Field(ge=0)]
    counts: TokenCounts
    lacking: dict[str, list[Lacking]]
    rejected: dict[str, int]


class TokenArtifact:
    """A finished folder of token rows; get one from `TokenArtifact.open`. Pickling it carries its place only.

    `folder` is that place; what is mapped is the folder itself, or the copy of this machine. `fingerprint` is that of
    sources, tokenizer and data settings; `languages` are all of the data set, sorted: the columns of the grid of a
    batch. `counts` are tokens per language, and what the limits cut; `rejected` the number of rejected rows by reason
    (empty if all rows were valid). `head` is how many tokens all prompts of the data set begin with: the template's,
    before the user's text. `lacking` are the first bundles without a chosen or without a rejected answer, of which
    `counts.lacking` has the number.
    """

    def __init__(self, folder: Place, manifest: _Manifest, here: Path):
        self.folder, self.manifest = folder, manifest
        self.fingerprint, self.languages, self.head = manifest.fingerprint, manifest.languages, manifest.head
        self.counts, self.rejected, self.lacking = manifest.counts, manifest.rejected, manifest.lacking
        self._batches = [batch for name in manifest.shards for batch in _mapped(here / name)]
        sizes = np.array([batch.num_rows for batch in self._batches], dtype=np.int64)
        self._starts = starts_of(sizes)
        self.rows_count = int(sizes.sum())

    @classmethod
    def open(cls, folder: str | Path | Place) -> TokenArtifact:
        """Map a folder; one that is elsewhere is fetched first, once per machine.

        Raises:
            IncompleteArtifactError: a file is missing or short.
            ArtifactError: the folder holds something else.
        """
        folder = Place(folder)
        manifest = read_manifest(folder)
        what, version = manifest.get("artifact"), manifest.get("format")
        if (what, version) != ("tokens", FORMAT):
            said = f"it says artifact={what!r}, format={version!r}"
            raise ArtifactError(f"{str(folder)!r} is not a folder of token rows in format {FORMAT}: {said}")
        here = local_artifact(folder, manifest)
        try:
            found = _Manifest.model_validate(manifest)
            if strangers := sorted(set(found.shards) - manifest["files"].keys()):
                raise ValueError(f"shards has {strangers[0]!r}, which is not in files")
            return cls(folder, found, here)
        except (ValueError, pa.ArrowInvalid) as error:
            fault = " ".join(str(error).split())
            raise ArtifactError(f"{str(folder)!r} is damaged: {fault}; remove it, and it is made again") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenArtifact.open, (self.folder,))

    def __len__(self) -> int:
        return self.rows_count

    @property
    def rejects_path(self) -> Place | None:
        """JSONL of the rejected rows, if there were any."""
        return self.folder / REJECTS_FILE if self.rejected else None

    @cached_property
    def most_languages(self) -> int:
        """Of the bundle that has the most; read from Arrow's offsets."""
        return max(
            (int(np.diff(each.column("prompts").offsets.to_numpy()).max(initial=0)) for each in self._batches),
            default=0,
        )

    def lengths(self, indices: Sequence[int] | Ints) -> Lengths:
        """Tokens of some rows; read from Arrow's offsets, no token is.

        Raises:
            IndexError: An index is outside 0..rows-1.
        """
        parts, rows = self._places(indices)
        found = np.empty((len(fields(Lengths)), len(rows)), dtype=np.int64)
        for part in np.unique(parts):
            here = parts == part
            found[:, here] = _lengths(self._batches[part], rows[here])
        return Lengths(*found)

    def counted(self, number: Callable[[Lengths], Ints]) -> Ints:
        """What `number` says of all rows, [N] int32; made shard by shard, since `Lengths` are 64 bytes a bundle."""
        parts = [number(Lengths(*_lengths(batch))).astype(np.int32) for batch in self._batches]
        return np.concatenate([np.empty(0, np.int32), *parts])

    @cached_property
    def keys(self) -> Keys:
        """`mlc_ray.data.tables.keys_of` all rows, [N]."""
        parts = [batch.column("key").to_numpy() for batch in self._batches]
        return np.concatenate([np.empty(0, np.uint64), *parts])

    @property
    def pairs(self) -> Keys:
        """The same of the pair that each row is in; one without a pair is alone in its own."""
        parts = (pc.if_else(pc.equal(rows["pair"], ""), rows["bundle_id"], rows["pair"]) for rows in self._batches)
        return keys_of(name for part in parts for name in part.to_pylist())

    @property
    def kinds(self) -> npt.NDArray[np.int8]:
        """Kinds of all rows, [N], as indices into `mlc_ray.data.bundles.KINDS`."""
        parts = [batch.column("kind").indices.to_numpy() for batch in self._batches]
        return np.concatenate([np.empty(0, np.int8), *parts])

    def table(self, indices: Sequence[int] | Ints) -> pa.Table:
        """Rows by index as a table of `TOKENS`, reading only those.

        Raises:
            IndexError: an index is outside 0..rows-1.
        """
        places = zip(*self._places(indices), strict=True)
        return pa.Table.from_batches([self._batches[part].slice(row, 1) for part, row in places], schema=TOKENS)

    def _places(self, indices: Sequence[int] | Ints) -> tuple[Ints, Ints]:
        """The record batch of each row, and which of its rows it is."""
        wanted = np.asarray(indices, dtype=np.int64)
        if len(outside := wanted[(wanted < 0) | (wanted >= self.rows_count)]):
            raise IndexError(f"row {outside[0]} of {self.rows_count} in {str(self.folder)!r}")
        parts = np.searchsorted(self._starts, wanted, side="right") - 1
        return parts, wanted - self._starts[parts]

    def rows(self, indices: Sequence[int] | Ints) -> list[TokenRow]:
        """`table` as token rows, for small calls."""
        return table_to_rows(self.table(indices))


def _lengths(batch: pa.RecordBatch, rows: Ints | None = None) -> Ints:
    """The fields of `Lengths` for some rows of a record batch (None: all), [8, N]."""
    rows = np.arange(batch.num_rows) if rows is None else rows
    prompts = batch.column("prompts")
    first = prompts.offsets.to_numpy()
    starts, ends = first[rows], first[rows + 1]  # of the bundle's prompts
    tokens = prompts.values.offsets.to_numpy()
    answered = batch.column("response_prompt").to_numpy()[rows]
    one = np.minimum(starts + answered.clip(min=0), ends - 1)
    own = np.where(answered >= 0, tokens[one + 1] - tokens[one], 0)
    further = batch.column("answers")
    begin, end = further.offsets.to_numpy()[rows], further.offsets.to_numpy()[rows + 1]

    def sizes(answers: pa.ListArray, begin: Ints, end: Ints) -> Ints:  # an absent answer is null, and has no tokens
        offsets: Ints = answers.offsets.to_numpy()
        return offsets[end] - offsets[begin]

    answers = [sizes(batch.column(name), rows, rows + 1) for name in ANSWERS]
    answers += [sizes(further.values.field(name), begin, end) for name in ANSWERS]
    return np.stack([ends - starts, tokens[ends] - tokens[starts], own, *answers, end - begin]).astype(np.int64)
