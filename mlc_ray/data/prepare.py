"""The Ray Data pipelines: files -> bundles -> token rows on disk, and token rows -> batches inside a worker."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from mlc_ray.config import DataSection, ModelSection, SourceSection
from mlc_ray.data.batches import collate
from mlc_ray.data.bundle_tables import NOT_OF_A_BUNDLE, keep_valid, parse_file
from mlc_ray.data.bundles import BundleFileError, RejectedRow, from_row
from mlc_ray.data.formats.containers import load_dataset
from mlc_ray.data.formats.readers import resolve_source
from mlc_ray.data.order import Slot
from mlc_ray.data.store import (
    FORMAT,
    REJECTS_FILE,
    TokenArtifact,
    gather,
    rows_to_table,
    table_to_rows,
    write_rows,
)
from mlc_ray.data.tokens import ChatTemplate, load_tokenizer, tokenize_and_count
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import (
    IncompleteArtifactError,
    atomic_folder,
    fingerprint,
    fingerprint_files,
    fingerprint_tokenizer,
)
from mlc_ray.types import Batch, ReferenceRow

# Other runs on the cluster may hold most of its CPUs. A stage that asked for whole ones would wait for them in silence.
_PARSE_CPUS = 0.25
_TOKENIZE_CPUS = 0.25
# While batches are gathered, this run's own workers may hold every CPU there is.
_GATHER_CPUS = 0
_GATHER_TASKS = 2

_ROWS_AT_ONCE = 512
_GATHER_ROWS = 256
_NAMED_FIRST = 5
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


class InvalidBundlesError(MlcRayError, ValueError):
    """Some rows are not valid bundles (or none is); the message names the first few and the rejects file."""


# ------------------------------------------------------------------------------------------------- files -> bundles


def read_bundles(
    sources: Sequence[SourceSection],
    *,
    on_invalid: str,
    rejects_path: str | Path,
    named_path: str | Path | None = None,
    languages: Sequence[str] | None = None,
) -> ray.data.Dataset:
    """All valid bundles of `sources` as a materialised dataset, in the order of sources, files and lines.

    Rows have the columns of `mlc_ray.data.bundles.to_row`, and `file` and `line`. Each file is parsed by a task of its
    own. Rows that are no bundle, repeat one, or lack what `languages` (data.languages) needs are written to
    `rejects_path` (JSONL: file, line, reason, text) and counted on stderr; an older file there is removed. Messages
    name `named_path` instead, where the caller will move the file. Raises `BundleFileError` for a file that cannot be
    read, `InvalidBundlesError` if `on_invalid` is "fail" and a row was rejected, or if no row is left.
    """
    files = [file for source in sources for file in resolve_source(source)]
    items = [{"file_index": index, **asdict(file)} for index, file in enumerate(files)]
    plan = ray.data.from_items(items, override_num_blocks=len(items))
    _quiet_and_ordered(plan)
    parsed = plan.map_batches(
        parse_file,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=_PARSE_CPUS,
        fn_kwargs={"languages": None if languages is None else list(languages)},
    ).materialize()

    rejected, kept = _judge(parsed)
    _report(rejected, kept, Path(rejects_path), on_invalid, named=Path(named_path or rejects_path))
    drop = {(file, line) for file, line, _ in rejected}
    if not drop:
        return parsed.drop_columns(NOT_OF_A_BUNDLE)
    return parsed.map_batches(
        keep_valid, batch_format="pyarrow", num_cpus=_PARSE_CPUS, fn_kwargs={"drop": drop}
    ).materialize()


def _judge(parsed: ray.data.Dataset) -> tuple[list[tuple[int, int, RejectedRow]], int]:
    """Rejected rows of the whole data set, repeated bundles among them, with (file_index, row); and how many are kept.

    The driver sees ids and places of all rows, but the content of rejected ones only.
    """
    rejected: list[tuple[int, int, RejectedRow]] = []
    first_seen: dict[str, str] = {}
    columns = ["bundle_id", "file", "line", "file_index", "row", "reason", "text", "fault"]
    for table in parsed.select_columns(columns).iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in table.to_pylist():
            if row["fault"] is not None:
                raise BundleFileError(row["fault"])
            reason, text = row["reason"], row["text"]
            if reason is None:
                if (name := row["bundle_id"]) not in first_seen:
                    first_seen[name] = f"{row['file']}:{row['line']}"
                    continue
                reason, text = f"repeats bundle {name!r} of {first_seen[name]!r}", ""
            rejected.append((row["file_index"], row["row"], RejectedRow(row["file"], row["line"], reason, text)))
    return rejected, len(first_seen)


def _report(
    rejected: list[tuple[int, int, RejectedRow]], kept: int, path: Path, on_invalid: str, *, named: Path
) -> None:
    path.unlink(missing_ok=True)
    if rejected:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for *_, row in rejected:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        by_reason = count_by_reason(row.reason for *_, row in rejected)
        summary = [f"  {count} x {reason}" for reason, count in by_reason.items()]
        print(f"{len(rejected)} invalid rows, written to {named}:", *summary, sep="\n", file=sys.stderr)
    if rejected and (on_invalid == "fail" or not kept):
        first = [f"  {row.file}:{row.line}: {row.reason}" for *_, row in rejected[:_NAMED_FIRST]]
        more = len(rejected) - len(first)
        raise InvalidBundlesError(
            "\n".join(
                [
                    f"{len(rejected)} of {len(rejected) + kept} rows are not valid bundles:",
                    *first,
                    *([f"  and {more} more"] if more else []),
                    f"All of them are in {str(named)!r}."
                    + (" To leave them out, set data.on_invalid=skip." if kept else " No valid row is left."),
                ]
            )
        )


def count_by_reason(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason occurs, most frequent first; values quoted in a reason do not tell reasons apart."""
    return dict(Counter(_QUOTED.sub("…", reason) for reason in reasons).most_common())


