"""What nodes hold: parts of CPUs and GPUs, each on one node with the labels that it asks for; and what may be added.

What an autoscaler may still start is read from its own configuration, on the cluster's head. Ray has no public way to
ask for it, and its private one (`ray._private.state.state.get_cluster_config`) is filled by no autoscaler of Ray 2.60.
The process that scales a cluster of `ray up` names its file on its command line. KubeRay's runs in a container of its
own beside the head, out of sight: such a cluster may start nodes, and nobody here knows which.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from mlc_ray.config import ClusterSection
from mlc_ray.config.placement import selects

logger = logging.getLogger(__name__)

Labels = Mapping[str, str]
NO_LABELS: Labels = MappingProxyType({})


class Need(NamedTuple):
    """CPUs and GPUs of one worker or engine, which lie on one node, and the labels which that node must have."""

    cpus: float
    gpus: float
    labels: Labels = NO_LABELS

    def __str__(self) -> str:
        said = f"({self.cpus:g} CPUs" + (f", {self.gpus:g} GPUs" if self.gpus else "")
        return said + (f", labels {_said(self.labels)})" if self.labels else ")")


def workers_needed(cluster: ClusterSection, *, gpu: bool) -> list[Need]:
    """What the workers of a run need, of an elastic one the fewest."""
    return [Need(cluster.cpus_per_worker, 1.0 if gpu else 0.0, cluster.label_selector)] * cluster.least_workers


Part = tuple[float, float] | Need
"""What is to be placed: (CPUs, GPUs), or a `Need`."""


@dataclass(frozen=True)
class Node:
    """Resources and labels that a node has, or would have."""

    resources: Mapping[str, float]
    labels: Labels = field(default_factory=dict)

    @property
    def size(self) -> tuple[float, float]:
        """(CPUs, GPUs)."""
        return self.resources.get("CPU", 0.0), self.resources.get("GPU", 0.0)


def fit(parts: Sequence[Part], nodes: Iterable[Node], more: Sequence[Node] = (), most: int = 0) -> bool:
    """Whether nodes can hold all parts at once and keep some CPU: each part lies on one node.

    Placed those with labels first, then largest first, GPUs before CPUs, each on the fullest node where it fits; with
    parts of few sizes on equal nodes, this finds a placement if there is one.

    Args:
        parts: what is to be placed.
        nodes: those that are there.
        more: nodes that may be added, and
        most: how many of them: the largest one that takes a part is, where no other has place for it.
    """
    free = [([*node.size], node.labels) for node in nodes]
    left = sorted(more, key=lambda node: node.size[::-1], reverse=True)
    for need in sorted(_needs(parts), key=lambda part: (not part.labels, -part.gpus, -part.cpus)):
        places = [size for size, labels in free if _takes(size, labels, need)]
        if not places:
            added = next((node for node in left if _takes(node.size, node.labels, need)), None)
            if added is None or most < 1:
                return False
            left.remove(added)
            most -= 1
            free.append(([*added.size], added.labels))
            places = [free[-1][0]]
        place = min(places, key=lambda size: (size[1], size[0]))
        place[0] -= need.cpus
        place[1] -= need.gpus
    return any(size[0] > 1e-9 for size, _ in free) or (most > 0 and any(node.size[0] > 1e-9 for node in left))


def _takes(size: Sequence[float], labels: Labels, need: Need) -> bool:
    return size[0] >= need.cpus - 1e-9 and size[1] >= need.gpus and selects(need.labels, labels)


def most_that_fit(part: Part, nodes: Sequence[Node]) -> int:
    """How many parts nodes hold at once, each on one node, with some CPU left; at least 1."""
    (need,) = _needs([part])
    most = 0
    for node in nodes:
        counts = [has / asked for has, asked in zip(node.size, need[:2], strict=True) if asked]
        most += int(min(counts) + 1e-9) if selects(need.labels, node.labels) else 0
    return max(1, most if fit([part] * most, nodes) else most - 1)


def amount(parts: Sequence[Part]) -> str:
    """Several parts, in words: `2 x (1 CPUs, 1 GPUs) + 4 x (0.1 CPUs)`."""
    return " + ".join(f"{number} x {part}" for part, number in Counter(map(str, _needs(parts))).items())


def said_of(nodes: Iterable[Node]) -> str:
    """Nodes, in words; labels that Ray gives to every node by itself are left out."""
    shown = [Need(*node.size, {k: v for k, v in node.labels.items() if not k.startswith("ray.io/")}) for node in nodes]
    return amount(shown) or "no nodes"


def _needs(parts: Iterable[Part]) -> list[Need]:
    return [Need(*part) for part in parts]


def _said(labels: Labels) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(labels.items()))


# ---------------------------------------------------------------------------------------------------- what may be added


@dataclass(frozen=True)
class Growth:
    """The nodes that a cluster may have: each of `kinds` at most so often, and `most` of all kinds beside the head.

    Where they are not `known`, an autoscaler is there, and what it may start is not.
    """

    kinds: tuple[tuple[Node, int], ...] = ()
    most: int = 0
    known: bool = True

    def beside(self, there: Sequence[Node], *, at_most: int) -> tuple[list[Node], int]:
        """The nodes that may still come beside those that are there, and how many of them at once.

        Args:
            there: living nodes, one of which is the head.
            at_most: of each kind.

        Returns:
            The nodes, largest GPUs first; the cluster's own limit may be less than their number.
        """
        have = Counter(self._kind_of(node) for node in there)
        found: list[Node] = []
        kinds = sorted(enumerate(self.kinds), key=lambda each: each[1][0].size[::-1], reverse=True)
        for number, (node, most) in kinds:
            found += [node] * max(0, min(most - have[number], at_most))
        return found, min(len(found), max(0, self.most - max(0, len(there) - 1)))

    def _kind_of(self, node: Node) -> int | None:
        """Index in `kinds` of a living node's kind: one of its size, whose labels it has; of several that with the most
        labels."""
        alike = [
            at
            for at, (kind, _) in enumerate(self.kinds)
            if kind.size == node.size and kind.labels.items() <= node.labels.items()
        ]
        return max(alike, key=lambda at: len(self.kinds[at][0].labels), default=None)


def look(gcs_address: str, processes: Path = Path("/proc")) -> Growth:
    """What the autoscaler of the cluster at `gcs_address` may start, on whose head this runs; nothing where none does.

    Args:
        gcs_address: of the cluster, HOST:PORT; the host has many names on its own machine, and only the port is read.
        processes: the kernel's folder of processes.
    """
    monitors = [line for line in _command_lines(processes) if _is_monitor(line, gcs_address)]
    for line in monitors:
        for argument in line:
            name, _, file = argument.partition("=")
            if name == "--autoscaling-config" and file:
                return _growth_in(Path(file).expanduser())
    return Growth(known=bool(monitors) or "RAY_USAGE_STATS_KUBERAY_IN_USE" not in os.environ)


def _growth_in(file: Path) -> Growth:
    try:
        return growth_of(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        # Another user's, as where a job does not run as who started the head.
        logger.warning("what the autoscaler may start is not known: %s cannot be read (%s)", str(file), error)
        return Growth(known=False)


def growth_of(config: Mapping[str, Any]) -> Growth:
    """What a configuration of Ray's cluster launcher lets the autoscaler start.

    Not known where a type has no `resources`, as the only one of machines that are reached by SSH (`type: local`).
    """
    most = int(config.get("max_workers") or 0)
    kinds, known = [], True
    for name, kind in (config.get("available_node_types") or {}).items():
        # As Ray fills it in: the head's type is for the head alone, unless it says otherwise.
        often = int(kind.get("max_workers", 0 if name == config.get("head_node_type") else most))
        if often and not kind.get("resources"):
            known = False
        elif often:
            kinds.append((Node(kind["resources"], kind.get("labels") or {}), often))
    return Growth(tuple(kinds), most, known)


def _command_lines(processes: Path) -> Iterator[list[str]]:
    for file in processes.glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended, or is another user's
            yield file.read_bytes().decode("utf-8", "replace").split("\0")


def _is_monitor(line: list[str], gcs_address: str) -> bool:
    scripts = (("autoscaler", "_private", "monitor.py"), ("autoscaler", "v2", "monitor.py"))
    port = gcs_address.rpartition(":")[2]
    ours = any(part.startswith("--gcs-address=") and part.endswith(f":{port}") for part in line)
    return ours and any(Path(part).parts[-3:] in scripts for part in line)
