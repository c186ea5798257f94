"""Token rows -> batches, inside a worker: a Ray Data pipeline that gathers rows while the worker computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray

from mlc_ray.data.batches import collate
from mlc_ray.data.order import Slot
from mlc_ray.data.prepare import quiet_and_ordered, tables_of
from mlc_ray.data.store import TokenArtifact, gather
from mlc_ray.types import Batch, ReferenceRow

# While batches are gathered, this run's own workers may hold every CPU there is.
_GATHER_CPUS = 0
_GATHER_TASKS = 2
_GATHER_ROWS = 256


def stream_batches(
    artifact_folder: str | Path,
    slots: Sequence[Slot],
    *,
    bundles_per_worker: int,
    languages: Sequence[str],
    needs_rejected: bool,
    reference: Mapping[str, ReferenceRow] | None,
    taps: Callable[[int], bool],
    prefetch: int = 2,
) -> Iterator[tuple[list[Slot], Batch]]:
    """One worker's batches in the order of its `slots` (see `plan_rank`), each with the slots it was made from.

    A Ray Data pipeline of its own: a task on this node gathers rows from the memory-mapped artefact while the worker
    computes, `prefetch` batches ahead; the worker makes trees of them straight from Arrow's buffers. `taps` says of the
    n-th of these batches (from 0) whether its step taps.

    Raises:
        ArtifactError: the folder is damaged.
        BatchError: a bundle lacks what the loss needs.
        ValueError: `slots` do not fill whole batches.
    """
    if len(slots) % bundles_per_worker:
        raise ValueError(f"{len(slots)} slots do not fill batches of {bundles_per_worker} bundles")
    if not slots:
        return
    TokenArtifact.open(artifact_folder)  # a damaged folder is reported here, not from inside a task
    plan = _plan_dataset([slot.row_index for slot in slots])
    quiet_and_ordered(plan)
    gathered = plan.map_batches(
        cast(Any, gather),
        fn_kwargs={"folder": str(Path(artifact_folder).absolute())},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=_GATHER_CPUS,
        compute=ray.data.TaskPoolStrategy(_GATHER_TASKS),
        # The rows are in this node's page cache once any worker of it has read them.
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )
    start = 0
    for table in tables_of(gathered, bundles_per_worker, prefetch=prefetch):
        taken = list(slots[start : start + bundles_per_worker])
        if table["position"].to_pylist() != list(range(start, start + len(taken))):
            raise RuntimeError(
                f"Ray Data changed the order of rows at position {start}; preserve_order is not honoured"
            )
        start += len(taken)
        batch = collate(
            table,
            languages=languages,
            weights=[slot.weight for slot in taken],
            needs_rejected=needs_rejected,
            reference=reference,
            tap=taps(start // bundles_per_worker - 1),
        )
        yield taken, batch
    if start != len(slots):
        raise RuntimeError(f"Ray Data delivered {start} of {len(slots)} rows")


def _plan_dataset(row_indices: list[int]) -> ray.data.Dataset:
    """Which row goes where, in a few blocks, so that gathering starts with the first and later ones wait."""
    table = pa.table({"position": pa.array(range(len(row_indices)), pa.int64()), "row_index": row_indices})
    # Not from_arrow: it asks a task of one whole CPU for each block's size, which waits without end where none is free.
    starts = range(0, len(row_indices), _GATHER_ROWS)
    plan: ray.data.Dataset = ray.data.from_blocks([table.slice(start, _GATHER_ROWS) for start in starts])
    return plan
