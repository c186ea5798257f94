"""The phases of a score on Ray Data: benchmarks -> prompts, and one stage after another over a table."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from mlc_ray.config import EngineSection, ScoringSection, SourceSection
from mlc_ray.data.prepare import read_bundles
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, engine_environment
from mlc_ray.score.stages import FAULT, PROMPTS, Stage, explode
from mlc_ray.stats.rates import ALL_BENCHMARKS
from mlc_ray.storage import fingerprint

# Engines may hold all CPUs but a fraction, and other runs the rest: a stage that asked for a whole one could wait for
# ever, in silence.
_STAGE_CPUS = 0.25
_INLINE_ACTORS = 4
# vLLM batches continuously, so a batch only has to be large against the number of sequences it runs at once.
_BATCH_ROWS = {"cpu": 256, "gpu": 2048}


class PhaseError(MlcRayError):
    """An engine, a judge or a translator failed in a worker; the message is its own."""


class BenchmarkError(MlcRayError):
    """The benchmarks lack what is asked of them; the message names the setting to change."""


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

    @property
    def languages(self) -> set[str]:
        """Languages that are scored."""
        return {code for codes in self.kept.values() for code in codes}


# --------------------------------------------------------------------------------------------------------- what to ask


def read_benchmarks(scoring: ScoringSection, *, rejects: Path) -> list[Benchmark]:
    """The benchmarks by the names of `benchmark_names`; invalid rows of each go into a file in the folder `rejects`.

    Raises what `read_bundles` raises, and `BenchmarkError` for a language in which there is no prompt.
    """
    found = []
    for name, source in zip(benchmark_names(scoring.benchmarks), scoring.benchmarks, strict=True):
        file = rejects / f"rejects-{slug(name)}.jsonl"
        bundles = read_bundles([source], on_invalid=scoring.on_invalid, rejects_path=file)
        columns = bundles.select_columns(["bundle_id", "kind", "languages"])
        rows = [
            row for table in columns.iter_batches(batch_size=None, batch_format="pyarrow") for row in table.to_pylist()
        ]
        found.append(Benchmark(name, bundles, choose_prompts(rows, scoring.languages, scoring.limit)))
    languages = {code for benchmark in found for code in benchmark.languages}
    if absent := sorted(set(scoring.languages or ()) - languages):
        raise BenchmarkError(
            f"languages={scoring.languages!r}: no benchmark has a prompt in {', '.join(map(repr, absent))}"
        )
    return found


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "score"


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


def prompts_of(benchmarks: Sequence[Benchmark]) -> pa.Table:
    """All prompts to answer (`PROMPTS`), in the driver: short texts, a few MB even where there are ten thousand."""
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


# ---------------------------------------------------------------------------------------------------------- one phase


@dataclass(frozen=True)
class Phase:
    """A stage, what it is made with, and where it runs: in `engine`s, or (None) in `actors` light ones."""

    what: str
    stage: type[Stage]
    settings: Mapping[str, Any]
    engine: EngineSection | None = None
    actors: int = _INLINE_ACTORS


def run_phase(phase: Phase, table: pa.Table, path: Path, schema: pa.Schema, device: Device) -> pa.Table:
    """Run `phase` over `table` in order, write its rows to `path` as they come, and return them (columns of `schema`).

    `path` appears when all rows are there. Raises `PhaseError` with the message of a fault that a stage reported.
    """
    done: list[pa.Table] = []
    writer = pq.ParquetWriter(partial := path.with_name(f".{path.name}.part"), schema)
    try:
        for part in _stream(phase, table, device).iter_batches(batch_size=None, batch_format="pyarrow"):
            if faults := [text for text in part[FAULT].to_pylist() if text is not None]:
                raise PhaseError(faults[0])
            part = part.select(schema.names).cast(schema)
            writer.write_table(part)
            done.append(part)
            print(f"  {sum(map(len, done))} of {len(table)} {phase.what}", file=sys.stderr)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    writer.close()
    result = pa.concat_tables(done)
    if len(result) != len(table):
        raise RuntimeError(f"{phase.what}: {len(table)} rows went in, {len(result)} came out")
    partial.replace(path)
    return result


def _stream(phase: Phase, table: pa.Table, device: Device) -> ray.data.Dataset:
    engine: EngineSection | None = phase.engine
    actors = engine.replicas if engine is not None else phase.actors
    rows = max(1, min(_BATCH_ROWS[device], math.ceil(len(table) / actors)))
    blocks = [table.slice(start, rows) for start in range(0, len(table), rows)]
    settings = dict(phase.settings)
    if engine is None:
        options: dict[str, Any] = {"num_cpus": _STAGE_CPUS}
    else:
        settings["device"] = device
        options = {
            "num_cpus": engine.cpus_per_replica,
            "num_gpus": engine.tensor_parallel if device == "gpu" else 0,
            # Set when the process starts: OpenMP reads its settings once, when torch is loaded.
            "runtime_env": {"env_vars": engine_environment(engine, device)},
        }
    # One block per batch, so that every actor has work. Ray Data's own repartition would ask for whole CPUs.
    staged = ray.data.from_arrow(blocks).map_batches(
        phase.stage,
        fn_constructor_kwargs=settings,
        batch_size=rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks))),
        **options,
    )
    _quiet_and_ordered(staged)
    return staged


def _quiet_and_ordered(dataset: ray.data.Dataset) -> None:
    """Set on the data set's own copy of the context, not on the process's."""
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
