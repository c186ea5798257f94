"""What a score of a trial has written: weights alone, against a whole checkpoint with optimizer states.

One worker with SmolLM2-135M-Instruct under DeepSpeed (ZeRO-2), all parameters and LoRA, writes both, and then weights
to memory (`/dev/shm`), which is the most that handing them over without a disk could save. `load` is reading the
published file once, as an engine does.

    python benchmarks/trial_weights.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from step_data import batch_of, sample_rows

from mlc_ray.config import TrainConfig, parse_config, resolve_layer
from mlc_ray.data.tokens import load_tokenizer
from mlc_ray.quickstart import MODEL_NAME, prepare_smollm2
from mlc_ray.storage import Place, scratch_folder, user_cache
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.engines.deepspeed import DeepSpeed
from mlc_ray.train.loop import Progress
from mlc_ray.train.model import PolicyWithExtractor, add_adapters, cast_parameters, load_policy
from mlc_ray.train.saving import CheckpointSaver
from mlc_ray.train.worker import engine_class


def engine_of(config: TrainConfig) -> Engine:
    """The engine of a run's worker, as it builds it."""
    policy = load_policy(config.model)
    layer = resolve_layer(config.mlc.layer, policy.config.get_text_config().num_hidden_layers)
    policy = add_adapters(policy, config.model)
    module = PolicyWithExtractor(policy, layer=layer, extractor_dim=config.mlc.extractor_dim, seed=config.seed)
    cast_parameters(module, getattr(torch, config.model.dtype))
    engine = engine_class(config)(module, config, torch.device("cpu"))
    engine.begin(1)  # one step, after which there are moments to write
    engine.backward(-engine.forward(batch_of(sample_rows(config.model.path, 1, 1)[0], 1)).chosen.total.mean())
    engine.step(1e-6)
    return engine


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call, the writing behind it included."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(config: TrainConfig, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of seconds, and bytes, of both ways."""
    engine = engine_of(config)
    tokenizer = load_tokenizer(config.model.path)
    found: dict[str, dict[str, float]] = {}
    for place in (folder, Path("/dev/shm")):
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            saver = CheckpointSaver(
                Place(scratch), engine=engine, tokenizer=tokenizer, config=config, fingerprints={"model": "m"}
            )

            def whole(step: int, saver: CheckpointSaver = saver) -> None:
                saver.save(Progress(step=step))
                saver.finish()

            def weights(step: int, saver: CheckpointSaver = saver) -> None:
                saver.publish(Progress(step=step), ends=False)
                saver.finish()

            ways = {"checkpoint": whole, "weights": weights} if place == folder else {"weights": weights}
            for name, action in ways.items():
                spent = []
                for step in range(1, rounds + 1):
                    spent.append(timed(lambda step=step, action=action: action(step)))
                    os.sync()
                assert saver.newest is not None and saver.fault is None
                where = "memory" if place == Path("/dev/shm") else "disk"
                walls, cpus = zip(*spent, strict=True)
                size = sum(saver.newest.sizes().values())
                found[f"{name}, {where}"] = {"seconds": median(walls), "cpu": median(cpus), "bytes": size}
            assert saver.newest is not None
            file = next(Path(saver.newest).glob("*/*.safetensors"))
            found[f"load, {where}"] = {"seconds": median(timed(partial(load_file, file))[0] for _ in range(rounds))}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    DeepSpeed.prepare(torch.device("cpu"))
    dist.init_process_group("gloo", rank=0, world_size=1)
    path = str(prepare_smollm2(user_cache() / "models" / MODEL_NAME))
    for name, lora in (("all parameters", None), ("LoRA, rank 16", {"rank": 16})):
        raw = {
            "name": "measured",
            "model": {"path": path, "dtype": "bfloat16", "lora": lora},
            "data": {"train": [{"path": "sample:train"}]},
            "engine": {"stage": 2},
            "checkpoint": {"keep": 1, "background": True},
        }
        with scratch_folder() as folder:
            figures = measure(parse_config(TrainConfig, raw), folder, options.rounds)
        print(name, json.dumps(figures, indent=2), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
