"""Utility in a report: which results are of the same measurement, how it was made, and where that differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mlc_ray.report.tables import NONE, Table, cell, row, table
from mlc_ray.utility.file import UtilityRow

Measured: TypeAlias = Mapping[str, Sequence[UtilityRow]]
"""What was measured of each model, by its label."""


@dataclass(frozen=True)
class UtilityLine:
    """One metric of a task by one filter of answers: a result per model, None where it was not measured."""

    task: str
    metric: str
    filter: str
    results: tuple[UtilityRow | None, ...]

    @property
    def name(self) -> str:
        """The metric, with the filter where the harness used one: `exact_match, strict-match`."""
        return self.metric if self.filter in ("", "none") else f"{self.metric}, {self.filter}"


def utility_lines(measured: Measured) -> list[UtilityLine]:
    """Every measurement that any model has, in the order they first occur."""
    by_model = [{(row.task, row.metric, row.filter): row for row in rows} for rows in measured.values()]
    names = dict.fromkeys(name for found in by_model for name in found)
    return [UtilityLine(*name, tuple(found.get(name) for found in by_model)) for name in names]


def measured_how(result: UtilityRow) -> str:
    """How many questions, worked examples, and whether in the chat template: `first 20 of each task, 5-shot`."""
    parts = [
        "" if result.limit is None else f"first {result.limit} of each task",
        "" if result.num_fewshot is None else f"{result.num_fewshot}-shot",
        "chat template" if result.chat_template else "",
    ]
    return ", ".join(filter(None, parts))


def utility_table(measured: Measured) -> Table | None:
    """Tasks by models, each result with how it was measured; None if no model has any."""
    rows = []
    for line in utility_lines(measured):
        cells = []
        for score in line.results:
            if score is None:
                cells.append(NONE)
                continue
            error = "" if score.stderr is None else f"± {score.stderr:.4f}"
            n = "" if score.n is None else f"n = {score.n}"
            value = "no value" if score.value is None else f"{score.value:.4f}"
            cells.append(cell(value, error, n, measured_how(score)))
        rows.append(row(cell(line.task, line.name), cells))
    return table("Tasks", ["task", *measured], rows, "value ± standard error") if rows else None


def utility_warnings(measured: Measured) -> Iterator[str]:
    """A line per setting that has to be the same for all models, and is not: with the tasks it was different for."""
    places: dict[str, list[str]] = {}
    for line in utility_lines(measured):
        present = [(label, row) for label, row in zip(measured, line.results, strict=True) if row is not None]
        settings = {
            "limit": [(label, "all questions" if row.limit is None else str(row.limit)) for label, row in present],
            "few-shot examples": [
                (label, "unknown" if row.num_fewshot is None else str(row.num_fewshot)) for label, row in present
            ],
            "chat template": [(label, "used" if row.chat_template else "not used") for label, row in present],
            "conversation (chat)": [
                (label, json.dumps(row.chat, sort_keys=True, ensure_ascii=False)) for label, row in present if row.chat
            ],
        }
        for setting, found in settings.items():
            labels: dict[str, list[str]] = {}
            for label, value in found:
                labels.setdefault(value, []).append(label)
            if len(labels) > 1:
                each = "; ".join(f"{value}: {', '.join(names)}" for value, names in labels.items())
                tasks = places.setdefault(f"the {setting} differ{'s' * (setting != 'few-shot examples')} ({each})", [])
                if line.task not in tasks:
                    tasks.append(line.task)
    for difference, tasks in places.items():
        shown = ", ".join(tasks[:3]) + (f" and {len(tasks) - 3} more" if len(tasks) > 3 else "")
        yield f"Utility not measured the same way, {difference}: do not compare {shown}."
