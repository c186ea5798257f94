"""Attack success and compliance by hazard category, which is the prompts' own label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mlc_ray.report.collect import Model, Response
from mlc_ray.report.rates import keys, summary_of
from mlc_ray.report.summaries import attack_success, with_count
from mlc_ray.report.tables import NONE, Cell, Table, cell, row, table
from mlc_ray.stats.rates import outcome
from mlc_ray.stats.summaries import miss_rate
from mlc_ray.types import Kind, Measure


def category_table(models: Sequence[Model], benchmark: str) -> Table | None:
    """A row per category of a benchmark, two columns per model; None where prompts have no category."""
    asked: list[dict[tuple[str, Kind], list[Response]]] = []
    for model in models:
        chosen: dict[tuple[str, Kind], list[Response]] = {}
        for response in model.responses:
            if response.benchmark == benchmark:
                chosen.setdefault((response.category, response.kind), []).append(response)
        asked.append(chosen)
    names = sorted({name for chosen in asked for name, _ in chosen if name})
    if not names:
        return None
    rows = []
    for name in names:
        cells: list[Cell] = []
        for model, chosen in zip(models, asked, strict=True):
            summary = summary_of(model, benchmark)
            measure = summary.harmful_measure if summary else "refused"
            cells += [
                _cell(chosen.get((name, "harmful"), ()), measure),
                _cell(chosen.get((name, "benign"), ()), "refused"),
            ]
        rows.append(row(name, cells))
    short = [[key] if len(models) > 1 else [] for key in keys(models)]
    heads = [cell(head, *key) for key in short for head in ("attack success, at most %", "benign complied %")]
    note = "mean over languages, 95 % intervals; few prompts: compare with care"
    return table(f"Categories of {benchmark}", ["category", *heads], rows, note)


def _cell(responses: Sequence[Response], measure: Measure) -> Cell:
    records = [response.judged for response in responses]
    counts = Counter(outcome(record, measure) for record in records)
    if not records or counts[None]:
        return NONE
    n = len(records)
    if responses[0].kind == "harmful":
        most = miss_rate(records, measure, most=True)
        return attack_success(most, counts["misses"], counts["degenerate"], counts["unparsed"], n)
    return with_count(miss_rate(records, measure), counts["misses"], n)
