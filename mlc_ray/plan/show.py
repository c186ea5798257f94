"""A plan in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mlc_ray.plan.check import broken
from mlc_ray.plan.nearest import Fitting
from mlc_ray.plan.records import GIB, Part, RunPlan
from mlc_ray.plan.scores import ScorePlan, SearchPlan
from mlc_ray.progress import counted


def run_lines(plan: RunPlan, cheapest: Fitting | None, refused: str | None = None) -> list[str]:
    """A run's plan, line by line; `refused` is what `train` would say of fewer workers, with which it goes on too."""
    settings = " ".join(f"{name}={_plain(value)}" for name, value in plan.settings.items() if value is not None)
    memory = plan.memory
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters, {plan.trained:,} trained, on {plan.workers} x {plan.gpu} "
        f"({counted(plan.nodes, 'nodes')})",
        settings,
        f"data: {plan.data}",
        "",
        f"each worker, where a step is highest: {memory.worker_bytes / GIB:.1f} of {memory.worker_limit / GIB:.1f} GiB",
        *_parts(memory.worker),
        f"each node: {memory.node_bytes / GIB:.1f} GiB"
        + (f" of {memory.node_limit / GIB:.1f}" if memory.node_limit is not None else ""),
        *_parts(memory.node),
        f"the run's folder: {memory.disk_bytes / GIB:.1f} GiB",
        *_parts(memory.disk),
        "",
    ]
    if memory.fits:
        lines.append("it fits" if refused is None else f"it fits so, but not on its fewest workers: {refused}")
    else:
        part, where, needs, limit = broken(memory)
        lines.append(f"it does not fit: {where} lacks {(needs - limit) / GIB:.1f} GiB; the largest part is {part}")
    if cheapest is None:
        lines.append("nothing that was tried fits")
    elif "model.lora.rank" in cheapest.changes:  # tried last: it is another training
        lines.append(
            f"nothing that was tried fits with all weights trained{' (more GPUs may)' if plan.gpu != 'cpu' else ''}; "
            f"adapters, another training, would: {cheapest} ({cheapest.plan.seconds.step:.3g} s a step)"
        )
    elif cheapest.changes:
        faster = cheapest.plan.seconds.step
        said = "faster, and fits too" if memory.fits else "cheapest that fits"
        lines.append(f"{said}: {cheapest} ({faster:.3g} s a step)")
    else:
        lines.append("nothing cheaper was found than these settings")
    time = plan.seconds
    lines += [
        "",
        f"a step: {plan.work.tokens:,.0f} tokens in {plan.work.forwards:.3g} forwards of each worker, {time.step:.3g} "
        f"s: compute {time.compute:.3g}, exchange not hidden {time.exchange:.3g}, AdamW {time.optimizer:.3g}, forwards "
        f"{time.overhead:.3g}",
        *_idle(plan),
        f"the run: {plan.steps:,} steps, {_time(plan.wall_seconds)} (of it the reference beforehand "
        f"{_time(plan.reference_seconds)}, and checkpoints {_time(plan.saving_seconds)}), "
        f"{_hours(plan.gpu_hours, plan.gpu)}",
        f"a checkpoint: {plan.checkpoint_bytes / GIB:.1f} GiB; training stops for {_time(plan.checkpoint_seconds)}",
    ]
    return [*lines, *(f"assumed: {each}" for each in plan.assumed)]


def _idle(plan: RunPlan) -> list[str]:
    if not plan.idle_workers:
        return []
    return [
        f"{plan.idle_workers:,} of {plan.workers:,} workers have no bundle of their own in a step of {plan.bundles}, "
        "and make it no faster: raise train.batch_bundles, or take fewer workers where they hold it"
    ]


def score_lines(plan: ScorePlan, refused: str | None) -> list[str]:
    """A score's plan, line by line; `refused` is what a score would say instead of starting."""
    lines = [
        f"{plan.prompts:,} prompts on {_engines(plan)}",
        *(f"each answer read on {_engines(each)}, by {each.of}" for each in plan.readers),
        "it fits" if refused is None else f"it does not fit: {refused}",
        f"the score: {_time(plan.wall_seconds)}, {_hours(plan.gpu_hours, plan.gpu)}"
        + (", where every judge and translator reads every answer" if plan.readers else ""),
    ]
    return [*lines, *(f"assumed: {each}" for each in plan.assumed)]


def _engines(plan: ScorePlan) -> str:
    engine, each = plan.engine, "each GPU" if plan.gpu != "cpu" else "each"
    return (
        f"{counted(plan.replicas, 'engines')}: weights {engine.weights / GIB:.1f} GiB and a cache of {engine.cached:,} "
        f"tokens on {each}, of {engine.limit / GIB:.1f} GiB"
    )


def search_lines(plan: SearchPlan, refused: str | None, *, checks: str, together: bool) -> list[str]:
    """A search's plan; `refused` is what a search would say of its trials, `together` whether engines beside them were
    looked at; `checks` is `cluster.plan` of its runs."""
    fits = "each corner of its space fits" + (", and trials and engines fit together" if together else "")
    if checks != "check":
        fits = f"corners of its space are not checked: cluster.plan={checks}"
    again = f" and {counted(plan.runs - plan.trials, 'runs')} with further seeds" if plan.runs > plan.trials else ""
    probe = f", of it a probe {_time(plan.probe_seconds)}" if plan.probe_seconds else ""
    return [
        f"the search, at most: {counted(plan.trials, 'trials')}{again}, {plan.at_once} at once, {plan.scores[0]} "
        f"scores to choose and {plan.scores[1]} to confirm, {_time(plan.seconds)}{probe}, "
        f"{_hours(plan.gpu_hours, plan.gpu)}",
        fits if refused is None else f"it does not fit: {refused}",
        *(f"assumed: {each}" for each in plan.assumed),
    ]


def run_json(plan: RunPlan, cheapest: Fitting | None, refused: str | None = None) -> dict[str, Any]:
    """The same numbers: bytes and seconds."""
    memory, breaks = plan.memory, plan.memory.breaks
    return {
        **asdict(plan),
        "fits": memory.fits and refused is None,
        "refused": refused,
        "breaks": None if breaks is None else breaks.name,
        "worker_bytes": memory.worker_bytes,
        "node_bytes": memory.node_bytes,
        "disk_bytes": memory.disk_bytes,
        "step_seconds": plan.seconds.step,
        "wall_seconds": plan.wall_seconds,
        "gpu_hours": plan.gpu_hours,
        "cheapest": None
        if cheapest is None
        else {
            "settings": cheapest.changes,
            "step_seconds": cheapest.plan.seconds.step,
            "gpu_hours": cheapest.plan.gpu_hours,
        },
    }


def score_json(plan: ScorePlan, refused: str | None) -> dict[str, Any]:
    """The same numbers."""
    return {
        **asdict(plan),
        "wall_seconds": plan.wall_seconds,
        "gpu_hours": plan.gpu_hours,
        "fits": refused is None,
        "refused": refused,
    }


def search_json(plan: SearchPlan, refused: str | None) -> dict[str, Any]:
    """The same numbers."""
    return {**asdict(plan), "fits": refused is None, "refused": refused}


def _parts(parts: Iterable[Part]) -> list[str]:
    return [f"  {part.name:<20} {part.bytes / GIB:>9.2f} GiB  {part.formula}" for part in parts]


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hours(hours: float, gpu: str) -> str:
    return f"{hours:.3g} {'CPU-worker' if gpu == 'cpu' else 'GPU'} hours"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
