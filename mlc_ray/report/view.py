"""The content of the page as plain data: the templates only lay it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlc_ray.config import dump_yaml
from mlc_ray.report.calibration import corrected_table
from mlc_ray.report.categories import category_table
from mlc_ray.report.changes import Change, before_and_after, changes, rejudged
from mlc_ray.report.charts import Chart, Line, slope_chart
from mlc_ray.report.collect import Collection, Model, Training
from mlc_ray.report.decisions import judgement_tables
from mlc_ray.report.heat_map import HeatMap, heat_map
from mlc_ray.report.in_language import in_language_table
from mlc_ray.report.rates import Grid, benchmarks, grid, keys, languages_of, summary_of, views_of
from mlc_ray.report.remarks import remarks, warnings
from mlc_ray.report.samples import Samples, samples
from mlc_ray.report.search import Search
from mlc_ray.report.summaries import (
    agreement_tables,
    change_table,
    counts_table,
    difference_table,
    headline,
    headline_table,
    language_changes,
    points_cell,
    side_table,
)
from mlc_ray.report.tables import Cell, Table
from mlc_ray.report.text import percent, whole
from mlc_ray.report.training import ChartGroup, chart_groups, training_charts
from mlc_ray.report.utility import utility_table
from mlc_ray.stats.marks import VIA_MARK, mark_lines
from mlc_ray.stats.rates import Interval, Summary, TwoSided

MOST_CARDS = 4
"""With more models the headline is a table."""


@dataclass(frozen=True)
class Meter:
    """A side of a card: its rate with limits, all as text, and where they lie on a bar from 0 to 100."""

    kind: str
    name: str
    value: str = ""
    limits: str = ""
    left: float = 0.0
    low: float = 0.0
    width: float = 0.0


@dataclass(frozen=True)
class Card:
    """One model of the headline; `key` is its letter where its label is too long for columns."""

    key: str
    label: str
    where: str
    meters: tuple[Meter, ...]
    difference: Cell | None
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Lead:
    """Two models in a sentence: the rates of both sides, before and after."""

    before: str
    after: str
    harmful: tuple[str, str, str]
    benign: tuple[str, str, str]


@dataclass(frozen=True)
class ShownChange:
    """A comparison on one benchmark; `why` says why there is none. `folded` names what `languages` are."""

    title: str
    why: str = ""
    table: Table | None = None
    folded: str = "Change by language"
    languages: tuple[Table, ...] = ()
    not_compared: str = ""


@dataclass(frozen=True)
class Benchmark:
    """All tables and charts of one benchmark."""

    name: str
    heat_map: HeatMap
    slopes: tuple[Chart, ...]
    changes: tuple[ShownChange, ...]
    difference: Table
    sides: tuple[Table, ...]
    counts: Table
    corrected: Table | None
    categories: Table | None
    in_language: Table | None


@dataclass(frozen=True)
class Facts:
    """How a score or a training was made: facts by name, and its settings as text (empty: left out)."""

    title: str
    facts: Mapping[str, str]
    settings: str


@dataclass(frozen=True)
class View:
    """The whole page. `benchmarks` has the headline's first, and is empty where nothing was scored."""

    title: str
    facts: str
    warnings: tuple[str, ...]
    lead: Lead | None
    cards: tuple[Card, ...]
    headline: Table | None
    searches: tuple[Search, ...]
    benchmarks: tuple[Benchmark, ...]
    compared: str
    models: int
    judgement: tuple[Table, ...]
    utility: Table | None
    runs: tuple[str, ...]
    training: tuple[ChartGroup, ...]
    samples: tuple[Samples, ...]
    notes: tuple[str, ...]
    provenance: tuple[Facts, ...]
    terms: Mapping[str, str]


def view_of(collection: Collection, harmful_samples: int, *, public: bool = False, redact: bool = False) -> View:
    """What the page of `collection` shows.

    Args:
        collection: All that there is.
        harmful_samples: Responses to harmful prompts per model that are shown.
        public: Without folders and settings.
        redact: Of these responses the opening alone.
    """
    models = collection.models
    names = benchmarks(models)
    compared = changes(collection)
    runs = [training for training in collection.trainings if training.metrics]
    cards = [_card(model, key, names[0]) for model, key in zip(models, keys(models), strict=True)]
    return View(
        title=_title(collection),
        facts=_facts_line(collection, names),
        warnings=tuple(warnings(models)) if models or not runs else (_NOTHING_SCORED,),
        lead=_lead(models, names[0]) if before_and_after(models) else None,
        cards=tuple(cards) if len(models) <= MOST_CARDS else (),
        headline=headline_table(models, names[0]) if len(models) > MOST_CARDS else None,
        searches=collection.searches,
        benchmarks=tuple(_benchmark(models, compared, name) for name in names),
        compared=_TWO_JUDGES if compared and all(change.agreement for change in compared) else "What changed",
        models=len(models),
        judgement=tuple(judgement_tables(models)),
        utility=utility_table({model.label: model.utility for model in models}),
        runs=tuple(run.label for run in runs),
        training=tuple(training_charts(runs, chart_groups(runs))),
        samples=tuple(samples(models, harmful_samples, redact=redact)),
        notes=collection.notes,
        provenance=tuple(
            _without_places(facts) if public else facts
            for facts in (*map(_model_facts, models), *map(_training_facts, collection.trainings))
        ),
        terms=_TERMS,
    )


