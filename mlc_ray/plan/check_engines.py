"""What `score` and `search` ask before they start, and `plan` too: whether engines, and trials beside them, fit."""

from __future__ import annotations

from collections.abc import Sequence

from mlc_ray.config import ScoringSection, TrainConfig
from mlc_ray.judges.panel import Reader
from mlc_ray.plan.engines import EnginePlan, Engines, plan_engine, readers_of, room_of
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import least
from mlc_ray.plan.memory import RAY
from mlc_ray.plan.rates import rates_of, threads_of
from mlc_ray.plan.records import GIB
from mlc_ray.plan.runs import PlanError, dtype_of, plan_run, plannable
from mlc_ray.plan.shapes import Shape, known_shape
from mlc_ray.plan.there import engines_there, grows, known_cluster

TRIAL = 2**29
"""Measured: what Ray Tune has for a trial beside its run."""


def check_engine(
    model: str,
    scoring: ScoringSection,
    *,
    gpu: bool,
    cluster: Cluster | None = None,
    readers: Sequence[Reader] | None = None,
) -> None:
    """Refuse a score whose engines cannot hold their models: that which answers, and judges, guards and translators.

    On CPUs also where the engines of one part that lie on a node cannot hold theirs together.

    Args:
        model: that answers.
        scoring: the settings.
        gpu: whether engines run on GPUs.
        cluster: what they run on (default: the cluster that is there).
        readers: who reads responses, once that is known (default: whoever may).

    Raises:
        PlanError: They cannot, the message names the part and the nearest settings that fit; a model's heads cannot be
            split over the GPUs of an engine; or a node has fewer of these, or `cluster` holds fewer engines.
    """
    for each in [Engines("", model, scoring.engine), *readers_of(scoring.judge, readers)]:
        _check(each, gpu=gpu, given=cluster)


def check_readers(scoring: ScoringSection, readers: Sequence[Reader], *, gpu: bool) -> None:
    """The same for what reads responses that are there already."""
    for each in readers_of(scoring.judge, readers):
        _check(each, gpu=gpu, given=None)


def _check(engines: Engines, *, gpu: bool, given: Cluster | None) -> None:
    engine, where = engines.engine, f"{engines.where}engine"
    cluster = known_cluster(gpu=gpu, labels=engine.label_selector) if given is None else given
    if cluster is None or (shape := engines.shape()) is None:
        return
    plan = plan_engine(shape, engine, cluster, where=engines.where)
    if cluster.gpu is None:
        _check_a_node(shape, engines, plan, cluster, there=given is None)
        return
    room = None if given is None else room_of(engine, cluster, where=engines.where)
    if room is not None and engine.replicas != "auto" and engine.replicas > room:
        raise PlanError(
            f"{where}.replicas={engine.replicas} with {where}.tensor_parallel={engine.tensor_parallel}, but "
            f"{cluster.gpus} GPUs on nodes of {cluster.per_node} hold {room}; lower it, or set auto"
        )
    if plan.fits:
        return
    for parallel in (2, 4, 8):
        changed = engine.model_copy(update={"tensor_parallel": parallel})
        possible = engine.tensor_parallel < parallel <= cluster.per_node and not shape.heads % parallel
        if possible and plan_engine(shape, changed, cluster).fits:
            fix = f"the nearest that fits: {where}.tensor_parallel={parallel}"
            break
    else:
        fix = "GPUs with more memory, or a smaller model"
    raise PlanError(
        f"an engine for {shape.name} needs {plan.bytes / GIB:.1f} GiB, of which weights {plan.weights / GIB:.1f}, but "
        f"may have {plan.limit / GIB:.1f} ({where}.tensor_parallel={engine.tensor_parallel}, "
        f"{where}.gpu_memory_utilization={engine.gpu_memory_utilization}); {fix}"
    )


