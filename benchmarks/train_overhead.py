"""What Ray Train adds to a step: a run under it, and the same loop in a plain process with DeepSpeed, in turn.

Both have one worker, the same model, data, engine, logging and threads. They take steps in turn, each while the other
waits, so that what else the machine does meets both alike; a step is timed with all that the loop does around it:
waiting for the batch, the forward and backward, the update, the measures, logging. Losses of both must be equal at
every step, or the exit status is 1.

    python benchmarks/train_overhead.py --steps 24 --bundles 1 --out overhead.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from plan_worker import NoSaves
from turns import TURN

from mlc_ray.cluster import connect, use_gpu
from mlc_ray.config import TrainConfig, parse_config
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import plans, stream_steps
from mlc_ray.plan.cutting import order_of
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.runs import read_metrics
from mlc_ray.storage import scratch_folder, user_cache
from mlc_ray.train import worker
from mlc_ray.train.loop import Progress, train_loop
from mlc_ray.train.run import train
from mlc_ray.train.tracking import Tracker

WARM_UP = 3
"""Steps at the start that are not counted."""


def config_of(options: argparse.Namespace, folder: Path, me: str, other: str) -> TrainConfig:
    """The run called `me`."""
    return parse_config(
        TrainConfig,
        {
            "name": me,
            "output_dir": str(folder),
            "model": {"path": options.model, "dtype": options.dtype},
            "data": {"train": [{"path": "sample:train"}]},
            "objective": {"loss": "simpo"},  # no reference to prepare
            "train": {"epochs": 1000, "max_steps": options.steps, "batch_bundles": options.bundles},
            "engine": {
                "name": "turns:TakingTurns", "folder": str(folder), "me": me, "other": other, "steps": options.steps,
            },
            "cluster": {"address": "local", "workers": 1, "cpus_per_worker": options.threads},
            "logging": {"tensorboard": False},
        },
    )  # fmt: skip


def plain(settings: dict[str, Any], tokens_folder: Path, gpu: bool) -> None:
    """The same loop in this process, as Ray Train's worker runs it, without Ray."""
    config = parse_config(TrainConfig, settings)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    os.environ["LOCAL_RANK"] = "0"
    torch.set_num_threads(int(config.cluster.cpus_per_worker))
    device = torch.device("cuda" if gpu else "cpu")
    worker.engine_class(config).prepare(device)
    dist.init_process_group("nccl" if gpu else "gloo", rank=0, world_size=1)
    torch.manual_seed(config.seed)
    engine, reference = worker._build(config, device)
    tokens = TokenArtifact.open(tokens_folder)
    total = config.train.max_steps or 0
    cutting = worker.cutting_of_worker(config, tokens, engine, total)
    planned = plans(tokens, order_of(config, tokens), cutting, range(total))
    steps = worker._checked(stream_steps(tokens, planned, cutting, None, rank=0, pin=gpu), engine)
    folder = Path(config.output_dir) / config.name
    folder.mkdir()
    tracker = Tracker(config, folder, 0)
    train_loop(
        config, engine=engine, steps=steps, reference=reference, progress=Progress(), total_steps=total,
        kinds=tokens.counts.kinds, log=tracker.log, saves=NoSaves(),
    )  # fmt: skip
    tracker.close()
    steps.close()
    dist.destroy_process_group()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both; seconds of each one's steps, and whether their losses are equal."""
    ours, other = (config_of(options, folder, me, other) for me, other in (("ray", "plain"), ("plain", "ray")))
    (folder / TURN).write_text("ray", encoding="utf-8")
    connect("local")
    gpu = use_gpu("auto")
    tokens = prepare_token_rows(ours.data, ours.model, cache_dir=folder / "cache")
    settings = other.model_dump(mode="json", exclude_unset=True)
    process = multiprocessing.get_context("spawn").Process(target=plain, args=(settings, tokens.folder, gpu))
    process.start()
    try:
        train(ours, display=False)
        process.join(60)
    finally:
        process.kill()
    seconds = {me: json.loads((folder / f"{me}.json").read_text(encoding="utf-8"))[WARM_UP:] for me in ("ray", "plain")}
    losses = [[row["loss/total"] for row in read_metrics(folder / me)] for me in ("ray", "plain")]
    ratios = [under / alone for under, alone in zip(seconds["ray"], seconds["plain"], strict=True)]
    return {
        "model": options.model, "dtype": options.dtype, "bundles": options.bundles, "threads": options.threads,
        "device": "cuda" if gpu else "cpu", "seconds": seconds, "ratios": ratios,
        "median_seconds": {me: median(values) for me, values in seconds.items()},
        "median_ratio": median(ratios), "quartiles_of_ratio": quantiles(ratios, n=4),
        "equal_losses": losses[0] == losses[1],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if both trained alike."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"Hugging Face folder (default: {MODEL_NAME})")
    parser.add_argument("--steps", type=int, default=24, help=f"steps of each, {WARM_UP} of which are not counted")
    parser.add_argument("--bundles", type=int, default=1, help="bundles of a step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    if options.steps < WARM_UP + 2:
        parser.error(f"--steps must be at least {WARM_UP + 2}")
    options.model = options.model or str(prepare_smollm2(user_cache() / "models" / MODEL_NAME))
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))  # for Ray's workers
    with scratch_folder() as folder:
        result = measure(options, folder)
    first, third = result["quartiles_of_ratio"][0], result["quartiles_of_ratio"][2]
    medians = ", ".join(f"{me} {value:.4f} s" for me, value in result["median_seconds"].items())
    print(f"{len(result['ratios'])} pairs of steps: median {medians}")
    ratio = result["median_ratio"]
    print(f"under Ray Train a step takes {ratio:.4f} times as long (quartiles {first:.4f} to {third:.4f})")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not result["equal_losses"]:
        print("the two runs did not train alike: their times cannot be compared", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
