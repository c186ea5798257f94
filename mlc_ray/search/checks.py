"""What a search is asked before it starts: whether the cluster can hold it; and what is decided of its settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mlc_ray.capacity import Need, amount, workers_needed
from mlc_ray.cluster import ClusterError, connect, could_fit, nodes_held, nodes_there, use_gpu, with_dtype
from mlc_ray.config import ConfigError, SearchConfig, TrainConfig, resolve_layer
from mlc_ray.generate.engine import Device
from mlc_ray.nodes import check_nodes
from mlc_ray.plan.check import check_run
from mlc_ray.plan.check_engines import check_beside, check_engine
from mlc_ray.plan.hardware import Cluster
from mlc_ray.plan.lengths import Weights
from mlc_ray.runs import output_place
from mlc_ray.score.plan import places, with_dtypes, with_longest_answer
from mlc_ray.search.space import Space
from mlc_ray.search.tune import number_of_points, seeds_of
from mlc_ray.train.model import check_device, model_depth
from mlc_ray.train.run import paths_read

TRIAL_CPUS = 0.1  # the process of a trial only waits for its workers


def as_it_runs(config: SearchConfig, space: Space) -> SearchConfig:
    """A search with the conversation of its runs, and the length of answers decided.

    Raises:
        ConfigError: `scoring.chat` is another conversation.
    """
    config = _with_chat(config, space)
    return config.model_copy(update={"scoring": with_longest_answer(config.scoring)})


def _with_chat(config: SearchConfig, space: Space) -> SearchConfig:
    """Trials are scored in the conversation that they train in.

    Raises:
        ConfigError: `scoring.chat` is another one.
    """
    chat, asked = base_of(space).chat, config.scoring.chat
    if asked is not None and asked != chat:
        raise ConfigError(
            f"scoring.chat={asked!r}, but the runs train with chat={chat!r}; give chat in the file of the runs, or by "
            "set, alone"
        )
    if config.scoring.asking.reasoning == "forbid":
        raise ConfigError(
            "scoring.asking.reasoning='forbid' would score trials in another conversation than they train in; turn "
            "thoughts off in the chat of the runs, e.g. set: [chat.arguments={enable_thinking: false}]"
        )
    return config.model_copy(update={"scoring": config.scoring.model_copy(update={"chat": chat})})


def check_search(config: SearchConfig, space: Space) -> None:
    """Join the cluster, and raise if it can never hold the search, or the model lacks a layer of it."""
    base = base_of(space)
    lora_rank_of(space)
    if twice := sorted(set(config.confirm.seeds) & set(seeds_of(config, space))):
        raise ConfigError(f"confirm.seeds={config.confirm.seeds}: trials are trained with seed {twice[0]} themselves")
    depth = model_depth(base.model.path, trust_remote_code=base.model.trust_remote_code)
    for corner in space.corners():
        resolve_layer(space.run(corner, name="corner").mlc.layer, depth)
    connect(base.cluster.address, base.cluster.env)
    check_device(base.model, gpu=device_of(base) == "gpu")
    check_feasible(config, base, device_of(base))
    if base.cluster.plan == "check":
        check_plan(*with_dtypes_decided(config, space), gpu=device_of(base) == "gpu")
    check_nodes(output_place(config.output_dir), paths_read(base))


def check_plan(
    config: SearchConfig, space: Space, *, gpu: bool, cluster: Cluster | None = None, weights: Weights | None = None
) -> None:
    """Refuse a search whose trials, or engines, cannot fit the cluster that is there (or another one).

    Args:
        config: the search, types decided.
        space: of its trials.
        gpu: whether they have GPUs.
        cluster: what it runs on (default: the cluster that is there).
        weights: what the data of its first corner weighs, if that is known.

    Raises:
        PlanError: They cannot; the message names what lacks and what would fit.
    """
    runs = [space.run(corner, name="corner") for corner in space.corners()]
    for run in runs:  # a stage or a budget may be part of the space
        check_run(run, gpu=gpu, cluster=cluster, weights=weights if run.data == runs[0].data else None)
    check_engine(runs[0].model.path, config.scoring, gpu=gpu, cluster=cluster)
    if not gpu:
        at_once = min(config.concurrency, number_of_points(config, space) * config.repeats)
        check_beside(config.scoring, runs, at_once=at_once, cluster=cluster)


def check_feasible(config: SearchConfig, base: TrainConfig, device: Device) -> None:
    """Refuse a search that the cluster can never hold, since Ray would wait for it without end.

    Placed, largest first: the engines, what reads their responses, and for each concurrent trial its own process and
    its workers; a little is left for Ray Data.

    Raises:
        ClusterError: The trials asked for do not fit beside the engines, or have no fixed number of workers; or they
            are to share a GPU with the engine, and there are several.
    """
    gpu = device == "gpu"
    if config.share_gpu and not gpu:
        raise ClusterError("share_gpu=True, but this search runs on CPU, where engines cannot sleep; remove it")
    if config.share_gpu and [node.size[1] for node in nodes_there()] != [1.0]:
        # Ray Train makes a placement group of its own for each trial and joins none that is there, while the engine
        # lives from the first trial to the last: no group can hold both.
        raise ClusterError(
            f"share_gpu=True, but {nodes_held()}: the engine and the trials meet for certain only where there is one "
            "node with one GPU, since Ray Train places each trial anew; give the engine a GPU of its own "
            "(share_gpu: false), or start Ray on one GPU (ray start --head --num-gpus=1)"
        )
    if not isinstance(base.cluster.workers, int):
        raise ClusterError(
            f"cluster.workers={list(base.cluster.workers)}: a trial of a search keeps its number of workers, "
            "since other trials would take what it gives up; set one number"
        )
    engines = places(config.scoring, device, in_turn=config.share_gpu)
    workers = workers_needed(base.cluster, gpu=gpu)
    trials = [Need(TRIAL_CPUS, 0), *workers] * config.concurrency
    if not could_fit([*engines, *trials]):
        raise ClusterError(
            f"concurrency={config.concurrency} trials of {amount(trials[: len(workers) + 1])} (its own process, and "
            f"cluster.workers x cluster.cpus_per_worker) beside engines of {amount(engines)}, and some CPU for Ray "
            f"Data, are more than the nodes can hold; {nodes_held()}: ask for less, add nodes, or where there is one "
            "GPU let the engine sleep beside training (share_gpu: true)"
        )


def lora_rank_of(space: Space) -> int | None:
    """The largest rank of adapters in the space, None for whole models.

    Raises:
        ConfigError: The space has both.
    """
    loras = [space.run(corner, name="corner").model.lora for corner in space.corners()]
    if any(lora is None for lora in loras) and any(lora is not None for lora in loras):
        raise ConfigError("the space has runs with LoRA adapters and runs without; search them apart")
    ranks = [lora.rank for lora in loras if lora is not None]
    return max(ranks) if ranks else None


def with_dtypes_decided(config: SearchConfig, space: Space) -> tuple[SearchConfig, Space]:
    """What trials and engines compute in is decided once, and written down: a resumed search keeps it."""
    base = base_of(space)
    gpu = device_of(base) == "gpu"
    scoring = with_dtypes(config.scoring, gpu=gpu)
    labels = base.cluster.label_selector
    model = {**space.base["model"], "dtype": with_dtype(base.model, gpu=gpu, labels=labels).dtype}
    return config.model_copy(update={"scoring": scoring}), replace(space, base={**space.base, "model": model})


def base_of(space: Space, **own: Any) -> TrainConfig:
    """A run of a search, at the first corner of its space; `own` are further settings of it."""
    return space.run(next(iter(space.corners())), name="base", **own)


def device_of(base: TrainConfig) -> Device:
    """What its workers compute on, in the cluster that is joined."""
    return "gpu" if use_gpu(base.cluster.accelerator) else "cpu"
