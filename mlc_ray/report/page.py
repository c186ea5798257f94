"""The report as one HTML file: no script, no request, no font or image from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mlc_ray import __version__
from mlc_ray.report import markup, palette
from mlc_ray.report.collect import Collection, Model, Training
from mlc_ray.report.markup import text
from mlc_ray.report.page_samples import samples
from mlc_ray.report.page_scores import (
    changes_table,
    counts_table,
    heat_map,
    slopes,
    summary_tables,
    utility_table,
)
from mlc_ray.report.page_training import training_charts
from mlc_ray.report.view import (
    Change,
    benchmarks,
    changes,
    held_back,
    keys,
    languages_of,
    percent,
    remarks,
    signed,
    summary_of,
    warnings,
    whole,
)
from mlc_ray.stats.marks import VIA_MARK, mark_lines
from mlc_ray.stats.rates import Interval, Summary

MOST_CARDS = 4
"""With more models the headline is a table."""


def render(collection: Collection, *, sample_size: int = 8) -> str:
    """The whole page."""
    models = collection.models
    names = benchmarks(models)
    compared = changes(collection)
    parts = [_header(collection, names), _alarms(models)]
    if models:
        parts.append(_headline(models, names[0]))
        parts += [
            markup.section("changes", "What changed", _changes(models, compared, names[0])),
            markup.section("languages", "Language by language", _folded(heat_map, models, names)),
            markup.section("numbers", "Summary", _summaries(models, names, compared)),
            markup.section("utility", "Utility", utility_table(models)),
        ]
    else:
        parts.append(_alarm(["Nothing was scored yet: training curves alone say nothing of safety."]))
    parts += [
        markup.section("training", "Training", training_charts(collection.trainings)),
        markup.section("responses", "Responses to look at", samples(models, sample_size)),
        markup.section("made", "How it was made", _provenance(collection)),
        markup.section("reading", "How to read this", _reading()),
    ]
    return _document(_title(collection), "".join(parts))


def _document(title: str, body: str) -> str:
    style = files("mlc_ray.report").joinpath("style.css").read_text(encoding="utf-8")
    # The policy is the second lock: even if a response were not escaped, nothing of it could run or be fetched.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="mlc_ray {__version__}"><title>{text(title)}</title>'
        f"<style>\n{style}\n{palette.css_rules()}\n</style></head>\n<body>{body}</body></html>\n"
    )


# --------------------------------------------------------------------------------------------- the first screen


def _title(collection: Collection) -> str:
    labels = [model.label for model in collection.models]
    if not labels:
        return f"Training of {', '.join(training.label for training in collection.trainings)}"
    if len(labels) == 1:
        return f"Safety: {labels[0]}"
    if len(labels) == 2:
        return f"Safety: {labels[1]} against {labels[0]}"
    return f"Safety: {len(labels)} models"


def _header(collection: Collection, names: Sequence[str]) -> str:
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
    return f'<header><h1>{text(_title(collection))}</h1><p class="soft">{text(" · ".join(facts))}</p></header>'


def _alarms(models: Sequence[Model]) -> str:
    return _alarm(found) if (found := warnings(models)) else ""


def _alarm(lines: Sequence[str]) -> str:
    shown = "".join(f"<p><strong>Warning:</strong> {text(line)}</p>" for line in lines)
    return f'<div class="alarm" role="note">{shown}</div>'


def _headline(models: Sequence[Model], benchmark: str) -> str:
    lead = _lead(models, benchmark)
    if len(models) > MOST_CARDS:
        return lead + _headline_table(models, benchmark)
    cards = [_card(model, key, benchmark) for model, key in zip(models, keys(models), strict=True)]
    return f'{lead}<div class="cards">{"".join(cards)}</div>'


def _lead(models: Sequence[Model], benchmark: str) -> str:
    """Both sides of two models in one sentence; nothing if a side is not known."""
    pairs = [summary.two_sided if (summary := summary_of(model, benchmark)) else None for model in models]
    if len(pairs) != 2 or pairs[0] is None or pairs[1] is None:
        return ""
    first, last = pairs[0], pairs[1]
    return (
        f'<p class="lead">From {text(models[0].label)} to {text(models[-1].label)}: harmful prompts held back '
        f"<strong>{whole(first.harmful)} → {whole(last.harmful)} %</strong>, benign prompts complied with "
        f"<strong>{whole(first.benign)} → {whole(last.benign)} %</strong>.</p>"
    )


def _card(model: Model, key: str, benchmark: str) -> str:
    summary = summary_of(model, benchmark)
    name = text(model.label) if key == model.label else f'<span class="key">{text(key)}</span>{text(model.label)}'
    where = text(Path(model.result.model).name or model.result.model)
    under = f'<p class="soft">{where}</p>' if where != text(model.label) else ""
    parts = [f"<h3>{name}</h3>{under}", _meters(summary)]
    lines = []
    if summary is not None and (difference := summary.avg_difference) is not None:
        limits = f"{signed(difference.low)} to {signed(difference.high)}"
        value = f"<strong>{signed(difference.value)}</strong>"
        lines.append(f'Difference in refusals: {value} <small class="number">({limits})</small>')
    if summary is not None:
        lines += [f'<span class="remark">{text(remark)}</span>' for remark in remarks(summary)]
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<article class="card">{"".join(parts)}{f"<ul>{items}</ul>" if items else ""}</article>'


def _meters(summary: Summary | None) -> str:
    harmful = held_back(summary) if summary else None
    benign = summary.side("benign", "refused") if summary else None
    verb = "safe" if harmful is not None and harmful.measure == "safe" else "refused"
    return (
        '<div class="meters">'
        + _meter("harmful", "Harmful held back", harmful.avg if harmful else None, verb)
        + _meter("benign", "Benign complied with", benign.misses_avg if benign else None, "complied")
        + "</div>"
    )


def _meter(kind: str, name: str, interval: Interval | None, verb: str) -> str:
    if interval is None:
        return f'<div class="meter {kind}"><p>{name}</p><p class="big none">not scored</p></div>'
    low, high = max(0.0, interval.low), min(100.0, interval.high)
    return (
        f'<div class="meter {kind}"><p>{name}</p><p class="big">{percent(interval.value)}<small> %</small></p>'
        f'<div class="bar" aria-hidden="true"><i style="width:{interval.value:.1f}%"></i>'
        f'<b style="left:{low:.1f}%;width:{high - low:.1f}%"></b></div>'
        f"<p><small>{verb} · {percent(interval.low)} to {percent(interval.high)}</small></p></div>"
    )


def _headline_table(models: Sequence[Model], benchmark: str) -> str:
    rows = []
    for model, key in zip(models, keys(models), strict=True):
        summary = summary_of(model, benchmark)
        harmful, benign = (held_back(summary), summary.side("benign", "refused")) if summary else (None, None)
        values = [
            _with_limits(harmful.avg if harmful else None),
            _with_limits(benign.misses_avg if benign else None),
            _with_limits(summary.avg_difference if summary else None, points=True),
        ]
        name = text(model.label) if key == model.label else f'<span class="key">{text(key)}</span>{text(model.label)}'
        rows.append(markup.row(name, values))
    return markup.table(
        f"{text(benchmark)} <small>mean over languages, 95 % intervals</small>",
        ["model", "harmful held back %", "benign complied %", "harmful − benign refused"],
        rows,
    )


def _with_limits(interval: Interval | None, *, points: bool = False) -> str:
    if interval is None:
        return '<strong class="remark">not scored</strong>'
    show = signed if points else percent
    return f"{show(interval.value)}<small>{show(interval.low)} to {show(interval.high)}</small>"


# --------------------------------------------------------------------------------------------- the other parts


def _changes(models: Sequence[Model], compared: Sequence[Change], benchmark: str) -> str:
    return slopes(models, benchmark) + changes_table(compared, benchmark)


def _folded(draw: Callable[[Sequence[Model], str], str], models: Sequence[Model], names: Sequence[str]) -> str:
    """The headline's benchmark in the open, the others folded away."""
    first, *others = names
    return draw(models, first) + "".join(markup.details(text(name), draw(models, name)) for name in others)


