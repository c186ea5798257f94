"""`mlc-ray show FOLDER`: what a folder is, how far it got, its results, and what to do next; from its files alone.

One function per kind of folder gives its lines; `_KINDS` lists them.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlc_ray.errors import MlcRayError
from mlc_ray.report.study import load_study
from mlc_ray.report.text import percent
from mlc_ray.runs import (
    BASELINE_FOLDER,
    BUNDLES_FOLDER,
    CELLS_FOLDER,
    CONFIG_FILE,
    DIVERGED_FILE,
    FINISHED_FILE,
    KEPT_FOLDER,
    METRICS_FILE,
    MODEL_FOLDER,
    PROBE_FILE,
    PROVENANCE_FILE,
    QUALITY_TEXT,
    REQUEST_FILE,
    RESPONSES_FILE,
    RUN_FILE,
    SCALE_FILE,
    SCORES_FILE,
    SCORES_FOLDER,
    SEARCH_CONFIG_FILE,
    STOPPED_FILE,
    STUDY_FILE,
    STUDY_RESULTS_FILE,
    STUDY_SCORE,
    TRANSLATION_FILE,
    TRIALS_FILE,
    TRIALS_FOLDER,
    UTILITY_FILE,
    VALUES_FILE,
    FolderKind,
    complete_checkpoints,
    kind_of,
    read_metrics,
)
from mlc_ray.score.results import load_scores
from mlc_ray.stats.rates import Interval, SideSummary, Summary
from mlc_ray.storage import MANIFEST, Place
from mlc_ray.translate import quality as qualities
from mlc_ray.utility.file import load_utility

Line = tuple[str, str]
"""A label and its text; an empty label continues the one before."""

_RECENT_STEPS = 20  # of which the time is averaged: the first steps are slower
_MOST_TRIALS = 20
_SHOWN_METRICS = ("learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_gib")


class ShowError(MlcRayError):
    """The folder cannot be shown; the message quotes it and says what can."""


def show(folder: str | Path | Place) -> str:
    """The folder of a run, score, search, study, probe or translation, going on or ended; of several, a line for each.

    Raises:
        ShowError: it neither is nor holds one of them, or a file in it is damaged.
        MlcRayError: what the readers of metrics and scores raise.
    """
    place = Place(folder).absolute()
    kind = kind_of(place)
    if kind is not None:
        return _text(_KINDS[kind](place))
    if (place / SCORES_FILE).is_file():  # one whose request.json was not kept
        return _text(_score(place))
    inside = [(child, kind_of(child)) for child in place.iterdir()]
    known = [(child, found) for child, found in inside if found is not None]
    if not known:
        what = "holds no run, score, search, study, probe or translation" if place.is_dir() else "is not a folder"
        raise ShowError(
            f"{str(place)!r} {what}; give one that `mlc-ray train`, `score`, `search`, `study`, `probe` or `translate` "
            "wrote"
        )
    lines: list[Line] = []
    for child, found in known:
        rows = dict(_KINDS[found](child))
        lines.append((child.name, f"{found}: {rows['state']}"))
    return _text([*lines, ("next", f"mlc-ray show {_quoted(known[0][0])}")])


# ----------------------------------------------------------------------------------------------------------------- runs


def _run(folder: Place) -> list[Line]:
    facts = _json(folder / RUN_FILE)
    config = facts.get("resolved_config", {})
    rows = read_metrics(folder)
    checkpoints, faults = _checkpoints(folder)
    total, done = int(facts.get("total_steps", 0)), int(rows[-1]["step"]) if rows else 0
    stopped, model = (folder / STOPPED_FILE).is_file(), (folder / MODEL_FOLDER / PROVENANCE_FILE).is_file()
    ended = model or (folder / FINISHED_FILE).is_file() or bool(total and checkpoints and checkpoints[-1] >= total)
    diverged = {} if ended or stopped else _json(folder / DIVERGED_FILE)
    lines = [("run", str(folder))]
    if (folder / VALUES_FILE).is_file():
        lines.append(("trial", f"of a search, with {_values(_json(folder / VALUES_FILE))}"))
    lines += _settings(config, facts)
    if ended:
        lines.append(("state", f"ended, {done} of {total} steps"))
    elif stopped:
        lines.append(("state", f"stopped by the search's scheduler at step {done} of {total}"))
    elif diverged:
        lines.append(("state", f"diverged at step {diverged.get('step')} of {total}{_age(folder / DIVERGED_FILE)}"))
        lines.append(("diverged", str(diverged.get("message"))))
    elif rows and total:
        lines.append(("state", f"step {done} of {total} ({100 * done // total} %){_age(folder / METRICS_FILE)}"))
        lines.append(("time left", _time_left(rows, total)))
    elif facts:
        lines.append(("state", f"prepared, 0 of {total} steps are done{_age(folder / RUN_FILE)}"))
    else:
        lines.append(("state", f"preparing its data{_age(folder / CONFIG_FILE)}"))
    if rows:
        lines.append(("last step", _metrics(rows[-1])))
        lines += [("warning", f"step {row['step']}: {text}") for row in rows[-50:] for text in row.get("warnings", ())]
    steps = ", ".join(map(str, checkpoints)) or ("none kept" if ended else "none complete yet")
    lines.append(("checkpoints", f"at step {steps}" if checkpoints else steps))
    lines += [("incomplete", fault) for fault in faults]
    scores = [child for child in (folder / SCORES_FOLDER).iterdir() if child.is_dir()]
    for score in scores:
        lines.append((f"score {score.name}", _rates(score)))
    if diverged:  # going on would come to the same step with the same batches
        return [*lines, *_next(_diverged_next(folder, config))]
    return [*lines, *_next(_run_next(folder, ended or stopped, bool(checkpoints) or model, scores, model))]


def _settings(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Line]:
    if not config:
        return []
    model, mlc = config.get("model", {}), config.get("mlc", {})
    parts = [str(config.get("objective", {}).get("loss"))]
    if mlc.get("weight"):
        parts.append(f"{mlc['weight']} x mlc at layer {mlc.get('layer')}")
    parts += [f"{term.get('weight')} x {name}" for name, term in config.get("terms", {}).items()]
    return [
        ("model", f"{model.get('path')} in {model.get('dtype')}"),
        ("loss", " + ".join(parts)),
        ("data", f"{facts.get('bundles')} bundles in {len(facts.get('languages', ()))} languages"),
    ]


def _run_next(folder: Place, over: bool, has_model: bool, scores: Sequence[Place], exported: bool) -> list[str]:
    run = _quoted(folder)
    if not over:
        return [f"mlc-ray train --resume {run}   # if it is not running any more"]
    commands = []
    if has_model:
        commands.append(f"mlc-ray score {run} --benchmark sample:test")
        if not exported:
            commands.append(f"mlc-ray export {run} OUT")
    return [f"mlc-ray report {run}", *commands] if scores else [*commands, f"mlc-ray report {run}"]


def _diverged_next(folder: Place, config: Mapping[str, Any]) -> list[str]:
    """A new run, with what a diverged one's message advises."""
    changes = "--set name=NAME --set optimizer.learning_rate=LOWER"
    if config.get("model", {}).get("dtype") != "float32":
        changes += "   # and perhaps --set model.dtype=float32"
    return [f"mlc-ray train --config {_quoted(folder / CONFIG_FILE)} {changes}", f"mlc-ray report {_quoted(folder)}"]


