"""What one optimizer step measures: means over its batch, however it was cut, and what the cut costs."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlc_ray.train.collectives import largest, rank_and_workers, sum_over_workers
from mlc_ray.train.flops import Work
from mlc_ray.train.model import ModelOutput
from mlc_ray.train.slow import Stopwatch
from mlc_ray.train.watch import TappedStep
from mlc_ray.types import Batch, LossOutput

Metrics = dict[str, float]


@dataclass
class StepMeter:
    """Adds up one optimizer step's numbers over micro-batches, then over workers.

    Numbers of the alignment loss are means over the batch's bundles, those of the terms over its bundles with at least
    two languages; a bundle forwarded at weight 0 is in none of them.

    `forwarding` is the time of forwards; once reduced, `paces` has each worker's seconds for a token, by rank.
    """

    tapped: TappedStep
    work: Work | None
    forwarding: Stopwatch
    sums: dict[str, Tensor] = field(default_factory=dict)
    term_sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("tokens", "idle_forwards", "flops"), 0.0))
    forwards: int = 0
    losses: list[tuple[list[str], Tensor]] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)

    def add(self, batch: Batch, output: ModelOutput, result: LossOutput, *, idle: bool) -> None:
        """Add one micro-batch; nothing is waited for."""
        real, with_terms = batch.weight > 0, batch.term_weight > 0
        add_to(self.counts, "loss/total", result.loss.detach().double())
        add_to(self.counts, "bundles", real.double().sum())
        if output.representations is not None:
            add_to(self.counts, "term_bundles", with_terms.double().sum())
        of_loss, of_terms = (self.sums, result.metrics, real), (self.term_sums, result.term_metrics, with_terms)
        finite = []
        for sums, metrics, counts in (of_loss, of_terms):
            for name, values in metrics.items():
                add_to(sums, name, values.double().where(counts, 0.0).sum())
                if name.startswith("loss/"):
                    finite.append(values.isfinite() | ~counts)
        self.losses.append((list(batch.bundle_ids), torch.stack(finite).all(dim=0)))
        self.tapped.add(batch, output)
        self.forwards += 1
        self.numbers["tokens"] += batch.tree.tokens
        self.numbers["idle_forwards"] += idle
        self.numbers["flops"] += self.work.step(batch) if self.work is not None else 0.0

    @property
    def broken(self) -> list[str]:
        """This worker's bundles with a loss that is not finite."""
        return [name for names, fine in self.losses for name, ok in zip(names, fine.tolist(), strict=True) if not ok]

    def reduce(self, waited: float, device: torch.device, notice: int = 0, *, writes: bool = False) -> Metrics:
        """The step's metrics, the same on every worker; every worker must call it.

        Args:
            waited: seconds that this worker waited for its batches.
            device: where this worker computes.
            notice: what this worker was told (`preemption.Notice`); the largest of all workers' is the metric `notice`.
            writes: whether this worker still writes a checkpoint; the metric `writes` is 1 where any does.
        """
        named = {**self.counts, **self.sums, **self.term_sums}
        rank, workers = rank_and_workers()
        paces = [0.0] * workers  # a sum of which each worker has its own place gathers them
        paces[rank] = self.forwarding.seconds() / self.numbers["tokens"]
        own_numbers = torch.tensor([*self.numbers.values(), *paces], dtype=torch.float64, device=device)
        summed = sum_over_workers(torch.cat([torch.stack(list(named.values())), own_numbers])).tolist()
        totals = dict(zip([*named, *self.numbers], summed[:-workers], strict=True))
        self.paces = summed[-workers:]
        bundles, term_bundles = totals["bundles"], totals.get("term_bundles", 0.0)
        means = {name: totals[name] / bundles for name in self.sums}
        if term_bundles:  # where no bundle has two languages, the terms have no mean
            means |= {name: totals[name] / term_bundles for name in self.term_sums}
        own = [self.numbers["tokens"], waited, peak_memory_gib(device), float(notice), float(writes)]
        most_tokens, longest_wait, memory, highest_notice, any_writes = largest(own, device)
        return {
            "loss/total": totals["loss/total"] / workers,
            **dict(sorted(means.items())),
            **{name: totals[name] for name in ("term_bundles",) if name in totals},
            "bundles": bundles,
            "tokens": totals["tokens"],
            "tokens_imbalance": most_tokens * workers / totals["tokens"],
            "forwards": float(self.forwards),
            "idle_forwards": totals["idle_forwards"],
            "flops": totals["flops"] / workers,
            "data_wait_seconds": longest_wait,
            "peak_memory_gib": memory,
            "notice": highest_notice,
            "writes": any_writes,
        }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held so far, in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to the sum of that name, if there is one already."""
    sums[name] = sums[name] + value if name in sums else value
