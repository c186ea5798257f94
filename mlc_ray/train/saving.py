"""Saving checkpoints while training goes on: it stops while state and published weights are copied to host memory.

Published weights that find no room there, beside `AHEAD_BYTES` of others, are copied once those are written, and
training waits for it. A thread of each worker writes and checksums the worker's files, and waits for nobody. What
workers need of each other is exchanged by the training threads, at steps after which all are known to have written: so
no thread ever joins in a collective, and nothing can wait crosswise.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mlc_ray.config import TrainConfig
from mlc_ray.device import host_memory
from mlc_ray.errors import MlcRayError
from mlc_ray.monitoring import count
from mlc_ray.runs import checkpoint_folder, weights_folder
from mlc_ray.storage import MANIFEST, Place, StorageError, StorageFaultError, library_versions, sealed, sync_folders
from mlc_ray.train import published
from mlc_ray.train.checkpoint import (
    INDEX,
    STATE,
    element_counts,
    prune_checkpoints,
    prune_weights,
    random_file,
    remove_checkpoint,
)
from mlc_ray.train.collectives import from_rank_zero, gather_objects
from mlc_ray.train.engines.base import Engine
from mlc_ray.train.file_writer import Background, FileWriter, Written, with_retries, write_file
from mlc_ray.train.loop import Progress
from mlc_ray.train.published import published_bytes, published_files, small_files
from mlc_ray.train.random_state import random_state
from mlc_ray.train.shards import FILE_BYTES, Range, bytes_of, index_of, state_files
from mlc_ray.train.tensor_files import parts_of

logger = logging.getLogger(__name__)

AHEAD_BYTES = 2 * 2**30
"""How much of the published weights waits at most in rank 0's host memory for its writing."""

_SLACK = 16 << 20  # headers of files, random numbers, the tokenizer

MEMORY_SHARE = 0.5
"""`checkpoint.background: auto` is on where all copies of a host take at most this share of its available memory."""


class CheckpointWriterError(MlcRayError):
    """A checkpoint's files could not be made or written, though the storage refused nothing; the message quotes why."""


@dataclass
class _Going:
    """A checkpoint that is being written; `completing` is rank 0's, once all workers have written their files.

    `ends` is of weights alone, without what resuming needs: whether their step is the last one.
    """

    folder: Place
    progress: Progress
    writer: FileWriter
    ends: bool | None = None
    ranges: dict[str, list[Range]] = field(default_factory=dict)
    all_written: bool = False
    completing: Background | None = None


