"""Where DeepSpeed (0.19.8) keeps float32 weights and AdamW's moments, at every ZeRO stage.

Reading and writing them here, by parameter and range, is what lets a checkpoint be read at another stage or by another
number of workers. DeepSpeed's own loaders would not do: stage 3's gives all parameter groups the first one's weight
decay, and every one of them needs the layout that was written. Nor would its `_hp_mapping` of stages 1 and 2, which
does not know the order of `round_robin_gradients`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mlc_ray.train.engines.base import STATE_KINDS, StateReader, StateShard, owned_ranges, pieces


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `stop` of a flattened parameter, which are those of `flat` from `offset` on.

    `flat` is what the optimizer steps: a float32 tensor of this parameter or of many, or a worker's part of one.
    """

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    flat: Tensor
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The fragment's elements in `flat`, or in a moment of the same shape; a view."""
        return whole.detach().view(-1).narrow(0, self.offset, self.stop - self.start)

    def pieces(self) -> Iterator[Fragment]:
        """The same elements in fragments that are short enough for a checkpoint."""
        for start, stop in pieces(self.start, self.stop):
            yield replace(self, start=start, stop=stop, offset=self.offset + start - self.start)


class ZeroState:
    """Optimizer state of DeepSpeed's engine for `module`, by parameter name and range."""

    def __init__(self, module: nn.Module, optimizer: Any, stage: int, rank: int, workers: int) -> None:
        self.optimizer = optimizer
        self.adamw: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # float32 at stage 0: no wrapper
        self.stage, self.rank, self.workers = stage, rank, workers
        # Any: stage 3 gives parameters attributes of its own.
        self.names: dict[Any, str] = {p: name for name, p in module.named_parameters() if p.requires_grad}

    def owned(self) -> Iterator[StateShard]:
        """The shards that this worker writes."""
        held = self._divided() if self.stage == 0 else self._fragments()
        for fragment in chain.from_iterable(each.pieces() for each in held):
            moments = self.adamw.state[fragment.flat]
            tensors = {"master": fragment.flat, **{kind: moments[kind] for kind in STATE_KINDS[1:]}}
            views = {kind: fragment.of(tensor) for kind, tensor in tensors.items()}
            yield StateShard(fragment.name, fragment.start, fragment.stop, views)

    @torch.no_grad()
    def load(self, read: StateReader, steps: int) -> None:
        """Fill this worker's fragments, and make the model's weights of them on every worker."""
        for fragment in self._fragments():
            moments = self.adamw.state[fragment.flat]  # empty before a first step
            moments["step"] = torch.tensor(float(steps), device=fragment.flat.device)
            values = read(fragment.name, fragment.start, fragment.stop)
            fragment.of(fragment.flat).copy_(values["master"])
            for kind in STATE_KINDS[1:]:
                if kind not in moments:
                    moments[kind] = torch.zeros_like(fragment.flat)
                fragment.of(moments[kind]).copy_(values[kind])
        self._refresh_weights()

    def _fragments(self) -> Iterator[Fragment]:
        """What this worker holds."""
        if self.stage == 3:
            yield from self._partitions()
        elif self.stage:
            groups = zip(
                self.optimizer.round_robin_bit16_groups,
                self.optimizer.round_robin_bit16_offsets,
                self.optimizer.single_partition_of_fp32_groups,
                strict=True,
            )
            for parameters, offsets, flat in groups:
                yield from self._of_flat(parameters, offsets, flat, self.rank * flat.numel())
        elif self.optimizer is self.adamw:
            for parameter, name in self.names.items():
                yield Fragment(name, parameter, 0, parameter.numel(), parameter, 0)
        else:  # bfloat16 at stage 0
            for parameters, masters in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    yield Fragment(self.names[parameter], parameter, 0, parameter.numel(), master, 0)

    def _of_flat(
        self, parameters: Iterable[nn.Parameter], offsets: Iterable[int], flat: Tensor, first: int
    ) -> Iterator[Fragment]:
        """Of parameters that lie at `offsets` of a group, those in `flat`, which is the group's from `first` on."""
        for parameter, offset in zip(parameters, offsets, strict=True):
            start = max(first - offset, 0)
            stop = min(first + flat.numel() - offset, parameter.numel())
            if start < stop:
                yield Fragment(self.names[parameter], parameter, start, stop, flat, offset + start - first)

    def _partitions(self) -> Iterator[Fragment]:
        """Stage 3: an equal part of each parameter, the last one's filled up."""
        optimizer = self.optimizer
        for parameter, name in self.names.items():
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            stop = min(start + size, parameter.ds_numel)
            if start < stop:
                flat = optimizer.fp32_partitioned_groups_flat[group]
                yield Fragment(name, parameter, start, stop, flat, offset)

    def _divided(self) -> Iterator[Fragment]:
        """Stage 0: this worker's share of what all hold."""
        whole = {fragment.name: fragment for fragment in self._fragments()}
        sizes = {name: fragment.stop for name, fragment in whole.items()}
        for name, start, stop in owned_ranges(sizes, self.rank, self.workers):
            held = whole[name]
            yield Fragment(name, held.parameter, start, stop, held.flat, held.offset + start)

    def _refresh_weights(self) -> None:
        """Make the weights that forwards use of those that the optimizer steps, as a step does at its end."""
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # no gathered copy of the old weights stays
            for group in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self.optimizer.checkpoint_event_epilogue()
        elif self.stage:
            self.optimizer.update_lp_params()
        else:
            for fragment in self._fragments():
                fragment.parameter.copy_(fragment.of(fragment.flat).view_as(fragment.parameter))
