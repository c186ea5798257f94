"""The plan of a training run: its memory, its time, and what was assumed."""

from __future__ import annotations

import math
from typing import Any

from mlc_ray.config import ClusterSection, TrainConfig, resolve_layer
from mlc_ray.device import resolved
from mlc_ray.errors import MlcRayError
from mlc_ray.plan.activations import Row
from mlc_ray.plan.budget import tokens_in
from mlc_ray.plan.costs import COPY_GB, NODE_GB, behind, blocking
from mlc_ray.plan.cutting import BUNDLES_PER_REFERENCE_FORWARD, CPU_TOKENS, steps_of
from mlc_ray.plan.hardware import Cluster, has_sheet, with_workers
from mlc_ray.plan.lengths import Weights, busy_workers, cut
from mlc_ray.plan.memory import (
    CUDA_CONTEXT,
    PLANNED,
    Device,
    Holding,
    bucket,
    disk_parts,
    gathered,
    gradients,
    holding_of,
    node_parts,
    peak,
    reference_part,
    states,
    zero_extra,
)  # fmt: skip
from mlc_ray.plan.rates import Rates, rates_of, said_of, threads_of
from mlc_ray.plan.records import Memory, Part, RunPlan, Work
from mlc_ray.plan.seconds import REPEATED, flops, gathering, seconds
from mlc_ray.plan.shapes import Shape

SETTINGS = (
    "engine.stage", "engine.offload_optimizer", "engine.offload_parameters", "engine.secondary_partition",
    "model.gradient_checkpointing", "model.lora", "train.batch_bundles",
)  # fmt: skip


class PlanError(MlcRayError):
    """What is asked for cannot be planned, or cannot fit; the message names the part that breaks and what would fit."""


class NoRoomError(PlanError):
    """A cluster has fewer GPUs, or smaller nodes, than what is to run on it, so that there is nothing to plan."""


def dtype_of(said: str, cluster: Cluster) -> str:
    """The type of a model or an engine there: `auto` decided as runs decide it."""
    return "bfloat16" if said == "auto" and cluster.gpu is not None else resolved(said, gpu=False)


def plannable(config: TrainConfig) -> bool:
    """Whether its engine is one whose memory is known."""
    return config.engine.name == "deepspeed"