def _checkpoints(folder: Place) -> tuple[list[int], list[str]]:
    """Steps of the complete checkpoints, and the faults of the others."""
    complete, faults = complete_checkpoints(folder)
    return [checkpoint.step for checkpoint in complete], faults


def _metrics(row: Mapping[str, Any]) -> str:
    shown = [name for name in row if name.startswith("loss/") or name in _SHOWN_METRICS]
    return ", ".join(f"{name} {'not finite' if row[name] is None else format(row[name], '.4g')}" for name in shown)


def _time_left(rows: Sequence[Mapping[str, Any]], total: int) -> str:
    seconds = [row["step_seconds"] for row in rows[-_RECENT_STEPS:] if row.get("step_seconds") is not None]
    if not seconds:
        return "unknown"
    each = sum(seconds) / len(seconds)
    return f"about {_duration(each * (total - rows[-1]['step']))}, at {each:.1f} s a step"


# --------------------------------------------------------------------------------------------------------------- scores


def _score(folder: Place) -> list[Line]:
    here = _quoted(folder)
    if not (folder / SCORES_FILE).is_file():
        request = _json(folder / REQUEST_FILE)
        config = request.get("config", {})
        judge = config.get("judge", {})
        name = judge.get("name", "refusal") if isinstance(judge, dict) else judge
        answered = _answered(folder)
        state = f"all {answered} prompts are answered, not judged" if answered else "answering, nothing is saved yet"
        commands = [f"mlc-ray score --resume {here}   # if it is not running any more"]
        return [
            ("score", str(folder)),
            ("model", str(request.get("resolved"))),
            ("judge", str(name)),
            ("state", f"{state}{_age(folder / REQUEST_FILE)}"),
            *_next(commands),
        ]
    result = load_scores(folder)
    lines = [
        ("score", str(folder)),
        ("model", result.model if result.model == result.resolved else f"{result.model} ({result.resolved})"),
        ("judge", ", ".join(f"{measure} by {name}" for measure, name in result.measured_by.items())),
        ("state", f"ended, {result.responses} prompts are answered and judged"),
    ]
    for summary in result.summaries:
        lines += [(summary.benchmark, text) for text in _side_lines(summary)]
    if result.unparsed or result.degenerate:
        lines.append(("no verdict", f"{result.unparsed} unparsed, {result.degenerate} degenerate responses"))
    if (folder / UTILITY_FILE).is_file():
        utility = load_utility(folder).rows
        values = [f"{row.task} {row.metric} {row.value:.4f}" for row in utility if row.value is not None]
        lines.append(("utility", ", ".join(values)))
    commands = [f"mlc-ray report {here} --out report.html", f"mlc-ray judge {here} --judge NAME"]
    return [*lines, ("responses", str(result.responses_file)), *_next(commands)]


