"""What workers exchange besides gradients: tensors of equal shape, or objects, gathered from all of them by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def distributed() -> bool:
    """Whether there is more than one worker."""
    return dist.is_initialized() and dist.get_world_size() > 1


def rank_and_workers() -> tuple[int, int]:
    """This worker's rank, from 0, and how many workers there are."""
    return (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)


def sum_over_workers(tensor: Tensor) -> Tensor:
    """The sum of all workers' `tensor`, which is written to; every worker must call it."""
    if distributed():
        dist.all_reduce(tensor)
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """All workers' `tensor` [B, ...] as [workers x B, ...], without gradient; every worker must call it."""
    if not distributed():
        return tensor.detach()
    own = tensor.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts)


def gather_rows(tensor: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
    """All workers' `tensor` [n, ...] by rank, whose numbers of rows n differ; every worker must call it.

    Without `sizes`, those numbers, they are exchanged first.
    """
    if not distributed():
        return [tensor.detach()]
    if sizes is None:
        sizes = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    everything = gather(padded).view(len(sizes), *padded.shape)
    return [part[:size] for part, size in zip(everything, sizes, strict=True)]


def gather_objects(value: T) -> list[T]:
    """Every worker's `value` (pickled on the way), by rank; every worker must call it."""
    if not distributed():
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def from_rank_zero(value: T) -> T:
    """The `value` of rank 0 (pickled on the way), where workers' own could differ; every worker must call it."""
    return gather_objects(value)[0]


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of all workers' for each of `values`; every worker must call it."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    if distributed():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [float(value) for value in found.tolist()]
