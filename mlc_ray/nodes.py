"""Whether every node of a cluster sees what a run reads and writes, and has the same software.

Asked before anything is loaded: a worker that lacks a mount or a package would say so minutes later, and not where.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlc_ray.config.paths import scheme_of
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import Place, StorageError, engine_versions, library_versions, remove_abandoned

ALIKE = ("python", "mlc_ray", "torch", "ray", "deepspeed", "transformers")
"""What must have one version on all nodes; those of an engine that answers prompts are compared too, see `unlike`."""


class NodeError(MlcRayError):
    """A node lacks what a run needs, or has not joined; the message names the node, what it lacks, and the fix."""


@dataclass(frozen=True)
class Sight:
    """What one node has: versions by package, the nonce of `folder` as it reads it (None: no such file), and the paths
    asked about that are not there.
    """

    versions: Mapping[str, str]
    nonce: str | None
    missing: Sequence[str]


def look(nonce_file: str, paths: Sequence[str]) -> Sight:
    """What this machine has of it."""
    nonce = None
    with suppress(OSError, StorageError):
        nonce = Place(nonce_file).read_text()
    return Sight(library_versions(), nonce, [path for path in paths if not _is_there(path)])


def _is_there(path: str) -> bool:
    try:
        return Place(path).exists()
    except (OSError, StorageError):  # this machine has no credentials, or does not reach the store
        return False


def check_nodes(folder: Path | Place, paths: Mapping[str, str], *, setting: str = "output_dir") -> None:
    """Ask every other node that may get a worker, or a task of the data. A cluster of one node is not asked.

    Args:
        folder: where the run writes; a file is made in it for a moment.
        paths: what the run reads, by the setting that names it; URLs, and local paths that are there, are asked for.
        setting: what names `folder`.

    Raises:
        NodeError: A node does not answer, does not see `folder` or a path, or has other versions.
    """
    from mlc_ray.cluster import ask_nodes, living_nodes, this_node

    here = this_node()
    # All that have CPUs: tasks that read and tokenise bundles run anywhere.
    nodes = {
        node["NodeID"]: str(node["NodeManagerAddress"])
        for node in living_nodes()
        if node["NodeID"] != here and node["Resources"].get("CPU")
    }
    if not nodes:
        return
    folder = Place(folder)
    remove_abandoned(folder)
    asked = {name: path for name, path in paths.items() if scheme_of(path) is not None or Path(path).exists()}
    nonce, said = uuid.uuid4().hex, folder / f".nonce-{uuid.uuid4().hex}"
    try:
        said.write_text(nonce)
        answers = ask_nodes(look, str(said), list(asked.values()), nodes=list(nodes))
    finally:
        said.remove()
    faults = []
    for node, answer in answers.items():
        name = f"node {nodes[node]} ({node[:8]})"
        if isinstance(answer, Exception):
            faults.append(f"{name} does not answer ({answer}): install mlc_ray there by cluster/install.sh")
        else:
            faults += [
                f"{name} {fault}"
                for fault in unlike(answer, library_versions(), nonce, str(folder), asked, setting=setting)
            ]
    if faults:
        raise NodeError(
            "\n  ".join(
                [f"{len(nodes)} other nodes may get workers or tasks, and not all have what they need:", *faults]
            )
        )


def unlike(
    there: Sight,
    here: Mapping[str, str],
    nonce: str,
    folder: str,
    paths: Mapping[str, str],
    *,
    setting: str = "output_dir",
) -> list[str]:
    """What a node lacks, each as a clause with its fix."""
    faults = []
    if there.nonce != nonce:
        what = "does not see" if there.nonce is None else "sees an old state of"
        faults.append(
            f"{what} {folder!r}: "
            + _fix(folder, f"mount the same storage on all nodes, and set {setting} to a folder on it")
        )
    faults += [
        f"does not see {name}={path!r}: {_fix(path, 'put it on storage that all nodes share, at the same path')}"
        for name, path in paths.items()
        if path in there.missing
    ]
    names = [*ALIKE, *(name for name in engine_versions(here) if name in there.versions)]
    other = [
        f"{name} {there.versions.get(name, 'not installed')} (here {here[name]})"
        for name in names
        if name in here and plain_version(there.versions.get(name)) != plain_version(here[name])
    ]
    if other:
        faults.append(f"has {', '.join(other)}: run cluster/install.sh there, from the same checkout")
    return faults


def _fix(place: str, here: str) -> str:
    """What to do where a node does not see `place`; `here` for a path."""
    if (scheme := scheme_of(place)) is None:
        return here
    return f"give it what {scheme}:// needs, such as the endpoint and credentials in the environment it is started with"


def plain_version(version: str | None) -> str | None:
    """A version without the build's mark: +cpu on the head and +cu130 on the workers are one version."""
    return None if version is None else version.partition("+")[0]


def wait_for_nodes(number: int, seconds: float) -> None:
    """Join the cluster that is there and wait until it has so many living nodes, its head among them.

    Without an autoscaler a run that asks for more than is there is refused at once, also while nodes still join.

    Args:
        number: of nodes.
        seconds: to wait at most.

    Raises:
        NodeError: There are fewer by then.
        ClusterError: No cluster answers.
    """
    from mlc_ray.cluster import ClusterError, connect, living_nodes, running

    if (address := running()) is None:
        raise ClusterError("no Ray cluster is here to wait for; set RAY_ADDRESS to its head, HOST:PORT")
    connect(address)
    deadline = time.monotonic() + seconds
    while (there := len(living_nodes())) < number:
        if time.monotonic() > deadline:
            raise NodeError(
                f"{there} of {number} nodes have joined {address} after {seconds:g} s; look at what `ray start` says "
                "on the others, or ask for fewer nodes"
            )
        time.sleep(min(1.0, seconds))


def main(argv: Sequence[str]) -> int:
    """`python -m mlc_ray.nodes NUMBER SECONDS`, which the scripts of `cluster/` call; returns the exit status."""
    if len(argv) != 2:
        print("usage: python -m mlc_ray.nodes NUMBER SECONDS", file=sys.stderr)
        return 2
    try:
        wait_for_nodes(int(argv[0]), float(argv[1]))
    except MlcRayError as error:
        print(f"mlc-ray: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