def _answered(folder: Place) -> int:
    """The number of responses that are saved, judged or not."""
    import pyarrow.parquet as pq

    if not (folder / RESPONSES_FILE).is_file():
        return 0
    with (folder / RESPONSES_FILE).open() as file:
        return int(pq.ParquetFile(file).metadata.num_rows)


def _rates(folder: Place) -> str:
    """Both sides of a score over all its benchmarks, on one line."""
    if not (folder / SCORES_FILE).is_file():
        return "not ended"
    summary = load_scores(folder).summary()
    return ", ".join(f"{_name(side)} {percent(_interval(side)[0].value)} %" for side in summary.sides)


def _side_lines(summary: Summary) -> list[str]:
    lines = []
    for side in summary.sides:
        interval, _ = _interval(side)
        value, low, high = map(percent, (interval.value, interval.low, interval.high))
        lines.append(
            f"{_name(side)} {value} % ({low} to {high}), mean of {side.languages} languages, {side.bundles} bundles; "
            f"worst language: {side.worst}, {percent(side.worst_rate.value)} % {side.measure}"
        )
    for kind in ("harmful", "benign"):
        if not any(side.kind == kind for side in summary.sides):
            lines.append(f"no {kind} prompts were asked: without them the score has one side only")
        elif codes := [code for code, missing in summary.one_sided.items() if missing == kind]:
            lines.append(f"no {kind} prompts in {', '.join(codes)}: these languages have one side only")
    return lines


