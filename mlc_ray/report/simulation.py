"""A simulated run as tables, sentences and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mlc_ray.config.simulation import SimulationConfig
from mlc_ray.plan.costs import Costs
from mlc_ray.plan.simulate import LOSSES, SATURATED, Best, Growth, Simulated
from mlc_ray.report.tables import Cell, Table, cell, row, table
from mlc_ray.report.text import ABSENT, percent
from mlc_ray.stats.rates import Interval

_NAMES = {
    "stragglers": "late workers",
    "data": "data",
    "storage": "checkpoints",
    "repeated": "work done again",
    "restarts": "restarts",
}
_HEADS = ["steps", "checkpoint every", "goodput %", "wall hours", "GPU hours", "nodes lost", *_NAMES.values()]


def tables(config: SimulationConfig, best: Best, grown: Growth) -> list[Table]:
    """The run at each interval that was tried, and at its best on more and more GPUs."""
    tried = [_row(f"{run.every:,}", run, strong=run is best.run) for run in best.tried]
    by_interval = [row(name, cells[:1] + cells[2:], tone) for name, cells, tone in tried]
    sizes = [_row(f"{run.gpus:,}", run, strong=run.gpus == config.gpus) for run in grown.runs]
    note = f"means over {config.repetitions} runs with 95 % intervals; shares of the time in %"
    heads = ["checkpoint every", *(head for head in _HEADS if head != "checkpoint every")]
    return [
        table(f"{config.gpus:,} GPUs", heads, by_interval, note),
        table(
            "As the cluster grows", ["GPUs", *_HEADS], [row(name, cells, tone) for name, cells, tone in sizes],
            f"{config.bundles_per_gpu:g} bundles a GPU and step, the interval by Daly's formula",
        ),
    ]  # fmt: skip


def _row(name: str, run: Simulated, *, strong: bool) -> tuple[str, list[str | Cell], Any]:
    hours: list[str | Cell] = [cell("does not end", tone="alarm"), ABSENT]
    if run.finished:
        hours = [cell(f"{run.wall_hours.value:,.1f}", _limits(run.wall_hours)), f"{run.gpu_hours.value:,.0f}"]
    numbers: list[str | Cell] = [
        f"{run.steps:,}",
        f"{run.every:,}",
        cell(percent(100 * run.goodput.value), _limits(run.goodput, 100)),
        *hours,
        f"{run.lost_nodes:.1f}",
        *(percent(100 * run.shares[name]) for name in LOSSES),
    ]
    return name, numbers, "strong" if strong else ""


def _limits(found: Interval, factor: float = 1.0) -> str:
    return f"{factor * found.low:,.1f} to {factor * found.high:,.1f}"


def findings(config: SimulationConfig, best: Best, grown: Growth) -> list[str]:
    """What follows, a sentence each."""
    run, costs = best.run, Costs.of(config)
    hours, spent = run.wall_hours, run.gpu_hours
    lines = [
        f"{run.steps:,} steps on {config.gpus:,} GPUs take {hours.value:,.1f} h ({_limits(hours)}), "
        f"{spent.value:,.0f} GPU hours; goodput {percent(100 * run.goodput.value)} %"
    ]
    if not run.finished:
        lines[0] = f"the run does not end: hardly a step of it lasts; goodput {percent(100 * run.goodput.value)} %"
    elif len(best.tried) > 1:
        lines.append(
            f"best: checkpoint.every={run.every}; not told apart from it: {best.alike[0]} to {best.alike[1]} steps"
        )
    if best.young is not None and best.daly is not None:
        lines.append(f"optimum by Young's formula {best.young:,.0f} steps, by Daly's {best.daly:,.0f}")
    lines.append(
        f"a checkpoint stops training for {costs.blocking:.1f} s and is written for {costs.upload:.1f} s more; a start "
        f"takes {costs.start:.0f} s; data take {percent(100 * costs.data_share)} % of the storage's bandwidth"
    )
    lines.append(f"most of the rest goes to {_NAMES[run.largest]}: {percent(100 * run.shares[run.largest])} %")
    if grown.first is None:
        lines.append(f"nothing takes {100 * SATURATED:.0f} % of the time on up to {grown.runs[-1].gpus:,} GPUs")
    else:
        cause, gpus = grown.first
        lines.append(f"first to take {100 * SATURATED:.0f} % of the time: {_NAMES[cause]}, on {gpus:,} GPUs")
    return lines


def as_json(config: SimulationConfig, best: Best, grown: Growth) -> dict[str, Any]:
    """All of it, with the settings."""
    return {
        "config": config.model_dump(mode="json"),
        "costs": asdict(Costs.of(config)),
        "best": asdict(best),
        "growth": asdict(grown),
        "findings": findings(config, best, grown),
    }