def _check_a_node(shape: Shape, engines: Engines, plan: EnginePlan, cluster: Cluster, *, there: bool) -> None:
    """Refuse what the engines that some node gets, spread evenly, cannot hold; `there` is a cluster that can be asked.

    Raises:
        PlanError: They need more memory than it has.
    """
    nodes, engine = cluster.nodes, engines.engine
    if there:
        replicas = nodes if grows() else engines_there(engine)
    else:
        replicas = nodes if engine.replicas == "auto" else engine.replicas
    number = -(-replicas // nodes)
    one = number == 1
    if number * plan.bytes <= plan.limit:
        return
    fix = f"lower {engines.where}engine.cpu_kv_cache_gib={engine.cpu_kv_cache_gib}, or take a smaller model"
    if (room := plan.limit // plan.bytes) > 0:
        fix = f"the nearest that fits: {engines.where}engine.replicas={room * nodes}"
    raise PlanError(
        f"{'an engine' if one else f'{number} engines on a node'} for {shape.name} need{'s' if one else ''} "
        f"{number * plan.bytes / GIB:.1f} GiB, of which weights, which are there twice, "
        f"{2 * number * plan.weights / GIB:.1f}, but {'this machine' if nodes == 1 else 'a node'} has "
        f"{plan.limit / GIB:.1f} for {'it' if one else 'them'}; {fix}"
    )


def check_beside(
    scoring: ScoringSection, runs: Sequence[TrainConfig], *, at_once: int, cluster: Cluster | None = None
) -> bool:
    """Refuse a search on CPUs whose trials and engines need more memory together than all nodes have.

    Engines are those of the trials' model and of judges and translators, which are all up at once. Those that are
    placed by other labels than the trials are left out.

    Args:
        scoring: of the search, number of engines decided.
        runs: the trials that its space can have; the one that needs least counts.
        at_once: trials that train at a time.
        cluster: what it runs on (default: the cluster that is there, which is not looked at where it may grow).

    Returns:
        Whether it is known that they do not.

    Raises:
        PlanError: They do; the message says how many trials would fit.
    """
    run, given = runs[0], cluster
    cluster = known_cluster(gpu=False, labels=run.cluster.label_selector) if given is None else given
    if cluster is None or cluster.node_room is None or not plannable(run) or (given is None and grows()):
        return False
    shape = known_shape(run.model.path, trust_remote_code=run.model.trust_remote_code)
    if shape is None:
        return False
    there = cluster.nodes * (cluster.node_room - RAY)
    parts = [(shape, Engines("", run.model.path, scoring.engine))]
    parts += [(found, each) for each in readers_of(scoring.judge) if (found := each.shape()) is not None]
    engines = sum(_held(found, each, run, cluster) for found, each in parts)
    trial = min(_needed(each, shape, cluster) for each in runs)
    if engines + at_once * trial <= there:
        return True
    room = max(0, there - engines) // trial
    fix = f"the nearest that fits: concurrency={room}" if room else "use nodes with more memory, or a smaller model"
    raise PlanError(
        f"concurrency={at_once} trials of {shape.name} need {at_once * trial / GIB:.1f} GiB, and the engines beside "
        f"them {engines / GIB:.1f}, but all nodes together have {there / GIB:.1f} for them; {fix}"
    )


def _held(shape: Shape, engines: Engines, run: TrainConfig, cluster: Cluster) -> int:
    """Bytes of all engines of a part; none of those that may lie on other nodes than the trials."""
    engine = engines.engine
    if engine.label_selector != run.cluster.label_selector:
        return 0
    return (1 if engine.replicas == "auto" else engine.replicas) * plan_engine(shape, engine, cluster).bytes


def _needed(run: TrainConfig, shape: Shape, cluster: Cluster) -> int:
    """Bytes of a trial with next to no data, beside Ray; without the copy of a checkpoint that `auto` leaves out."""
    dtype, workers = dtype_of(run.model.dtype, cluster), run.cluster.least_workers
    alone = Cluster(None, workers, workers, cluster.node_memory)
    rates = rates_of(None, dtype, threads=threads_of(run))
    node = plan_run(run, shape, alone, least(), rates, dtype=dtype, workers=workers).memory.node
    left_out = {"Ray"} if run.checkpoint.background is True else {"Ray", "checkpoint copy"}
    return TRIAL + sum(part.bytes for part in node if part.name not in left_out)
