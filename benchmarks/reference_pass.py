"""How fast the cached reference is computed, against a bare loop of the same forwards in one process.

The pass over the sample runs as before training, in one worker of Ray Train with the engine; the engine notes when each
forward begins and ends. The bare loop makes the same forwards of the same bundles in a process of its own, before and
after, with neither. What both say must be equal, or the exit status is 1. Starting the worker and loading the model are
stated apart. On a machine that does other work wall times mean little: read the CPU seconds of the two processes, which
are given too.

    python benchmarks/reference_pass.py --out reference.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlc_ray.cluster import connect, use_gpu
from mlc_ray.config import TrainConfig, parse_config
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.store import TokenArtifact
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.storage import Place, scratch_folder, user_cache
from mlc_ray.train.engines.deepspeed import DeepSpeed
from mlc_ray.train.model import load_policy
from mlc_ray.train.reference import ReferenceModel, ReferenceOutput
from mlc_ray.train.reference_cache import prepare_references
from mlc_ray.train.reference_pass import Asking
from mlc_ray.train.reference_shards import load_reference, shard_ranges
from mlc_ray.types import Batch

NEEDED = {"log_probs": True, "layer": None, "pairing": "response", "pooling": None}


class TimedDeepSpeed(DeepSpeed):
    """The engine of every run, with when each forward of the reference began and ended in a file.

    Each is two times: that of the clock, and the CPU seconds of the process until then.
    """

    class Settings(DeepSpeed.Settings):
        """And where that file is."""

        times: str

    @classmethod
    def frozen(
        cls, model: ReferenceModel, config: TrainConfig, device: torch.device
    ) -> Callable[[Batch], ReferenceOutput]:
        """As ever, and a line for each forward."""
        reference = super().frozen(model, config, device)
        times = Path(config.engine.times)

        def ask(batch: Batch) -> ReferenceOutput:
            began = now()
            said = reference(batch)
            with times.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps([began, now()])}\n")
            return said

        return ask


def now() -> list[float]:
    """The clock, and the CPU seconds of this process."""
    return [time.time(), time.process_time()]


def bare(
    tokens_folder: str, settings: dict[str, Any], gpu: bool, threads: int
) -> tuple[list[float], list[list[float]]]:
    """Seconds and CPU seconds of all forwards one after another, one made beforehand; and log-probs of each row."""
    torch.set_num_threads(threads)
    config, device = parse_config(TrainConfig, settings), torch.device("cuda" if gpu else "cpu")
    tokens = TokenArtifact.open(tokens_folder)
    model = ReferenceModel(load_policy(config.model), **NEEDED).to(device).eval()
    asking = Asking.of(config, lambda batch: model(batch, state=batch.taps), NEEDED, device)
    with torch.no_grad():
        asking.ask(tokens, np.arange(1), lambda _: None)
        began = now()
        parts = [asking.ask(tokens, np.array(rows), lambda _: None) for rows in shard_ranges(len(tokens))]
    seconds = [after - before for before, after in zip(began, now(), strict=True)]
    said = np.concatenate(parts)
    return seconds, np.column_stack([said["chosen"], said["rejected"]]).tolist()


def in_child(*arguments: Any) -> Any:
    """`bare` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(bare, *arguments).result()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both, and how they compare."""
    times = folder / "times.jsonl"
    config = parse_config(
        TrainConfig,
        {
            "name": "reference",
            "output_dir": str(folder),
            "model": {"path": options.model, "dtype": options.dtype},
            "data": {"train": [{"path": "sample:train", "only": options.only}]},
            "engine": {"name": "reference_pass:TimedDeepSpeed", "stage": 0, "times": str(times)},
            "cluster": {"address": "local", "cpus_per_worker": options.threads},
        },
    )
    connect("local")
    gpu = use_gpu("auto")
    tokens = prepare_token_rows(config.data, config.model, cache_dir=folder)
    loop = (str(tokens.folder), config.model_dump(mode="json", exclude_unset=True), gpu, options.threads)
    before, said = in_child(*loop)
    asked = time.time()
    (reference_folder,) = prepare_references(config, [tokens], layer=0, cache_dir=Place(folder), gpu=gpu).values()
    whole = time.time() - asked
    after, _ = in_child(*loop)
    cached = load_reference(reference_folder).take(range(len(tokens)))
    forwards = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
    (first, first_cpu), (last, last_cpu) = forwards[0][0], forwards[-1][1]
    alone, alone_cpu = ((one + other) / 2 for one, other in zip(before, after, strict=True))
    busy = sum(ended - began for (began, _), (ended, _) in forwards)
    return {
        "model": options.model, "dtype": options.dtype, "threads": options.threads, "bundles": len(tokens),
        "bare_seconds": [before[0], after[0]], "pass_seconds": last - first, "start_seconds": first - asked,
        "bare_cpu_seconds": [before[1], after[1]], "pass_cpu_seconds": last_cpu - first_cpu,
        "cpu_speed": alone_cpu / (last_cpu - first_cpu),
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
    with scratch_folder() as folder:
        result = measure(options, folder)
    text = "{bundles} bundles: the pass took {pass_seconds:.2f} s, after {start_seconds:.1f} s to start and before "
    text += (
        "{end_seconds:.1f} s to end; a bare loop {bare_seconds[0]:.2f} and {bare_seconds[1]:.2f} s: {speed:.0%} of it. "
    )
    text += (
        "CPU seconds: {pass_cpu_seconds:.2f}; {bare_cpu_seconds[0]:.2f} and {bare_cpu_seconds[1]:.2f}: {cpu_speed:.0%}"
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
