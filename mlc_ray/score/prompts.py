"""What a score asks: benchmarks -> one table of prompts, in the driver.

Texts are short: ten thousand prompts are a few MB. They are read once, and made into rows by Arrow's own kernels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlc_ray.config import ScoringSection, SourceSection
from mlc_ray.data.prepare import read_bundles
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.stage import PROMPTS
from mlc_ray.stats.rates import ALL_BENCHMARKS
from mlc_ray.storage import fingerprint


class BenchmarkError(MlcRayError):
    """The benchmarks lack what is asked of them; the message names the setting to change."""


@dataclass(frozen=True)
class Prompts:
    """Everything that a model is asked for one score: `table` has a row per prompt (`PROMPTS`), benchmarks in order.

    A prompt of which several answers are drawn has a row for each, one behind another. `fingerprint` names the set of
    prompts, whatever the number of answers: two scores with the same one can be compared.
    """

    table: pa.Table
    fingerprint: str

    @property
    def languages(self) -> list[str]:
        """The languages asked in."""
        return sorted(self.table["language"].unique().to_pylist())

    def by_language(self) -> dict[str, list[str]]:
        """The texts asked in each language."""
        found: dict[str, list[str]] = {code: [] for code in self.languages}
        columns = (self.table[name].to_pylist() for name in ("language", "prompt", "sample"))
        for code, text, sample in zip(*columns, strict=True):
            if sample == 0:
                found[code].append(text)
        return found

    def counts(self) -> dict[str, int]:
        """The number of prompts of each benchmark, each counted once."""
        return dict(Counter(self.table["benchmark"].filter(pc.equal(self.table["sample"], 0)).to_pylist()))


def read_prompts(scoring: ScoringSection, *, rejects: Path) -> Prompts:
    """The prompts of the benchmarks, named by `benchmark_names`; invalid rows go into files in the folder `rejects`.

    Raises:
        MlcRayError: what `read_bundles` raises.
        BenchmarkError: there is no prompt in a language that is asked for.
    """
    tables, chosen = [], []
    for name, source in zip(benchmark_names(scoring.benchmarks), scoring.benchmarks, strict=True):
        file = rejects / f"rejects-{slug(name)}.jsonl"
        table = read_bundles([source], on_invalid=scoring.on_invalid, rejects_path=file)
        kept = choose_prompts(
            table.select(["bundle_id", "kind", "languages"]).to_pylist(), scoring.languages, scoring.limit
        )
        tables.append(explode(table, name, kept))
        chosen.append([name, sorted((key, *codes) for key, codes in kept.items())])
    table, samples = pa.concat_tables(tables), scoring.asking.samples
    prompts = Prompts(with_samples(table, samples) if samples > 1 else table, fingerprint(chosen))
    if absent := sorted(set(scoring.languages or ()) - set(prompts.languages)):
        raise BenchmarkError(
            f"languages={scoring.languages!r}: no benchmark has a prompt in {', '.join(map(repr, absent))}"
        )
    return prompts


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "score"


def benchmark_names(sources: Sequence[SourceSection]) -> list[str]:
    """A name for each source: a file or folder by its own name, anything else as given; a second one gets `#2`."""
    names, seen = list[str](), Counter({ALL_BENCHMARKS: 1})
    for source in sources:
        path = Path(source.path).expanduser()
        plain = path.stem if path.is_file() else path.name if path.is_dir() else source.path
        seen[plain] += 1
        names.append(plain if seen[plain] == 1 else f"{plain}#{seen[plain]}")
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


def explode(bundles: pa.Table, benchmark: str, kept: Mapping[str, Sequence[str]]) -> pa.Table:
    """Rows of bundles -> a row per prompt (`PROMPTS`), for the bundles and languages in `kept`, in their order."""
    owner = pc.list_parent_indices(bundles["languages"])
    table = bundles.select(["bundle_id", "kind", "category"]).take(owner)
    table = table.append_column("language", pc.list_flatten(bundles["languages"]))
    table = table.append_column("prompt", pc.list_flatten(bundles["texts"]))
    table = table.append_column("benchmark", pa.array([benchmark] * len(table), pa.string()))
    table = table.append_column("sample", pa.array(np.zeros(len(table), np.int32)))
    wanted = {name: frozenset(codes) for name, codes in kept.items()}
    pairs = zip(table["bundle_id"].to_pylist(), table["language"].to_pylist(), strict=True)
    mask = np.fromiter((code in wanted.get(name, ()) for name, code in pairs), dtype=bool, count=len(table))
    return table.select(PROMPTS.names).cast(PROMPTS).filter(pa.array(mask))


def with_samples(prompts: pa.Table, samples: int) -> pa.Table:
    """Every row so often, one behind another, with `sample` from 0."""
    table = prompts.take(np.repeat(np.arange(len(prompts)), samples))
    column = pa.array(np.tile(np.arange(samples, dtype=np.int32), len(prompts)))
    return table.set_column(table.schema.get_field_index("sample"), "sample", column)
