"""The scoring pipeline on Ray Data: bundles -> prompts -> responses (vLLM actors) -> verdicts -> files and tables."""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from mlc_ray.artifacts import fingerprint, fingerprint_model, library_versions
from mlc_ray.config import ScoreConfig, SourceSection
from mlc_ray.data.ray_data import read_bundles
from mlc_ray.errors import MlcRayError
from mlc_ray.ray_cluster import check_capacity, connect, use_gpu
from mlc_ray.score.generate import Device, EngineError, check_lengths, engine_environment
from mlc_ray.score.judges import check_coverage, get_judge
from mlc_ray.score.metrics import ALL_BENCHMARKS, Judged, as_label, pooled_rows, score_rows, summarise
from mlc_ray.score.models import resolve_model
from mlc_ray.score.report import heatmap, score_table, show
from mlc_ray.score.results import HEATMAP_FILE, RESPONSES_FILE, SCORES_FILE, ScoreResult, save_scores
from mlc_ray.score.stages import ENGINE_FAULT, PROMPTS, GenerateStage, explode, judge_batch

# Engines may hold all CPUs but a fraction, and other runs the rest: a stage that asked for a whole one could wait for
# ever, in silence.
_STAGE_CPUS = 0.25
# vLLM batches continuously, so a batch only has to be large against the number of sequences it runs at once.
_BATCH_ROWS = {"cpu": 256, "gpu": 2048}


class ScoreError(MlcRayError):
    """The score cannot be made as asked; the message names the setting to change."""


class TooManyUnparsedError(MlcRayError):
    """A larger share of responses than `max_unparsed` got no verdict: the rates mean little. All files are written."""


@dataclass(frozen=True)
class Benchmark:
    """A source of prompts: which of its bundles are scored, in which languages, and how many prompts that makes."""

    name: str
    bundles: ray.data.Dataset
    kept: Mapping[str, tuple[str, ...]]

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return sum(map(len, self.kept.values()))


def score(config: ScoreConfig) -> ScoreResult:
    """Generate, judge, count; write the score folder and print its table.

    The folder `output_dir/name` gets `responses.parquet`, `heatmap.png`, `scores.json` (written last). On a cluster, a
    local model folder must lie where every node sees it. Everything that can be refused is refused before an engine
    starts: `ModelPathError`, `JudgeError`, `UncoveredLanguageError`, `EngineError`, `ScoreError`, `ClusterError`, and
    the reader's errors. Raises `TooManyUnparsedError` when all is written.
    """
    model = resolve_model(config.model)
    check_lengths(model, config.engine, config.max_new_tokens)
    judge = get_judge(config.judge)
    name = config.name or f"{_slug(Path(config.model).name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = _claim_folder(Path(config.output_dir).expanduser().absolute() / name)

    connect(config.address)
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # else two lines for every small pipeline
    engine = config.engine
    device: Device = "gpu" if use_gpu(config.accelerator) else "cpu"
    gpus = engine.tensor_parallel if device == "gpu" else 0
    check_capacity("engine", workers=engine.replicas, cpus_each=engine.cpus_per_replica, gpus_each=gpus)

    benchmarks = _read_benchmarks(config, folder)
    check_coverage(judge, {code for benchmark in benchmarks for codes in benchmark.kept.values() for code in codes})
    print(f"scoring {model} on {', '.join(f'{b.name} ({b.prompts} prompts)' for b in benchmarks)}", file=sys.stderr)

    responses = _pipeline(config, model, benchmarks, device, gpus)
    records, finish = _collect(responses, folder / RESPONSES_FILE, sum(b.prompts for b in benchmarks))
    several = len(benchmarks) > 1
    result = ScoreResult(
        name=name,
        model=config.model,
        resolved=model,
        fingerprint=fingerprint_model(model),
        prompts=fingerprint([[b.name, sorted((key, *codes) for key, codes in b.kept.items())] for b in benchmarks]),
        judge=judge.name,
        rows=(*score_rows(records), *(pooled_rows(records) if several else [])),
        summaries=tuple(summarise(records)),
        responses=len(records),
        unparsed=sum(record.label == "unparsed" for record in records),
        finish=finish,
        config=config.model_dump(mode="json"),
        versions=library_versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        folder=folder,
    )
    heatmap([result], folder / HEATMAP_FILE)
    save_scores(result)
    show(score_table(result))
    print(f"score in {folder}", file=sys.stderr)
    _check_unparsed(result, config.max_unparsed)
    return result


# --------------------------------------------------------------------------------------------------------- what to ask


def _read_benchmarks(config: ScoreConfig, folder: Path) -> list[Benchmark]:
    names = benchmark_names(config.benchmarks)
    found = []
    for name, source in zip(names, config.benchmarks, strict=True):
        rejects = folder / f"rejects-{_slug(name)}.jsonl"
        bundles = read_bundles([source], on_invalid=config.on_invalid, rejects_path=rejects)
        columns = bundles.select_columns(["bundle_id", "kind", "languages"])
        rows = [
            row for table in columns.iter_batches(batch_size=None, batch_format="pyarrow") for row in table.to_pylist()
        ]
        found.append(Benchmark(name, bundles, choose_prompts(rows, config.languages, config.limit)))
    present = {code for benchmark in found for codes in benchmark.kept.values() for code in codes}
    if absent := sorted(set(config.languages or ()) - present):
        raise ScoreError(f"languages={config.languages!r}: no benchmark has a prompt in {', '.join(map(repr, absent))}")
    return found