# --------------------------------------------------------------------------------------------- bundles -> token rows


def prepare_token_rows(data: DataSection, model: ModelSection, *, cache_dir: str | Path) -> TokenArtifact:
    """Read, validate and tokenise `data.train`; the result is a folder `cache_dir/tokens-FINGERPRINT`.

    The fingerprint covers the content of the sources, the tokenizer's files and the data settings. A folder that is
    there and complete is used again; an incomplete one is made anew. Rejected rows are in `TokenArtifact.rejects_path`,
    or, if the function raises, in `cache_dir/tokens-FINGERPRINT.rejects.jsonl`. Raises as `read_bundles`, and
    `TokenizationError` or `TemplateError` when the template does not fit the settings.
    """
    name = token_fingerprint(data, model)
    folder = Path(cache_dir).absolute() / f"tokens-{name}"
    if folder.exists():
        try:
            artifact = TokenArtifact.open(folder)
        except IncompleteArtifactError as error:
            print(f"{error}; making it anew", file=sys.stderr)
        else:
            _announce(artifact)
            return artifact

    # Before anything is read: a template that does not fit is a fault of the settings, not of a row.
    template = ChatTemplate(load_tokenizer(model.path, trust_remote_code=model.trust_remote_code))
    template.encode_prompt("x", data.max_prompt_tokens)

    kept_rejects = folder.with_name(f"{folder.name}.rejects.jsonl")
    # Another run that shares the folder may prepare the same data: each has a file of its own until it fails.
    rejects_path = folder.with_name(f".{folder.name}.rejects-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl")
    try:
        bundles = read_bundles(
            data.train,
            on_invalid=data.on_invalid,
            rejects_path=rejects_path,
            named_path=kept_rejects,
            languages=data.languages,
        )
        artifact = _write_token_rows(bundles, data, model, name=name, folder=folder, rejects_path=rejects_path)
    except BaseException:
        if rejects_path.exists():
            os.replace(rejects_path, kept_rejects)
        raise
    rejects_path.unlink(missing_ok=True)
    kept_rejects.unlink(missing_ok=True)
    _announce(artifact)
    return artifact


def _write_token_rows(
    bundles: ray.data.Dataset, data: DataSection, model: ModelSection, *, name: str, folder: Path, rejects_path: Path
) -> TokenArtifact:
    _quiet_and_ordered(bundles)
    tokens = bundles.map_batches(
        Tokenize,
        batch_size=_ROWS_AT_ONCE,
        batch_format="pyarrow",
        num_cpus=_TOKENIZE_CPUS,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(ray.cluster_resources().get("CPU", 1)))),
        fn_constructor_kwargs={"data": data, "model": model},
    )
    try:
        with atomic_folder(folder, replace=folder.exists()) as temporary:
            rejected: dict[str, int] = {}
            if rejects_path.exists():
                shutil.copyfile(rejects_path, temporary / REJECTS_FILE)
                with rejects_path.open(encoding="utf-8") as file:
                    rejected = count_by_reason(json.loads(line)["reason"] for line in file)
            write_rows(
                temporary,
                tokens.iter_batches(batch_size=_ROWS_AT_ONCE, batch_format="pyarrow"),
                fingerprint=name,
                rejected=rejected,
                model=model.path,
                data=data.model_dump(mode="json"),
            )
            if _is_complete(folder):  # by another run, meanwhile: it may be in use, and is never moved aside
                raise FileExistsError(folder)
    except FileExistsError:  # another run prepared the same data meanwhile: its folder has the same content
        pass
    return TokenArtifact.open(folder)


def _is_complete(folder: Path) -> bool:
    try:
        TokenArtifact.open(folder)
    except IncompleteArtifactError:
        return False
    return True


