"""What a trial's score costs with engines that stay warm, against an engine started for every trial.

The same model, prompts and machine, in one run: first a scorer is started for every trial, answers, and is ended; then
one scorer takes the same weights in the same order and answers. Both must answer alike, word for word, or the exit
status is 1. The weights are a copy of the model with 5 % of noise on every matrix, and the model's own, in turn; the
two must not answer alike.

    python benchmarks/warm_scoring.py --rounds 3 --limit 4 --out warm.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mlc_ray.cluster import check_fits, connect, use_gpu
from mlc_ray.config import ScoringSection, parse_config
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.score.plan import places, with_chat, with_dtypes
from mlc_ray.score.prompts import read_prompts
from mlc_ray.score.scorer import WarmScorer, start_scorer
from mlc_ray.storage import scratch_folder, user_cache


def main() -> int:
    """Measure, print a table, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--rounds", type=int, default=3, help="trials to score each way (default: 3)")
    parser.add_argument("--limit", type=int, default=4, help="bundles of each kind of the sample (default: 4)")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    model = arguments.model or prepare_smollm2(user_cache() / "models" / MODEL_NAME)
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
    gpu = use_gpu("auto")
    scoring = with_chat(with_dtypes(scoring, gpu=gpu), str(model))
    check_fits("engine and judge", places(scoring, "gpu" if gpu else "cpu"))
    with scratch_folder() as scratch:
        other = noisy_copy(model, scratch / "other")
        figures, alike = measure(model, other, scoring, arguments.rounds, scratch)
    print(table(figures))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if not alike:
        print("warm and fresh engines do not answer alike, or not otherwise with other weights", file=sys.stderr)
    return 0 if alike else 1


def noisy_copy(model: Path, folder: Path) -> Path:
    """The same model with 5 % of noise, by standard deviation, on every matrix."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = load_file(file)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator)
            weights[name] = (tensor.float() + 0.05 * tensor.float().std() * noise).to(tensor.dtype)
    save_file(weights, file, {"format": "pt"})
    return folder


def measure(
    model: Path, other: Path, scoring: ScoringSection, rounds: int, scratch: Path
) -> tuple[dict[str, Any], bool]:
    """Seconds of every part, and whether both ways gave the same responses, and other ones to other weights."""
    prompts = read_prompts(scoring, rejects=scratch).table
    trials = [str(other if index % 2 == 0 else model) for index in range(rounds)]
    figures: dict[str, Any] = {"prompts": len(prompts), "start": [], "fresh": [], "warm": []}

    def started(weights: str) -> WarmScorer:
        before = time.perf_counter()
        scorer = start_scorer(weights, scoring, prompts, device="gpu" if use_gpu("auto") else "cpu", folder=scratch)
        figures["start"].append(time.perf_counter() - before)
        return scorer

    fresh = []
    for weights in trials:
        scorer = started(weights)
        fresh.append(timed(figures["fresh"], scorer, weights))
        scorer.close()
    scorer = started(str(model))
    first = timed([], scorer, str(model))  # the first answers of any engine are slower
    warm = [timed(figures["warm"], scorer, weights) for weights in trials]
    scorer.close()
    return figures, warm == fresh and warm[0] != first


def timed(rows: list[dict[str, float]], scorer: WarmScorer, weights: str) -> list[str]:
    """The responses of the model in the folder `weights`; the seconds they took are added to `rows`."""
    score = scorer.score(weights)
    rows.append(dict(score.seconds))
    return score.judged["response"].to_pylist()


def table(figures: dict[str, Any]) -> str:
    """The medians, as Markdown."""

    def middle(name: str) -> float:
        return median(row[name] for row in figures["warm"])

    start_seconds = median(figures["start"])
    beyond = median(row["total"] - row["answer"] - row["transfer"] for row in figures["warm"])
    fresh = [row["total"] - row["transfer"] - row["proof"] for row in figures["fresh"]]  # it needs no swap
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
        f"| a trial's score, warm | {middle('total'):.2f} |",
        f"| a trial's score, engine of its own | {start_seconds + median(fresh):.2f} |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
