"""How often responses are in the language of their prompt, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from mlc_ray.report.collect import Model
from mlc_ray.report.rates import benchmarks, keys, summary_of
from mlc_ray.report.summaries import language, rate_cell
from mlc_ray.report.tables import NONE, Cell, Table, cell, row, table
from mlc_ray.report.text import percent
from mlc_ray.stats.rates import ALL_BENCHMARKS, KINDS, Interval
from mlc_ray.stats.response_languages import LanguageRow, Part
from mlc_ray.types import Kind

NOT_MEASURED = Cell("not measured", tone="dim")
RESPONSES_GONE = Cell("no responses.parquet", tone="dim")
NOT_TOLD = Cell("not told", tone="dim")
_PARTS: tuple[tuple[Part, str], ...] = (("refused", "refusals"), ("others", "others"))


def in_language_table(models: Sequence[Model], benchmark: str, *, limits: bool = True) -> Table | None:
    """A row per language (over all benchmarks one per benchmark) beneath the average; None where nothing was measured.

    Columns are of each kind and model. Small print has the interval, refusals and the others apart where there are
    both, the languages that stand there instead, and how many responses are in none that could be told; without
    `limits` only the most frequent other language.
    """
    if not any(model.result.told_by for model in models):
        return None
    of = "benchmark" if benchmark == ALL_BENCHMARKS else "language"
    heads: list[str | Cell] = [of]
    columns = []
    for kind in KINDS:
        for model, key in zip(models, keys(models), strict=True):
            summary = summary_of(model, benchmark)
            if summary is not None and kind not in summary.not_scored:
                heads.append(cell(f"{kind} %", key if len(models) > 1 else ""))
                columns.append(_column(model, kind, benchmark, limits=limits))
    names = list(dict.fromkeys(name for column in columns for name in column if name))
    rows = [row("average", [column.get("", NONE) for column in columns], "strong")]
    for name in names:
        first = language(name) if of == "language" else cell(name)
        rows.append(row(first, [column.get(name, NONE) for column in columns]))
    note = f"% of the responses whose language could be told{', 95 % intervals' if limits else ''}"
    return table("In the prompt's language", heads, rows, note)


def _column(model: Model, kind: Kind, benchmark: str, *, limits: bool) -> dict[str, Cell]:
    """Cells by name, the average under an empty one."""
    found = model.in_language
    if not model.result.told_by:
        return {"": NOT_MEASURED}
    if not found.rows:
        return {"": RESPONSES_GONE}
    column = {"": _average(model, kind, benchmark, limits=limits)}
    if benchmark == ALL_BENCHMARKS:
        names = [name for name in benchmarks([model]) if name != ALL_BENCHMARKS]
        return column | {name: _average(model, kind, name, limits=limits) for name in names}
    mine = [each for each in found.rows if (each.benchmark, each.kind) == (benchmark, kind)]
    return column | {each.language: _cell(each, limits=limits) for each in mine}


def _average(model: Model, kind: Kind, benchmark: str, *, limits: bool) -> Cell:
    found = model.in_language
    whole = rate_cell(found.mean(benchmark, kind), NOT_TOLD)
    parts = [(name, found.mean(benchmark, kind, part)) for part, name in _PARTS]
    more = [f"{name} {_with_limits(rate)}" for name, rate in parts if rate is not None]
    return cell(whole.text, *(whole.more if limits else ()), *(more if limits and len(more) > 1 else ()))


def _with_limits(rate: Interval) -> str:
    return f"{percent(rate.value)}, {percent(rate.low)} to {percent(rate.high)}"


def _cell(found: LanguageRow, *, limits: bool) -> Cell:
    if found.rate is None:
        return NOT_TOLD
    instead = [f"{code} {count}" for code, count in found.instead.items()]
    if not limits:
        return cell(percent(found.rate.value), *instead[:1])
    others = found.told - found.refused_told
    parts = (
        f"refusals {found.refused_same} of {found.refused_told}, others {found.same - found.refused_same} of {others}"
        if found.refused_told and others
        else f"{found.same} of {found.told}"
    )
    untold = found.n - found.told
    more = [parts, f"instead {', '.join(instead)}" if instead else "", f"{untold} not told" if untold else ""]
    return cell(percent(found.rate.value), *rate_cell(found.rate).more, *more)
