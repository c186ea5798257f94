"""Monitoring collapse during training: what is measured of a step, the last bundles' states, and the warnings.

Measures are in `losses/measures.py`; here is which bundles they see, and what is kept from one step to the next.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mlc_ray.config import CollapseSection
from mlc_ray.losses.measures import MIN_PER_KIND, cosine_sums, effective_rank, separability
from mlc_ray.train.collectives import gather_rows, rank_and_workers, sum_over_workers
from mlc_ray.train.model import ModelOutput
from mlc_ray.types import Batch

SMOOTHED = 5
"""Logged values whose median is compared with a bound; the start is the median of as many first ones."""

UNREAD = math.log(1e-3)
"""Log-odds of a refusal below which, behind every harmful prompt, openings are taken for those of other models."""
_LIKELIEST = "validation/refusal/likeliest/"


class StateWindow:
    """Tapped states of the last `size` different bundles of all workers: [n, L, H] float32, on the device.

    The same on every worker. A bundle seen again, in a later epoch, replaces its older states: no bundle is ever on
    both sides of the probe. It is not saved: a resumed run starts with an empty window.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.names: list[int] = []
        self.harmful: list[bool] = []
        self.states = self.present = torch.empty(0)

    def add(self, names: Sequence[int], harmful: Sequence[bool], states: Tensor, present: Tensor) -> None:
        """Take in states [n, L, H] of n different bundles, present [n, L]."""
        new = set(names)
        keep = [index for index, name in enumerate(self.names) if name not in new]
        keep = keep[max(0, len(keep) + len(names) - self.size) :]
        if keep:
            index = torch.tensor(keep, device=states.device)
            states, present = torch.cat([self.states[index], states]), torch.cat([self.present[index], present])
        self.names = [*(self.names[index] for index in keep), *names]
        self.harmful = [*(self.harmful[index] for index in keep), *harmful]
        self.states, self.present = states, present

    def separability(self) -> float:
        """AUC of the probe on the states in the window; NaN with too few bundles of either kind."""
        if not self.names:
            return math.nan
        return float(separability(self.states, self.present, torch.tensor(self.harmful, device=self.states.device)))


@dataclass
class TappedStep:
    """What one optimizer step tapped on this worker, kept on the device until the step is done, and measured then.

    Args:
        sample: how many bundles of all workers are compared with each other; 0 for none.
        window: where states go; of size 0 where nobody looks at them.
    """

    sample: int
    window: StateWindow
    batches: list[Batch] = field(default_factory=list)
    outputs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, batch: Batch, output: ModelOutput) -> None:
        """Take in one micro-batch, without waiting for its numbers."""
        if output.representations is None or output.present is None or output.tapped is None:
            return
        self.batches.append(batch)
        states = output.tapped if self.window.size else output.tapped[:, :, :0]
        self.outputs.append((output.representations.detach(), output.present, states.detach()))

    def measure(self, seed: str) -> dict[str, float]:
        """The measures by name, the same on every worker; every worker must call it. No bundle's padding is in them.

        Where the step has more bundles than `sample`, or than the window holds, those that take part are drawn by
        `seed` and their ids alone: how bundles lie on workers does not matter. Only they are sent.
        """
        if not self.outputs or not (self.sample or self.window.size):
            return {}
        representations, present, states = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
        drawn = _draw(self.batches, seed)
        metrics: dict[str, float] = {}
        if self.sample:
            chosen = drawn[: self.sample]
            metrics = _compare(_exchange(chosen, representations), _exchange(chosen, present))
        if self.window.size:
            chosen = drawn[: self.window.size]
            names, harmful = [it.name for it in chosen], [it.harmful for it in chosen]
            self.window.add(names, harmful, _exchange(chosen, states).float(), _exchange(chosen, present))
            if not math.isnan(auc := self.window.separability()):
                metrics["collapse/separability"] = auc
        return metrics