def plan_run(
    config: TrainConfig, shape: Shape, cluster: Cluster, weights: Weights, rates: Rates, *, dtype: str, workers: int
) -> RunPlan:
    """What a run needs.

    Args:
        config: its settings.
        shape: its model's.
        cluster: what it runs on.
        weights: what its data weighs.
        rates: of a worker.
        dtype: of the model, `auto` decided.
        workers: of the run; at most the cluster's GPUs.

    Raises:
        ConfigError: The model has no such layer as `mlc.layer`.
        PlanError: Its engine is not DeepSpeed.
    """
    resolve_layer(config.mlc.layer, shape.layers)
    if not plannable(config):
        raise PlanError(f"engine.name={config.engine.name!r}: only the memory of engine.name='deepspeed' is known")
    device: Device = "cpu" if cluster.gpu is None else "gpu"
    held = holding_of(config, shape, workers=workers, dtype=dtype, device=device)
    limit = cluster.gpu.memory if cluster.gpu is not None else (cluster.node_room or 0) // max(1, cluster.per_node)
    budget = _budget(config, shape, held, weights, limit, rates.kept)
    cutting = cut(config, weights, tokens_per_forward=budget, workers=workers)
    per_node, nodes = min(workers, cluster.per_node), cluster.nodes_of(workers)
    steps = steps_of(config, weights)
    disk, checkpoint = disk_parts(config, held, steps=steps, lora=config.model.lora is not None)
    forwards = [
        (row, list(peak(config, shape, held, row, forwards=cutting.forwards, kept_share=rates.kept, grown=rates.grown)))
        for row in cutting.largest
    ]
    largest, worker = max(forwards, key=lambda each: sum(part.bytes for part in each[1]))
    on_cpus = per_node * sum(part.bytes for part in worker) if device == "cpu" else 0
    resting = per_node * sum(part.bytes for part in [*states(held), *reference_part(held)]) if device == "cpu" else 0
    node = node_parts(config, held, per_node=per_node, memory=cluster.node_memory, workers=on_cpus, resting=resting)
    memory = Memory(tuple(worker), node, disk, limit or 2**62, cluster.node_room)
    step, useful = seconds(config, shape, held, cutting, rates=rates, cluster=cluster)
    reference = 0.0
    if config.needs_reference and config.reference == "cached":
        reference = _reference_seconds(config, shape, weights, rates, held, cluster)
    stops, after = _checkpoint_seconds(held, checkpoint, nodes=nodes, behind_training=_copied(node))
    return RunPlan(
        model=shape.name,
        parameters=shape.parameters,
        trained=held.trained,
        gpu="cpu" if cluster.gpu is None else cluster.gpu.name,
        workers=workers,
        nodes=nodes,
        settings={
            **{name: _read(config, name) for name in SETTINGS},
            "train.tokens_per_forward": budget,
            "model.dtype": dtype,
        },
        memory=memory,
        work=Work(
            cutting.tokens, cutting.forwards, largest.tokens, largest.head, useful,
            REPEATED[config.model.gradient_checkpointing],
        ),
        seconds=step,
        steps=steps,
        bundles=config.train.batch_bundles,
        idle_workers=workers - busy_workers(config, weights, workers),
        reference_seconds=reference,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=stops,
        checkpoint_behind_seconds=after,
        saving_seconds=_saving_seconds(steps, config.checkpoint.every or steps, step.step, stops, after),
        assumed=_assumed(config, rates, cluster, shape, workers),
        data=weights.said,
    )  # fmt: skip


def check_room(section: ClusterSection, cluster: Cluster, *, workers: int) -> None:
    """Refuse a run for which a cluster has too few GPUs.

    Raises:
        NoRoomError: It has fewer than `workers`.
    """
    if cluster.gpu is not None and workers > cluster.gpus:
        raise NoRoomError(
            f"cluster.workers={section.workers}, but the cluster has {cluster.gpus} GPUs; lower it, or take more"
        )


def plan_alone(config: TrainConfig, shape: Shape, cluster: Cluster, weights: Weights) -> RunPlan:
    """What a run needs on a cluster that it has alone, with as many workers as its settings say.

    Raises:
        PlanError: Its engine is not DeepSpeed.
        NoRoomError: The cluster has fewer GPUs than it has workers.
    """
    workers, dtype = config.cluster.most_workers, dtype_of(config.model.dtype, cluster)
    check_room(config.cluster, cluster, workers=workers)
    rates = rates_of(cluster.gpu, dtype, threads=threads_of(config))
    return plan_run(config, shape, with_workers(cluster, workers), weights, rates, dtype=dtype, workers=workers)


def _budget(config: TrainConfig, shape: Shape, held: Holding, weights: Weights, limit: int, kept: float) -> int:
    """`train.tokens_per_forward`, or what `auto` makes of the memory that states leave."""
    said = config.train.tokens_per_forward
    if said != "auto":
        return said
    if held.device == "cpu":
        return CPU_TOKENS
    there = [*states(held), *reference_part(held), gradients(held), gathered(held, shape), bucket(held)]
    free = limit - CUDA_CONTEXT - sum(part.bytes for part in there)
    return tokens_in(free, config, shape, weights, size=held.size, workers=held.workers, kept_share=kept)


def _copied(node: tuple[Part, ...]) -> bool:
    return any(part.name == "checkpoint copy" for part in node)


