"""Sources -> token rows on disk, or a table of bundles, by Ray Data; docs/data.md follows one prompt on its way."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from mlc_ray.config import PLAIN_CHAT, ChatSection, DataSection, ModelSection, SourceSection
from mlc_ray.data.artifacts import is_made, new_artifact
from mlc_ray.data.contents import Block, Content, contents_of, read_blocks
from mlc_ray.data.ragged import Ints
from mlc_ray.data.rejects import InvalidBundlesError, Ledger, PartRead
from mlc_ray.data.sources import Reading, Seen, SourceFile, parse, pinned, readings_of, resolve_source
from mlc_ray.data.store import (
    FORMAT,
    REJECTS_FILE,
    Shard,
    TokenArtifact,
    bundle_ids_in,
    finish_artifact,
    rewrite_shard,
    shard_file,
    write_shard,
)
from mlc_ray.data.tables import BUNDLES
from mlc_ray.data.tokens import ChatTemplate, load_tokenizer, tokenize_table
from mlc_ray.errors import MlcRayError
from mlc_ray.progress import phase
from mlc_ray.storage import Place, fingerprint, fingerprint_tokenizer, scratch_folder

# Other runs on the cluster may hold most of its CPUs. A stage that asked for whole ones would wait without a message.
_CPUS = 0.25

_BLOCKS_HERE = 8
"""Up to 64 MiB of sources are hashed in this process (0.1 s); starting a task takes longer."""

_BLOCKS_A_TASK = 16
_PARTS = 4096
"""Parts of about 8 MiB, or larger ones where there would be more: every process maps a file of each."""

_INVALID = "invalid"


def _rejects_file(part: int) -> str:
    """Where the task that reads a part writes its rejected rows."""
    return f"rejects-{part:05d}.jsonl"


logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- sources -> parts


def _files(sources: Sequence[SourceSection]) -> list[SourceFile]:
    return [file for source in sources for file in resolve_source(source)]


def _contents(files: Sequence[SourceFile]) -> dict[Place, Content]:
    """The contents of all files, each of which is read once, and remembered."""
    paths = dict.fromkeys(path for file in files for path in file.files())
    return contents_of(paths, _blocks_by_tasks)


def _blocks_by_tasks(blocks: list[Block]) -> Iterable[tuple[str, int]]:
    if len(blocks) <= _BLOCKS_HERE:
        return read_blocks(blocks)
    return _blocks_in_parallel(blocks)


def _blocks_in_parallel(blocks: list[Block]) -> list[tuple[str, int]]:
    task: Any = ray.remote(num_cpus=_CPUS)(lambda some: list(read_blocks(some)))
    starts = range(0, len(blocks), _BLOCKS_A_TASK)
    results = ray.get([task.remote(blocks[start : start + _BLOCKS_A_TASK]) for start in starts])
    return [each for result in results for each in result]


def _readings(files: Sequence[SourceFile], contents: dict[Place, Content]) -> list[Reading]:
    """All that is to be read, in order, in parts."""
    blocks = -(-sum(len(content.digests) for content in contents.values()) // _PARTS)
    return [reading for file in files for reading in readings_of(file, contents, blocks=max(1, blocks))]


def _results(readings: Sequence[Reading], stage: Any, **options: Any) -> Iterator[tuple[PartRead, Any]]:
    """What `stage` says of each reading, in their order.

    Raises:
        MlcRayError: what a task raised, the first in order; or a source holds nothing that can be used.
    """
    items = [{"number": n, "reading": reading} for n, reading in enumerate(readings)]
    planned = ray.data.from_items(items, override_num_blocks=len(items))
    quiet_and_ordered(planned)
    answered = zip(readings, planned.map(stage, num_cpus=_CPUS, **options).iter_rows(), strict=True)
    for file, parts in groupby(answered, key=lambda each: each[0].file):
        seen = Seen()
        for _, said in parts:
            if said["error"] is not None:
                raise said["error"]
            seen.add(said["seen"])
            yield said["read"], said["made"]
        seen.check(file)


Row = dict[str, Any]
"""What goes between tasks: one reading with its number, or what was said of it."""


def _answering(work: Callable[[Reading], tuple[PartRead, Any]], row: Row) -> Row:
    """What `work` says of the reading of `row`, or its error as data: raised here, Ray would wrap it."""
    reading, read, made, error = row["reading"], None, None, None
    try:
        read, made = work(reading)
    except MlcRayError as raised:
        error = raised
    return {"read": read, "made": made, "seen": reading.seen, "error": error}


# ------------------------------------------------------------------------------------------------- parts -> bundles


def read_bundles(
    sources: Sequence[SourceSection],
    *,
    on_invalid: str,
    rejects_path: str | Path,
    languages: Sequence[str] | None = None,
) -> pa.Table:
    """All valid bundles of `sources` as a table of `BUNDLES`, in the order of sources, files and lines.

    It is held in memory, as benchmarks are; what is trained on goes from its files to token rows.

    Args:
        sources: what to read; bundles that are in memory become a source by `mlc_ray.data.given.as_source`.
        on_invalid: `fail` or `skip`, as data.on_invalid.
        rejects_path: JSONL (file, line, reason, text) for rows that are not a bundle, repeat one, or lack what
            `languages` needs; an older file there is removed.
        languages: data.languages; bundles are restricted to them.

    Raises:
        BundleFileError: a file cannot be read.
        InvalidBundlesError: `on_invalid` is "fail" and a row was rejected, or no valid row is left.
        KeyCollisionError: two different bundles have the same key.
    """
    files = _files(sources)
    ledger, rejects, tables = Ledger(), list[str](), list[pa.Table]()
    stage_settings = {"languages": None if languages is None else list(languages)}
    with phase("reading", unit="bundles") as progress:
        for read, table in _results(_readings(files, _contents(files)), _read_stage, fn_kwargs=stage_settings):
            ledger.add(read)
            rejects += read.rejects
            tables.append(table)
            progress.advance(len(table))
    ids = pa.concat_tables(tables)["bundle_id"]
    repeats = ledger.close(lambda rows: ids.take(rows).to_pylist(), on_invalid, rejects, Path(rejects_path))
    return pa.concat_tables(_without(repeats, tables) if repeats else tables)


def _without(rows: Mapping[int, Ints], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables without some rows of each, by its number."""
    for number, table in enumerate(tables):
        mask = np.ones(len(table), dtype=bool)
        mask[rows.get(number, [])] = False
        yield table.filter(mask)


