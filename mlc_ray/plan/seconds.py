"""Time of an optimizer step: useful operations, what travels between workers, and AdamW."""

from __future__ import annotations

from mlc_ray.config import TrainConfig
from mlc_ray.plan.activations import Row
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import Cut
from mlc_ray.plan.memory import Holding
from mlc_ray.plan.rates import READS, Rates
from mlc_ray.plan.records import Seconds
from mlc_ray.plan.shapes import Shape

REPEATED = {False: 0.0, "selective": 0.1, True: 0.21}
"""What checkpointing adds to the time of forward and backward: measured on a CPU (docs/step.md)."""

OFFLOADED_ADAMW = 1e9
"""Parameters a second that AdamW steps on the CPUs of a node, assumed (30M took 0.028 s on two threads)."""

BACKWARD = 2 / 3
"""Of forward and backward, behind which gradients and parameters can travel."""


def flops(shape: Shape, row: Row, *, trained: float, head_trained: bool, pairs: int) -> float:
    """Useful operations of a forward and backward, as `mlc_ray.train.flops.Work` counts them.

    Args:
        shape: the model.
        row: of the forward.
        trained: the share of the blocks' matrices that is trained.
        head_trained: whether the head is.
        pairs: of a token and what it attends to.
    """
    return (
        (4 + 2 * trained) * shape.layers * shape.matrices * row.tokens
        + (4 + 2 * head_trained) * shape.embedding * row.head
        + 12 * shape.layers * shape.attention * pairs
    )


def traffic(held: Holding, forwards: float) -> tuple[float, float]:
    """Bytes that one worker sends in a step: within groups of all workers, and within those of a secondary partition.

    Rings: a reduction or a gather of b bytes sends (W - 1) / W b, a reduction that leaves the whole to all twice that.
    Gradients travel in `engine.reduce_dtype`. At stage 2 each forward's are reduced, and weights are gathered once a
    step; at stage 3 each forward gathers all parameters for itself and again for its backward, and a checkpointed block
    that keeps none of them once more.
    """
    ring = (held.workers - 1) / held.workers
    gradient = held.reduced * held.trained * ring
    if held.stage == 0:
        return 2 * gradient, 0.0
    if held.stage == 1:
        return gradient + held.size * held.trained * ring, 0.0
    if held.stage == 2:
        return forwards * gradient + held.size * held.trained * ring, 0.0
    gather = held.size * held.whole
    if held.secondary > 1:
        return forwards * (gradient + (gather + held.size * held.again) * ring), forwards * gather * (
            held.secondary - 1
        ) / held.secondary
    return forwards * (gradient + held.size * gathered_elements(held) * ring), 0.0


def gathered_elements(held: Holding) -> int:
    """Elements that a forward and its backward gather at stage 3, of all workers' parts; `tests/train/test_zero3.py`
    counts those of DeepSpeed."""
    return 2 * held.whole + held.again


def seconds(
    config: TrainConfig, shape: Shape, held: Holding, cut: Cut, *, rates: Rates, cluster: Cluster
) -> tuple[Seconds, float]:
    """Of a step, and the useful operations of all workers in it."""
    lora = config.model.lora
    rates = rates.training(lora=lora is not None).among(min(held.workers, cluster.per_node))
    whole, pairs = lora is None, attended(cut.mean)
    of_row = flops(shape, cut.mean, trained=float(whole), head_trained=whole, pairs=pairs)
    if lora is not None:  # forward, back to the input and to the weight
        of_row += 6 * shape.adapters(lora.rank, lora.target_modules) * cut.mean.tokens
    worker = of_row * cut.forwards
    again = 1 + REPEATED[config.model.gradient_checkpointing]
    online = 1.0
    if held.reference or (config.needs_reference and config.reference == "online"):
        online += 1 / 3  # a forward beside a forward and a backward of twice that
    overhead = cut.forwards * shape.layers * rates.forward_seconds * again * online
    if cluster.gpu is not None:  # weights are read from memory, however few tokens there are
        overhead += cut.forwards * READS * held.size * shape.parameters / cluster.gpu.bandwidth
    compute = worker / rates.flops * again * online
    share = held.trained / (held.workers if held.stage else 1)
    adamw = share / (OFFLOADED_ADAMW if held.offload_optimizer and cluster.gpu is not None else rates.adamw)
    return Seconds(compute, _exposed(held, cut, compute, rates, cluster), adamw, overhead), of_row * cut.working


def gathering(held: Holding, rates: Rates, cluster: Cluster) -> float:
    """Seconds in which a forward's parameters are gathered at ZeRO-3; none where each worker has them."""
    if held.stage < 3 or held.workers == 1:
        return 0.0
    sent = held.size * held.whole * (held.workers - 1) / held.workers
    return sent / (rates.exchange or 1e9 if cluster.gpu is None else _between(held.workers, rates, cluster))


def _between(workers: int, rates: Rates, cluster: Cluster) -> float:
    """Bytes a second that each of so many workers on GPUs sends: the network's, where they are not on one node."""
    assert cluster.gpu is not None
    link = cluster.gpu.link
    return min(rates.exchange or (cluster.network if cluster.nodes_of(workers) > 1 else link), link)


def attended(row: Row) -> int:
    """Pairs that attend: of what kernels compare, half of a segment's own are masked."""
    own = row.tokens**2 / max(1, row.tapped + 2) / 2  # segments of like length
    return max(0, round(row.pairs - min(own, row.pairs / 2)))


def _exposed(held: Holding, cut: Cut, compute: float, rates: Rates, cluster: Cluster) -> float:
    """What of the traffic is not hidden behind the backward; on CPUs, where it takes the same cores, all of it."""
    if held.workers == 1:
        return 0.0
    everyone, group = traffic(held, cut.forwards)
    if cluster.gpu is None:
        return (everyone + group) / (rates.exchange or 1e9)
    seconds = everyone / _between(held.workers, rates, cluster) + group / cluster.gpu.link
    hidden = BACKWARD * compute if held.stage >= 2 else 0.0
    return max(0.0, seconds - hidden)