def _checkpoint_seconds(held: Holding, size: int, *, nodes: int, behind_training: bool) -> tuple[float, float]:
    """That training stops for a checkpoint of `size` bytes, and that it is written beside training after that."""
    state = 12 * held.trained / 1e9
    model = size / 1e9 - state
    stops = blocking(state, model, nodes=nodes, copy=COPY_GB, storage=NODE_GB)
    after = behind(state, model, writing=nodes * NODE_GB, storage=NODE_GB)
    return (stops, after) if behind_training else (stops + after, 0.0)


def _saving_seconds(steps: int, every: int, step: float, stops: float, after: float) -> float:
    """Of all checkpoints: each stops training, and waits until the one before it is written, which takes `after`."""
    number = -(-steps // every)
    gaps = [every] * (number - 2) + [steps - every * (number - 1)] if number > 1 else []
    return number * stops + sum(max(0.0, after - gap * step) for gap in gaps) + after


def _reference_seconds(
    config: TrainConfig, shape: Shape, weights: Weights, rates: Rates, held: Holding, cluster: Cluster
) -> float:
    """A forward of each answer behind its prompt: a third of a forward and backward.

    At ZeRO-3 the next block's parameters are gathered meanwhile, so that the longer of both counts.
    """
    lengths, said = weights.lengths, config.train.tokens_per_forward
    each = float((lengths.answered + lengths.chosen + lengths.rejected).mean())
    tokens = each * len(weights)
    rows = float((lengths.chosen + lengths.rejected).mean()) * len(weights)
    row = Row(round(tokens), round(tokens), 0, round(rows), 0)
    rates = rates.among(min(held.workers, cluster.per_node))
    computing = flops(shape, row, trained=1.0, head_trained=True, pairs=0) / 3 / rates.flops / held.workers
    budget = said if said != "auto" else CPU_TOKENS if held.device == "cpu" else BUNDLES_PER_REFERENCE_FORWARD * each
    return max(computing, math.ceil(tokens / (budget * held.workers)) * gathering(held, rates, cluster))


def _read(config: TrainConfig, name: str) -> object:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _assumed(config: TrainConfig, rates: Rates, cluster: Cluster, shape: Shape, workers: int) -> tuple[str, ...]:
    said = []
    lora = config.model.lora is not None
    said.append(said_of(rates.training(lora=lora)))
    if lora and rates.measured is not None and rates.lora_flops is None:
        said.append("adapters take the time of all weights: that calibration measured none; calibrate again")
    if rates.threads is not None and rates.threads != (threads := threads_of(config)):
        said.append(
            f"that was measured with cluster.cpus_per_worker={rates.threads}, but this run has {threads}: calibrate "
            "with that"
        )
    if rates.crowd < (here := min(workers, cluster.per_node)) and cluster.gpu is None and rates.measured is not None:
        said.append(f"of {here} workers on one CPU each is as fast as of the {rates.crowd} that were measured at once")
    if cluster.gpu is not None:
        if cluster.nodes_of(workers) > 1 and rates.exchange is None:
            said.append(f"{cluster.network / 1e9:.0f} GB/s between nodes for each GPU")
        if not has_sheet(cluster.gpu) and min(workers, cluster.per_node) > 1:
            said.append(
                f"{cluster.gpu.link / 1e9:.0f} GB/s between the GPUs of a node ({cluster.gpu.name} has no data sheet)"
            )
        said.append(f"{CUDA_CONTEXT / 2**30:.1f} GiB of each GPU for CUDA, cuBLAS and NCCL")
    said.append(f"{COPY_GB:g} GB/s that a node copies of a checkpoint to host memory, and {NODE_GB:g} that it writes")
    if cluster.node_memory is None:
        said.append("each node's memory holds what lies in it: how much it has is not known (--node-memory GIB)")
    if unread := sorted(zero_extra(config).keys() - PLANNED):
        said.append(
            f"no more and no less for {', '.join(unread)} of engine.extra.zero_optimization, which no plan reads"
        )
    if not shape.counted:
        said.append("parameters by arithmetic, not counted from modules")
    return tuple(said)
