"""Sources -> a table of bundles -> token rows on disk, by Ray Data; docs/data.md follows one prompt on its way."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray

from mlc_ray.config import DataSection, ModelSection, SourceSection
from mlc_ray.data.bundles import BundleFileError, RejectedRow, place
from mlc_ray.data.sources import NOT_OF_A_BUNDLE, keep_valid, parse_file, resolve_source
from mlc_ray.data.store import FORMAT, REJECTS_FILE, TokenArtifact, write_rows
from mlc_ray.data.tokens import ChatTemplate, load_tokenizer, tokenize_table
from mlc_ray.errors import MlcRayError
from mlc_ray.progress import Phase, phase
from mlc_ray.storage import IncompleteArtifactError, atomic_folder, fingerprint, fingerprint_tokenizer

# Other runs on the cluster may hold most of its CPUs. A stage that asked for whole ones would wait without a message.
_PARSE_CPUS = 0.25
_TOKENIZE_CPUS = 0.25

_ROWS_AT_ONCE = 512
_NAMED_FIRST = 5
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")

logger = logging.getLogger(__name__)


class InvalidBundlesError(MlcRayError, ValueError):
    """Some or all rows are not valid bundles; the message names the first few and the rejects file."""


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

    Rows have the columns of `mlc_ray.data.tables.BUNDLES`. Each file is parsed by a task of its own.

    Args:
        sources: what to read; bundles that are in memory become a source by `mlc_ray.data.given.as_source`.
        on_invalid: `fail` or `skip`, as data.on_invalid.
        rejects_path: JSONL (file, line, reason, text) for rows that are not a bundle, repeat one, or lack what
            `languages` needs; an older file there is removed.
        named_path: what messages name instead, where the caller will move the file.
        languages: data.languages; bundles are restricted to them.

    Raises:
        BundleFileError: a file cannot be read.
        InvalidBundlesError: `on_invalid` is "fail" and a row was rejected, or no valid row is left.
    """
    files = [file for source in sources for file in resolve_source(source)]
    items = [{"file_index": index, **asdict(file)} for index, file in enumerate(files)]
    plan = ray.data.from_items(items, override_num_blocks=len(items))
    quiet_and_ordered(plan)
    with phase("reading", unit="bundles") as progress:
        parsed: ray.data.Dataset = plan.map_batches(
            cast(Any, parse_file),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=_PARSE_CPUS,
            fn_kwargs={"languages": None if languages is None else list(languages)},
        ).materialize()
        rejected, kept = _judge(parsed, progress)
    _report(rejected, kept, Path(rejects_path), on_invalid, named=Path(named_path or rejects_path))
    drop = {(file, line) for file, line, _ in rejected}
    if not drop:
        kept_columns: ray.data.Dataset = parsed.drop_columns(NOT_OF_A_BUNDLE)
        return kept_columns
    valid: ray.data.Dataset = parsed.map_batches(
        cast(Any, keep_valid), batch_format="pyarrow", num_cpus=_PARSE_CPUS, fn_kwargs={"drop": drop}
    ).materialize()
    return valid


