"""How fast the cached reference is computed, against a bare loop of the same forwards in one process.

The pass over the sample runs as training runs it, as a Ray Data stage with one actor; the actor notes when each forward
begins and ends. The bare loop makes the same forwards of the same bundles in a process of its own, before and after.
What both say must be equal, or the exit status is 1. Starting the actor and loading the model are stated apart.

    python benchmarks/reference_pass.py --out reference.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch

from mlc_ray.cluster import connect, use_gpu
from mlc_ray.config import TrainConfig, parse_config
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.storage import user_cache
from mlc_ray.train import reference_cache
from mlc_ray.train.reference_cache import (
    BUNDLES_PER_FORWARD,
    ReferenceScorer,
    column_file,
    load_reference,
    prepare_reference,
)

NEEDED = {"log_probs": True, "layer": None}


class TimedScorer:
    """The actor, with the time at which each of its forwards began and ended in a column."""

    def __init__(self, **settings: Any) -> None:
        # Imported here, in the actor: this class takes its place in the driver's module, and travels without it.
        from mlc_ray.train.reference_cache import ReferenceScorer

        self.scorer = ReferenceScorer(**settings)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """As ever, and two columns more."""
        began = time.time()
        table = self.scorer(batch)
        times = {"began": began, "ended": time.time()}
        for name, value in times.items():
            table = table.append_column(name, pa.array([value] * len(table)))
        return table


def bare(tokens_folder: str, settings: dict[str, Any], gpu: bool, threads: int) -> tuple[float, list[list[float]]]:
    """Seconds of all forwards one after another, the first repeated beforehand; and log-probs of each row."""
    torch.set_num_threads(threads)
    scorer = ReferenceScorer(tokens_folder, settings, NEEDED, gpu)
    rows = len(scorer.tokens)
    batches = [
        {"row": np.arange(at, min(at + BUNDLES_PER_FORWARD, rows))} for at in range(0, rows, BUNDLES_PER_FORWARD)
    ]
    scorer(batches[0])
    began = time.time()
    table = pa.concat_tables([scorer(batch) for batch in batches])
    seconds = time.time() - began
    return seconds, np.column_stack([table["chosen"], table["rejected"]]).tolist()


def in_child(*arguments: Any) -> Any:
    """`bare` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(bare, *arguments).result()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both, and how they compare."""
    config = parse_config(
        TrainConfig,
        {
            "name": "reference",
            "output_dir": str(folder),
            "model": {"path": options.model, "dtype": options.dtype},
            "data": {"train": [{"path": "sample:train", "only": options.only}]},
            "cluster": {"address": "local", "cpus_per_worker": options.threads},
        },
    )
    connect("local")
    gpu = use_gpu("auto")
    tokens = prepare_token_rows(config.data, config.model, cache_dir=folder)
    loop = (str(tokens.folder), config.model.model_dump(), gpu, options.threads)
    before, said = in_child(*loop)
    asked = time.time()
    with mock.patch.object(reference_cache, "ReferenceScorer", TimedScorer):
        reference_folder = prepare_reference(config, tokens, layer=0, cache_dir=folder, gpu=gpu)
    whole = time.time() - asked
    after, _ = in_child(*loop)
    cached = load_reference(reference_folder)
    # The columns that are not the reference's own lie beside those that are.
    times = {name: np.load(reference_folder / column_file(name)).tolist() for name in ("began", "ended")}
    first, last = min(times["began"]), max(times["ended"])
    alone = (before + after) / 2
    busy = sum(ended - began for began, ended in set(zip(times["began"], times["ended"], strict=True)))
    return {
        "model": options.model, "dtype": options.dtype, "threads": options.threads, "bundles": len(tokens),
        "bare_seconds": [before, after], "pass_seconds": last - first, "start_seconds": first - asked,
        "end_seconds": asked + whole - last, "speed": alone / (last - first), "busy": busy / (last - first),
        "equal": np.column_stack([cached.chosen, cached.rejected]).tolist() == said,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if both say the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"Hugging Face folder (default: {MODEL_NAME})")
    parser.add_argument("--only", choices=("harmful", "benign"), help="bundles of this kind alone (default: all 96)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    options.model = options.model or str(prepare_smollm2(user_cache() / "models" / MODEL_NAME))
    with tempfile.TemporaryDirectory(prefix="mlc_ray-reference-") as folder:
        result = measure(options, Path(folder))
    text = "{bundles} bundles: the pass took {pass_seconds:.2f} s, after {start_seconds:.1f} s to start and before "
    text += (
        "{end_seconds:.1f} s to end; a bare loop {bare_seconds[0]:.2f} and {bare_seconds[1]:.2f} s: {speed:.0%} of it"
    )
    print(text.format(**result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not result["equal"]:
        print("the two do not say the same", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