class CheckpointSaver:
    """Saves checkpoints of a run. Every worker calls `save`, `publish`, `settle` and `finish` after the same steps.

    Args:
        run: its folder.
        engine: what trains.
        tokenizer: written beside the model.
        config: the run's settings.
        fingerprints: of the model and the data; a checkpoint of others is refused.
        may_write: called by a thread of each worker before each of its files: raises where another driver has the run.
        completing: entered around each step to a checkpoint's end, whoever asks for it: what it raises ends the step.
        record: called by a thread of rank 0 last before the manifest is written: stores what was logged up to it, and
            makes sure that the run is still this driver's. Where it raises, that is no checkpoint.

    Attributes:
        newest: the folder of the last checkpoint that is there, or of the last published weights.
        fault: why the last one that was tried is not, if so.
        in_background: whether training goes on while files are written; said by the first `save`.
    """

    def __init__(
        self,
        run: Place,
        *,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        fingerprints: Mapping[str, str],
        may_write: Callable[[], None] = lambda: None,
        completing: Callable[[], AbstractContextManager[None]] = nullcontext,
        record: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.engine, self.config = run, engine, config
        self.fingerprints = dict(fingerprints)
        self.may_write, self.completing, self.record = may_write, completing, record
        self.lora = config.model.lora is not None
        self._small_files = small_files(engine.module.policy, tokenizer, lora=self.lora) if engine.rank == 0 else []
        self.newest: Place | None = None
        self.fault: str | None = None
        self._going: _Going | None = None
        self._room: int | None = None
        self.in_background = False
        self._said_to_wait = False

    def save(self, progress: Progress) -> None:
        """Copy what a checkpoint holds, and have it written; one that is still being written is waited for."""
        if self._going is not None:
            self._say_that_it_waits(progress)
            self.finish()
        started = time.monotonic()
        room = self._room = self._find_room() if self._room is None else self._room
        if (going := self._begun(checkpoint_folder(self.run, progress.step), progress, room)) is None:
            return
        going.writer.put(random_file(self.engine.rank), parts_of(random_state()))
        for file in state_files(self.engine.rank, self.engine.owned_state()):
            for name, found in file.ranges:
                going.ranges.setdefault(name, []).append(found)
            going.writer.put(f"{STATE}/{file.name}", file.parts)
        self._put_weights(going)
        self._took("copy", time.monotonic() - started)

    def publish(self, progress: Progress, *, ends: bool) -> None:
        """Have the weights alone written, those of earlier steps then removed; `ends` is whether the step is the last.

        As with `save`, they are there after `finish`; what is being written already is waited for.
        """
        self.finish()
        started = time.monotonic()
        if (going := self._begun(weights_folder(self.run, progress.step), progress, AHEAD_BYTES)) is not None:
            going.ends = ends
            self._put_weights(going)
            self._took("copy", time.monotonic() - started)

    def _begun(self, folder: Place, progress: Progress, room: int) -> _Going | None:
        """What is written into `folder` from now on; None where an earlier one there cannot be removed."""
        if self._has_failed(folder, from_rank_zero(self._removed(folder))):
            return None
        writer = FileWriter(folder, room, self.may_write)
        self._going = _Going(folder, replace(progress, before=dict(progress.before)), writer)
        return self._going

    def _put_weights(self, going: _Going) -> None:
        for name, parts in published_files(self.engine, self._small_files, lora=self.lora):
            going.writer.put(name, parts)
        going.writer.end()
        # Rank 0 may have waited for room, and so all wait for it here, where a watchdog sees files grow, rather than in
        # the next step, where they would look hung.
        gather_objects(None)

    @property
    def going(self) -> bool:
        """Whether a checkpoint is on its way; so on all workers, or on none."""
        return self._going is not None

    def writes(self) -> bool:
        """Whether this worker still writes something."""
        going = self._going
        if going is None:
            return False
        return going.completing.runs if going.completing is not None else going.writer.writes

    def settle(self) -> None:
        """Take the next step to a checkpoint's end, once no worker writes any more; one that does is waited for.

        First what all have written becomes known to rank 0, which adds the index and the manifest, in a thread. Then
        the checkpoint is there. One of which a file could not be written is removed, and a warning says why.

        Raises:
            CheckpointError: What the engine says that its workers own is not each trainable element once.
            CheckpointWriterError: On every worker: a thread of one ended by another error than a fault of the storage.
        """
        if (going := self._going) is not None:
            with self.completing():
                self._settle(going)

    def finish(self) -> None:
        """Wait until what is being written is a checkpoint, or is known not to become one; raises as `settle`."""
        while self._going is not None:
            self.settle()

    def _settle(self, going: _Going) -> None:
        if not going.all_written:
            fault = going.writer.wait()
            self._took("upload", going.writer.seconds)
            count("mlc_checkpoint_bytes", sum(size for size, _ in going.writer.written.values()))
            everyones = gather_objects((going.ranges, going.writer.written, _told(fault)))
            faults = [fault for _, _, fault in everyones if fault is not None]
            if not self._has_failed(going.folder, faults[0] if faults else None):
                going.all_written = True
                index: Mapping[str, object] | None = None
                if going.ends is None:
                    index = index_of([ranges for ranges, _, _ in everyones], element_counts(self.engine))
                written = {name: value for _, files, _ in everyones for name, value in files.items()}
                if self.engine.rank == 0:
                    going.completing = Background(lambda: self._complete(going, index, written), "checkpoint-completer")
            return
        fault = going.completing.wait() if going.completing is not None else None
        if not self._has_failed(going.folder, from_rank_zero(_told(fault))):
            self._going, self.newest, self.fault = None, going.folder, None
            if self.engine.rank == 0:
                count("mlc_checkpoints", outcome="saved")
                logger.info("step %d is saved in %s", going.progress.step, going.folder)

    def _complete(self, going: _Going, index: Mapping[str, object] | None, written: dict[str, Written]) -> None:
        """Rank 0's part; there is no `index` of weights alone."""
        started = time.monotonic()
        if index is not None:
            written[f"{STATE}/{INDEX}"] = write_file(going.folder / STATE / INDEX, [json.dumps(index).encode()])
        manifest: dict[str, Any] = {
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "resolved_config": self.config.model_dump(mode="json"),
            "fingerprints": self.fingerprints,
            "step": going.progress.step,
            "bundles_consumed": going.progress.bundles,
            "validation_before": going.progress.before,
            "world_size": self.engine.world_size,
            "versions": library_versions(),
            "files": {name: size for name, (size, _) in sorted(written.items())},
            "checksums": {name: value for name, (_, value) in sorted(written.items())},
            **({} if going.ends is None else {"ends": going.ends}),
        }
        if going.folder.is_local:
            with_retries(f"writing {going.folder}", lambda: sync_folders(Path(going.folder)))
        with_retries("storing what was logged", self.record)
        file = going.folder / MANIFEST
        with_retries(f"writing {file}", lambda: file.write_json(sealed(manifest)))
        self._took("complete", time.monotonic() - started)
        try:
            if going.ends is None:
                prune_checkpoints(self.run, self.config.checkpoint, manifest["step"])
            else:
                prune_weights(self.run, going.folder)
        except (OSError, StorageError) as error:  # this checkpoint is there: a fault here must not cost it
            logger.warning(
                "%s is saved, but older checkpoints could not be removed, and will be with the next one: %s",
                going.folder, error,
            )  # fmt: skip

    def _removed(self, folder: Place) -> MlcRayError | None:
        """Remove what is there of an earlier checkpoint, on rank 0; why it could not be, if so."""
        if self.engine.rank == 0:
            try:
                with_retries(f"removing {folder}", lambda: remove_checkpoint(folder))
            except (OSError, StorageError) as error:
                return _told(error)
        return None

    def _has_failed(self, folder: Place, fault: MlcRayError | None) -> bool:
        if fault is None:
            return False
        self._going = None
        if not isinstance(fault, StorageFaultError):
            raise fault
        self.fault = f"checkpoint {str(folder)!r} could not be written: {fault}"
        if self.engine.rank == 0:
            count("mlc_checkpoints", outcome="failed")
            logger.warning("%s. The checkpoints before it stay as they are", self.fault)
            try:
                remove_checkpoint(folder)
            except (OSError, StorageError) as error:
                logger.warning("what is there of it could not be removed, and will be at the next start: %s", error)
        return True

    def _took(self, phase: str, seconds: float) -> None:
        count("mlc_checkpoint_seconds", seconds, phase=phase)

    def _find_room(self) -> int:
        """Bytes that this worker's files may take in host memory before they are written.

        A worker's copy takes 12 bytes for each element of trainable parameters that it owns. That of rank 0 also has
        published weights: those of the file that is being gathered, and at most `AHEAD_BYTES` that wait.
        """
        state = bytes_of(self.engine.owned_state())
        weights = published_bytes(self.engine, lora=self.lora) if self.engine.rank == 0 else 0
        setting = self.config.checkpoint.background
        if setting == "auto":
            setting = self._has_room(state + min(weights, AHEAD_BYTES + published.FILE_BYTES))
        self.in_background = bool(setting)
        return state + min(weights, AHEAD_BYTES) + _SLACK if setting else FILE_BYTES

    def _has_room(self, needed: int) -> bool:
        everyones = gather_objects((socket.gethostname(), needed, host_memory().available))
        for host in sorted({host for host, _, _ in everyones}):
            copies = sum(size for name, size, _ in everyones if name == host)
            free = min(free for name, _, free in everyones if name == host)
            if copies > MEMORY_SHARE * free:
                if self.engine.rank == 0:
                    logger.warning(
                        "training stops while checkpoints are written: on %s their copies would take %.1f GiB, more "
                        "than half of the %.1f GiB of memory that are free (checkpoint.background=true does it anyway)",
                        host, copies / 2**30, free / 2**30,
                    )  # fmt: skip
                return False
        return True

    def _say_that_it_waits(self, progress: Progress) -> None:
        if self.engine.rank == 0 and not self._said_to_wait and self._going is not None:
            self._said_to_wait = True
            logger.warning(
                "step %d: training waits for the checkpoint of step %d to be written; with a larger checkpoint.every "
                "it need not",
                progress.step, self._going.progress.step,
            )  # fmt: skip


def _told(fault: BaseException | None) -> MlcRayError | None:
    """The fault of a thread as every worker hears of it: one of the storage, an error of this package, or a bug."""
    if fault is None:
        return None
    where = f"{socket.gethostname()}: {type(fault).__name__}: {fault}"
    if isinstance(fault, OSError | StorageError):
        return StorageFaultError(where)
    if isinstance(fault, MlcRayError):
        return fault
    logger.error("the writing of a checkpoint ended by an error that is none of the storage", exc_info=fault)
    return CheckpointWriterError(
        f"a checkpoint could not be written, and not by a fault of the storage ({where}): another try would end the "
        "same way. The log has the traceback; report it, or correct the engine or storage that raised it"
    )