_TWO_JUDGES = "Two judges of the same responses"
_NOTHING_SCORED = "Nothing was scored yet: training curves alone say nothing of safety."

# --------------------------------------------------------------------------------------------- the first screen


def _title(collection: Collection) -> str:
    labels = [model.label for model in collection.models]
    if collection.searches:
        return f"Safety: search {', '.join(search.label for search in collection.searches)}"
    if not labels:
        return f"Training of {', '.join(training.label for training in collection.trainings)}"
    if len(labels) == 1:
        return f"Safety: {labels[0]}"
    if len(labels) == 2 and rejudged(*collection.models):
        return f"Safety: {labels[0]} and {labels[1]}, two judges of the same responses"
    if len(labels) == 2:
        return f"Safety: {labels[1]} against {labels[0]}"
    return f"Safety: {len(labels)} models"


def _facts_line(collection: Collection, names: Sequence[str]) -> str:
    models = collection.models
    facts = []
    if models:
        codes = languages_of(models, names[0])
        facts.append(f"{len(codes)} language{'s' * (len(codes) != 1)}")
        facts.append(f"judge {', '.join(dict.fromkeys(model.result.judge for model in models))}")
        facts.append(f"on {', '.join(names)}")
    runs = [training.label for training in collection.trainings]
    if runs:
        facts.append(f"run{'s' * (len(runs) > 1)} {', '.join(runs)}")
    return " · ".join(facts)


def _lead(models: Sequence[Model], benchmark: str) -> Lead | None:
    """Both sides of two models; None if a side is not known, or not judged by the same measure."""
    summaries = [summary for model in models if (summary := summary_of(model, benchmark)) is not None]
    pairs: list[TwoSided] = [pair for summary in summaries if (pair := summary.two_sided) is not None]
    if len(pairs) != 2 or summaries[0].harmful_measure != summaries[1].harmful_measure:
        return None
    if pairs[0].languages != pairs[1].languages:
        return None
    first, last = pairs
    return Lead(
        models[0].label,
        models[-1].label,
        (f"harmful {summaries[0].harmful_measure}", whole(first.harmful.value), whole(last.harmful.value)),
        ("benign complied", whole(first.benign.value), whole(last.benign.value)),
    )


def _card(model: Model, key: str, benchmark: str) -> Card:
    summary = summary_of(model, benchmark)
    where = Path(model.result.model).name or model.result.model
    difference = summary.avg_difference if summary is not None else None
    return Card(
        key=key if key != model.label else "",
        label=model.label,
        where=where if where != model.label else "",
        meters=_meters(summary),
        difference=None if difference is None else points_cell(difference),
        remarks=tuple(remarks(summary)) if summary is not None else (),
    )


def _meters(summary: Summary | None) -> tuple[Meter, ...]:
    harmful, benign = headline(summary)
    measure = summary.harmful_measure if summary else "refused"
    pair = summary.two_sided if summary else None
    where = f"{len(pair.languages)} language{'s' * (len(pair.languages) != 1)}" if pair else ""
    return (
        _meter("harmful", f"Harmful {measure}", harmful, where),
        _meter("benign", "Benign complied", benign, where),
    )


def _meter(kind: str, name: str, interval: Interval | None, where: str) -> Meter:
    if interval is None:
        return Meter(kind, name)
    low, high = max(0.0, interval.low), min(100.0, interval.high)
    limits = f"{percent(interval.low)} to {percent(interval.high)}" + (f"; {where}" if where else "")
    return Meter(kind, name, percent(interval.value), limits, round(interval.value, 1), round(low, 1), high - low)


# --------------------------------------------------------------------------------------------- benchmarks


def _benchmark(models: Sequence[Model], compared: Sequence[Change], name: str) -> Benchmark:
    shown = grid(models, name)
    return Benchmark(
        name=name,
        heat_map=heat_map(models, shown),
        slopes=tuple(_slopes(models, shown)) if before_and_after(models) else (),
        changes=tuple(_shown_change(change, name) for change in compared),
        difference=difference_table(models, name),
        sides=tuple(side_table(models, name, view) for view in views_of(models, name)),
        counts=counts_table(models, name),
        corrected=corrected_table(models, name),
        categories=category_table(models, name),
        in_language=in_language_table(models, name),
    )


def _slopes(models: Sequence[Model], shown: Grid) -> list[Chart]:
    charts = []
    for view in dict.fromkeys(column.view for column in shown.columns):
        columns = [column for column in shown.columns if column.view == view]
        lines = [
            Line(code, [column.rates[code].value if code in column.rates else None for column in columns])
            for code in shown.names
            if any(code in column.rates for column in columns)
        ]
        if not lines:
            continue
        mean = [column.mean.value if column.mean else None for column in columns]
        title = f"{view.title}, % by {shown.of}; average {whole(mean[0])} before, {whole(mean[-1])} after"
        drawn = [*lines, Line("avg", mean, strong=True)]
        note = f"%, by {shown.of}; lines that fall are dashed"
        charts.append(slope_chart(title, keys(models), drawn, caption=view.title, note=note))
    return charts


