"""What `train`, `score` and `search` ask before they start: whether it can fit at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

from mlc_ray.config import EngineSection, ScoringSection, TrainConfig
from mlc_ray.plan.hardware import Cluster, with_workers
from mlc_ray.plan.lengths import Weights, assumed, least
from mlc_ray.plan.nearest import fitting, nearest
from mlc_ray.plan.rates import rates_of, threads_of
from mlc_ray.plan.records import GIB, Memory, RunPlan
from mlc_ray.plan.runs import PlanError, plan_run, plannable
from mlc_ray.plan.scores import EnginePlan, plan_engine
from mlc_ray.plan.shapes import KINDS, Shape, ShapeError, config_of, counted, shape_of
from mlc_ray.plan.there import cluster_there, engines_there, grows

logger = logging.getLogger(__name__)


def check_run(
    config: TrainConfig, *, gpu: bool, weights: Weights | None = None, cluster: Cluster | None = None
) -> None:
    """Refuse a run that cannot fit; what is not known is not refused.

    Args:
        config: the run, its model's type decided.
        gpu: whether its workers have GPUs.
        weights: what its data weighs, once that is known; before, next to nothing is taken for it.
        cluster: what it runs on (default: the cluster that is there).

    Raises:
        PlanError: It cannot fit; the message names the part that breaks it and the nearest settings that fit.
    """
    if config.cluster.plan == "off" or not plannable(config):
        return
    labels = config.cluster.label_selector
    cluster = cluster_there(gpu=gpu, labels=labels) if cluster is None else cluster
    if cluster is None:
        logger.info("memory is not planned: the GPUs of this cluster are not in the table (mlc_ray/plan/hardware.py)")
        return
    workers = config.cluster.least_workers
    cluster = with_workers(cluster, workers)
    shape = known_shape(config.model.path, trust_remote_code=config.model.trust_remote_code)
    if shape is None:
        return
    dtype = "float32" if config.model.dtype == "float32" else "bfloat16"
    rates = rates_of(cluster.gpu, dtype, threads=threads_of(config))
    plan = plan_run(
        config, shape, cluster, least() if weights is None else weights, rates, dtype=dtype, workers=workers
    )
    if plan.memory.fits:
        return
    weights = assumed(config) if weights is None else weights
    found = nearest(fitting(config, shape, cluster, weights, rates, dtype=dtype, workers=workers))
    fix = f"the nearest that fits: {found}" if found is not None else "nothing that was tried fits: use more workers"
    raise PlanError(
        f"{said(plan)}; {fix} (`mlc-ray plan --config ...` has all numbers; cluster.plan: off tries anyway)"
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


def check_engine(model: str, scoring: ScoringSection, *, gpu: bool, cluster: Cluster | None = None) -> None:
    """Refuse a score whose engines cannot hold the model; on CPUs also where those of one node cannot hold it together.

    Engines of judges and translators are not looked at: how many are up at once beside these is not known.

    Raises:
        PlanError: They cannot, the message names the part and the nearest settings that fit; or its heads cannot be
            split over the GPUs of an engine.
    """
    engine, given = scoring.engine, cluster
    cluster = cluster_there(gpu=gpu, labels=engine.label_selector) if given is None else given
    if cluster is None:
        return
    try:
        shape = known_shape(model, trust_remote_code=engine.trust_remote_code)
    except ShapeError:  # an adapter has no config of its own
        return
    if shape is None:
        return
    plan = plan_engine(shape, engine, cluster)
    if cluster.gpu is None:
        _check_engines_of_a_node(shape, engine, plan, cluster, there=given is None)
        return
    if plan.fits:
        return
    for parallel in (2, 4, 8):
        changed = engine.model_copy(update={"tensor_parallel": parallel})
        possible = engine.tensor_parallel < parallel <= cluster.per_node and not shape.heads % parallel
        if possible and plan_engine(shape, changed, cluster).fits:
            fix = f"the nearest that fits: engine.tensor_parallel={parallel}"
            break
    else:
        fix = "GPUs with more memory, or a smaller model"
    raise PlanError(
        f"an engine for {shape.name} needs {plan.bytes / GIB:.1f} GiB, of which weights {plan.weights / GIB:.1f}, but "
        f"may have {plan.limit / GIB:.1f} (engine.tensor_parallel={engine.tensor_parallel}, "
        f"engine.gpu_memory_utilization={engine.gpu_memory_utilization}); {fix}"
    )


def _check_engines_of_a_node(
    shape: Shape, engine: EngineSection, plan: EnginePlan, cluster: Cluster, *, there: bool
) -> None:
    """Refuse what the engines that some node gets, spread evenly, cannot hold; `there` is a cluster that can be asked.

    Raises:
        PlanError: They need more memory than it has.
    """
    nodes = cluster.nodes
    if there:
        engines = nodes if grows() else engines_there(engine)
    else:
        engines = nodes if engine.replicas == "auto" else engine.replicas
    number = -(-engines // nodes)
    if number * plan.bytes <= plan.limit:
        return
    fix = f"lower engine.cpu_kv_cache_gib={engine.cpu_kv_cache_gib}, or take a smaller model"
    if (room := plan.limit // plan.bytes) > 0:
        fix = f"the nearest that fits: engine.replicas={room * nodes}"
    raise PlanError(
        f"{'an engine' if number == 1 else f'{number} engines on a node'} for {shape.name} need"
        f"{'s' if number == 1 else ''} {number * plan.bytes / GIB:.1f} GiB, of which weights "
        f"{number * plan.weights / GIB:.1f}, but {'this machine' if nodes == 1 else 'a node'} has "
        f"{plan.limit / GIB:.1f}; {fix}"
    )


def check_beside(
    scoring: ScoringSection, runs: Sequence[TrainConfig], *, at_once: int, cluster: Cluster | None = None
) -> None:
    """Refuse a search on CPUs whose trials and engines need more memory together than all nodes have.

    Engines that are placed by other labels than the trials are left out.

    Args:
        scoring: of the search, types and number of engines decided.
        runs: the trials that its space can have, types decided; the one that needs least counts.
        at_once: trials that train at a time.
        cluster: what it runs on (default: the cluster that is there, which is not looked at where it may grow).

    Raises:
        PlanError: They do; the message says how many trials would fit.
    """
    run, given = runs[0], cluster
    cluster = cluster_there(gpu=False, labels=run.cluster.label_selector) if given is None else given
    if cluster is None or cluster.node_memory is None or not plannable(run) or (given is None and grows()):
        return
    shape = known_shape(run.model.path, trust_remote_code=run.model.trust_remote_code)
    if shape is None:
        return
    there = cluster.nodes * cluster.node_memory
    engine, replicas = scoring.engine, scoring.engine.replicas
    apart = engine.label_selector != run.cluster.label_selector  # they may lie on other nodes than the trials
    number = 0 if apart else 1 if replicas == "auto" else replicas
    engines = number * plan_engine(shape, engine, cluster).bytes
    trial = min(_needed(each, shape, cluster) for each in runs)
    if engines + at_once * trial <= there:
        return
    room = max(0, there - engines) // trial
    fix = f"the nearest that fits: concurrency={room}" if room else "use nodes with more memory, or a smaller model"
    raise PlanError(
        f"concurrency={at_once} trials of {shape.name} need {at_once * trial / GIB:.1f} GiB, and the engines beside "
        f"them {engines / GIB:.1f}, but all nodes together have {there / GIB:.1f}; {fix}"
    )


def _needed(run: TrainConfig, shape: Shape, cluster: Cluster) -> int:
    """Bytes of all workers of a trial with next to no data; without the copy of a checkpoint that `auto` leaves out."""
    dtype, workers = "float32" if run.model.dtype == "float32" else "bfloat16", run.cluster.least_workers
    alone = Cluster(None, workers, workers, cluster.node_memory)
    node = plan_run(run, shape, alone, least(), rates_of(None, dtype), dtype=dtype, workers=workers).memory.node
    return sum(part.bytes for part in node if part.name != "checkpoint copy" or run.checkpoint.background is True)


@cache
def known_shape(path: str, *, trust_remote_code: bool) -> Shape | None:
    """The model's shape; of a kind that the arithmetic does not know counted, and None where that fails.

    Raises:
        ShapeError: There is no config.
    """
    config, name = config_of(path, trust_remote_code=trust_remote_code)
    try:
        shape = shape_of(config, name)
        return shape if shape.kind in KINDS else counted(shape, config)
    except Exception as error:  # code of a model of any kind: the command itself will say what is wrong, if it is
        logger.info("memory is not planned: the shape of %s is not known (%s)", path, error)
        return None
