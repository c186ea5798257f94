"""Monitoring collapse during training: the last bundles' states for the probe, and the warnings.

Measures are in `losses/measures.py`; here is the state that is kept from one optimizer step to the next.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mlc_ray.config import CollapseSection
from mlc_ray.losses.measures import separability
from mlc_ray.train.collectives import gather
from mlc_ray.types import Batch

SMOOTHED = 5
"""Logged values whose median is compared with a bound; the start is the median of as many first ones."""


class StateWindow:
    """Tapped states of the last `size` different bundles of all workers: [L, H] float32 each, on the CPU.

    The same on every worker. A bundle seen again, in a later epoch, replaces its older states: no bundle is ever on
    both sides of the probe. It is not saved: a resumed run starts with an empty window.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.bundles: OrderedDict[int, tuple[Tensor, Tensor, bool]] = OrderedDict()

    def add(self, tapped: Tensor, present: Tensor, batch: Batch) -> None:
        """Take in this worker's [B, L, H] and all others'; every worker must call it. Padding is left out."""
        names = torch.tensor([_number(name) for name in batch.bundle_ids], device=tapped.device)
        harmful = torch.tensor([kind == "harmful" for kind in batch.kinds], device=tapped.device)
        facts = torch.stack([names, harmful.long(), (batch.weight > 0).long()], dim=1)
        everything = gather(torch.cat([facts, present.long()], dim=1)).cpu()
        states = gather(tapped).float().cpu()
        for index, (name, is_harmful, is_real) in enumerate(everything[:, :3].tolist()):
            if is_real:
                self.bundles.pop(name, None)
                self.bundles[name] = (states[index].clone(), everything[index, 3:].bool(), bool(is_harmful))
        while len(self.bundles) > self.size:
            self.bundles.popitem(last=False)

    def separability(self) -> float:
        """AUC of the probe on the states in the window; NaN with too few bundles of either kind."""
        if not self.bundles:
            return math.nan
        states, present, harmful = zip(*self.bundles.values(), strict=True)
        return float(separability(torch.stack(states), torch.stack(present), torch.tensor(harmful)))


class Watch:
    """Says when a measure crosses its bound, only from the rows of a run in order, so that a replay agrees."""

    def __init__(self, settings: CollapseSection) -> None:
        self.settings = settings
        self.values: dict[str, list[float]] = {}
        self.crossed: set[str] = set()
        self.been_above: set[str] = set()

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """Warnings that one step's metrics give rise to: one where a measure crosses, none while it stays there.

        What is compared is the median of the last `SMOOTHED` values, since a round of few bundles is noisy. The bounds
        of spread and effective rank are shares of the median of the first `SMOOTHED` ones: a language model's states
        are alike from the start, how much depends on model and layer. Separability is compared with a fixed bound, once
        it has been above it: kinds that this model never told apart have not collapsed.
        """
        cosine, rank = row.get("collapse/between_bundle_cosine"), row.get("collapse/effective_rank_share")
        spread = None if cosine is None else 1 - cosine
        bounds = self.settings
        found = [
            self._relative("spread (1 - between-bundle cosine)", spread, bounds.min_spread, "min_spread"),
            self._relative("effective rank, as a share,", rank, bounds.min_effective_rank, "min_effective_rank"),
            self._absolute(
                "separability of harmful and benign states",
                row.get("collapse/separability"),
                bounds.min_separability,
                "min_separability",
            ),
        ]
        return [warning for warning in found if warning is not None]

    def _relative(self, title: str, value: float | None, bound: float, field: str) -> str | None:
        now = self._smoothed(field, value)
        if now is None:
            return None
        start = median(self.values[field][:SMOOTHED])
        if not self._crosses(field, now < bound * start):
            return None
        return (
            f"collapse: {title} fell to {now:.3g}, below {bound:g} of the {start:.3g} it was at the start "
            f"(collapse.{field}): bundles of different meanings become one"
        )

    def _absolute(self, title: str, value: float | None, bound: float, field: str) -> str | None:
        now = self._smoothed(field, value)
        if now is None:
            return None
        if now >= bound:
            self.been_above.add(field)
        if not self._crosses(field, now < bound and field in self.been_above):
            return None
        return f"collapse: {title} fell to {now:.3g}, below collapse.{field}={bound:g}; 0.5 is chance"

    def _smoothed(self, field: str, value: float | None) -> float | None:
        if value is None or math.isnan(value):
            return None
        values = self.values.setdefault(field, [])
        values.append(value)
        return median(values[-SMOOTHED:]) if len(values) >= SMOOTHED else None

    def _crosses(self, field: str, low: bool) -> bool:
        crossed = low and field not in self.crossed
        (self.crossed.add if low else self.crossed.discard)(field)
        return crossed


def _number(bundle_id: str) -> int:
    # 63 bits, to travel in an int64 tensor
    return int.from_bytes(hashlib.blake2b(bundle_id.encode(), digest_size=8).digest(), "big") >> 1