def _read_stage(row: Row, languages: list[str] | None) -> Row:
    def work(reading: Reading) -> tuple[PartRead, pa.Table]:
        read = PartRead()
        bundles = [read.bundles(part) for part in parse(reading, languages)]
        return read, pa.concat_tables([BUNDLES.empty_table(), *bundles])

    return _answering(work, row)


# --------------------------------------------------------------------------------------------- parts -> token rows


def prepare_token_rows(
    data: DataSection, model: ModelSection, *, chat: ChatSection = PLAIN_CHAT, cache_dir: str | Path | Place
) -> TokenArtifact:
    """Read, validate and tokenise `data.train`; the result is a folder `cache_dir/tokens-FINGERPRINT`.

    Parts of the sources are read side by side, and each one's rows are written as a shard by the process that tokenises
    them: `cache_dir` must be the same folder on all nodes, or a URL. The driver keeps 12 bytes of each bundle (see
    `rejects`).

    The fingerprint covers the content of the sources, the code of formats from outside this package, the tokenizer's
    files, `chat` and the data settings. A complete folder is used again; an incomplete one is written once more.
    Rejected rows are in `TokenArtifact.rejects_path`, or, if the function raises, in
    `cache_dir/tokens-FINGERPRINT.rejects.jsonl`.

    Raises:
        BundleFileError: as `read_bundles`, as do InvalidBundlesError and KeyCollisionError.
        TokenizationError: data.max_prompt_tokens is too small for the template and any text.
        TemplateError: the template is unusable.
    """
    # The hub is asked once, and the manifest has the commits.
    data = data.model_copy(update={"train": pinned(data.train)})
    files = _files(data.train)
    contents = _contents(files)
    name = token_fingerprint(data, model, chat, contents)
    folder = Place(cache_dir).absolute() / f"tokens-{name}"
    if not is_made(folder):
        # Before anything is read: a template that does not fit is a fault of the settings, not of a row.
        template = ChatTemplate(load_tokenizer(model.path, trust_remote_code=model.trust_remote_code), chat)
        template.encode_prompt("x", data.max_prompt_tokens)
        _write_token_rows(_readings(files, contents), data, model, chat, name=name, folder=folder)
    artifact = TokenArtifact.open(folder)
    _announce(artifact)
    return artifact