def _judge(parsed: ray.data.Dataset, progress: Phase) -> tuple[list[tuple[int, int, RejectedRow]], int]:
    """Rejected rows of the whole data set, repeated bundles among them, with (file_index, row); and how many are kept.

    The driver sees ids and places of all rows, but the content of rejected ones only.
    """
    rejected: list[tuple[int, int, RejectedRow]] = []
    first_seen: dict[str, str] = {}
    columns = ["bundle_id", "file", "line", "file_index", "row", "reason", "text", "fault"]
    for table in tables_of(parsed.select_columns(columns)):
        progress.advance(table.num_rows)
        for row in table.to_pylist():
            if row["fault"] is not None:
                raise BundleFileError(row["fault"])
            reason, text = row["reason"], row["text"]
            if reason is None:
                if (name := row["bundle_id"]) not in first_seen:
                    first_seen[name] = place(row["file"], row["line"])
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
        summary = "".join(f"\n  {count} x {reason}" for reason, count in by_reason.items())
        logger.warning("%d invalid rows, written to %s:%s", len(rejected), named, summary)
    if rejected and (on_invalid == "fail" or not kept):
        first = [f"  {place(row.file, row.line)}: {row.reason}" for *_, row in rejected[:_NAMED_FIRST]]
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

    The fingerprint covers the content of the sources, the code of formats from outside this package, the tokenizer's
    files and the data settings. A complete folder is used again; an incomplete one is written once more. Rejected rows
    are in `TokenArtifact.rejects_path`, or, if the function raises, in `cache_dir/tokens-FINGERPRINT.rejects.jsonl`.

    Raises:
        BundleFileError: as `read_bundles`, as does InvalidBundlesError.
        TokenizationError: data.max_prompt_tokens is too small for the template and any text.
        TemplateError: the template is unusable.
    """
    name = token_fingerprint(data, model)
    folder = Path(cache_dir).absolute() / f"tokens-{name}"
    if folder.exists():
        try:
            artifact = TokenArtifact.open(folder)
        except IncompleteArtifactError as error:
            logger.warning("%s; tokenising again", error)
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
    quiet_and_ordered(bundles)
    tokens = bundles.map_batches(
        Tokenize,
        batch_size=_ROWS_AT_ONCE,
        batch_format="pyarrow",
        num_cpus=_TOKENIZE_CPUS,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=_tokenizers_at_most()),
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
                _shown(tokens, total=bundles.count()),
                fingerprint=name,
                rejected=rejected,
                model=model.path,
                data=data.model_dump(mode="json", exclude={"validation"}),
            )
            if _is_complete(folder):  # by another run, meanwhile: it may be in use, and is never moved aside
                raise FileExistsError(folder)
    except FileExistsError:  # another run prepared the same data meanwhile: its folder has the same content
        pass
    return TokenArtifact.open(folder)


def _tokenizers_at_most() -> int:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, int(resources.get("CPU", 1)))


def _shown(tokens: ray.data.Dataset, total: int) -> Iterator[pa.Table]:
    """The tables of `tokens` as they are made, with their progress."""
    with phase("tokenising", total=total, unit="bundles") as progress:
        for table in tables_of(tokens, _ROWS_AT_ONCE):
            progress.advance(table.num_rows)
            yield table


def _is_complete(folder: Path) -> bool:
    try:
        TokenArtifact.open(folder)
    except IncompleteArtifactError:
        return False
    return True


def token_fingerprint(data: DataSection, model: ModelSection) -> str:
    """Fingerprint of everything that token rows depend on; paths do not count, contents do."""
    sources = [file.fingerprint() for source in data.train for file in resolve_source(source)]
    return fingerprint(
        {
            "format": FORMAT,
            "sources": sources,
            "tokenizer": fingerprint_tokenizer(model.path),
            "settings": data.model_dump(mode="json", exclude={"train", "validation"}),
        }
    )


class Tokenize:
    """Ray Data stage: bundle rows -> token rows; an actor, so that each process loads the tokenizer once."""

    def __init__(self, data: DataSection, model: ModelSection):
        self.template = ChatTemplate(load_tokenizer(model.path, trust_remote_code=model.trust_remote_code))
        self.limits = {
            "max_prompt_tokens": data.max_prompt_tokens,
            "max_response_tokens": data.max_response_tokens,
        }

    def __call__(self, bundles: pa.Table) -> pa.Table:
        """Tokenise a table of `read_bundles` into one of `mlc_ray.data.tables.TOKENS`."""
        return tokenize_table(bundles, self.template, **self.limits)


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


def tables_of(dataset: ray.data.Dataset, rows: int | None = None, *, prefetch: int = 1) -> Iterator[pa.Table]:
    """A dataset's tables as they are made, of `rows` rows each (None: as they come)."""
    batches = dataset.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=prefetch)
    return cast(Iterator[pa.Table], iter(batches))


def quiet_and_ordered(dataset: ray.data.Dataset) -> None:
    """Order matters in every pipeline here. The setting is the data set's own copy, not the process's."""
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
