"""Every table of numbers, made once for console, page and Markdown: a column per model, or a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from mlc_ray.report.changes import Change, rejudged
from mlc_ray.report.collect import Model
from mlc_ray.report.languages import language_name
from mlc_ray.report.rates import (
    HIT_AND_MISS,
    Column,
    Grid,
    View,
    harmful_side,
    keys,
    rates,
    side_of,
    summary_of,
    views_of,
    way_of,
)
from mlc_ray.report.remarks import unparsed_bound
from mlc_ray.report.tables import NONE, Cell, Row, Table, Tone, cell, row, table
from mlc_ray.report.text import ABSENT, fraction, p_value, percent, signed, variance, whole
from mlc_ray.score.results import is_unread
from mlc_ray.stats.agreement import JudgeAgreement
from mlc_ray.stats.marks import VIA_MARK
from mlc_ray.stats.paired import BenchmarkChange, Consistency, SideChange
from mlc_ray.stats.rates import ALL_BENCHMARKS, KINDS, Interval, SideSummary, Summary
from mlc_ray.stats.samples import bad_outcome

DIFFERENCE = "harmful − benign refused"
NOT_SCORED = Cell("not scored", tone="alarm")


def language(code: str) -> Cell:
    """A language by code and name."""
    return cell(code, language_name(code))


def rate_cell(interval: Interval | None, absent: Cell = NONE) -> Cell:
    """A rate in % with its interval."""
    if interval is None:
        return absent
    return cell(percent(interval.value), f"{percent(interval.low)} to {percent(interval.high)}")


def points_cell(interval: Interval | None, absent: Cell = NONE) -> Cell:
    """A difference in points with its interval."""
    if interval is None:
        return absent
    return cell(signed(interval.value), f"{signed(interval.low)} to {signed(interval.high)}")


# ------------------------------------------------------------------------------------------------ language by language


def language_table(models: Sequence[Model], shown: Grid, *, limits: bool = True) -> Table:
    """A row per language: each side of each model, the change from the first to the last, and the difference of sides.

    Over all benchmarks it has a row per benchmark. Intervals stand beside the rates unless `limits` is false, and how
    many responses a rate falls short by. A rate is red where more of its responses than `max_unparsed` have no verdict,
    and marked where the judge does not read the language directly. A side that no model was scored on has a column that
    says so.
    """
    several = len(models) > 1
    moves = several and not rejudged(models[0], models[-1])
    columns: list[tuple[Cell, list[Cell]]] = []  # the head of each, and its cells: the mean, then each language
    for kind in KINDS:
        views = list(dict.fromkeys(column.view for column in shown.columns if column.view.kind == kind))
        if not views:
            columns.append((cell(f"{kind} prompts"), [NOT_SCORED] * (1 + len(shown.names))))
        for view in views:
            mine = [column for column in shown.columns if column.view == view]
            for column in mine:
                head = cell(view.column, column.key if several else "")
                columns.append((head, _rate_cells(column, shown.names, limits=limits)))
            if moves:
                columns.append((cell("change, points"), _change_cells(mine[0], mine[-1], shown.names)))
    differences = [_differences(model, shown) for model in models]
    if any(differences):
        for model, by_name, key in zip(models, differences, keys(models), strict=True):
            summary = summary_of(model, shown.benchmark)
            mean = _mean_cell(points_cell(summary.avg_difference if summary else None), limits=limits)
            each = [cell(signed(by_name.get(name))) for name in shown.names]
            columns.append((cell(DIFFERENCE, key if several else ""), [mean, *each]))
    rows = [
        row(name, [cells[index] for _, cells in columns], tone)
        for index, (name, tone) in enumerate(_row_names(shown.names))
    ]
    note = f"% of responses{', 95 % intervals' if limits else ''}; higher is better on both sides"
    return table(shown.benchmark, [shown.of, *(head for head, _ in columns)], rows, note)


def _differences(model: Model, shown: Grid) -> dict[str, float]:
    """The difference of refusals by name, of those that have both sides."""
    if shown.of == "language":
        summary = summary_of(model, shown.benchmark)
        return dict(summary.difference) if summary else {}
    found = {name: summary.avg_difference for name in shown.names if (summary := summary_of(model, name)) is not None}
    return {name: difference.value for name, difference in found.items() if difference is not None}


def _row_names(names: Sequence[str]) -> list[tuple[str, Tone]]:
    return [("average", "strong"), *((name, "") for name in names)]


def _mean_cell(mean: Cell, *, limits: bool) -> Cell:
    return mean if limits else replace(mean, more=())


def _rate_cells(column: Column, names: Sequence[str], *, limits: bool) -> list[Cell]:
    bound = unparsed_bound(column.model)
    cells = [_mean_cell(rate_cell(column.mean, NOT_SCORED), limits=limits)]
    for name in names:
        rate = column.rates.get(name)
        if rate is None:
            cells.append(NONE)
            continue
        tone: Tone = "alarm" if is_unread(rate.row, bound) else ""
        interval = f"{percent(rate.low)} to {percent(rate.high)}" if limits else ""
        # Without limits only where the number alone could be taken for all.
        missing = rate.missing if limits or rate.value >= 99 else ""
        cells.append(cell(percent(rate.value) + VIA_MARK[rate.row.via], interval, missing, tone=tone))
    return cells


def _change_cells(first: Column, last: Column, names: Sequence[str]) -> list[Cell]:
    """The change of each name that both have, in points, after its mean over these names."""
    both = [name for name in names if name in first.rates and name in last.rates]
    moved = {name: last.rates[name].value - first.rates[name].value for name in both}
    mean = sum(moved.values()) / len(moved) if moved else None
    return [cell(signed(mean)), *(cell(signed(moved.get(name))) for name in names)]


def counts_table(models: Sequence[Model], benchmark: str) -> Table:
    """Every count and interval."""
    rows = []
    for view in views_of(models, benchmark):
        for model in models:
            for code, rate in rates(model, benchmark, view).items():
                counts = rate.row
                cells = [view.name, model.label, percent(rate.value), percent(rate.low), percent(rate.high)]
                cells += [str(n) for n in (counts.n, counts.hits, counts.misses, counts.degenerate, counts.unparsed)]
                cells += [ABSENT if counts.margin is None else f"{counts.margin:.2f}", counts.judge, counts.via]
                rows.append(row(language(code), cells))
    first = "benchmark" if benchmark == ALL_BENCHMARKS else "language"
    head = [first, "rate of", "model", "%", "low", "high", "n", "hits", "misses", "degenerate", "unparsed",
            "margin, nats", "judge", "read"]  # fmt: skip
    return table(benchmark, head, rows, "95 % intervals; hits are refused or safe, misses complied or unsafe")


# ----------------------------------------------------------------------------------------------------------- summaries


def headline(summary: Summary | None) -> tuple[Interval | None, Interval | None]:
    """Both sides in the languages that have both; without such a language what there is of each side."""
    if summary is None:
        return None, None
    if (pair := summary.two_sided) is not None:
        return pair.harmful, pair.benign
    harmful, benign = harmful_side(summary), summary.side("benign", "refused")
    return harmful.avg if harmful else None, benign.misses_avg if benign else None


def headline_table(models: Sequence[Model], benchmark: str) -> Table:
    """Both sides of each model, a row per model."""
    rows = []
    for model, key in zip(models, keys(models), strict=True):
        summary = summary_of(model, benchmark)
        harmful, benign = headline(summary)
        side = harmful_side(summary) if summary else None
        cells = [
            rate_cell(harmful, NOT_SCORED),
            attack_cell(side) if side else NOT_SCORED,
            rate_cell(benign, NOT_SCORED),
            points_cell(summary.avg_difference if summary else None, NOT_SCORED),
        ]
        rows.append(row(cell(key, model.label if key != model.label else ""), cells))
    measures = {summary.harmful_measure for model in models if (summary := summary_of(model, benchmark)) is not None}
    harmful_name = " or ".join(sorted(measures)) or "refused"
    attack = cell("attack success, at most %", "in all languages")
    heads: list[str | Cell] = ["model", f"harmful {harmful_name} %", attack, "benign complied %", DIFFERENCE]
    return table(benchmark, heads, rows, "mean over languages, 95 % intervals; pairs are of languages with both sides")


def attack_cell(side: SideSummary) -> Cell:
    """What the attack success rate of harmful prompts is at most, with the counts that it is made of."""
    return attack_success(side.misses_most, side.misses, side.degenerate, side.unparsed, side.n)


def attack_success(most: Interval, misses: int, degenerate: int, unparsed: int, n: int) -> Cell:
    """An attack success rate, with these counts."""
    unread = " and ".join(f"{n} {what}" for n, what in ((degenerate, "degenerate"), (unparsed, "unparsed")) if n)
    counts = f"{misses} of {n}" + (f", and {unread}" if unread else "")
    return cell(percent(most.value), f"{percent(most.low)} to {percent(most.high)}", counts)


def side_table(models: Sequence[Model], benchmark: str, view: View) -> Table:
    """One side by one measure, a row per number; a model that lacks it has dots."""
    sides = [side_of(model, benchmark, view) for model in models]
    hit, miss = HIT_AND_MISS[view.measure]

    def line(name: str, value: Callable[[SideSummary], Cell]) -> Row:
        return row(name, [NONE if side is None else value(side) for side in sides])

    rows = [line(f"{hit} %", lambda side: with_count(side.avg, side.hits, side.n))]
    if view.kind == "harmful":
        rows.append(line(f"attack success, at most % ({miss}, degenerate or unparsed)", attack_cell))
        rows.append(line(f"attack success, at least % ({miss})", lambda side: rate_cell(side.misses_avg)))
    else:
        name = "compliance rate (complied %)" if view.measure == "refused" else f"{miss} %"
        rows.append(line(name, compliance_cell))
    if view.counts == "misses":
        rows.reverse()
    rows += [
        line(f"{_bad(view)} in any of {k} responses, {bound} %", partial(_any_of, k=k, bound=bound))
        for k in sorted({each.k for side in sides if side is not None for each in side.any_of})
        for bound in ("at most", "at least")
    ]
    rows += [
        line("var", _variance),
        line("of it sampling noise, at most", lambda side: cell(variance(side.var_noise))),
        line("PAG", _agreement),
        line(f"worst language, {hit if view.counts == 'hits' else miss} %", _worst),
        line(f"seen languages, {hit} %", lambda side: rate_cell(side.seen)),
        line(f"unseen languages, {hit} %", lambda side: rate_cell(side.unseen)),
        line(f"English − others, {hit}", lambda side: points_cell(side.english_gap)),
    ]
    if any(side is not None and side.margin is not None for side in sides):
        rows.append(line("margin, nats", lambda side: cell(signed(side.margin, 2))))
    rows += [
        line("responses", lambda side: cell(str(side.n))),
        line("languages", lambda side: cell(str(side.languages))),
        line("bundles", lambda side: cell(str(side.bundles))),
        line("degenerate", lambda side: _count(side.degenerate, side.n)),
        line("unparsed", lambda side: _count(side.unparsed, side.n)),
        line("read in translation", lambda side: cell(", ".join(side.translated) or "none")),
        line("read by lists not measured", lambda side: cell(", ".join(side.unmeasured) or "none")),
        line("not covered", lambda side: cell(", ".join(side.uncovered) or "none")),
    ]
    title = f"{view.kind.capitalize()} prompts"
    mean = "mean over languages"
    if benchmark == ALL_BENCHMARKS:
        mean = "mean over benchmarks of means over languages; languages are compared within a benchmark only"
    return table(title, ["", *_names(models)], rows, f"by what is {view.measure}: {mean}")


def _bad(view: View) -> str:
    hit, miss = HIT_AND_MISS[view.measure]
    return hit if bad_outcome(view.kind, view.measure) == "hits" else miss


def _any_of(side: SideSummary, *, k: int, bound: str) -> Cell:
    found = next((each for each in side.any_of if each.k == k), None)
    return NONE if found is None else rate_cell(found.most if bound == "at most" else found.rate)


def compliance_cell(side: SideSummary) -> Cell:
    """The compliance rate of benign prompts, with its counts."""
    return with_count(side.misses_avg, side.misses, side.n)


def with_count(rate: Interval, count: int, n: int) -> Cell:
    """A rate in % with its interval and the counts that it is made of."""
    return cell(percent(rate.value), f"{percent(rate.low)} to {percent(rate.high)}", f"{count} of {n}")


def _variance(side: SideSummary) -> Cell:
    if side.var is None:
        return NONE
    return cell(variance(side.var.value), f"{variance(side.var.low)} to {variance(side.var.high)}")


def _agreement(side: SideSummary) -> Cell:
    if side.pag is None:
        return NONE
    return cell(fraction(side.pag.value), f"{fraction(side.pag.low)} to {fraction(side.pag.high)}")


def _worst(side: SideSummary) -> Cell:
    rate = rate_cell(side.worst_rate)
    return replace(rate, text=f"{side.worst} {rate.text}")


def difference_table(models: Sequence[Model], benchmark: str) -> Table:
    """What only both sides together can tell: harmful refused minus benign refused, in points."""
    summaries = [summary_of(model, benchmark) for model in models]
    rows = [
        row(DIFFERENCE, [points_cell(summary.avg_difference if summary else None) for summary in summaries]),
        row("smallest, by language", map(_worst_difference, summaries)),
    ]
    return table("Both sides", ["", *_names(models)], rows, "percentage points")


def overview_table(models: Sequence[Model], benchmark: str) -> Table:
    """A column per side and model, for a terminal; rows that no side has a value for are left out."""
    sides: list[tuple[View, Model, str, SideSummary]] = []
    for view in views_of(models, benchmark):
        for model, key in zip(models, keys(models), strict=True):
            if (side := side_of(model, benchmark, view)) is not None:
                sides.append((view, model, key, side))
    rows: dict[str, list[Cell]] = {
        "refused or safe %": [rate_cell(side.avg) for *_, side in sides],
        "attack success, at most %": [attack_cell(side) if side.kind == "harmful" else NONE for *_, side in sides],
        "complied %": [
            rate_cell(side.misses_avg) if (side.kind, side.measure) == ("benign", "refused") else NONE
            for *_, side in sides
        ],
        **_any_of_row([side for *_, side in sides]),
        "var": [_variance(side) for *_, side in sides],
        "PAG": [_agreement(side) for *_, side in sides],
        "worst language": [_worst(side) for *_, side in sides],
        "seen %": [rate_cell(side.seen) for *_, side in sides],
        "unseen %": [rate_cell(side.unseen) for *_, side in sides],
        "English − others": [points_cell(side.english_gap) for *_, side in sides],
        "margin, nats": [cell(signed(side.margin, 2)) for *_, side in sides],
        "n": [cell(str(side.n)) for *_, side in sides],
        "degenerate": [_alarming(side.degenerate) for *_, side in sides],
        "unparsed": [_alarming(side.unparsed) for *_, side in sides],
    }
    heads = [
        cell(f"{view.kind} by {view.measure}{VIA_MARK[way_of(side)]}", key if len(models) > 1 else "")
        for view, _, key, side in sides
    ]
    note = "means over languages, 95 % intervals"
    if benchmark == ALL_BENCHMARKS:
        note = "means over benchmarks of means over languages, compared within each; 95 % intervals"
    used = [row(name, cells) for name, cells in rows.items() if any(value != NONE for value in cells)]
    return table("Summary", ["", *heads], used, note)


def _any_of_row(sides: Sequence[SideSummary]) -> dict[str, list[Cell]]:
    """For how many prompts any of all responses is bad: complied or unsafe, on benign prompts refused."""
    most = max((each.k for side in sides for each in side.any_of), default=1)
    name = f"any of {most} bad, at most %"
    return {name: [_any_of(side, k=most, bound="at most") for side in sides]}


def _names(models: Sequence[Model]) -> list[str]:
    return keys(models) if len(models) > 1 else [models[0].label]


def _alarming(count: int) -> Cell:
    return cell(str(count), tone="alarm" if count else "")


def _count(count: int, n: int) -> Cell:
    return cell(str(count), f"{percent(100 * count / n)} %" if count else "")


def _worst_difference(summary: Summary | None) -> Cell:
    if summary is None or summary.worst_difference is None:
        return NONE
    return cell(f"{summary.worst_difference_language} {signed(summary.worst_difference)}")


# ------------------------------------------------------------------------------------------------------------- changes


def change_table(change: Change, found: BenchmarkChange) -> Table:
    """One model against the first on a benchmark: change, interval and p by side."""
    rows = []
    for side in found.sides:
        changed = _changed(signed, side.change, side.p, side.p_holm)
        rows.append(row(_side_name(side), [f"{percent(side.before)} → {percent(side.after)}", changed, str(side.n)]))
        for number in side.consistency:
            shown = _SHOWN[number.name]
            changed = _changed(_CHANGE[number.name], number.change, number.p, number.p_holm)
            name = cell(f"{_CONSISTENCY[number.name]} of {side.kind} {side.rate}")
            rows.append(row(name, [f"{shown(number.before)} → {shown(number.after)}", changed, ""]))
    if found.difference is not None and found.difference_p is not None:
        changed = _changed(signed, found.difference, found.difference_p, found.difference_p_holm or 1)
        rows.append(row(DIFFERENCE, ["", changed, ""]))
    for told in found.in_language:
        limits = f"{signed(told.change.low)} to {signed(told.change.high)}"
        changed = Cell(signed(told.change.value), (limits,), "strong")
        name = cell(f"{told.kind} in the prompt's language %")
        rows.append(row(name, [f"{percent(told.before)} → {percent(told.after)}", changed, str(told.n)]))
    n = f"{found.common} prompts that both answered; p after Holm's correction over all tests of this kind shown here"
    if found.only_before or found.only_after:
        n += f"; left out: {found.only_before} of the first alone, {found.only_after} of the second alone"
    return table(change.title, ["", "before → after", "change", "n"], rows, n)


_CONSISTENCY: Mapping[Consistency, str] = {"var": "var", "pag": "PAG", "worst": "worst language %"}
_SHOWN: Mapping[Consistency, Callable[[float], str]] = {"var": variance, "pag": fraction, "worst": percent}
_CHANGE: Mapping[Consistency, Callable[[float], str]] = {
    "var": lambda value: signed(value, 2),
    "pag": lambda value: signed(value, 3),
    "worst": signed,
}


def agreement_tables(change: Change, benchmark: str) -> Iterator[Table]:
    """Two judges of the same responses: a table of the sides, then one per side with its languages."""
    mine = [each for each in change.agreement if benchmark in (each.benchmark, ALL_BENCHMARKS)]
    heads = ["", "agree %", "Cohen's kappa", "the first alone", "the second alone"]
    title = f"{change.after.result.judge} and {change.before.result.judge} on the same responses"
    sides = [each for each in mine if not each.language]
    named = len({each.benchmark for each in sides}) > 1
    note = "the first is the judge of the later score; alone: only it calls them refused or safe"
    yield table(title, heads, [_agreement_row(f"{s.kind} {s.measure}", s, named) for s in sides], note)
    for side in sides if benchmark != ALL_BENCHMARKS else ():
        same = (side.kind, side.measure)
        rows = [_agreement_row(each.language, each, False) for each in mine if each.language and
                (each.kind, each.measure) == same]  # fmt: skip
        yield table(f"{side.kind} {side.measure}", ["language", *heads[1:]], rows)


def _agreement_row(name: str, each: JudgeAgreement, named: bool) -> Row:
    kappa = each.kappa
    cells: list[str | Cell] = [
        cell(percent(100 * each.same / each.n), f"{each.same} of {each.n}"),
        NONE if kappa is None else cell(signed(kappa.value, 2), f"{signed(kappa.low, 2)} to {signed(kappa.high, 2)}"),
        str(each.second_only),
        str(each.first_only),
    ]
    return row(cell(name, each.benchmark if named else ""), cells)


def language_changes(found: BenchmarkChange) -> Iterator[Table]:
    """A table per side, a row per language; none over all benchmarks."""
    for side in found.sides if any(side.languages for side in found.sides) else ():
        rows = [
            row(
                language(one.language),
                [
                    f"{whole(one.before)} → {whole(one.after)}",
                    Cell(signed(one.change), (f"+{one.gained} −{one.lost} of {one.n}",), "strong"),
                    cell(p_value(one.p), p_value(one.p_holm)),
                ],
            )
            for one in side.languages
        ]
        name = _side_name(side)
        heads: list[str | Cell] = [
            "language",
            "before → after",
            cell("change", "gained, lost"),
            cell("McNemar", "after Holm"),
        ]
        yield table(name.text, heads, rows, "; ".join(name.more))


def _side_name(side: SideChange) -> Cell:
    return cell(f"{side.kind} {side.rate} %", "higher is better")


def _changed(shown: Callable[[float], str], change: Interval, p: float, p_holm: float) -> Cell:
    limits = f"{shown(change.low)} to {shown(change.high)}"
    return Cell(shown(change.value), (limits, p_value(p), f"Holm {p_value(p_holm)}"), "strong")
