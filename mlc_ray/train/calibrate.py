"""One probe of a device: forwards and backwards of the settings' model, AdamW, and what other workers cost.

It runs in processes of its own, so that what it measures of memory is its own; docs/plan.md says what a plan makes of
it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mlc_ray._registry import resolve
from mlc_ray.config import ConfigError, ModelSection, TrainConfig, parse_config
from mlc_ray.data.batches import collate
from mlc_ray.data.sources import Reading, resolve_source
from mlc_ray.data.tokens import ChatTemplate, load_tokenizer, tokenize_bundle
from mlc_ray.device import resolved
from mlc_ray.plan.activations import Row, head_bytes, kept_bytes, table_bytes
from mlc_ray.plan.hardware import gpu_key
from mlc_ray.plan.rates import READS, Rates, bandwidth_of, threads_of
from mlc_ray.plan.shapes import shape_of
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.flops import Work
from mlc_ray.train.model import (
    ModelOutput,
    PolicyWithExtractor,
    cast_parameters,
    load_policy,
    model_depth,
    resolve_layer,
)
from mlc_ray.types import Batch, Bundle, TokenRow, move

REPEATS = 5
"""Times of each are the median of so many."""

SHAPES = 8
"""Different forwards before memory is measured on a CPU: glibc cannot use again all that tensors of another size left,
and oneDNN keeps kernels of each shape. By eight the heap of SmolLM2-135M grew from 1.1 times what is counted to 2.1
times, and by twenty to 2.3 times (bfloat16, two bundles each, an Intel Xeon with AMX)."""

TIMED, CROWD = 5, 4
"""Steps of different bundles that are timed on a CPU, the first of them not; and at most so many workers at once, which
share the bandwidth of its memory."""

STEPPED, SENT = 2**25, 2**24
"""Elements that AdamW steps, and that workers add up."""


@dataclass(frozen=True)
class Probed:
    """Seconds and useful operations of a small and a large forward, its bytes in units of counted ones, AdamW's
    parameters a second, the bytes of weights that a forward and backward read, which a plan counts by itself; and on a
    CPU the seconds of a `whole` step of the large forward, and what `kept` has `grown` by after others."""

    seconds: tuple[float, float]
    flops: tuple[float, float]
    kept: float
    adamw: float
    reading: int
    whole: float = 0.0
    grown: float = 0.0


def calibrate(config: TrainConfig, *, threads: int | None = None, bundles: int | None = None) -> Rates:
    """Measure this machine's GPU, or its CPU with the threads that a worker has.

    Args:
        config: a run; its model, type, attention and sources are used.
        threads: of a worker on a CPU (default: `cluster.cpus_per_worker`).
        bundles: of the large forward (default: 2 on a CPU, 8 on a GPU).

    Raises:
        ConfigError: There are not enough bundles in data.train, or the model's operations are not known.
    """
    gpu = torch.cuda.is_available() and config.cluster.accelerator != "cpu"
    dtype = resolved(config.model.dtype, gpu=gpu)
    threads = threads or threads_of(config)
    device = gpu_key(torch.cuda.get_device_name()) if gpu else "cpu"
    count = bundles or (8 if gpu else 2)
    probed = _in_child(probe, probe_settings(config, dtype), "cuda" if gpu else "cpu", threads, count)
    exchange = None if gpu else _exchange(threads, workers=2)
    crowd = 1 if gpu else max(1, min(CROWD, len(os.sched_getaffinity(0)) // threads))
    crowded = 1.0 if crowd == 1 else _crowded(probe_settings(config, dtype), threads, count, crowd, probed.whole)
    depth = model_depth(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if probed.flops[0] <= 0:
        raise ConfigError(
            f"model.path={config.model.path!r}: how many operations a token of it takes is not known (its config does "
            "not say how many experts a token meets), so nothing can be calibrated by it; take another model"
        )
    rate, overhead = speed(probed, device)
    return Rates(
        device=device,
        dtype=dtype,
        flops=rate,
        forward_seconds=overhead / depth,
        adamw=probed.adamw,
        exchange=exchange,
        kept=probed.kept,
        measured=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {config.model.path}, {threads} threads",
        threads=None if gpu else threads,
        crowd=crowd,
        crowded=crowded,
        grown=probed.grown,
    )


def speed(probed: Probed, device: str) -> tuple[float, float]:
    """Useful operations a second, and the seconds of a forward and backward beside them.

    Of a GPU less what a plan counts by itself of them: reading the weights.
    """
    (small, large), (few, many) = probed.seconds, probed.flops
    if many <= few or large <= small:  # noise: what both took together
        return (few + many) / (small + large), 0.0
    rate = (many - few) / (large - small)
    reading = 0.0 if device == "cpu" else probed.reading / bandwidth_of(device, probed.adamw)
    return rate, max(0.0, small - few / rate - reading)


def probe_settings(config: TrainConfig, dtype: str) -> dict[str, object]:
    """The run as it is probed: all weights trained, nothing checkpointed, since that is what plans count from."""
    settings = {**config.model_dump(mode="json", exclude_unset=True)}
    model = {"dtype": dtype, "gradient_checkpointing": False, "lora": None}
    stage = getattr(config.engine, "stage", None)
    engine = {"name": config.engine.name} | ({} if stage is None else {"stage": stage})
    return settings | {"model": {**settings["model"], **model}, "engine": engine}


def _in_child(function: Callable[..., Probed], *arguments: object) -> Probed:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rows_of(config: TrainConfig, number: int) -> list[TokenRow]:
    """The first bundles of data.train as token rows.

    Raises:
        ConfigError: There are fewer.
    """
    template = ChatTemplate(
        load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code), config.chat
    )
    rows: list[TokenRow] = []
    for file in (file for source in config.data.train for file in resolve_source(source)):
        for row in Reading(file).rows():
            if isinstance(row.parsed, Bundle):
                rows.append(
                    tokenize_bundle(
                        row.parsed, template, languages=config.data.languages,
                        max_prompt_tokens=config.data.max_prompt_tokens,
                        max_response_tokens=config.data.max_response_tokens,
                    )
                )  # fmt: skip
            if len(rows) == number:
                return rows
    raise ConfigError(f"data.train has {len(rows)} bundles, but calibrating takes {number}; give it more")


def probe(settings: dict[str, object], device: str, threads: int, bundles: int) -> Probed:
    """Measure this process's device by a forward and backward of one bundle, and of several."""
    torch.set_num_threads(threads)
    config = parse_config(TrainConfig, settings)
    module = _module(config, device)
    for weight in module.parameters():  # as an engine that reduces them during the backward
        weight.register_post_accumulate_grad_hook(_dropped)
    reading = READS * sum(weight.numel() * weight.element_size() for weight in module.parameters())
    gc.collect()
    before = _held(device)
    if device == "cpu":
        shapes = _batches(config, bundles, device, SHAPES)
        kept = _kept(module, shapes[0], before, device)
        for batch in shapes[1:]:
            _forward_backward(module, batch)
        later = _kept(module, max(shapes, key=lambda batch: batch.tree.tokens), before, device)
        del module
        (few, few_flops, _), (many, many_flops, last) = timed_steps(settings, threads, (1, bundles))
        grown, whole = max(0.0, later - kept), many + last
        return Probed((few, many), (few_flops, many_flops), kept, STEPPED / last, reading, whole, grown)
    small, large = (_batches(config, size, device, 1)[0] for size in (1, bundles))
    work = Work.of(module, lambda parameter: tuple(parameter.shape))
    kept = _kept(module, large, before, device)
    seconds = tuple(_median(partial(_forward_backward, module, each), device) for each in (small, large))
    flops = tuple(work.step(each) if work is not None else 0.0 for each in (small, large))
    return Probed((seconds[0], seconds[1]), (flops[0], flops[1]), kept, _adamw(device), reading)


