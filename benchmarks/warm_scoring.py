"""What a trial's score costs with engines that stay warm, against an engine started for every trial.

The same model, prompts and machine, in one run, in turn: a warm pool takes other weights and answers; a fresh pool is
started with them, answers, and is ended. Both must answer alike, word for word, or the exit status is 1. The weights
are the model's own and a copy with every tensor scaled by 1.02, so that both answer something else.

    python benchmarks/warm_scoring.py --rounds 3 --limit 4 --out warm.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
from safetensors.torch import load_file, save_file

from mlc_ray.config import ScoringSection, parse_config
from mlc_ray.quickstart import MODEL_NAME, cache_folder, prepare_smollm2
from mlc_ray.ray_cluster import connect, use_gpu
from mlc_ray.score.ray_phases import prompts_of, read_benchmarks
from mlc_ray.search.ray_warm import PoolScore, WarmPool, start_pool


def main() -> int:
    """Measure, print a table, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--rounds", type=int, default=3, help="trials to score each way (default: 3)")
    parser.add_argument("--limit", type=int, default=4, help="bundles of each kind of the sample (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    model = arguments.model or prepare_smollm2(cache_folder() / "models" / MODEL_NAME)
    scoring = parse_config(
        ScoringSection,
        {
            "benchmarks": [{"path": "sample:test"}],
            "limit": arguments.limit,
            "max_new_tokens": arguments.max_new_tokens,
            "engine": {"max_model_len": 512, "cpus_per_replica": 1.5},
        },
    )
    connect("local")
    with tempfile.TemporaryDirectory(prefix="mlc_ray-warm-") as scratch:
        other = scaled_copy(model, Path(scratch) / "other")
        figures, alike = measure(model, other, scoring, arguments.rounds, Path(scratch))
    print(table(figures))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not alike:
        print("warm and fresh engines do not answer alike", file=sys.stderr)
    return 0 if alike else 1


def scaled_copy(model: Path, folder: Path) -> Path:
    """The same model with every tensor scaled a little."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    save_file({name: tensor * 1.02 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def measure(
    model: Path, other: Path, scoring: ScoringSection, rounds: int, scratch: Path
) -> tuple[dict[str, Any], bool]:
    """Seconds of every part, and whether both ways gave the same responses."""
    prompts = prompts_of(read_benchmarks(scoring, rejects=scratch))
    started = time.perf_counter()
    pool = start(model, scoring, prompts, scratch)
    figures: dict[str, Any] = {
        "prompts": len(prompts),
        "start": [time.perf_counter() - started],
        "warm": [],
        "fresh": [],
    }
    pool.score(str(model))  # the first answers of any engine are slower
    alike = True
    for index in range(rounds):
        weights = str(other if index % 2 == 0 else model)
        warm = timed(figures["warm"], pool, weights)
        pool_started = time.perf_counter()
        fresh_pool = start(Path(weights), scoring, prompts, scratch)
        figures["start"].append(time.perf_counter() - pool_started)
        fresh = timed(figures["fresh"], fresh_pool, weights)
        fresh_pool.close()
        alike &= responses(warm) == responses(fresh)
    pool.close()
    return figures, alike


def start(model: Path, scoring: ScoringSection, prompts: pa.Table, scratch: Path) -> WarmPool:
    """A pool of one engine with the model's weights."""
    return start_pool(str(model), scoring, prompts, device="gpu" if use_gpu("auto") else "cpu", folder=scratch)


def timed(rows: list[dict[str, float]], pool: WarmPool, weights: str) -> PoolScore:
    """A score, with its seconds added to `rows`."""
    score = pool.score(weights)
    rows.append(dict(score.seconds))
    return score


def responses(score: PoolScore) -> list[str]:
    """What was answered."""
    return score.judged["response"].to_pylist()


def table(figures: dict[str, Any]) -> str:
    """The medians, as Markdown."""

    def middle(name: str) -> float:
        return median(row[name] for row in figures["warm"])

    start_seconds = median(figures["start"])
    beyond = median(row["total"] - row["answer"] - row["transfer"] for row in figures["warm"])
    lines = [
        f"{figures['prompts']} prompts, medians of {len(figures['warm'])} rounds, seconds",
        "",
        "| part | seconds |",
        "|---|---:|",
        f"| engine start | {start_seconds:.2f} |",
        f"| warm: transfer of the weights | {middle('transfer'):.2f} |",
        f"| warm: proof that they are served | {middle('proof'):.3f} |",
        f"| answering | {middle('answer'):.2f} |",
        f"| judging | {middle('judge'):.3f} |",
        f"| warm: beyond answering and transfer | {beyond:.3f} |",
        f"| the same, of an engine start | {100 * beyond / start_seconds:.1f} % |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
