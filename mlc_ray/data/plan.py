"""How a batch is cut into forwards: from token lengths alone, the same on every worker, with no effect on the result.

A forward holds one prefix tree: the *head* that all prompts of the data share, once, and behind it each bundle's own
tokens. Bundles are packed into as few forwards as the budget allows, as many on every worker, and alike in tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from mlc_ray.data.ragged import Ints
from mlc_ray.errors import MlcRayError
from mlc_ray.types import Pairing, Scope

if TYPE_CHECKING:
    from mlc_ray.data.branches import Branches


class BudgetError(MlcRayError):
    """`train.tokens_per_forward` is too small for what must be forwarded at once; the message names both numbers."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of N bundles, each an array [N]; 0 where a bundle has none.

    `prompts` are those of all languages, `answered` of the prompt that the answers continue, `languages` a number.
    `chosen` and `rejected` are in the response language, `further_chosen` and `further_rejected` those of all `further`
    languages with answers.
    """

    languages: Ints
    prompts: Ints
    answered: Ints
    chosen: Ints
    rejected: Ints
    further_chosen: Ints
    further_rejected: Ints
    further: Ints

    def take(self, rows: Sequence[int] | Ints) -> Lengths:
        """Those of some rows."""
        return Lengths(*(values[rows] for values in vars(self).values()))

    def own_tokens(
        self,
        *,
        head: int,
        taps: bool,
        rejected: bool,
        pairing: Pairing = "response",
        whole: bool = False,
        scope: Scope = "none",
        openings: int = 0,
    ) -> Ints:
        """Tokens that each bundle adds to a forward, [N]: all its prompts where a step taps, else the answered ones.

        The last token of an answer predicts nothing and is not forwarded, unless `whole` sequences are read. Answers in
        every language must be there where `pairing` reads them; with `given`, a step that does not tap forwards no
        prompt without an answer, so that this is the most. Behind each prompt of `scope` there are `openings`.
        """
        prompts = self.prompts - head * self.languages if taps or pairing != "response" else self.answered - head
        last = 0 if whole else 1
        own: Ints = prompts.clip(min=0)
        pairs = [(self.chosen, self.further_chosen), (self.rejected, self.further_rejected)]
        for response, further in pairs if rejected else pairs[:1]:
            one, more = (response - last).clip(min=0), further - last * self.further
            if pairing in ("shared", "crossed"):
                one = one * self.languages
            own = own + one + {"response": 0, "own": 1, "given": 1, "shared": 0, "crossed": 2}[pairing] * more
        opened: Ints = np.full_like(own, int(scope == "response")) if scope != "all" else self.languages
        return own + openings * opened


@dataclass(frozen=True)
class Forward:
    """What one worker forwards at once: rows of the token artefact, each with its weight in the sums of the loss.

    The weights are (workers / bundles of the batch), and for the terms (workers / its bundles with at least two
    languages), 0 for the others: an engine sums over forwards and takes the mean over workers. Bundles with the same
    number in `groups` (None: the step has none) are compared with each other. A worker for which a batch has nothing
    left forwards one bundle at weight 0.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]
    term_weights: tuple[float, ...]
    groups: tuple[int, ...] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing in it counts."""
        return not any(self.weights)


@dataclass(frozen=True)
class StepPlan:
    """An optimizer step: `forwards[micro][rank]`; `taps` and `scope` as the `Objective` says; `tokens[micro][rank]` at
    most."""

    step: int
    taps: bool
    scope: Scope
    forwards: tuple[tuple[Forward, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Cutting:
    """By what a batch is cut.

    Args:
        tokens_per_forward: the budget. A bundle that exceeds it alone has a forward of its own.
        world_size: the number of workers.
        head: tokens that all prompts begin with.
        rejected: whether rejected answers are forwarded.
        taps: whether optimizer step `step` (from 0) forwards all prompts.
        ever_taps: whether any step does.
        group_bundles: the most bundles of a group, or None where no term compares bundles.
        pairing: which answers continue which prompts.
        whole: whether the last tokens of answers are forwarded too.
        scope: behind which prompts step `step` reads openings of responses; `all` of a step that taps alone.
        widest: the widest of these, of any step.
        branches: these openings; None where no step reads any, or a plan has none.
        opened: where there are no branches, tokens of openings behind each prompt of a scope.
        keeps: whether next tokens of benign bundles are read of steps that tap.
    """

    tokens_per_forward: int
    world_size: int
    head: int
    rejected: bool
    taps: Callable[[int], bool]
    ever_taps: bool
    group_bundles: int | None = None
    pairing: Pairing = "response"
    whole: bool = False
    scope: Callable[[int], Scope] = lambda _: "none"
    widest: Scope = "none"
    branches: Branches | None = None
    opened: Mapping[Scope, int] = field(default_factory=dict)
    keeps: bool = False

    def openings(self, scope: Scope) -> int:
        """Tokens of openings behind each prompt of a scope; of `branches` the most that a language has."""
        if scope == "none":
            return 0
        return self.branches.tokens if self.branches is not None else self.opened.get(scope, 0)

    def own_tokens(self, lengths: Lengths, *, taps: bool, scope: Scope) -> Ints:
        """Tokens that each bundle adds to a forward of a step that taps, or of one that does not; with openings, the
        most: a language may have less of them than another."""
        return lengths.own_tokens(
            head=self.head,
            taps=taps,
            rejected=self.rejected,
            pairing=self.pairing,
            whole=self.whole,
            scope=scope,
            openings=self.openings(scope),
        )

    def plan(self, step: int, rows: Sequence[int], lengths: Lengths) -> StepPlan:
        """Cut the batch `rows`, of which `lengths` has the tokens."""
        taps, scope = self.taps(step), self.scope(step)
        own = self.own_tokens(lengths, taps=taps, scope=scope)
        groups = group_of(len(rows), self.group_bundles) if taps and self.group_bundles is not None else None
        # What must be in the same forward: a group, or else a bundle.
        positions = groupby(range(len(rows)), key=groups.__getitem__ if groups is not None else None)
        items = [list(same) for _, same in positions]
        bins = cut([int(own[item].sum()) for item in items], self.tokens_per_forward - self.head, self.world_size)
        weight = self.world_size / len(rows)
        with_term = lengths.languages >= 2
        term_weight = self.world_size / max(1, int(with_term.sum()))
        spare = int(np.argmin(own))

        def forward(chosen: Sequence[int]) -> Forward:
            positions = sorted(position for item in chosen for position in items[item])
            if not positions:
                return Forward((rows[spare],), (0.0,), (0.0,), None if groups is None else (0,))
            return Forward(
                tuple(rows[position] for position in positions),
                (weight,) * len(positions),
                tuple(term_weight if with_term[position] else 0.0 for position in positions),
                None if groups is None else tuple(groups[position] for position in positions),
            )

        def tokens(chosen: Sequence[int]) -> int:
            return self.head + int(sum(own[items[item]].sum() for item in chosen) if chosen else own[spare])

        return StepPlan(
            step,
            taps,
            scope,
            tuple(tuple(forward(one) for one in micro) for micro in bins),
            tuple(tuple(tokens(one) for one in micro) for micro in bins),
        )


def group_of(bundles: int, at_most: int) -> list[int]:
    """The group of each bundle of a batch: consecutive ones, as few groups as can be, alike in size."""
    number = -(-bundles // at_most)
    return [position * number // bundles for position in range(bundles)]


def cut(sizes: Sequence[int], capacity: int, world_size: int) -> list[list[list[int]]]:
    """Items into bins, `bins[micro][rank]`, as many for every rank; a bin may be empty.

    First-fit decreasing says how many bins it takes. As many times `world_size` as hold them are then filled alike: the
    largest items first, each into the bin with the least in it, if that respects the capacity. What is forwarded at the
    same time on all ranks is alike too, for they wait for each other.

    Args:
        sizes: tokens of each item; one that exceeds the capacity has a bin of its own.
        capacity: the most tokens of a bin.
        world_size: the number of ranks.
    """
    largest_first = sorted(range(len(sizes)), key=lambda item: (-sizes[item], item))
    fitted = _first_fit(sizes, capacity, largest_first)
    number = -(-len(fitted) // world_size) * world_size
    levelled: list[list[int]] = [[] for _ in range(number)]
    least = [(0, index) for index in range(number)]
    for item in largest_first:
        load, index = heapq.heappop(least)
        levelled[index].append(item)
        heapq.heappush(least, (load + sizes[item], index))
    if any(load > capacity and len(levelled[index]) > 1 for load, index in least):
        levelled = fitted + [[] for _ in range(number - len(fitted))]
    loads = [sum(sizes[item] for item in one) for one in levelled]
    heaviest_first = sorted(range(number), key=lambda index: (-loads[index], index))
    bins: list[list[list[int]]] = []
    totals = [0] * world_size
    for start in range(0, number, world_size):
        # The heaviest of those at the same time for the rank with the least so far.
        ranks = sorted(range(world_size), key=lambda rank: (totals[rank], rank))
        micro: list[list[int]] = [[] for _ in range(world_size)]
        for rank, index in zip(ranks, heaviest_first[start : start + world_size], strict=True):
            micro[rank] = sorted(levelled[index])
            totals[rank] += loads[index]
        bins.append(micro)
    return bins


def _first_fit(sizes: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Each item of `order` into the first bin with space for it."""
    bins: list[list[int]] = []
    space = np.full(len(sizes), capacity)
    for item in order:
        fits = space[: len(bins)] >= sizes[item]
        index = int(fits.argmax()) if fits.any() else len(bins)
        if index == len(bins):
            bins.append([])
        bins[index].append(item)
        space[index] -= sizes[item]
    return bins
