"""The plan of a training run: its memory, its time, and what was assumed."""

from __future__ import annotations

from typing import Any

from mlc_ray.config import TrainConfig
from mlc_ray.device import resolved
from mlc_ray.errors import MlcRayError
from mlc_ray.plan.activations import Row
from mlc_ray.plan.budget import tokens_in
from mlc_ray.plan.cutting import CPU_TOKENS, steps_of
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import Weights, cut
from mlc_ray.plan.memory import (
    CUDA_CONTEXT,
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
)  # fmt: skip
from mlc_ray.plan.costs import blocking
from mlc_ray.plan.rates import Rates
from mlc_ray.plan.records import Memory, Part, RunPlan, Work
from mlc_ray.plan.seconds import REPEATED, flops, gathering, seconds
from mlc_ray.plan.shapes import Shape

SETTINGS = (
    "engine.stage", "engine.offload_optimizer", "engine.offload_parameters", "engine.secondary_partition",
    "model.gradient_checkpointing", "model.lora", "train.batch_bundles",
)  # fmt: skip


class PlanError(MlcRayError):
    """What is asked for cannot be planned, or cannot fit; the message names the part that breaks and what would fit."""


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
        PlanError: Its engine is not DeepSpeed.
    """
    if not plannable(config):
        raise PlanError(f"engine.name={config.engine.name!r}: only DeepSpeed's memory is known; set cluster.plan: off")
    device: Device = "cpu" if cluster.gpu is None else "gpu"
    held = holding_of(config, shape, workers=workers, dtype=dtype, device=device)
    limit = cluster.gpu.memory if cluster.gpu is not None else (cluster.node_memory or 0) // max(1, cluster.per_node)
    budget = _budget(config, shape, held, weights, limit, rates.kept)
    cutting = cut(config, weights, tokens_per_forward=budget, workers=workers)
    per_node, nodes = min(workers, cluster.per_node), cluster.nodes_of(workers)
    steps = steps_of(config, weights)
    disk, checkpoint = disk_parts(config, held, steps=steps, lora=config.model.lora is not None)
    worker = list(peak(config, shape, held, cutting.largest, forwards=cutting.forwards, kept_share=rates.kept))
    node = node_parts(config, held, per_node=per_node, memory=cluster.node_memory)
    if device == "cpu":
        node = (*node, Part("workers", per_node * sum(part.bytes for part in worker), f"{per_node} workers, as above"))
    memory = Memory(tuple(worker), node, disk, limit or 2**62, cluster.node_memory)
    step, useful = seconds(config, shape, held, cutting, rates=rates, cluster=cluster)
    reference = 0.0
    if config.needs_reference and config.reference == "cached":
        reference = _reference_seconds(shape, weights, rates, held, cluster, budget=budget)
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
            cutting.tokens, cutting.forwards, cutting.largest.tokens, cutting.largest.head, useful,
            REPEATED[config.model.gradient_checkpointing],
        ),
        seconds=step,
        steps=steps,
        reference_seconds=reference,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=blocking(12 * held.trained / 1e9, (checkpoint - 12 * held.trained) / 1e9, nodes=nodes),
        checkpoints=-(-steps // config.checkpoint.every) if config.checkpoint.every else 1,
        assumed=_assumed(rates, cluster, shape, workers),
        data=weights.said,
    )  # fmt: skip


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


def _reference_seconds(
    shape: Shape, weights: Weights, rates: Rates, held: Holding, cluster: Cluster, *, budget: int
) -> float:
    """A forward of each answer behind its prompt: a third of a forward and backward.

    At ZeRO-3 the next block's parameters are gathered meanwhile, so that the longer of both counts.
    """
    lengths = weights.lengths
    tokens = float((lengths.answered + lengths.chosen + lengths.rejected).mean()) * len(weights)
    rows = float((lengths.chosen + lengths.rejected).mean()) * len(weights)
    row = Row(round(tokens), round(tokens), 0, round(rows), 0)
    computing = flops(shape, row, trained=1.0, head_trained=True, pairs=0) / 3 / rates.flops / held.workers
    forwards = -(-tokens // (budget * held.workers))
    return max(computing, forwards * gathering(held, rates, cluster))


def _read(config: TrainConfig, name: str) -> object:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _assumed(rates: Rates, cluster: Cluster, shape: Shape, workers: int) -> tuple[str, ...]:
    said = []
    if rates.measured is None:
        said.append(
            f"{rates.flops / 1e12:.3g}e12 useful operations a second and worker ({rates.device}, not calibrated: "
            "mlc-ray plan --calibrate on such a machine)"
        )
    if cluster.gpu is not None and cluster.nodes_of(workers) > 1 and rates.exchange is None:
        said.append(f"{cluster.network / 1e9:.0f} GB/s between nodes for each GPU")
    if cluster.gpu is not None:
        said.append(f"{CUDA_CONTEXT / 2**30:.1f} GiB of each GPU for CUDA, cuBLAS and NCCL")
    if cluster.node_memory is None:
        said.append("each node's memory holds what lies in it: how much it has is not known (--node-memory GIB)")
    if not shape.counted:
        said.append("parameters by arithmetic, not counted from modules")
    return tuple(said)
