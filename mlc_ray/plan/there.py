"""The cluster that is there, as a plan sees it: by what Ray says of its nodes, and they of their memory and GPUs.

Ray is imported on demand: a simulated run needs none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from mlc_ray.capacity import NO_LABELS, Labels, Need
from mlc_ray.config import ClusterSection, EngineSection
from mlc_ray.device import VisibleGpu, host_memory, visible_gpus
from mlc_ray.monitoring import ray_is_up
from mlc_ray.plan.hardware import Cluster, Gpu, HardwareError, this_machine
from mlc_ray.plan.rates import PlanCalibrationError, gpu_here, read_calibrations

logger = logging.getLogger(__name__)

T = TypeVar("T")


def cluster_here(address: str = "auto", *, accelerator: str = "auto", labels: Labels = NO_LABELS) -> Cluster:
    """The one that a command with these settings would join, or this machine.

    Raises:
        ClusterError: The cluster at an address does not answer, or has no GPU where one is asked for.
        HardwareError: A GPU is neither in the table nor calibrated, or one is asked for and this machine has none.
    """
    from mlc_ray.cluster import connect, running, use_gpu

    if (running() if address == "auto" else address) not in (None, "local"):
        connect(address)
        return cluster_there(gpu=use_gpu(accelerator), labels=labels)
    gpus = [] if accelerator == "cpu" else visible_gpus()
    if not gpus:
        if accelerator == "gpu":
            raise HardwareError("accelerator='gpu', but this machine has no GPU: name a cluster (--gpus N --gpu NAME)")
        return this_machine()
    return Cluster(_least(gpus), len(gpus), len(gpus), host_memory().total)


def cluster_there(*, gpu: bool, labels: Labels = NO_LABELS) -> Cluster:
    """Of the nodes that Ray has, with these labels.

    Each node counts as much memory as the one that has the least, and each GPU as the one that has the least.

    Raises:
        HardwareError: No node with GPUs has the labels, or a GPU is neither in the table nor calibrated.
        PlanCalibrationError: The file of calibrations is damaged.
    """
    from mlc_ray.cluster import nodes_that_compute

    nodes = nodes_that_compute(gpu=gpu, labels=labels)
    ids = tuple(node["NodeID"] for node in nodes)
    if not gpu:
        return Cluster(None, max(1, len(nodes)), 1, _least_memory(ids))
    # Ray's accelerator types keep A100 of "A100-SXM4-40GB", and H100 of "H100 PCIe". Tasks are asked: this process
    # would hold some of a GPU's memory from then on.
    seen = {node: each for node, each in _said_by(ids, visible_gpus, "which GPUs it has").items() if each}
    gpus = [int(node["Resources"]["GPU"]) for node in nodes if node["NodeID"] in seen]
    if not gpus:
        named = f" that has the labels {dict(labels)}" if labels else ""
        raise HardwareError(f"no node with GPUs{named} is up, or none said which they are: name them (--gpus N)")
    kinds = {gpu for each in seen.values() for gpu in each}
    return Cluster(_least(kinds), sum(gpus), max(1, min(gpus)), _least_memory(tuple(seen)))


def _least(gpus: Iterable[VisibleGpu]) -> Gpu:
    calibrations = read_calibrations()
    return min((gpu_here(each.name, each.memory, calibrations) for each in gpus), key=lambda each: each.memory)


def known_cluster(*, gpu: bool, labels: Labels = NO_LABELS) -> Cluster | None:
    """The same; None where its GPUs are not known, or the file of calibrations is damaged, which is logged."""
    try:
        return cluster_there(gpu=gpu, labels=labels)
    except HardwareError as error:
        logger.info("memory is not planned: %s", error)
    except PlanCalibrationError as error:  # what is only looked at beforehand stops nothing
        logger.warning("memory is not planned: %s", error)
    return None


def engines_there(engine: EngineSection) -> int:
    """Engines of a score on CPUs: as many as are asked for, or by `auto` as the nodes that are there hold."""
    from mlc_ray.cluster import how_many_fit

    if engine.replicas != "auto":
        return engine.replicas
    return how_many_fit(Need(engine.cpus_per_replica, 0.0, engine.label_selector))


def most_on_cpus(section: ClusterSection) -> int:
    """The most workers that a run on CPUs has at once: as its settings say, or of an elastic one as many as have room.

    That is on the nodes of the cluster that was joined, else on this machine.
    """
    from mlc_ray.cluster import how_many_fit

    if section.least_workers == section.most_workers:
        return section.least_workers
    if ray_is_up():
        room = how_many_fit(Need(section.cpus_per_worker, 0.0, section.label_selector))
    else:
        room = int(len(os.sched_getaffinity(0)) / section.cpus_per_worker)
    return min(section.most_workers, max(section.least_workers, room))


def grows() -> bool:
    """Whether an autoscaler may add nodes, whose memory nobody knows."""
    from mlc_ray.cluster import may_grow

    growth = may_grow()
    return bool(growth.kinds) or not growth.known


def _least_memory(nodes: Sequence[str]) -> int | None:
    """The least that one of these nodes (ids) has, each asked by a task; None where that is known of none.

    The driver may be on a small head. What Ray counts as a node's `memory` is what was free when it started, without
    its object store, or what its starter said.
    """
    from mlc_ray.cluster import this_node

    here = this_node()
    found = [host_memory().total] if here in nodes else []
    answers = _said_by([node for node in nodes if node != here], host_memory, "how much memory it has")
    return min([*found, *(each.total for each in answers.values())], default=None)


_known: dict[tuple[str, str], Any] = {}
"""What nodes said, by the function that was asked and the node: asked once, but for a node that did not answer."""


def _said_by(nodes: Sequence[str], function: Callable[[], T], what: str) -> dict[str, T]:
    """What `function` returns on each of these nodes, without those that do not answer, of which a warning is given."""
    from mlc_ray.cluster import ClusterError, ask_nodes

    asked = [node for node in nodes if (function.__name__, node) not in _known]
    for node, answer in ask_nodes(function, nodes=asked).items():
        if isinstance(answer, ClusterError):
            logger.warning("node %s did not say %s, and is not planned with (%s)", node[:8], what, answer)
        else:
            _known[function.__name__, node] = answer
    found = {node: _known.get((function.__name__, node)) for node in nodes}
    return {node: answer for node, answer in found.items() if answer is not None}