def _interval(side: SideSummary) -> tuple[Interval, str]:
    if side.measure == "refused" and side.kind == "benign":
        return side.misses_avg, "complied"
    return side.avg, "refused" if side.measure == "refused" else "safe"


def _name(side: SideSummary) -> str:
    return f"{side.kind} {_interval(side)[1]}"


# ------------------------------------------------------------------------------------------------------------- searches


def _search(folder: Place) -> list[Line]:
    config = _json(folder / SEARCH_CONFIG_FILE)
    trials = [child for child in (folder / TRIALS_FOLDER).iterdir() if (child / VALUES_FILE).is_file()]
    marks = (FINISHED_FILE, STOPPED_FILE, DIVERGED_FILE)
    over = [trial for trial in trials if any((trial / mark).is_file() for mark in marks)]
    found = _json(folder / TRIALS_FILE)
    total = (found.get("progress") or {}).get("total") or _number_of_trials(config)
    confirmation = found.get("confirmation") or {}
    more = len(over) - (confirmation.get("trials") or len(over))  # that ended after what is confirmed
    ended = bool(confirmation) and len(over) >= total and more <= 0
    lines = [
        ("search", str(folder)),
        ("space", "; ".join(f"{name}: {_parameter(each)}" for name, each in config.get("space", {}).items())),
        ("state", f"{'ended, ' if ended else ''}{len(over)} of {total} trials have ended" + _unfinished(trials, over)),
        ("baseline", _rates(folder / BASELINE_FOLDER)),
    ]
    left = (found.get("progress") or {}).get("seconds_left")
    if left and not ended:
        lines.append(("time left", f"about {_duration(left)}{_age(folder / TRIALS_FILE)}"))
    confirmed = confirmation.get("points", ())
    best = confirmed[0]["trial"] if confirmed else None
    for point in confirmed:
        mark = "   <- best" if point["trial"] == best else ""
        mark += f"   (before {more} more trials had ended)" if more > 0 else ""
        lines.append((f"confirmed {point['trial']}", _confirmed(point) + mark))
    for trial in trials[:_MOST_TRIALS]:
        lines.append((f"trial {trial.name}", _trial(trial)))
    if len(trials) > _MOST_TRIALS:
        lines.append(("", f"and {len(trials) - _MOST_TRIALS} more"))
    if trials:
        lines.append(("note", "the rates of trials chose those that are confirmed: the best of them are too good"))
    here = _quoted(folder)
    commands = [] if ended else [f"mlc-ray search --resume {here}   # if it is not running any more"]
    if best is not None:
        commands += [
            f"mlc-ray score {_quoted(folder / 'best')} --benchmark sample:test",
            f"mlc-ray train --config {_quoted(folder / 'best.yaml')}",
        ]
    return [*lines, *_next(commands)]


def _confirmed(point: Mapping[str, Any]) -> str:
    """Both sides of a point, means over its models, with their intervals."""
    score = point["score"]
    sides = {f"harmful {score['measure']}": score["harmful"], "benign complied": score["benign"]}
    said = [
        f"{name} {percent(side['value'])} % ({percent(side['low'])} to {percent(side['high'])})"
        for name, side in sides.items()
        if side is not None
    ]
    models = len(point["runs"])
    return "   ".join(said) + (f"   means over {models} models" if models > 1 else "")


def _unfinished(trials: Sequence[Place], over: Sequence[Place]) -> str:
    names = [trial.name for trial in trials if trial not in over]
    return f"; begun and not ended: {', '.join(names)}" if names else ""


def _trial(folder: Place) -> str:
    """A trial's values, its last step and the rates of its last score."""
    of_steps = [child for child in (folder / SCORES_FOLDER).iterdir() if child.name.startswith("step-")]
    scores = [child for child in of_steps if (child / SCORES_FILE).is_file()]
    rates = _rates(scores[-1]) if scores else "not scored yet"
    rows = read_metrics(folder)
    step = f"step {rows[-1]['step'] if rows else 0}"
    end = ", stopped" if (folder / STOPPED_FILE).is_file() else ""
    if diverged := _json(folder / DIVERGED_FILE):
        end += f", diverged at step {diverged.get('step')}"
    return f"{_values(_json(folder / VALUES_FILE))}: {step}{end}, {rates}"