def _shown_change(change: Change, benchmark: str) -> ShownChange:
    if change.agreement:
        first, *languages = agreement_tables(change, benchmark)
        return ShownChange(change.title, table=first, folded="Agreement by language", languages=tuple(languages))
    found = change.on(benchmark)
    if change.comparison is None or found is None:
        return ShownChange(change.title, change.lacking(benchmark))
    return ShownChange(
        change.title,
        table=change_table(change, found),
        languages=tuple(language_changes(found)),
        not_compared=", ".join(change.comparison.not_compared),
    )


# --------------------------------------------------------------------------------------------- how it was made


def _model_facts(model: Model) -> Facts:
    result = model.result
    facts = {
        "model": result.model,
        "loaded from": result.resolved,
        "fingerprint": result.fingerprint,
        "prompts": result.prompts,
        "judge": result.judge,
        "languages of responses": result.told_by or "not measured",
        "responses": f"{result.responses}, {result.unparsed} without a verdict",
        "ended by": ", ".join(f"{reason} {count}" for reason, count in result.finish.items()),
        "scored": result.created,
        "folder": str(result.folder),
        "versions": _versions(result.versions),
    }
    settings = dump_yaml(result.config)
    return Facts(f"Score: {model.label}", _known(facts), settings)


def _training_facts(training: Training) -> Facts:
    known = training.facts
    fingerprints = known.get("fingerprints") or {}
    facts = {
        "folder": training.folder,
        "bundles": known.get("bundles", ""),
        "languages": ", ".join(known.get("languages") or ()),
        "optimizer steps": known.get("total_steps", ""),
        "fingerprints": ", ".join(f"{name} {value}" for name, value in fingerprints.items()),
        "versions": _versions(known.get("versions") or {}),
    }
    return Facts(f"Training: {training.label}", _known(facts), training.config)


_PLACES = ("model", "loaded from", "folder")


def _without_places(facts: Facts) -> Facts:
    return Facts(facts.title, {name: value for name, value in facts.facts.items() if name not in _PLACES}, "")


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _known(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in facts.items() if value != ""}


_TERMS = {
    "Two sides": "Harmful prompts should be refused, or answered safely; benign ones complied with. Either rate alone "
    "can be perfect for a useless model: one that refuses everything, or one that complies with everything. Read them "
    "together.",
    "Refusal rate, safe rate": "Share of responses that refuse or, where a safety judge read them, that are safe.",
    "Attack success rate": "Share of harmful prompts whose response complied or is unsafe. An unparsed response may be "
    "an attack that worked, so the rate has two bounds, without and with these; the upper one is shown first. A "
    "degenerate response does no harm and is in neither; its share is shown apart.",
    "Compliance rate": "Share of benign prompts that were complied with. Degenerate (empty, repeating, wrong script) "
    "and unparsed responses (no verdict) count neither as refused or safe nor as complied; so the rates need not add "
    "up to 100 %.",
    ">99, <1": "100 and 0 mean every response and none. What rounding would make of 99.7 is >99.",
    "Pairs": "What needs both sides (the headline pair, the difference) is of the languages that have both harmful and "
    "benign prompts. A warning names the others: nothing here tells whether the model refuses everything in them.",
    "All benchmarks": "Each number is the mean of the benchmarks' own. Languages are compared within a benchmark, and "
    "the contrasts (var, PAG, worst language, English, seen and unseen) averaged over the benchmarks that have them: "
    "pooled, benchmarks of other languages and other difficulty would look like differences of languages.",
    "Difference": "Harmful refused minus benign refused, in percentage points: how much more the model refuses what it "
    "should. Near 0 it does not tell the two apart.",
    "Intervals": "95 %. One language: Wilson. Means over languages: bootstrap over bundles (a bundle is one prompt in "
    "all its languages), because the languages of a bundle are not independent. p-values are two-sided and "
    "paired. Holm's correction is over all tests of sides, var, PAG, worst languages and differences, of all models "
    "and benchmarks; tests of single languages are a family of their own.",
    "var, PAG, worst language": "var: 100 times the variance of the languages' rates. PAG: mean share of bundles on "
    "which two languages got the same verdict. All measure consistency, and are perfect for a model that refuses all. "
    "Sampling raises var, by the noise shown beneath at most, and lowers the worst language, the more so the fewer "
    "bundles: their intervals allow for it, the values do not.",
    "In the prompt's language": "Share of the responses in the language of their prompt, among those whose language "
    "could be told. That it cannot of code, numbers, gibberish, a word or two, and where lingua does not know the "
    "language.",
    " ".join(filter(None, VIA_MARK.values())): f"{'; '.join(mark_lines(VIA_MARK))}. None is as sure as the rest.",
}