class Watch:
    """Says when a measure crosses its bound, only from the rows of a run in order, so that a replay agrees."""

    def __init__(
        self,
        settings: CollapseSection,
        *,
        max_chosen_drop: float | None = None,
        min_decision_auc: float | None = None,
        reads_decisions: bool = False,
        begins: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self.settings = settings
        self.max_chosen_drop = max_chosen_drop
        self.min_decision_auc = min_decision_auc
        self.reads_decisions = reads_decisions
        self.begins = begins or {}
        self.values: dict[str, list[float]] = {}
        self.crossed: set[str] = set()
        self.been_above: set[str] = set()

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """Warnings that one step's metrics give rise to: one where a measure crosses, none while it stays there.

        What is compared is the median of the last `SMOOTHED` values, since a round of few bundles is noisy. The bounds
        of spread and effective rank are shares of the median of the first `SMOOTHED` ones: a language model's states
        are alike from the start, how much depends on model and layer. Separability is compared with a fixed bound, once
        it has been above it: kinds that this model never told apart have not collapsed. The change of the chosen
        answers' log-probs is compared as it is: it is a mean over all held-out bundles. So is the AUC of decisions,
        after the step that a term begins behind. Whether the model writes the openings that terms read is asked before
        training alone: they teach it to.
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
            self._chosen_fell(row.get("validation/log_prob/chosen_change")),
            self._undecided(row),
            self._unread(row),
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

    def _chosen_fell(self, change: float | None) -> str | None:
        bound = self.max_chosen_drop
        if bound is None or change is None or math.isnan(change):
            return None
        if not self._crosses("max_chosen_drop", change < -bound):
            return None
        return (
            f"the held-out chosen answers lost {-change:.3g} nats each since the start, more than "
            f"data.validation.max_chosen_drop={bound:g}: the loss lowers the answers that it should teach (likelihood "
            "displacement); objective.sft_weight or a lower learning rate keep them"
        )

    def _undecided(self, row: Mapping[str, Any]) -> str | None:
        step, auc, few = (row.get(name) for name in ("step", "validation/refusal/auc", "validation/refusal/per_kind"))
        bound, names = self.min_decision_auc, self.begins.get(-1 if step is None else step)
        if bound is None or names is None or few is None:
            return None
        if few < MIN_PER_KIND:
            if not self._crosses("min_decision_auc", True):
                return None
            return (
                f"data.validation has {few:.0f} bundles of its rarer kind, too few (below {MIN_PER_KIND}) to tell "
                f"whether {', '.join(names)} begin{'s' if len(names) == 1 else ''} too early: add some, or set "
                "data.validation.min_decision_auc=null"
            )
        if auc is None or math.isnan(auc) or auc >= bound:
            return None
        return (
            f"{', '.join(names)} begin{'s' if len(names) == 1 else ''} after step {step}, but in the response language "
            f"the refusal's log-odds tell held-out harmful from benign bundles with an AUC of {auc:.2f} only, below "
            f"data.validation.min_decision_auc={bound:g}: what is carried into the other languages is no judgement "
            "yet; a later start (mlc.start, terms.NAME.start) or terms.decision helps"
        )

    def _unread(self, row: Mapping[str, Any]) -> str | None:
        if not self.reads_decisions or row.get("step") != 0:
            return None
        codes = [name.removeprefix(_LIKELIEST) for name, v in row.items() if name.startswith(_LIKELIEST) and v < UNREAD]
        if not codes:
            return None
        return (
            f"the openings of refusals in {', '.join(sorted(codes))} are next to impossible behind every held-out "
            f"harmful prompt (below {math.exp(UNREAD):g}): this model complies with all of them, or refuses in other "
            "words, and then the terms teach it new ones; `mlc-ray openings` finds its own, for openings.further"
        )

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


@dataclass(frozen=True, order=True)
class _Drawn:
    """A bundle of the step, by the order drawn: where it lies, what the window calls it, and whether it is harmful."""

    key: int
    rank: int
    index: int
    name: int
    harmful: bool


def _draw(batches: Sequence[Batch], seed: str) -> list[_Drawn]:
    """All real bundles of all workers, in an order that `seed` and their ids decide."""
    facts = [
        [_number(f"{seed} {name}"), _number(name), kind == "harmful"]
        for batch in batches
        for name, kind in zip(batch.bundle_ids, batch.kinds, strict=True)
    ]
    real = (torch.cat([batch.weight for batch in batches]) > 0).unsqueeze(1)
    own = torch.cat([torch.tensor(facts, device=real.device), real.long()], dim=1)
    return sorted(
        _Drawn(key, rank, index, name, bool(harmful))
        for rank, part in enumerate(gather_rows(own))
        for index, (key, name, harmful, is_real) in enumerate(part.tolist())
        if is_real
    )


def _exchange(chosen: Sequence[_Drawn], own: Tensor) -> Tensor:
    """Rows of the chosen bundles, in their order, on every worker; `own` [n, ...] has those of this worker."""
    rank, workers = rank_and_workers()
    sent = torch.tensor([it.index for it in chosen if it.rank == rank], dtype=torch.long, device=own.device)
    parts = gather_rows(own[sent], [sum(it.rank == worker for it in chosen) for worker in range(workers)])
    by_rank = sorted(range(len(chosen)), key=lambda place: chosen[place].rank)
    return torch.cat(parts)[torch.tensor(by_rank, dtype=torch.long, device=own.device).argsort()]


def _compare(rows: Tensor, present: Tensor) -> dict[str, float]:
    """Measures between bundles, from [N, L, D] that all workers have: each takes the cosines of its share of them."""
    rank, workers = rank_and_workers()
    part = range(len(rows) * rank // workers, len(rows) * (rank + 1) // workers)
    sums = sum_over_workers(torch.stack([value.double() for value in cosine_sums(rows, present, part)]))
    numbers = torch.stack([sums[0] / sums[1], *effective_rank(rows, present)]).tolist()
    names = ("between_bundle_cosine", "effective_rank", "effective_rank_share")
    return {f"collapse/{name}": value for name, value in zip(names, numbers, strict=True)}


def _number(text: str) -> int:
    # 63 bits, to travel in an int64 tensor
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