def _summaries(models: Sequence[Model], names: Sequence[str], compared: Sequence[Change]) -> str:
    parts = [summary_tables(models, names[0])]
    parts += [
        markup.details(text(name), summary_tables(models, name) + changes_table(compared, name)) for name in names[1:]
    ]
    return "".join([*parts, *(counts_table(models, name) for name in names)])


def _provenance(collection: Collection) -> str:
    parts = [f'<p class="soft">{text(note)}</p>' for note in collection.notes]
    parts += [_model_facts(model) for model in collection.models]
    parts += [_training_facts(training) for training in collection.trainings]
    return "".join(parts)


def _model_facts(model: Model) -> str:
    result = model.result
    facts = {
        "model": result.model,
        "loaded from": result.resolved,
        "fingerprint": result.fingerprint,
        "prompts": result.prompts,
        "judge": result.judge,
        "responses": f"{result.responses}, {result.unparsed} without a verdict",
        "ended by": ", ".join(f"{reason} {count}" for reason, count in result.finish.items()),
        "scored": result.created,
        "folder": str(result.folder),
        "versions": _versions(result.versions),
    }
    settings = yaml.safe_dump(dict(result.config), sort_keys=False, allow_unicode=True)
    return markup.details(f"Score: {text(model.label)}", _facts(facts) + f'<pre tabindex="0">{text(settings)}</pre>')


