"""Tables of a judge's errors, and of rates corrected for them."""

from __future__ import annotations

from collections.abc import Sequence

from mlc_ray.report.collect import Model
from mlc_ray.report.summaries import language
from mlc_ray.report.tables import Cell, Table, cell, row, table
from mlc_ray.report.text import ABSENT, percent
from mlc_ray.score.calibration import Calibration
from mlc_ray.stats.calibration import Errors, Limits

ALL = "all"


def errors_table(calibration: Calibration) -> Table:
    """Precision and recall per measure, language and judge, and what is not measured."""
    rows = []
    for errors in [*calibration.errors, *pooled(calibration.errors)]:
        measured = calibration.measured(errors)
        mark = "" if measured else f"not measured: {errors.labels} labels of the rarer class"
        called = errors.hits_called + errors.others_called
        cells: list[str | Cell] = [
            errors.measure,
            _share(errors.precision, errors.precision_limits, errors.hits_called, called),
            _share(errors.recall, errors.recall_limits, errors.hits_called, errors.hits),
            str(errors.others),
            str(errors.unparsed),
            errors.judge,
            mark,
        ]
        rows.append(
            row("all" if errors.language == ALL else language(errors.language), cells, tone="" if measured else "dim")
        )
    head = ["language", "measure", "precision", "recall", "other responses", "unparsed", "judge", ""]
    note = f"95 % intervals; not measured: fewer than {calibration.min_labels} labels of either class"
    return table("errors of the judge", head, rows, note)


def _share(value: float | None, limits: Limits | None, count: int, of: int) -> Cell:
    if value is None or limits is None:
        return cell(ABSENT)
    return cell(f"{value:.2f}", f"{count}/{of}", f"{limits[0]:.2f} to {limits[1]:.2f}")


def pooled(errors: Sequence[Errors]) -> list[Errors]:
    """The same counts over all languages, per measure and judge, with the language `ALL`."""
    found = []
    for measure, judge in dict.fromkeys((each.measure, each.judge) for each in errors):
        own = [each for each in errors if (each.measure, each.judge) == (measure, judge)]
        counts = ("hits", "hits_called", "others", "others_called", "unparsed")
        found.append(Errors(measure, ALL, judge, **{name: sum(getattr(each, name) for each in own) for name in counts}))
    return found


def corrected_table(models: Sequence[Model], benchmark: str) -> Table | None:
    """The counted rates of a benchmark, and beside them those corrected; None where no score has a calibration."""
    rows = []
    for model in models:
        for each in model.result.corrected:
            if each.benchmark != benchmark:
                continue
            found = each.corrected
            value = ABSENT if found is None else percent(100 * found.value)
            limits = "" if found is None else f"{percent(100 * found.low)} to {percent(100 * found.high)}"
            said = each.why or ("clipped to 0 or 100" if found is not None and found.clipped else "")
            cells: list[str | Cell] = [
                model.label,
                each.kind,
                each.measure,
                percent(100 * each.rate),
                cell(value, limits),
                said,
            ]
            rows.append(row(language(each.language), cells))
    if not rows:
        return None
    head = ["language", "model", "prompts", "measure", "counted %", "corrected %", ""]
    note = "for the judge's errors on labelled responses, with 95 % intervals; the headline is what was counted"
    return table(f"{benchmark}, corrected", head, rows, note)
