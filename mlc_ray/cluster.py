"""Joining or starting a Ray cluster, and checking whether its resources suffice for a run."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TextIO, TypeVar, cast

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlc_ray import device, environment
from mlc_ray.capacity import NO_LABELS, Growth, Labels, Node, Part, amount, fit, look, most_that_fit, said_of
from mlc_ray.config import EngineSection, ModelSection
from mlc_ray.config.placement import selects
from mlc_ray.errors import MlcRayError
from mlc_ray.logs import libraries, show_warnings

logger = logging.getLogger(__name__)

# Read by Ray when it is first used in this process; a user's own setting wins. Workers of a Ray that is started here
# inherit them. In a cluster that is joined they have the environment of their nodes; Ray Train sends them RAY_TRAIN_*.
DEFAULTS = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it, every printed line appears twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report waits for the next check; the default is 2 s
    "RAY_TRAIN_COLLECTIVE_WARN_INTERVAL_S": "3600",  # workers wait while one has a checkpoint scored: no fault
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",  # a busy machine needs longer than Ray's default to start a node
}


class ClusterError(MlcRayError):
    """The cluster cannot be reached or cannot hold the run; the message says what is missing and what to set."""


def running() -> str | None:
    """The cluster that `connect("auto")` joins; None where it starts one.

    That is RAY_ADDRESS, which `ray job submit` sets, or else what the file that `ray start` leaves says, unless the Ray
    that it names is gone: one that was killed leaves the file.
    """
    from ray._private.services import find_bootstrap_address

    if named := os.environ.get("RAY_ADDRESS"):
        return None if named == "local" else named
    address: str | None = find_bootstrap_address(None)
    if address is not None and refuses(address):
        logger.info("the Ray at %s that was started on this machine is gone; `ray stop` forgets it", address)
        return None
    return address


def refuses(address: str) -> bool:
    """Whether nothing listens at `address`, HOST:PORT. Ray itself tries for minutes, in silence; other forms: False."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # no route, no name, no answer yet: Ray's to say
        return False
    return False


def connect(address: str, env: Sequence[str] = ()) -> None:
    """Join or start a cluster. Where Ray is already up, nothing is done; variables that its workers lack are warned of.

    Args:
        address: `auto`, `local` or an address.
        env: names of variables, or patterns, that the workers of a cluster which is joined get from the environment of
            this process; those of a cluster that is started have them all.

    Raises:
        ClusterError: no cluster answers, it has other versions, or its job has a setup hook beside `env`.
    """
    if ray.is_initialized():
        environment.warn_of_lacking(env)
        return
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns of bars switched off
    if address == "auto":
        address = running() or "local"
    if refuses(address):
        raise ClusterError(
            f"no Ray cluster answers at address {address!r}: nothing listens there; start one with `ray start --head`, "
            "or set the address to 'local'"
        )
    options: dict[str, Any] = {"log_to_driver": True, "configure_logging": True, "logging_level": "WARNING"}
    if passed := environment.chosen(env, os.environ) if address != "local" else {}:
        options["runtime_env"] = environment.runtime_env()
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        raise ClusterError(
            f"no Ray cluster answers at address {address!r} ({error}); start one with `ray start --head`, or set "
            "the address to 'local'"
        ) from None
    except Exception as error:
        if passed and "of a conflict" in str(error):
            raise ClusterError(
                f"env={list(env)}: this Ray job has a worker_process_setup_hook of its own, and Ray takes one: leave "
                "it out of the job's runtime environment, or give these variables there"
            ) from None
        if "Version mismatch" in str(error):
            raise ClusterError(
                f"the Ray cluster at {address!r} has other versions than this environment: {error}"
            ) from None
        if "timed out during startup" not in str(error):  # Ray raises this one as a bare Exception
            raise
        raise ClusterError(
            "a local Ray node did not come up in time: the machine is too busy, or an earlier Ray is still shutting "
            "down; try again, or raise RAY_raylet_start_wait_time_s"
        ) from None
    if passed:
        environment.leave(passed, options["runtime_env"])
        logger.info("workers get %s from the environment of this command", ", ".join(sorted(passed)))
    if address != "local" and (absent := environment.not_set(env, os.environ)):
        logger.info("env=%s: no variable of this command is called %s", list(env), ", ".join(absent))
    if (file := libraries()) is not None:
        _send_output_to(file)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the console has a display of its own
    if warning := unprotected(len(living_nodes()), os.environ):
        logger.warning(warning)


@contextmanager
def known_to_ray_train() -> Iterator[None]:
    """Within, a run that is started tells its controller which Ray it is in.

    Ray Train frees the CPUs and GPUs of a run whose process ended (a trial that is stopped) after asking Ray whether it
    has. It asks without an address: on a machine with two Rays, that fails and all is held for ever, or the other Ray
    is asked, which knows of no such run, and a living one loses what it holds (Ray 2.60).
    """
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        os.environ.pop("RAY_ADDRESS") if before is None else os.environ.update(RAY_ADDRESS=before)


# --------------------------------------------------------------------------------------------- the type to compute in