def _module(config: TrainConfig, device: str) -> PolicyWithExtractor:
    policy = load_policy(config.model)
    depth = policy.config.get_text_config().num_hidden_layers
    module = PolicyWithExtractor(
        policy, layer=resolve_layer(config.mlc.layer, depth), extractor_dim=config.mlc.extractor_dim, seed=config.seed
    )
    cast_parameters(module, getattr(torch, config.model.dtype))
    module.to(device)
    module.train()
    for weight in module.parameters():  # of a mapped file, nothing is in memory until it is read
        weight.data = weight.data.clone()
    return module


def _batches(config: TrainConfig, size: int, device: str, number: int) -> list[Batch]:
    """So many different ones of `size` bundles."""
    rows = rows_of(config, size + number - 1)
    languages = sorted({code for row in rows for code in row.languages})
    found = []
    for at in range(number):
        some = rows[at : at + size]
        made = collate(
            some, languages=languages, weights=[1.0] * len(some), needs_rejected=True, reference=None, tap=True
        )
        found.append(move(made, torch.device(device)))
    return found


def timed_steps(settings: dict[str, object], threads: int, sizes: Sequence[int]) -> list[tuple[float, float, float]]:
    """Steps of the run's engine, this process alone, on a CPU; of each number of bundles in `sizes` three medians.

    They are seconds of forward and backward, their useful operations, and seconds of the optimizer's step of `STEPPED`
    parameters.
    """
    torch.set_num_threads(threads)
    config, device = parse_config(TrainConfig, settings), torch.device("cpu")
    chosen: type[Engine] = resolve("engine", config.engine.name)
    chosen.prepare(device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "LOCAL_RANK": "0"}
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        with chosen.loading(config):
            module = _module(config, "cpu")
        trained = sum(parameter.numel() for parameter in module.parameters())
        work = Work.of(module, lambda parameter: tuple(parameter.shape))
        engine = chosen(module, config, device)
        # The sizes by turns, since steps get faster while the process finds its memory.
        turns = zip(*(_batches(config, size, "cpu", TIMED) for size in sizes), strict=True)
        spent = [[_timed_step(engine, work, batch) for batch in batches] for batches in turns]
    finally:
        dist.destroy_process_group()
    found = []
    for of_size in zip(*spent[1:], strict=True):
        computing, flops, stepping = map(statistics.median, zip(*of_size, strict=True))
        found.append((computing, flops, stepping * STEPPED / trained))
    return found


