"""Training curves: which metrics, in which groups, and what they mean; one small chart per metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlc_ray.report.charts import Chart, Curve, line_chart
from mlc_ray.report.collect import Training
from mlc_ray.runs import training_name

REWARDS = "Implicit rewards"
_GROUPS = (
    ("Losses", ("loss/",)),
    ("Agreement of languages, and collapse", ("mlc/", "collapse/")),
    (REWARDS, ("reward/",)),
    ("Held-out bundles", ("validation/",)),
)
_MEANING = {
    "loss/total": "what is minimised",
    "loss/alignment": "the preference loss alone",
    "mlc/leading_share": "s₁² / Σ s² of a bundle's languages: 1 when they all point one way",
    "collapse/between_bundle_cosine": "mean |cosine| between different bundles: near 1 all prompts look alike",
    "collapse/effective_rank": "directions that the bundles of a step fill: near 1 all prompts look alike",
    "collapse/effective_rank_share": "the same, as a share of what is possible",
    "collapse/separability": "AUC of a linear probe for harmful against benign: 0.5 is chance",
    "log_prob/chosen": "summed log-prob of the chosen answer, in nats",
    "log_prob/chosen_change": "the same, less what it was before training",
    "reward/accuracy": "share of pairs with the chosen answer ahead",
    "reward/margin": "chosen minus rejected",
}
_UNIT_RANGE = (
    "mlc/leading_share",
    "collapse/between_bundle_cosine",
    "collapse/effective_rank_share",
    "collapse/separability",
    "reward/accuracy",
)


@dataclass(frozen=True)
class Curves:
    """One number over the steps of all runs; without a chart where no finite value was logged."""

    name: str
    meaning: str
    chart: Chart | None


@dataclass(frozen=True)
class ChartGroup:
    """Charts under one title; `folded` where only specialists look."""

    title: str
    folded: bool
    charts: tuple[Curves, ...]


def training_charts(runs: Sequence[Training], groups: Sequence[tuple[str, list[str]]]) -> Iterator[ChartGroup]:
    """The charts of all groups."""
    for title, names in groups:
        yield ChartGroup(title, title == REWARDS, tuple(_chart(name, runs) for name in names))


def chart_groups(runs: Sequence[Training]) -> list[tuple[str, list[str]]]:
    """Titles and the names under them: first those whose meaning is told here, then as they were logged."""
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    names = [*(name for name in _MEANING if name in logged), *(name for name in logged if name not in _MEANING)]
    groups = [(title, [name for name in names if name.startswith(prefixes)]) for title, prefixes in _GROUPS]
    return [(title, found) for title, found in groups if found]


def unit_range(name: str) -> tuple[float, float] | tuple[None, None]:
    """0 and 1 for shares and cosines, so that a curve's height means something; else the data decide."""
    return (0.0, 1.0) if training_name(name) in _UNIT_RANGE else (None, None)


def _meaning(name: str) -> str:
    """What a metric is; any other loss than those told here is a term of the objective, named by its key."""
    told = training_name(name)
    if told.startswith("loss/") and told not in _MEANING:
        return f"the term {told.removeprefix('loss/')} alone, without its weight"
    for change in ("log_prob/chosen", "log_prob/chosen_change"):
        if told.startswith(f"{change}/"):
            return f"in {told.removeprefix(f'{change}/')}: {_MEANING[change]}"
    if told.startswith("mlc/cosine/"):
        return f"mean |cosine| of {told.removeprefix('mlc/cosine/')} with the bundle's other languages"
    return _MEANING.get(told, "")


def _chart(name: str, runs: Sequence[Training]) -> Curves:
    curves = [Curve(run.label, run.metrics.get(name, ())) for run in runs]
    meaning = _meaning(name)
    if not any(value is not None for curve in curves for _, value in curve.points):
        return Curves(name, meaning, None)
    low, high = unit_range(name)
    last = ", ".join(f"{curve.label} ends at {curve.points[-1][1]}" for curve in curves if curve.points)
    return Curves(name, meaning, line_chart(f"{name} over steps: {last}", curves, low=low, high=high))