_ANSWER_SECONDS = 180  # the first worker process of a busy node takes its time

S = TypeVar("S", ModelSection, EngineSection)
T = TypeVar("T")


def with_dtype(section: S, *, gpu: bool, labels: Labels = NO_LABELS) -> S:
    """`section` with `dtype: auto` replaced by what the cluster computes in natively; any other value stays.

    Args:
        section: a model that is trained, or an engine, which runs on nodes of its own `label_selector`.
        gpu: whether it runs on GPUs.
        labels: of the nodes that train, as `cluster.label_selector`.

    Raises:
        ClusterError: a node did not answer, or none is up yet.
    """
    if section.dtype != "auto":
        return section
    selected = section.label_selector if isinstance(section, EngineSection) else labels
    return section.model_copy(update={"dtype": native_dtype(gpu=gpu, labels=selected)})


def native_dtype(*, gpu: bool, labels: Labels = NO_LABELS) -> device.Dtype:
    """What every node that may compute does natively: those with GPUs for `gpu`, else those with CPUs.

    Only nodes of these labels are asked, each by a task: the driver may run on a head that has neither the GPU nor the
    CPU of the workers.

    Raises:
        ClusterError: a node did not answer, or there is none yet.
    """
    return _native_dtype(tuple(node["NodeID"] for node in nodes_that_compute(gpu=gpu, labels=labels)), gpu=gpu)


@cache  # asked, and said, once for the same nodes
def _native_dtype(nodes: tuple[str, ...], *, gpu: bool) -> device.Dtype:
    if not nodes:
        raise ClusterError(
            f"dtype='auto' asks the nodes with {'GPUs' if gpu else 'CPUs'} what they compute in, and none is up, or "
            "has the labels that are asked for; set dtype to bfloat16 or float32"
        )
    found = _natives(nodes, gpu=gpu)
    node, native = min(found.items(), key=lambda item: item[1].dtype == "bfloat16")
    logger.info("dtype: auto is %s (%s%s)", native.dtype, f"node {node[:8]}: " if len(found) > 1 else "", native.reason)
    return native.dtype


def _natives(nodes: tuple[str, ...], *, gpu: bool) -> dict[str, device.Native]:
    here = this_node()
    # Not in this process for a GPU: it would hold some of the GPU's memory from then on.
    asked = [node for node in nodes if gpu or node != here]
    found = ask_nodes(device.native_dtype, nodes=asked, gpu=gpu)
    for node, answer in found.items():
        if isinstance(answer, ClusterError):
            raise ClusterError(
                f"node {node[:8]} did not say in which type it computes ({answer}); run `mlc-ray doctor --address auto`"
                ", or set dtype to bfloat16 or float32"
            )
    natives = cast(dict[str, device.Native], found)
    return natives if here in natives or here not in nodes else {here: device.native_dtype(gpu=False), **natives}