def prepared_tokens(
    data: DataSection, model: ModelSection, *, chat: ChatSection = PLAIN_CHAT, cache_dir: str | Path | Place
) -> TokenArtifact | None:
    """What `prepare_token_rows` has made already; None where there is nothing yet."""
    data = data.model_copy(update={"train": pinned(data.train)})
    name = token_fingerprint(data, model, chat, _contents(_files(data.train)))
    folder = Place(cache_dir).absolute() / f"tokens-{name}"
    return TokenArtifact.open(folder) if is_made(folder) else None


def _write_token_rows(
    readings: Sequence[Reading], data: DataSection, model: ModelSection, chat: ChatSection, *, name: str, folder: Place
) -> None:
    kept_rejects = folder.parent / f"{folder.name}.rejects.jsonl"
    with (
        new_artifact(folder) as temporary,
        _work_folder(temporary) as work,
        scratch_folder() as here,
    ):
        ledger = Ledger()
        results = _results(
            readings,
            Tokenize,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(_tokenizers_at_most(), len(readings))),
            fn_constructor_kwargs={"data": data, "model": model, "chat": chat, "folder": temporary, "work": work},
        )
        shards, parts = list[Shard](), list[Place]()
        with phase("tokenising", unit="bundles") as progress:
            for read, shard in results:
                ledger.add(read)
                if read.reasons:
                    parts.append(work / _rejects_file(len(shards)))
                shards.append(shard)
                progress.advance(sum(map(len, read.keys)))
        failed = data.on_invalid == "fail" and ledger.reasons
        rejected = here / REJECTS_FILE
        rejects = (part.read_text() for part in parts)
        ids_at = None if failed else partial(bundle_ids_in, temporary, shards)
        try:
            repeats = ledger.close(ids_at, data.on_invalid, rejects, rejected, named=kept_rejects)
        except InvalidBundlesError:
            kept_rejects.storage.publish(rejected, str(kept_rejects))
            raise
        if rejected.exists():
            temporary.storage.publish(rejected, str(temporary / REJECTS_FILE))
        if repeats:
            _leave_out(repeats, ledger, temporary, shards)
        finish_artifact(
            temporary,
            shards,
            fingerprint=name,
            rejected=dict(ledger.reasons.most_common()),
            model=model.path,
            chat=chat.model_dump(mode="json"),
            data=data.model_dump(mode="json", exclude={"validation"}),
        )
    kept_rejects.remove()


def _leave_out(repeats: Mapping[int, Ints], ledger: Ledger, folder: Place, shards: list[Shard]) -> None:
    """Have the shards that hold repeated bundles written anew without them."""
    task: Any = ray.remote(num_cpus=_CPUS)(rewrite_shard)
    again = [task.remote(folder, n, drop, *ledger.columns(n)) for n, drop in repeats.items()]
    for number, shard in zip(repeats, ray.get(again), strict=True):
        shards[number] = shard
        if folder.is_local:  # one that no other run has
            (folder / shard_file(number)).remove()