def token_fingerprint(data: DataSection, model: ModelSection) -> str:
    """Fingerprint of everything that token rows depend on; paths do not count, contents do."""
    sources = []
    for source in data.train:
        for file in resolve_source(source):
            content = fingerprint_files([file.path]) if file.is_local else load_dataset(file.path)._fingerprint
            sources.append([content, source.format, source.kind, source.only])
    return fingerprint(
        {
            "format": FORMAT,
            "sources": sources,
            "tokenizer": fingerprint_tokenizer(model.path),
            "settings": data.model_dump(mode="json", exclude={"train"}),
        }
    )


class Tokenize:
    """Ray Data stage: bundle rows -> token rows; an actor, so that each process loads the tokenizer once."""

    def __init__(self, data: DataSection, model: ModelSection):
        self.template = ChatTemplate(load_tokenizer(model.path, trust_remote_code=model.trust_remote_code))
        self.settings: dict[str, Any] = {
            "languages": data.languages,
            "max_prompt_tokens": data.max_prompt_tokens,
            "max_response_tokens": data.max_response_tokens,
        }

    def __call__(self, bundles: pa.Table) -> pa.Table:
        """Tokenise a table of `read_bundles` into one of `token_store.SCHEMA`."""
        done = [tokenize_and_count(from_row(row), self.template, **self.settings) for row in bundles.to_pylist()]
        return rows_to_table([row for row, _ in done], [cut for _, cut in done])


def _announce(artifact: TokenArtifact) -> None:
    counts = artifact.counts
    lines = [
        f"{len(artifact)} bundles in {len(artifact.languages)} languages as tokens: {artifact.folder}",
        f"  prompts: {sum(counts.prompt_tokens.values())} tokens, "
        f"{sum(counts.truncated_prompts.values())} prompts lost {sum(counts.truncated_prompt_tokens.values())}"
        + (f" ({dict(counts.truncated_prompts)})" if counts.truncated_prompts else ""),
        f"  answers: {counts.response_tokens} tokens, "
        f"{counts.truncated_responses} bundles lost {counts.truncated_response_tokens}",
    ]
    if artifact.rejected:
        lines.append(f"  left out: {sum(artifact.rejected.values())} invalid rows, see {artifact.rejects_path}")
    print(*lines, sep="\n", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- token rows -> batches


def stream_batches(
    artifact_folder: str | Path,
    slots: Sequence[Slot],
    *,
    bundles_per_worker: int,
    languages: Sequence[str],
    needs_rejected: bool,
    reference: Mapping[str, ReferenceRow] | None,
    prefetch: int = 2,
) -> Iterator[tuple[list[Slot], Batch]]:
    """One worker's batches in the order of its `slots` (see `plan_rank`), each with the slots it was made from.

    A Ray Data pipeline of its own: a task on this node gathers rows from the memory-mapped artefact while the worker
    computes, `prefetch` batches ahead; the worker packs them. Raises `ArtifactError` if the folder is damaged,
    `BatchError` if a bundle lacks what the loss needs, `ValueError` if `slots` do not fill whole batches.
    """
    if len(slots) % bundles_per_worker:
        raise ValueError(f"{len(slots)} slots do not fill batches of {bundles_per_worker} bundles")
    if not slots:
        return
    TokenArtifact.open(artifact_folder)  # a damaged folder is reported here, not from inside a task
    plan = _plan_dataset([slot.row_index for slot in slots])
    _quiet_and_ordered(plan)
    gathered = plan.map_batches(
        gather,
        fn_kwargs={"folder": str(Path(artifact_folder).absolute())},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=_GATHER_CPUS,
        compute=ray.data.TaskPoolStrategy(_GATHER_TASKS),
        # The rows are in this node's page cache once any worker of it has read them.
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )
    start = 0
    batches = gathered.iter_batches(
        batch_size=bundles_per_worker, batch_format="pyarrow", prefetch_batches=prefetch, drop_last=False
    )
    for table in batches:
        taken = list(slots[start : start + bundles_per_worker])
        if table["position"].to_pylist() != list(range(start, start + len(taken))):
            raise RuntimeError(
                f"Ray Data changed the order of rows at position {start}; preserve_order is not honoured"
            )
        start += len(taken)
        batch = collate(
            table_to_rows(table),
            languages=languages,
            weights=[slot.weight for slot in taken],
            needs_rejected=needs_rejected,
            reference=reference,
        )
        yield taken, batch
    if start != len(slots):
        raise RuntimeError(f"Ray Data delivered {start} of {len(slots)} rows")


def _plan_dataset(row_indices: list[int]) -> ray.data.Dataset:
    """Which row goes where, in a few blocks, so that gathering starts with the first and later ones wait."""
    table = pa.table({"position": pa.array(range(len(row_indices)), pa.int64()), "row_index": row_indices})
    # Not from_arrow: it asks a task of one whole CPU for each block's size, which waits for ever where none is free.
    return ray.data.from_blocks([table.slice(i, _GATHER_ROWS) for i in range(0, len(row_indices), _GATHER_ROWS)])


def _quiet_and_ordered(dataset: ray.data.Dataset) -> None:
    """Order matters in every pipeline here. The setting is the data set's own copy, not the process's."""
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
