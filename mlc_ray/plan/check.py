"""What `train` and `search` ask before they start: whether a run can fit at all."""

from __future__ import annotations

import logging

from mlc_ray.config import TrainConfig
from mlc_ray.plan.hardware import Cluster, with_workers
from mlc_ray.plan.lengths import Weights, assumed, least
from mlc_ray.plan.nearest import fitting, nearest
from mlc_ray.plan.rates import rates_of, threads_of
from mlc_ray.plan.records import GIB, Memory, RunPlan
from mlc_ray.plan.runs import PlanError, plan_run, plannable
from mlc_ray.plan.shapes import Shape, known_shape
from mlc_ray.plan.there import grows, known_cluster, most_on_cpus

logger = logging.getLogger(__name__)


def check_run(
    config: TrainConfig, *, gpu: bool, weights: Weights | None = None, cluster: Cluster | None = None
) -> None:
    """Refuse a run that cannot fit; what is not known is not refused.

    Args:
        config: the run, its model's type decided.
        gpu: whether its workers have GPUs.
        weights: what its data weighs, once that is known; before, next to nothing is taken for it.
        cluster: what it runs on (default: the cluster that was joined).

    Raises:
        PlanError: It cannot fit; the message names the part that breaks it and the nearest settings that fit.
    """
    if config.cluster.plan == "skip" or not plannable(config):
        return
    given, labels = cluster, config.cluster.label_selector
    cluster = known_cluster(gpu=gpu, labels=labels) if given is None else given
    if cluster is None:
        return
    shape = known_shape(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if shape is None:
        return
    few = many = config.cluster.least_workers
    if not gpu and not (given is None and grows()):  # more GPUs hold more; more workers on the same CPUs share memory
        many = most_on_cpus(config.cluster)
    for workers in sorted({few, many}):
        _check(config, shape, with_workers(cluster, workers), weights, workers=workers)


def _check(config: TrainConfig, shape: Shape, cluster: Cluster, weights: Weights | None, *, workers: int) -> None:
    dtype = "float32" if config.model.dtype == "float32" else "bfloat16"
    rates = rates_of(cluster.gpu, dtype, threads=threads_of(config))
    plan = plan_run(
        config, shape, cluster, least() if weights is None else weights, rates, dtype=dtype, workers=workers
    )
    if plan.memory.fits:
        return
    weights = assumed(config) if weights is None else weights
    found = nearest(fitting(config, shape, cluster, weights, rates, dtype=dtype, workers=workers))
    more = "use more workers" if cluster.gpu is not None else "use nodes with more memory, or fewer workers on each"
    fix = f"the nearest that fits: {found}" if found is not None else f"nothing that was tried fits: {more}"
    raise PlanError(
        f"{said(plan)}; {fix} (`mlc-ray plan --config ...` has all numbers; cluster.plan=skip tries anyway)"
    )


def said(plan: RunPlan) -> str:
    """What does not fit, and the part that breaks it."""
    part, where, needs, limit = broken(plan.memory)
    return (
        f"{plan.model} with engine.stage={plan.settings['engine.stage']} on {plan.workers} x {plan.gpu} needs "
        f"{needs / GIB:.1f} GiB of {where}, which has {limit / GIB:.1f}; the largest part is {part}"
    )


def broken(memory: Memory) -> tuple[str, str, int, int]:
    """The largest part of the place that is too small, that place, what it needs and what it has."""
    part = memory.breaks
    assert part is not None
    named = f"{part.name}, {part.bytes / GIB:.1f} GiB ({part.formula})"
    if memory.worker_bytes > memory.worker_limit:
        return named, "each worker's memory", memory.worker_bytes, memory.worker_limit
    return named, "each node's memory", memory.node_bytes, memory.node_limit or 0
