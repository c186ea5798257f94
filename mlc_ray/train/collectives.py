"""What workers exchange besides gradients: tensors of equal shape, or objects, gathered from all of them by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mlc_ray.losses.base import Round

T = TypeVar("T")


def distributed() -> bool:
    """Whether there is more than one worker."""
    return dist.is_initialized() and dist.get_world_size() > 1


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


def gather_round(representations: Tensor, present: Tensor, weight: Tensor) -> Round:
    """The whole round, of which this worker forwarded [B, L, D]; every worker must compute the same loss on all of it.

    The mean over workers of that loss's gradients, which is what an engine takes, is then the gradient of the loss.
    """
    if not distributed():
        return Round(representations, present, weight)
    gathered: Tensor = cast(Any, _GatherWithGradient).apply(representations)
    return Round(gathered, gather(present), gather(weight), first=dist.get_rank() * len(representations))


class _GatherWithGradient(torch.autograd.Function):
    """`gather`, whose gradient is this worker's own part times the number of workers.

    Each worker holds the same loss of the gathered tensor, so that the gradient of its own part is complete: a
    reduction over workers in backward, in the middle of an engine's own, is not needed. The factor undoes the mean over
    workers that follows.
    """

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        context.bundles = len(own)
        return gather(own)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        first = dist.get_rank() * context.bundles
        return gradients[0][first : first + context.bundles] * dist.get_world_size()
