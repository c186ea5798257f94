"""What a scaling study adds to a study's results: each size's best point, how it moves with size, what it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlc_ray.report.tables import Cell, Table, cell, row, table
from mlc_ray.report.text import ABSENT, p_value, signed
from mlc_ray.stats.rates import Interval
from mlc_ray.stats.trend import Trend

BEST = "best"
"""The name of each size's best point, as a method."""


@dataclass(frozen=True)
class SizeBudget:
    """What the search of a size takes at most: runs of so many steps, tokens that these forward, and operations.

    `operations` are 6 for each parameter that a token meets, and token; embeddings are not counted. `scores` are
    answers of at most `max_new_tokens` to all prompts. `hours` and `gpu_hours` (on CPUs, of workers) are what
    `mlc-ray plan` makes of it; None where it knows the cluster or the model not. `assumed` is what they leave out.
    `fault` is what does not fit a cluster that was named; empty where all does, or none was.
    """

    size: str
    parameters: float
    runs: int
    steps: int
    tokens: int
    operations: float
    scores: int
    answers: int
    hours: float | None = None
    gpu_hours: float | None = None
    assumed: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class SizePoint:
    """A size and its best point; intervals in the unit of what they are of.

    `layer` is a fraction of the depth and `log_weight` log10 of lambda, both with the 95 % interval over the trials
    that are best in resamples of the bundles that chose.
    `transfer` is the gain on the harmful side in languages that were never trained, `over_refusal` what is refused
    more of benign prompts, both against the model before training, in points, on the bundles that confirm.
    `probed` is the layer that the probe ranked first; `seconds` are worker seconds of all runs.
    """

    size: str
    parameters: float
    family: str | None
    layer: Interval
    log_weight: Interval
    transfer: Interval | None
    over_refusal: Interval | None
    seeds: int
    trials: int
    probed: float | None
    seconds: float


@dataclass(frozen=True)
class Scaling:
    """All sizes that are confirmed, the trends over them, and what was stated beforehand."""

    points: tuple[SizePoint, ...]
    trends: tuple[Trend, ...]
    budget: tuple[SizeBudget, ...] = ()


def scale_tables(scaling: Scaling, *, gpu: bool) -> list[Table]:
    """The best points, the trends, and the budget."""
    found = []
    if scaling.points:
        found.append(_points(scaling.points, gpu=gpu))
    if scaling.trends:
        found.append(_trends(scaling.trends))
    if scaling.budget:
        found.append(budget_table(scaling.budget))
    return found


def _points(points: Sequence[SizePoint], *, gpu: bool) -> Table:
    who = "GPU" if gpu else "worker"
    heads = ["parameters", "best layer", "probe's first", "lambda", "transfer", "over-refusal", "trials", "seeds",
             f"{who} seconds"]  # fmt: skip
    lines = []
    for each in points:
        weight = each.log_weight
        lines.append(
            row(
                each.size,
                [
                    _parameters(each.parameters),
                    cell(f"{each.layer.value:.2f}", f"{each.layer.low:.2f} to {each.layer.high:.2f}"),
                    ABSENT if each.probed is None else f"{each.probed:.2f}",
                    cell(f"{10**weight.value:.2g}", f"{10**weight.low:.2g} to {10**weight.high:.2g}"),
                    _points_of(each.transfer),
                    _points_of(each.over_refusal),
                    str(each.trials),
                    str(each.seeds),
                    f"{each.seconds:,.0f}",
                ],
            )
        )
    note = (
        "layers as fractions of the depth; transfer: harmful side in languages never trained, over-refusal: benign "
        "refused, both less the model before training, in points"
    )
    return table("The best point of each size", ["size", *heads], lines, note)


def _points_of(found: Interval | None) -> Cell:
    return cell(ABSENT) if found is None else cell(signed(found.value), f"{signed(found.low)} to {signed(found.high)}")


