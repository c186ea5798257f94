"""Attack success and compliance by hazard category, which is the prompts' own label."""

from __future__ import annotations

from collections.abc import Sequence

from mlc_ray.report.collect import Model
from mlc_ray.report.rates import harmful_side, keys
from mlc_ray.report.summaries import attack_cell, compliance_cell
from mlc_ray.report.tables import NONE, Cell, Table, cell, row, table
from mlc_ray.stats.summaries import summarise


def category_table(models: Sequence[Model], benchmark: str) -> Table | None:
    """A row per category of a benchmark, two columns per model; None where prompts have no category."""
    asked = {model.label: [r for r in model.responses if r.benchmark == benchmark] for model in models}
    names = sorted({r.category for responses in asked.values() for r in responses if r.category})
    if not names:
        return None
    rows = []
    for name in names:
        cells: list[Cell] = []
        for model in models:
            chosen = [r.judged for r in asked[model.label] if r.category == name]
            (summary,) = summarise(chosen) if chosen else (None,)
            harmful = harmful_side(summary) if summary else None
            benign = summary.side("benign", "refused") if summary else None
            cells += [attack_cell(harmful) if harmful else NONE, compliance_cell(benign) if benign else NONE]
        rows.append(row(name, cells))
    short = [[key] if len(models) > 1 else [] for key in keys(models)]
    heads = [cell(head, *key) for key in short for head in ("attack success, at most %", "benign complied %")]
    note = "mean over languages, 95 % intervals; few prompts: compare with care"
    return table(f"Categories of {benchmark}", ["category", *heads], rows, note)