def _timed_step(engine: Engine, work: Work | None, batch: Batch) -> tuple[float, float, float]:
    started = time.perf_counter()
    engine.begin(1)
    engine.backward(_loss_of(engine.forward(batch)))
    computed = time.perf_counter()
    engine.step(1e-9)
    flops = work.step(batch) if work is not None else 0.0
    return computed - started, flops, time.perf_counter() - computed


def _crowded(settings: dict[str, object], threads: int, bundles: int, crowd: int, alone: float) -> float:
    """What of its speed alone the slowest of a crowd keeps, which all workers wait for."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(crowd, mp_context=context) as pool:
        said = list(pool.map(timed_steps, [settings] * crowd, [threads] * crowd, [(bundles,)] * crowd))
    return min(1.0, alone / max(computing + stepping for ((computing, _, stepping),) in said))


def _loss_of(said: ModelOutput) -> Tensor:
    loss: Tensor = said.chosen.total.sum() - (said.rejected.total.sum() if said.rejected is not None else 0.0)
    return loss + said.representations.sum() if said.representations is not None else loss


def _dropped(weight: Tensor) -> None:
    weight.grad = None


def _forward_backward(module: PolicyWithExtractor, batch: Batch) -> None:
    _loss_of(module(batch)).backward()


def _kept(module: PolicyWithExtractor, batch: Batch, before: int, device: str) -> float:
    """Bytes that a forward holds, in units of what is counted of it.

    On a CPU also what others since `before` left and is not used again; on a GPU what is allocated, after one in which
    kernels were chosen and workspaces made.
    """
    if device == "cuda":
        for _ in range(2):
            _forward_backward(module, batch)
        before = _held(device)
    config = module.language_model.config
    shape = shape_of(config, "probed")
    tree = batch.tree
    pairs = sum(q * k for q, k in zip(tree.lengths, tree.key_lengths, strict=True))
    rejected = len(batch.rejected.targets) if batch.rejected is not None else 0
    tapped = len(batch.prompts.tapped) if batch.prompts is not None else 0
    row = Row(tree.tokens, sum(tree.key_lengths), pairs, len(batch.chosen.targets) + rejected, tapped)
    size = next(module.parameters()).element_size()
    counted = kept_bytes(shape, row, ModelSection(path="probed"), size) + table_bytes(shape, row, size)
    loss = _loss_of(module(batch))
    left = _held(device) - before
    loss.backward()
    return max(0.5, (left - head_bytes(shape, row, size)) / counted)


def _held(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _median(call: Callable[[], None], device: str) -> float:
    call()
    spent = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def _adamw(device: str) -> float:
    weight = torch.nn.Parameter(torch.zeros(STEPPED, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-6, fused=True)
    return STEPPED / _median(lambda: optimizer.step() and None, device)


def _exchange(threads: int, *, workers: int) -> float:
    """Bytes a second that a worker sends in a reduction, over gloo on this machine."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        spent = list(pool.map(_reduce, range(workers), [workers] * workers, [port] * workers, [threads] * workers))
    return 2 * (workers - 1) / workers * 4 * SENT / max(spent)


def _reduce(rank: int, workers: int, port: int, threads: int) -> float:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    try:
        values = torch.ones(SENT)
        return _median(lambda: dist.all_reduce(values) and None, "cpu")
    finally:
        dist.destroy_process_group()