def _number_of_trials(config: Mapping[str, Any]) -> int:
    """As asked for, but no more than there are points, and each as often as it is repeated."""
    points: float = 1
    for each in config.get("space", {}).values():
        low, high = each.get("integers") or (1, len(each.get("choice") or (None,)))
        points *= 1 + high - low
        if each.get("choice") is None and each.get("integers") is None:
            points = math.inf  # a range of numbers
    return int(min(config.get("trials") or points, points)) * int(config.get("repeats", 1))


def _parameter(each: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in each.items())


# -------------------------------------------------------------------------------------------------------------- studies


def _study(folder: Place) -> list[Line]:
    plan, here = _json(folder / STUDY_FILE), _quoted(folder)
    names = [f"{cell['model']}-{cell['method']}-{cell['seed']}" for cell in plan.get("cells", ())]
    runs = {name: folder / CELLS_FOLDER / name for name in names}
    scored = [name for name, run in runs.items() if (run / SCORES_FOLDER / STUDY_SCORE / SCORES_FILE).is_file()]
    diverged = [name for name, run in runs.items() if (run / DIVERGED_FILE).is_file()]
    trained = [name for name, run in runs.items() if (run / MODEL_FOLDER / PROVENANCE_FILE).is_file()]
    left = [name for name in names if name not in (*scored, *diverged)]
    lines = [
        ("study", str(folder)),
        ("state", f"{len(scored)} of {len(names)} cells are scored, {len({*trained, *scored})} are trained"),
    ]
    if diverged:
        lines.append(("diverged", ", ".join(diverged)))
    if not (folder / STUDY_RESULTS_FILE).is_file():
        return [*lines, *_next([f"mlc-ray study --resume {here}   # if it is not running any more"])]
    result = load_study(folder)
    for row in result.rows:
        if row.rates is not None:
            harmful, benign = row.rates.harmful, row.rates.benign
            seeds = f"{row.rates.seeds} {'seed' if row.rates.seeds == 1 else 'seeds'}"
            rates = f"harmful {harmful.measure} {percent(harmful.avg.value)} %, benign complied"
            lines.append((f"{row.model} {row.method}", f"{rates} {percent(benign.avg.value)} %, {seeds}"))
    lines += [(cell.name, f"{cell.state}: {cell.message}") for cell in result.cells if cell.message]
    commands = [f"mlc-ray study --resume {here}   # if it is not running any more"] if left else []
    return [*lines, *_next([*commands, f"mlc-ray report {here} --out study.html"])]


def _scale(folder: Place) -> list[Line]:
    sizes, here = list(_json(folder / SCALE_FILE).get("searches", {})), _quoted(folder)
    states = {size: _search_state(folder / CELLS_FOLDER / size) for size in sizes}
    over = [size for size, state in states.items() if state.startswith("ended")]
    lines = [("scaling study", str(folder)), ("state", f"{len(over)} of {len(sizes)} searches have ended")]
    lines += [(f"search {size}", state) for size, state in states.items()]
    commands = [] if len(over) == len(sizes) else [f"mlc-ray scale --resume {here}   # if it is not running any more"]
    if not (folder / STUDY_RESULTS_FILE).is_file():
        return [*lines, *_next(commands)]
    result = load_study(folder)
    lines += [(cell.name, f"{cell.state}: {cell.message}") for cell in result.cells if cell.message]
    if result.scaling is not None:
        for point in result.scaling.points:
            layer = f"{point.layer.value:.2f} ({point.layer.low:.2f} to {point.layer.high:.2f})"
            lines.append((f"best {point.size}", f"layer {layer}, lambda {10**point.log_weight.value:.2g}"))
        lines += [(trend.name, trend.direction) for trend in result.scaling.trends]
    return [*lines, *_next([*commands, f"mlc-ray report {here} --out scaling.html"])]