def _parameters(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def _trends(trends: Sequence[Trend]) -> Table:
    lines = []
    for each in trends:
        if each.slope is None:
            numbers: list[str | Cell] = [ABSENT, ABSENT]
        else:
            shown = [f"{number:+.3g}" for number in (each.slope.value, each.slope.low, each.slope.high)]
            numbers = [cell(shown[0], f"{shown[1]} to {shown[2]}"), p_value(each.p_holm)]
        told = cell(each.direction, tone="" if each.direction == "cannot tell" else "strong")
        lines.append(row(each.name, [*numbers, str(each.sizes), str(each.freedom), told]))
    return table(
        "How they move with size",
        ["number", "for ten times the parameters", "p", "sizes", "degrees of freedom", "so it"],
        lines,
        "least squares over log10 of parameters with Student's t; p after Holm's correction over these",
    )


def budget_notes(budget: Sequence[SizeBudget]) -> list[str]:
    """What does not fit of it, and what it assumes, each as a sentence."""
    assumed = dict.fromkeys(said for each in budget for said in each.assumed)
    faults = [f"{each.size} does not fit: {each.fault}" for each in budget if each.fault]
    return [*faults, *(f"assumed: {each}" for each in assumed)]


def budget_table(budget: Sequence[SizeBudget], *, notes: bool = True) -> Table:
    """What each search takes at most, and all of them; with `budget_notes` in its own note, or without."""
    heads = ["parameters", "runs", "steps each", "tokens", "operations", "scores", "answers", "hours", "GPU hours"]
    lines = [
        row(
            f"{each.size} (does not fit)" if each.fault else each.size,
            [
                _parameters(each.parameters), f"{each.runs:,}", f"{each.steps:,}", f"{each.tokens:,}",
                f"{each.operations:.2g}", f"{each.scores:,}", f"{each.answers:,}", *_hours([each]),
            ],
        )
        for each in budget
    ]  # fmt: skip
    whole = [
        sum(getattr(each, name) for each in budget) for name in ("runs", "tokens", "operations", "scores", "answers")
    ]
    runs, tokens, operations, scores, answers = whole
    lines.append(
        row(
            "all",
            [
                ABSENT, f"{runs:,}", ABSENT, f"{tokens:,}", f"{operations:.2g}", f"{scores:,}", f"{answers:,}",
                *_hours(budget),
            ],
        )
    )  # fmt: skip
    note = (
        "stated beforehand, at most: tokens and operations of training, as if each step forwarded all prompts whole; "
        "answers of at most max_new_tokens; hours as "
        "`mlc-ray plan` counts them, with checkpoints, the probe, and judges that are models (on CPUs, GPU hours are "
        "those of workers)"
    )
    return table("Budget", ["size", *heads], lines, "; ".join([note, *(budget_notes(budget) if notes else ())]))


def _hours(budget: Sequence[SizeBudget]) -> list[str]:
    """Hours and GPU hours of all these; absent where they are not known of one."""
    both = [[each.hours for each in budget], [each.gpu_hours for each in budget]]
    found = [[value for value in values if value is not None] for values in both]
    return [f"{sum(known):,.3g}" if len(known) == len(budget) else ABSENT for known in found]


def scale_notes(scaling: Scaling) -> list[str]:
    """What the trends say, and what they cannot."""
    lines = []
    for each in scaling.trends:
        if each.slope is None:
            lines.append(f"{each.name}: {each.sizes} sizes cannot tell whether it moves with size.")
        elif each.slope.low == each.slope.high:
            lines.append(f"{each.name} is the same at all {each.sizes} sizes.")
        elif each.direction == "cannot tell":
            low, high = each.slope.low, each.slope.high
            lines.append(
                f"{each.name}: it cannot be told whether it moves with size; for ten times the parameters anything "
                f"from {low:+.3g} to {high:+.3g} is possible."
            )
        else:
            lines.append(f"{each.name} {each.direction} by {abs(each.slope.value):.3g} for ten times the parameters.")
    if at_edge := [each.size for each in scaling.points if math.isclose(each.layer.value, 1.0)]:
        lines.append(f"The best layer of {', '.join(at_edge)} is the last, the edge of what can be tried.")
    if len({each.family for each in scaling.points}) == 1 and len(scaling.points) > 1:
        lines.append("All sizes count as one family: what differs between models for another reason counts as size.")
    return lines
