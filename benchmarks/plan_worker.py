"""One measured point of `plan_accuracy.py`: workers of their own, joined by gloo, that train a few steps without Ray.

What is measured is what the loop of a run does, on the shipped sample: `train_loop` with the engine, the cut and the
batches of a run. Memory is the resident set of the process, above what it is once everything is imported; time is that
of the optimizer steps after the first.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS = 6
"""Optimizer steps of a point, unless it says `steps`: the first allocates what later ones keep, and is not timed."""


def config_of(point: Mapping[str, Any], model: str) -> Any:
    """The settings of a point, as a run has them."""
    from mlc_ray.config import TrainConfig

    return TrainConfig.model_validate(
        {
            "name": "point",
            "model": {
                "path": model,
                "dtype": point["dtype"],
                "gradient_checkpointing": point["checkpointing"],
                "lora": point["lora"],
            },
            "data": {"train": [{"path": "sample:train"}]},
            "train": {
                "batch_bundles": point["bundles"],
                "tokens_per_forward": point["tokens"],
                "max_steps": point.get("steps", STEPS),
            },
            "engine": {"stage": point["stage"]},
            "cluster": {"workers": point["workers"], "accelerator": "cpu"},
            "logging": {"tensorboard": False},
        }
    )


def measure(point: Mapping[str, Any], model: str, tokens_folder: str) -> list[dict[str, Any]]:
    """What each worker of a point measured, by rank."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = context.SimpleQueue()
    workers = [
        context.Process(target=_worker, args=(rank, port, dict(point), model, tokens_folder, answers))
        for rank in range(point["workers"])
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise RuntimeError(f"a worker of {json.dumps(dict(point))} ended with {failed[0]}")
    return sorted((answers.get() for _ in workers), key=lambda answer: answer["rank"])


def _worker(rank: int, port: int, point: dict[str, Any], model: str, folder: str, answers: Any) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(point["workers"]), "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(point["threads"])
    from mlc_ray.train.engines.deepspeed import DeepSpeed

    DeepSpeed.prepare(torch.device("cpu"))
    dist.init_process_group("gloo", rank=rank, world_size=point["workers"])
    try:
        answers.put({"rank": rank, **_train(point, model, folder)})
    finally:
        dist.destroy_process_group()


def _train(point: Mapping[str, Any], model: str, folder: str) -> dict[str, Any]:
    import deepspeed.runtime.engine  # noqa: F401, so that its import is before the start
    import numpy as np
    import peft  # noqa: F401
    import torch
    from step_memory import read_peak, reset_peak
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    from mlc_ray.config import resolve_layer
    from mlc_ray.data.store import TokenArtifact
    from mlc_ray.data.stream import plans, stream_steps
    from mlc_ray.losses.objective import Objective
    from mlc_ray.plan.cutting import cutting_of, order_of
    from mlc_ray.train.engines.deepspeed import DeepSpeed
    from mlc_ray.train.loop import Progress, train_loop
    from mlc_ray.train.model import PolicyWithExtractor, add_adapters, load_policy
    from mlc_ray.train.reference import cached_reference
    from mlc_ray.types import ReferenceRows

    config = config_of(point, model)
    steps = config.train.max_steps
    tokens = TokenArtifact.open(folder)
    start = resident()
    memory = {}
    with DeepSpeed.loading(config):
        policy = load_policy(config.model)
    memory["loaded"] = resident() - start
    policy = add_adapters(policy, config.model)
    module = PolicyWithExtractor(
        policy,
        layer=resolve_layer(config.mlc.layer, policy.config.num_hidden_layers),
        extractor_dim=config.mlc.extractor_dim,
        seed=config.seed,
        pooling=Objective(config).alignment.pooling,
    )
    module.to(dtype=getattr(torch, config.model.dtype))
    engine = DeepSpeed(module, config, torch.device("cpu"))
    memory["engine"] = resident() - start
    memory["peak_until_engine"] = read_peak("cpu") - start
    cutting = cutting_of(config, tokens, tokens_per_forward=point["tokens"], world_size=engine.world_size)
    planned = plans(tokens, order_of(config, tokens), cutting, range(steps))
    table = ReferenceRows(chosen=np.zeros(len(tokens)), rejected=np.zeros(len(tokens)))
    seconds: list[float] = []
    metrics: list[dict[str, float]] = []
    after: list[int] = []
    peaks: list[int] = []
    phases: list[tuple[str, int, int]] = []

    def watched(name: str, call: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            reset_peak("cpu")
            result = call(*args, **kwargs)
            phases.append((name, resident() - start, read_peak("cpu") - start))
            peaks.append(phases[-1][2])
            return result

        return inner

    for name in ("forward", "backward", "step"):
        setattr(engine, name, watched(name, getattr(engine, name)))

    def log(_: int, said: dict[str, float]) -> None:
        seconds.append(time.perf_counter())
        metrics.append(dict(said))
        after.append(resident() - start)
        peaks.append(read_peak("cpu") - start)

    seconds.append(time.perf_counter())
    train_loop(
        config, engine=engine, steps=stream_steps(tokens, planned, cutting, table, rank=engine.rank),
        reference=cached_reference, progress=Progress(), total_steps=steps, kinds=["harmful"], log=log,
        saves=NoSaves(),
    )  # fmt: skip
    return {
        "memory": {**memory, "after_steps": after, "peak": max(peaks), "start": start, "phases": phases},
        "seconds": [b - a for a, b in pairwise(seconds)],
        "tokens": [each["tokens"] for each in metrics],
        "forwards": [each["forwards"] for each in metrics],
    }


class NoSaves:
    """Checkpoints are no part of a point."""

    at_the_end = False

    def save(self, *args: Any, **kwargs: Any) -> bool:
        """Nothing is saved."""
        return True

    def score(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is scored."""

    def writes(self) -> bool:
        """Nothing is written."""
        return False

    def settle(self) -> None:
        """There is nothing to end."""

    def finish(self) -> None:
        """There is nothing to wait for."""


def resident() -> int:
    """Bytes of this process that are in memory now, without pages of mapped files."""
    pages = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * sum(int(line.split()[1]) for line in pages.splitlines() if line.startswith("VmRSS"))


if __name__ == "__main__":
    import sys

    print(json.dumps(measure(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3])))
