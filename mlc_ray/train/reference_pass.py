"""What the workers of a reference pass do: load the frozen reference by the engine, and ask it shard by shard.

All workers ask about the same bundles at the same time, cut among them as training cuts a batch, and make as many
forwards: an engine may have to gather the model's parameters in each of them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlc_ray.config import TrainConfig, parse_config
from mlc_ray.data.batches import collate
from mlc_ray.data.plan import cut
from mlc_ray.data.ragged import Ints
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.stream import ahead
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import BUNDLES_PER_REFERENCE_FORWARD, tokens_per_forward
from mlc_ray.storage import Place
from mlc_ray.train.collectives import from_rank_zero, gather_objects, rank_and_workers
from mlc_ray.train.entry import ReferenceSpec
from mlc_ray.train.file_writer import with_retries
from mlc_ray.train.reference import Reference, asked_of_reference
from mlc_ray.train.reference_shards import (
    finish_reference,
    is_whole,
    records,
    shard_bundles,
    shard_files,
    shard_number,
    shard_ranges,
    write_shard,
)
from mlc_ray.train.worker import begun, frozen_reference
from mlc_ray.types import Batch, Pairing, ReferenceRows, move

logger = logging.getLogger(__name__)

BUNDLES_PER_WORKER = 64
"""Asked about at once at least, if so many are missing: workers wait for the slowest at the end of each."""


def work(spec: ReferenceSpec) -> None:
    """Ask the reference, as one worker of a pass."""
    config = parse_config(TrainConfig, spec.config)
    with begun(config, spec.folder, spec.id) as (watchdog, device):
        asked = asked_of_reference(Objective(config), spec.layer)
        asking = Asking.of(config, frozen_reference(config, asked, device), asked, device)
        for each in spec.asked:
            watchdog.beat("opening its data")
            tokens = TokenArtifact.open(each.tokens_folder)
            asking.fill(each.folder, tokens, key=each.key, beat=watchdog.beat)


@dataclass(frozen=True)
class Asking:
    """How the reference is asked.

    Args:
        reference: what answers, batch by batch; every worker calls it as often.
        log_probs: whether answers' log-probs are needed.
        states: whether tapped states are.
        tokens_per_forward: the budget of a forward; None for the tokens of `BUNDLES_PER_REFERENCE_FORWARD`.
        device: where batches go.
        pairing: which answers it is asked about.
        pools: whether pooled states are needed.
    """

    reference: Reference
    log_probs: bool
    states: bool
    tokens_per_forward: int | None
    device: torch.device
    pairing: Pairing
    pools: bool

    @classmethod
    def of(cls, config: TrainConfig, reference: Reference, asked: dict[str, Any], device: torch.device) -> Asking:
        """As the settings say; `asked` are the arguments of the `ReferenceModel`."""
        budget = tokens_per_forward(config, gpu=device.type == "cuda")
        return cls(
            reference,
            asked["log_probs"],
            asked["layer"] is not None,
            budget,
            device,
            asked["pairing"],
            asked["pooling"] is not None,
        )

    def fill(self, folder: Place, tokens: TokenArtifact, *, key: str, beat: Callable[[str], None]) -> None:
        """Write all shards of a folder that are not there or damaged, and its manifest; every worker must call it.

        Args:
            folder: of the artefact.
            tokens: the bundles to ask about.
            key: the artefact's fingerprint.
            beat: called with what begins.

        Raises:
            BatchError: A bundle lacks an answer.
        """
        rank, workers = rank_and_workers()
        ranges = shard_ranges(len(tokens))
        shards = _whole_shards(folder, beat)
        missing = [number for number in range(len(ranges)) if number not in shards]
        at_once = -(-BUNDLES_PER_WORKER * workers // shard_bundles(len(tokens)))
        written = dict[int, tuple[str, int]]()
        for start in range(0, len(missing), at_once):
            numbers = missing[start : start + at_once]
            said = self.ask(tokens, np.concatenate([np.array(ranges[number]) for number in numbers]), beat)
            ends = np.cumsum([len(ranges[number]) for number in numbers])[:-1]
            for index, (number, part) in enumerate(zip(numbers, np.split(said, ends), strict=True)):
                if index % workers == rank:
                    beat(f"writing shard {number} of what the reference says")
                    write = functools.partial(write_shard, folder, number, part)
                    written[number] = with_retries(f"writing shard {number} into {folder}", write)
        beat("completing what the reference says, with all workers")
        for each in gather_objects(written):
            shards.update(each)
        if rank == 0:
            files = dict(shards[number] for number in sorted(shards))
            facts = {"fingerprint": key, "tokens": tokens.fingerprint, "bundles": len(tokens)}
            with_retries(f"completing {folder}", lambda: finish_reference(folder, files, **facts))

    def ask(self, tokens: TokenArtifact, rows: Ints, beat: Callable[[str], None]) -> np.ndarray:
        """What the reference says of N rows: an array [N] of `records`, the same on every worker, which all call it.

        A worker for which nothing is left asks about the smallest bundle once more, as an idle one does in training.

        Raises:
            BatchError: A bundle lacks an answer.
        """
        rank, workers = rank_and_workers()
        own = tokens.lengths(rows).own_tokens(
            head=tokens.head, taps=False, rejected=self.log_probs, pairing=self.pairing, whole=self.pools
        )
        budget = self.tokens_per_forward
        capacity = round(BUNDLES_PER_REFERENCE_FORWARD * own.mean()) if budget is None else budget - tokens.head
        bins = cut(own.tolist(), capacity, workers)
        spare = int(np.argmin(own))
        parts = list[tuple[list[int], np.ndarray]]()
        mine = [micro[rank] for micro in bins]
        with contextlib.closing(ahead(self._batch(tokens, rows[chosen or [spare]]) for chosen in mine)) as batches:
            for chosen, batch in zip(mine, batches, strict=True):
                beat("asking the reference, with all workers")
                said = self._records(batch)
                if chosen:
                    parts.append((chosen, said))
        gathered = [part for each in gather_objects(parts) for part in each]
        whole = np.empty(len(rows), dtype=gathered[0][1].dtype)
        for chosen, said in gathered:
            whole[chosen] = said
        return whole

    def _batch(self, tokens: TokenArtifact, rows: Ints) -> Batch:
        return collate(
            tokens.table(rows.tolist()),
            languages=tokens.languages,
            weights=[1.0] * len(rows),
            needs_rejected=self.log_probs,
            reference=None,
            tap=self.states,
            pairing=self.pairing,
            whole=self.pools,
        )

    def _records(self, batch: Batch) -> np.ndarray:
        said = self.reference(move(batch, self.device))

        def column(values: Tensor | None, dtype: torch.dtype) -> np.ndarray | None:
            return None if values is None else values.to("cpu", dtype).numpy()

        def of_answers(values: Tensor | None) -> np.ndarray | None:
            totals = column(values, torch.float64)
            if totals is None or self.pairing == "response":
                return totals
            grid = np.full((len(batch.bundle_ids), len(batch.languages)), np.nan)
            grid[batch.rows.bundle.numpy(), batch.rows.answer.numpy()] = totals
            return grid

        return records(
            ReferenceRows(
                of_answers(said.chosen),
                of_answers(said.rejected),
                column(said.state, torch.float32),
                column(None if said.pooled is None else said.pooled.transpose(0, 1), torch.float32),
            )
        )


def _whole_shards(folder: Place, beat: Callable[[str], None]) -> dict[int, tuple[str, int]]:
    """Names and sizes in bytes of the shards that are there and whole, by number; every worker reads a share of them.

    Where runs wrote a shard twice, with numbers that differ by rounding, the last by name.
    """
    rank, workers = rank_and_workers()
    names = from_rank_zero(shard_files(folder) if rank == 0 else [])
    whole = list[str]()
    for name in names[rank::workers]:
        beat(f"verifying the checksum of {name}")
        if with_retries(f"reading {folder / name}", functools.partial(is_whole, folder / name)):
            whole.append(name)
        else:
            logger.warning("%s is damaged; the reference is asked again about its bundles", folder / name)
    beat("verifying checksums, with all workers")
    found = sorted(name for part in gather_objects(whole) for name in part)
    sizes = folder.sizes(found)
    return {shard_number(name): (name, sizes[name]) for name in found}