def ask_nodes(
    function: Callable[..., T], *arguments: Any, nodes: Sequence[str], **named: Any
) -> dict[str, T | ClusterError]:
    """What `function` returns on each of the nodes (ids), each in a process of its own; an error where one fails."""
    # max_calls: a process that has looked at a GPU gives it back only by ending.
    ask = ray.remote(num_cpus=0, max_calls=1)(cast(Any, function))
    answers = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            *arguments, **named
        )
        for node in nodes
    }
    if answers:
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=_ANSWER_SECONDS)
    found: dict[str, T | ClusterError] = {}
    for node, answer in answers.items():
        try:
            found[node] = ray.get(answer, timeout=0)
        except ray.exceptions.RayError as error:  # a time-out is one too
            found[node] = ClusterError(str(error).strip().splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------------------ what it holds


def _send_output_to(file: TextIO) -> None:
    """Send what Ray's workers and its own loggers write into a file instead of this process's console.

    Warnings of this package among it are logged by this process.
    """
    # Ray has no public way to this. What its workers write goes through one dispatcher, whose only handler is replaced;
    # what it says of a worker's death goes past that, straight to a function, and this package warns of it itself.
    from ray._private import worker
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    dispatcher.remove_handler("ray_print_logs")

    def take(data: dict[str, Any]) -> None:
        others: Any = show_warnings(data.get("lines", []))
        with contextlib.suppress(ValueError):  # closed: the command has ended, and Ray's thread has not yet
            worker.print_worker_logs({**data, "lines": others}, file)

    worker.print_to_stdstream = lambda data, **_: take(data)
    dispatcher.add_handler("mlc_ray", take)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "ray" and isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


def unprotected(nodes: int, environment: Mapping[str, str]) -> str | None:
    """The warning that a cluster of several nodes runs any code sent to it; None for one node, or with tokens.

    Only `environment`, that of the driver, is looked at: whether the nodes were started with a token is not asked.
    """
    if nodes < 2 or environment.get("RAY_AUTH_MODE") == "token":
        return None
    return (
        f"THIS CLUSTER OF {nodes} NODES IS JOINED WITHOUT RAY_AUTH_MODE=token: unless a network keeps others out, "
        "anybody who reaches its ports can run code on it. Start every node, and submit, with RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN_PATH (cluster/README.md)"
    )


def use_gpu(accelerator: str) -> bool:
    """Whether to run on GPUs: `auto` does if there are any, or the cluster's autoscaler is known to start some.

    Raises:
        ClusterError: `gpu` is asked for on a cluster that has none and starts none.
    """
    if accelerator == "cpu" or cluster_resources().get("GPU", 0):
        return accelerator != "cpu"
    growth = may_grow()
    more, most = growth.beside(nodes_there(), at_most=1)
    if most and any(node.size[1] for node in more):
        logger.info("no node has a GPU yet; the autoscaler is to start some")
        return True
    if accelerator == "auto":
        if not growth.known:
            logger.warning(
                "no node has a GPU, and which nodes the autoscaler may start is not known: this runs on CPUs; set the "
                "accelerator to 'gpu' to wait for GPUs"
            )
        return False
    if growth.known:
        raise ClusterError("accelerator='gpu', but the Ray cluster has no GPU; set it to 'cpu' or 'auto'")
    return True


def check_fits(what: str, parts: Sequence[Part]) -> None:
    """Refuse what the nodes can never hold at once (`could_fit`): Ray would wait for it silently and without end.

    Args:
        what: what asks, and by which settings.
        parts: CPUs, GPUs and labels of each worker or engine, which lies on one node.

    Raises:
        ClusterError: the parts do not fit.
    """
    if not could_fit(parts):
        raise ClusterError(
            f"{what} needs {amount(parts)}, each part on one node, and some CPU for Ray Data; {nodes_held()}: ask for "
            "fewer or smaller ones, or add nodes"
        )


def nodes_held() -> str:
    """What the cluster has, and what its autoscaler may add, in words."""
    there = nodes_there()
    more, most = may_grow().beside(there, at_most=10_000)
    limit = f", {most} of these in all" if most < len(more) else ""
    return f"the Ray cluster has {said_of(there)}" + (f", and may add {said_of(more)}{limit}" if most else "")


def gpus_held() -> str:
    """How many of the cluster's GPUs and CPUs are in use now, in words, whoever uses them."""
    from ray._private.state import available_resources_per_node  # a DeveloperAPI; no public one goes by nodes

    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    counts = []
    for name in ("GPU", "CPU"):
        nodes = [(node["Resources"].get(name, 0.0), free.get(node["NodeID"], {})) for node in living_nodes()]
        there = sum(has for has, _ in nodes)
        most = max((left.get(name, 0.0) for has, left in nodes if has), default=0.0)
        if there:
            held = sum(has - left.get(name, 0.0) for has, left in nodes)
            counts.append(f"{held:g} of {there:g} {name}s are in use (the most that one node has free: {most:g})")
    return "; ".join(counts) or "there is no GPU and no CPU"


def cluster_resources() -> dict[str, float]:
    """Resources of the whole cluster: CPU, GPU and all others that Ray counts."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def living_nodes() -> list[dict[str, Any]]:
    """What Ray knows of each living node: NodeID, NodeManagerAddress, Resources and more; in the order of their ids."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sorted((node for node in nodes if node["Alive"]), key=lambda node: str(node["NodeID"]))


def this_node() -> str:
    """The id of the node that this process is on."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


def nodes_there() -> list[Node]:
    """Resources and labels of each living node."""
    return [Node(node["Resources"], node.get("Labels") or {}) for node in living_nodes()]


def nodes_that_compute(*, gpu: bool, labels: Labels = NO_LABELS) -> list[dict[str, Any]]:
    """What Ray knows of each living node with these labels that has GPUs for `gpu`, else of those that have CPUs."""
    able = [node for node in living_nodes() if node["Resources"].get("GPU" if gpu else "CPU", 0)]
    return [node for node in able if selects(labels, node.get("Labels") or {})]


def may_grow() -> Growth:
    """What the cluster's autoscaler may start: its head is asked, by a task unless this process is there."""
    head = next((node["NodeID"] for node in living_nodes() if _HEAD in node["Resources"]), None)
    address = ray.get_runtime_context().gcs_address
    if head == this_node():
        return look(address)
    found = {} if head is None else ask_nodes(look, address, nodes=[head])
    growth = found.get(head or "", Growth())
    if isinstance(growth, ClusterError):
        logger.warning("the head did not say what an autoscaler may start (%s): the nodes that are there count", growth)
        return Growth()
    return growth


_HEAD = "node:__internal_head__"


def how_many_fit(part: Part) -> int:
    """How many parts the nodes that are there hold at once, each on one node, with some CPU left; at least 1."""
    return most_that_fit(part, nodes_there())


def fits(parts: Sequence[Part]) -> bool:
    """Whether the nodes that are there can hold all parts at once and keep some CPU (`capacity.fit`)."""
    return fit(parts, nodes_there())


def could_fit(parts: Sequence[Part]) -> bool:
    """Whether they can, or could with the nodes that an autoscaler may start; where it is not known which, yes."""
    there = nodes_there()
    if fit(parts, there):
        return True
    growth = may_grow()
    return not growth.known or fit(parts, there, *growth.beside(there, at_most=len(parts) + 1))