@contextmanager
def _work_folder(folder: Place) -> Iterator[Place]:
    """A folder in `folder`, or of a store's beside it, for this run's own files; it is removed when the block ends."""
    work = (folder if folder.is_local else folder.parent) / f".work-{uuid.uuid4().hex[:8]}"
    try:
        yield work
    finally:
        try:
            work.remove()
        except OSError as error:
            logger.warning("%s could not be removed (%s); nothing reads it: remove it by hand", work, error)


def _tokenizers_at_most() -> int:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, int(resources.get("CPU", 1)))


def token_fingerprint(
    data: DataSection,
    model: ModelSection,
    chat: ChatSection = PLAIN_CHAT,
    contents: dict[Place, Content] | None = None,
) -> str:
    """Fingerprint of everything that token rows depend on; paths do not count, contents do.

    `contents` are those of the sources' files; without them, they are read.
    """
    return fingerprint(
        {
            "format": FORMAT,
            "sources": [file.fingerprint(contents) for file in _files(data.train)],
            "tokenizer": fingerprint_tokenizer(model.path),
            "chat": chat.model_dump(mode="json"),
            "settings": data.model_dump(mode="json", exclude={"train", "validation"}),
        }
    )


class Tokenize:
    """Ray Data stage: a part of the sources -> a shard; an actor, so that each process loads the tokenizer once.

    Where `data.on_invalid` is "fail", nothing is tokenised any more once a row was rejected, by whichever actor: what
    is left is read only, so that all rejected rows can be named.

    Shards go to `folder`, where runs that make the same artefact write the same ones; rejected rows, and that there are
    some, to `work`, which is this run's own.
    """

    def __init__(self, data: DataSection, model: ModelSection, chat: ChatSection, folder: Place, work: Place):
        self.template = ChatTemplate(load_tokenizer(model.path, trust_remote_code=model.trust_remote_code), chat)
        self.languages, self.others, self.fails = data.languages, data.other_languages, data.on_invalid == "fail"
        self.folder, self.work = folder, work
        self.limits = {
            "max_prompt_tokens": data.max_prompt_tokens,
            "max_response_tokens": data.max_response_tokens,
        }

    def __call__(self, row: Row) -> Row:
        """Write the shard of the part that `row` names."""
        return _answering(partial(self._write, row["number"]), row)

    def _write(self, number: int, reading: Reading) -> tuple[PartRead, Shard]:
        read = PartRead()
        invalid = self.work / _INVALID

        def tokens() -> Iterator[pa.Table]:
            failed = invalid.is_file()
            for parsed in parse(reading, self.languages, self.others):
                bundles = read.bundles(parsed)
                if self.fails and read.reasons and not failed:
                    failed = True
                    invalid.write_text("")
                if len(bundles) and not failed:
                    rows = tokenize_table(bundles, self.template, **self.limits)
                    yield rows.append_column("file", bundles["file"]).append_column("line", bundles["line"])

        shard = write_shard(self.folder, shard_file(number), tokens())
        if read.rejects:
            (self.work / _rejects_file(number)).write_text("".join(read.rejects))
            read.rejects.clear()
        return read, shard


def _announce(artifact: TokenArtifact) -> None:
    counts = artifact.counts
    lines = [
        f"{len(artifact)} bundles in {len(artifact.languages)} languages as tokens: {artifact.folder}",
        f"  prompts: {sum(counts.prompt_tokens.values())} tokens; "
        f"{sum(counts.truncated_prompts.values())} prompts were too long and lost "
        f"{sum(counts.truncated_prompt_tokens.values())}"
        + (f" ({dict(counts.truncated_prompts)})" if counts.truncated_prompts else ""),
        f"  answers: {counts.response_tokens} tokens; "
        f"those of {counts.truncated_responses} bundles were too long and lost {counts.truncated_response_tokens}",
    ]
    if artifact.rejected:
        lines.append(f"  left out: {sum(artifact.rejected.values())} invalid rows, see {artifact.rejects_path}")
    logger.info("%s", "\n".join(lines))


def quiet_and_ordered(dataset: ray.data.Dataset) -> None:
    """Order matters in every pipeline here. The setting is the data set's own copy, not the process's."""
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
