"""What a study takes, as it is stated before the study begins: in lines, tables and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlc_ray.plan.records import GIB
from mlc_ray.progress import counted
from mlc_ray.report.tables import Row, Table, cell, row, table
from mlc_ray.report.text import ABSENT
from mlc_ray.score.asked import Asked


@dataclass(frozen=True, kw_only=True)
class PartBudget:
    """Time and memory of a part of a study on a model; numbers are None where `fault` says why they are not known.

    `hours` follow each other; `gpu_hours` are on CPUs those of workers. `needs` and `limit` are bytes of the place that
    is too small, else of a worker's or an engine's memory; `fault` also says what does not fit.
    """

    model: str
    hours: float | None = None
    gpu_hours: float | None = None
    needs: int | None = None
    limit: int | None = None
    fits: bool | None = None
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class MethodBudget(PartBudget):
    """The runs of a method, a seed each."""

    method: str
    runs: int
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScoringBudget(PartBudget):
    """The scores of a model and all that is trained of it.

    Engines, also those of judges and translators, start once; those that are not known are left out, as `assumed` says
    in sentences.
    """

    scores: int
    answers: int
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyBudget:
    """A study: at most, or where bundles or prompts are assumed about so much; `assumed_of` says what of which.

    `gpu` is what it runs on, "cpu" for CPUs. `disk` are bytes of its folder when it is largest, None where they are not
    known; `asked` what endpoints that judge are asked. `notes`, and what is `assumed`, are sentences.
    """

    gpu: str
    methods: tuple[MethodBudget, ...]
    scoring: tuple[ScoringBudget, ...]
    asked: tuple[Asked, ...]
    disk: int | None
    notes: tuple[str, ...]
    assumed: tuple[str, ...]
    assumed_of: tuple[str, ...] = ()

    @property
    def runs(self) -> int:
        """Of all methods and models."""
        return sum(each.runs for each in self.methods)

    @property
    def scores(self) -> int:
        """Of all models."""
        return sum(each.scores for each in self.scoring)

    @property
    def answers(self) -> int:
        """Of all scores."""
        return sum(each.answers for each in self.scoring)

    @property
    def parts(self) -> list[PartBudget]:
        """The runs and the scores."""
        return [*self.methods, *self.scoring]

    @property
    def hours(self) -> float | None:
        """Of all, one after another; None where they are not known of one."""
        return _sum([each.hours for each in self.parts])

    @property
    def gpu_hours(self) -> float | None:
        """Of all; None where they are not known of one."""
        return _sum([each.gpu_hours for each in self.parts])

    @property
    def bound(self) -> str:
        """What is said before a number of hours."""
        return "about" if self.assumed_of else "at most"

    @property
    def fits(self) -> bool:
        """Whether nothing is known not to fit."""
        return all(each.fits is not False for each in self.parts)

    @property
    def faults(self) -> Iterator[str]:
        """What does not fit, or is not known, each once."""
        return iter(dict.fromkeys(each.fault for each in self.parts if each.fault))


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def study_budget_lines(budget: StudyBudget) -> list[str]:
    """All numbers of the whole study, in words."""
    unit = "CPU-worker" if budget.gpu == "cpu" else "GPU"
    time = (
        f"how long is not known on {budget.gpu}"
        if budget.hours is None or budget.gpu_hours is None
        else f"{budget.bound} {budget.hours:,.3g} hours and {budget.gpu_hours:,.3g} {unit} hours on {budget.gpu}"
    )
    time += f"; {' and '.join(budget.assumed_of)} are assumed" if budget.assumed_of else ""
    disk = "" if budget.disk is None else f"; at most {budget.disk / GIB:,.0f} GiB in its folder"
    return [
        f"{counted(budget.runs, 'runs')} and {counted(budget.scores, 'scores')} of {budget.answers:,} answers: "
        f"{time}{disk}",
        *map(str, budget.asked),
        *([] if budget.asked else ["no endpoint is asked"]),
        *budget.notes,
        _fitting(budget),
        *(f"  {fault}" for fault in budget.faults),
        "not in it: utility, starting and failures, and waiting for endpoints",
        *(f"assumed: {each}" for each in budget.assumed),
    ]


def _fitting(budget: StudyBudget) -> str:
    if not budget.fits:
        return "it does not fit the cluster"
    if all(each.fits is None for each in budget.parts):
        return "whether it fits the cluster is not known"
    return "what is known of it fits the cluster"


def study_budget_tables(budget: StudyBudget) -> list[Table]:
    """The runs by model and method, and the scores by model."""
    of_methods = [
        row(
            f"{each.model} {each.method}",
            [f"{each.runs:,}", ABSENT if each.steps is None else f"{each.steps:,}", *_time_and_memory(each)],
        )
        for each in budget.methods
    ]
    of_scores = [
        row(each.model, [f"{each.scores:,}", f"{each.answers:,}", *_time_and_memory(each)]) for each in budget.scoring
    ]
    heads = ["hours", "GPU hours" if budget.gpu != "cpu" else "worker hours", "memory GiB", "it fits"]
    return [
        table(
            "Training", ["model and method", "runs", "steps each", *heads],
            [*of_methods, _all([f"{budget.runs:,}", ABSENT], budget.methods)],
            f"{budget.bound}, as `mlc-ray plan` counts it",
        ),
        table(
            "Scoring", ["model", "scores", "answers", *heads],
            [*of_scores, _all([f"{budget.scores:,}", f"{budget.answers:,}"], budget.scoring)],
            "answers of at most max_new_tokens",
        ),
    ]  # fmt: skip


def _time_and_memory(each: PartBudget) -> list[Any]:
    memory = ABSENT if each.needs is None or each.limit is None else f"{each.needs / GIB:.1f} of {each.limit / GIB:.1f}"
    said = {True: cell("yes"), False: cell("no", tone="alarm"), None: cell(ABSENT)}
    return [_shown(each.hours), _shown(each.gpu_hours), memory, said[each.fits]]


def _all(counts: list[str], rows: Sequence[PartBudget]) -> Row:
    hours = [_shown(_sum([each.hours for each in rows])), _shown(_sum([each.gpu_hours for each in rows]))]
    return row("all", [*counts, *hours, ABSENT, ABSENT], tone="strong")


def _shown(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def study_budget_json(budget: StudyBudget) -> dict[str, Any]:
    """The same numbers: hours, bytes, dollars."""
    usd = [each.usd for each in budget.asked]
    return {
        **asdict(budget),
        "hours": budget.hours,
        "gpu_hours": budget.gpu_hours,
        "fits": budget.fits,
        "requests": sum(each.requests for each in budget.asked),
        "usd": _sum(usd),
    }