def benchmark_names(sources: Sequence[SourceSection]) -> list[str]:
    """A name for each source: a file or folder by its own name, anything else as given; a second one gets `#2`."""
    names: list[str] = []
    for source in sources:
        path = Path(source.path).expanduser()
        plain = path.stem if path.is_file() else path.name if path.is_dir() else source.path
        count = sum(name.partition("#")[0] == plain for name in (*names, ALL_BENCHMARKS)) + 1
        names.append(plain if count == 1 else f"{plain}#{count}")
    return names


def choose_prompts(
    rows: Iterable[Mapping[str, Any]], languages: Sequence[str] | None, limit: int | None
) -> dict[str, tuple[str, ...]]:
    """Bundle id -> the languages to score it in, for rows with `bundle_id`, `kind` and `languages`.

    At most `limit` bundles of each kind: those whose hashed id comes first, so that a larger limit adds bundles and
    takes none away, on any machine and whatever the order of the file.
    """
    wanted = None if languages is None else set(languages)
    by_kind: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {}
    for row in rows:
        codes = tuple(sorted(code for code in row["languages"] if wanted is None or code in wanted))
        if codes:
            by_kind.setdefault(row["kind"], []).append((fingerprint(row["bundle_id"]), row["bundle_id"], codes))
    return {name: codes for found in by_kind.values() for _, name, codes in sorted(found)[:limit]}


# --------------------------------------------------------------------------------------------------------- the pipeline


def _prompts(benchmarks: Sequence[Benchmark]) -> pa.Table:
    """All prompts to answer, here in the driver: short texts, a few MB even where there are ten thousand."""
    tables = []
    for benchmark in benchmarks:
        exploded = benchmark.bundles.map_batches(
            explode,
            fn_kwargs={"benchmark": benchmark.name, "kept": {k: list(codes) for k, codes in benchmark.kept.items()}},
            batch_format="pyarrow",
            num_cpus=_STAGE_CPUS,
        )
        _quiet_and_ordered(exploded)
        tables += exploded.iter_batches(batch_size=None, batch_format="pyarrow")
    return pa.concat_tables(table.select(PROMPTS.names).cast(PROMPTS) for table in tables)


def _pipeline(
    config: ScoreConfig, model: str, benchmarks: Sequence[Benchmark], device: Device, gpus: int
) -> ray.data.Dataset:
    engine = config.engine
    table = _prompts(benchmarks)
    rows = min(_BATCH_ROWS[device], math.ceil(len(table) / engine.replicas))
    # One block per batch, so that every engine has work. Ray Data's own repartition would ask for whole CPUs.
    prompts = ray.data.from_arrow([table.slice(start, rows) for start in range(0, len(table), rows)])
    responses = prompts.map_batches(
        GenerateStage,
        fn_constructor_kwargs={
            "model": model,
            "engine": engine,
            "max_new_tokens": config.max_new_tokens,
            "device": device,
        },
        batch_size=rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=engine.replicas),
        num_cpus=engine.cpus_per_replica,
        num_gpus=gpus,
        # Set when the process starts: OpenMP reads its settings once, when torch is loaded.
        runtime_env={"env_vars": engine_environment(engine, device)},
    )
    verdicts = responses.map_batches(
        judge_batch, fn_kwargs={"judge": config.judge}, batch_format="pyarrow", num_cpus=_STAGE_CPUS
    )
    _quiet_and_ordered(verdicts)
    return verdicts


def _quiet_and_ordered(dataset: ray.data.Dataset) -> None:
    """Set on the data set's own copy of the context, not on the process's."""
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False


def _collect(responses: ray.data.Dataset, path: Path, expected: int) -> tuple[list[Judged], dict[str, int]]:
    """Write responses to `path` as they come; returns their verdicts, and how often each finish reason occurred.

    Raises `EngineError` with the message of a fault that kept an engine from starting.
    """
    records: list[Judged] = []
    finish: Counter[str] = Counter()
    writer: pq.ParquetWriter | None = None
    partial = path.with_name(f".{path.name}.part")
    try:
        for table in responses.iter_batches(batch_size=None, batch_format="pyarrow"):
            if ENGINE_FAULT in (reasons := table["finish"].to_pylist()):
                raise EngineError(table["response"][reasons.index(ENGINE_FAULT)].as_py())
            writer = writer or pq.ParquetWriter(partial, table.schema)
            writer.write_table(table)
            records += _records(table)
            finish.update(reasons)
            print(f"  {len(records)} of {expected} responses", file=sys.stderr)
    finally:
        if writer is not None:
            writer.close()
    if len(records) != expected:
        raise RuntimeError(f"{expected} prompts went in, {len(records)} responses came out")
    partial.replace(path)
    return records, dict(finish)


def _records(table: pa.Table) -> list[Judged]:
    columns = [table[name].to_pylist() for name in ("benchmark", "bundle_id", "kind", "language", "verdict")]
    return [Judged(*row, label=as_label(verdict)) for *row, verdict in zip(*columns, strict=True)]


# --------------------------------------------------------------------------------------------------------- the folder


def _claim_folder(folder: Path) -> Path:
    if (folder / SCORES_FILE).exists():
        raise ScoreError(f"score folder {str(folder)!r} is there already; choose another name, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "score"


def _check_unparsed(result: ScoreResult, bound: float) -> None:
    if result.unparsed_share > bound:
        raise TooManyUnparsedError(
            f"{result.unparsed} of {result.responses} responses ({result.unparsed_share:.1%}) got no verdict; "
            f"max_unparsed={bound:g} allows fewer; they are in {str(result.responses_file)!r} (columns verdict and "
            "reason); mend the cause, or raise max_unparsed"
        )