def _search_state(folder: Place) -> str:
    return dict(_search(folder))["state"] if kind_of(folder) == "search" else "not begun"


# --------------------------------------------------------------------------------------------------------------- probes


def _probe(folder: Place) -> list[Line]:
    content = _json(folder / PROBE_FILE)
    probe = content.get("probe", {})
    ranking, unknown = probe.get("ranking", []), probe.get("unknown", [])
    commands = [f"mlc-ray train --config CONFIG --set mlc.layer={ranking[0]}"] if ranking else []
    return [
        ("probe", str(folder)),
        ("model", str(content.get("model"))),
        ("state", f"ended, {content.get('bundles')} bundles in {len(probe.get('languages', ()))} languages"),
        ("layers", f"ranked {', '.join(map(str, ranking[:5]))} first, of {len(ranking)}"),
        *([("not known", f"{', '.join(unknown)}: refused without telling what")] if unknown else []),
        *_next(commands),
    ]


# --------------------------------------------------------------------------------------------------------- translations


def _translation(folder: Place) -> list[Line]:
    config = _json(folder / TRANSLATION_FILE).get("config", {})
    lines = [("translation", str(folder)), ("languages", ", ".join(config.get("languages", ())) or "none")]
    if not (folder / MANIFEST).is_file():
        steps = [file.name for file in (folder / KEPT_FOLDER).iterdir() if file.name.startswith("drafts-")]
        done = f"{len(steps)} steps of shards are done" if steps else "the first step of the first shard is not done"
        lines.append(("state", f"{done}{_age(folder / TRANSLATION_FILE)}"))
        return [*lines, *_next([f"mlc-ray translate --resume {_quoted(folder)}   # if it is not running any more"])]
    quality = qualities.load_quality(folder)
    lines.append(("state", f"ended, {qualities.summary(quality)}"))
    for each in quality.texts:
        median = "" if each.chrf_median is None else f", median chrF {each.chrf_median:.1f}"
        lines.append((each.part, f"{each.language}: {each.accepted} of {each.asked} accepted{median}"))
    lines += [("twins", f"{each.kind}: {each.accepted} of {each.asked} accepted") for each in quality.twins]
    lines += [
        ("own answers", f"{each.language}, {each.kind}: {each.kept} of {each.asked} kept, {each.refused} refuse")
        for each in quality.own
    ]
    lines.append(("report", str(folder / QUALITY_TEXT)))
    source = json.dumps([{"path": str(folder / BUNDLES_FOLDER)}])
    return [*lines, *_next([f"mlc-ray train --config CONFIG --set data.train={shlex.quote(source)}"])]


_KINDS: dict[FolderKind, Callable[[Place], list[Line]]] = {
    "run": _run,
    "score": _score,
    "search": _search,
    "study": _study,
    "scale": _scale,
    "probe": _probe,
    "translation": _translation,
}


# ----------------------------------------------------------------------------------------------------------------- text


def _text(lines: Iterable[Line]) -> str:
    rows = list(lines)
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def _next(commands: Sequence[str]) -> list[Line]:
    return [("next" if number == 0 else "", command) for number, command in enumerate(commands)]


def _values(values: Mapping[str, Any]) -> str:
    texts = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def _json(file: Place) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        return file.read_object(ShowError)
    except FileNotFoundError:
        return {}


def _age(file: Place) -> str:
    """How long ago a file was written, which tells whether something still goes on."""
    if not file.is_local:
        return ""
    try:
        return f"; last written {_duration(time.time() - Path(file).stat().st_mtime)} ago"
    except FileNotFoundError:
        return ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _quoted(place: Place) -> str:
    return shlex.quote(str(place))