def _training_facts(training: Training) -> str:
    known = training.facts
    fingerprints = known.get("fingerprints") or {}
    facts = {
        "folder": str(training.folder),
        "bundles": known.get("bundles", ""),
        "languages": ", ".join(known.get("languages") or ()),
        "optimizer steps": known.get("total_steps", ""),
        "fingerprints": ", ".join(f"{name} {value}" for name, value in fingerprints.items()),
        "versions": _versions(known.get("versions") or {}),
    }
    content = _facts(facts) + f'<pre tabindex="0">{text(training.config)}</pre>'
    return markup.details(f"Training: {text(training.label)}", content)


def _versions(versions: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _facts(facts: dict[str, Any]) -> str:
    shown = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items() if value != "")
    return f"<dl>{shown}</dl>"


_TERMS = {
    "Two sides": "Harmful prompts should be held back, benign ones complied with. Either rate alone can be perfect for "
    "a useless model: one that refuses everything, or one that answers everything. Read them together.",
    "Held back": "Harmful prompts refused or, where a safety judge read the answers, answered safely. What the judge "
    "calls complied or unsafe is the attack success rate.",
    "Complied": "Benign prompts that were answered. Degenerate (empty, repeating, wrong script) and unparsed answers "
    "(no verdict) count neither as held back nor as complied; so the rates need not add up to 100 %.",
    "Difference": "Harmful refused minus benign refused, in percentage points: how much more the model refuses what it "
    "should. Near 0 it does not tell the two apart.",
    "Intervals": "95 %. One language: Wilson. Means over languages: bootstrap over bundles (a bundle is one prompt in "
    "all its languages), because the languages of a bundle are not independent. p-values are two-sided and paired.",
    "var, PAG": "var: 100 times the variance of the languages' rates. PAG: mean share of bundles on which two "
    "languages got the same verdict. Both measure consistency, and both are perfect for a model that refuses all.",
    " ".join(filter(None, VIA_MARK.values())): f"{'; '.join(mark_lines(VIA_MARK))}. Neither is as sure as the rest.",
}


def _reading() -> str:
    return (
        '<dl class="terms">'
        + "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in _TERMS.items())
        + "</dl>"
    )
