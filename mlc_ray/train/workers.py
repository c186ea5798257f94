"""How the driver has Ray Train run a group of workers: those of training, and those of the reference's pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from mlc_ray.capacity import workers_needed
from mlc_ray.cluster import known_to_ray_train
from mlc_ray.config import ClusterSection
from mlc_ray.train.failures import EndAtOwnError, keyboard_interrupt, own_errors
from mlc_ray.train.waiting import EndWithoutRoom, tries_of

logger = logging.getLogger(__name__)

_TorchBackend: type[Backend] = TorchConfig().backend_cls


class _Backend(_TorchBackend):  # type: ignore[valid-type,misc]  # a class that Ray Train gives as a property
    """Ray Train's backend of `torch.distributed`, which also ends where Ray killed a worker for memory.

    Ray Train asks workers to leave their process group, and expects that one which died cannot. Of one that was killed
    for memory it is told by another error, which nobody expects there: the others were never ended then, their place
    stayed taken until the driver's end, and no worker started again.
    """

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Called before workers are ended, of which some may have died."""
        try:
            super().on_shutdown(worker_group, backend_config)
        except OutOfMemoryError:
            logger.debug("a worker that was killed for memory did not leave its process group", exc_info=True)


class _Config(TorchConfig):
    """Ray Train's settings of `torch.distributed`, with our backend."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """The backend that Ray Train makes."""
        return _Backend


def run_workers(
    worker: Callable[[dict[str, Any]], None],
    spec: object,
    cluster: ClusterSection,
    *,
    workers: int | tuple[int, int],
    gpu: bool,
    name: str,
    storage: Path,
    goes_on: str,
    to_go_on: str,
    callbacks: Sequence[UserCallback] = (),
) -> None:
    """Run `worker({"spec": spec})` in every worker to its end; workers that die are started again.

    Args:
        worker: what each worker calls.
        spec: what it is told.
        cluster: what each worker gets, and how often all are started again.
        workers: how many; two numbers are the least and the most.
        gpu: whether each gets a GPU.
        name: of the folder in `storage` that Ray Train writes into.
        storage: a folder of this machine; Ray writes nothing there that is read again.
        goes_on: where workers that are started again go on from, for a warning.
        to_go_on: the command, or what else goes on after Ctrl-C, for its message.
        callbacks: Ray Train's own.

    Raises:
        ClusterError: The workers found no place in `cluster.wait_seconds`.
        MlcRayError: A worker raised it, and all have ended.
        KeyboardInterrupt: Ctrl-C; the workers have ended by then.
    """
    waits = EndWithoutRoom(workers_needed(cluster, gpu=gpu), cluster.wait_seconds)
    trainer = TorchTrainer(
        cast(Any, worker),
        train_loop_config={"spec": spec},
        torch_config=_Config(backend="nccl" if gpu else "gloo"),
        scaling_config=cast(Any, ScalingConfig)(  # type checkers see the class of Ray Train V1
            num_workers=workers,  # two numbers: Ray Train V2's elastic policy
            use_gpu=gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
            label_selector=cluster.label_selector or None,
        ),
        run_config=cast(Any, RunConfig)(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # the console has a table of its own
            callbacks=[*callbacks, EndAtOwnError(cluster.max_failures, goes_on), waits],
        ),
    )
    with (
        own_errors(),
        known_to_ray_train(),
        tries_of(cluster.wait_seconds),
        keyboard_interrupt(f"to go on: {to_go_on}"),
    ):
        trainer.fit()
