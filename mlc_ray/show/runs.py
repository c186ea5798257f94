"""What a run's and a score's folder say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlc_ray.report.collect import read_responses
from mlc_ray.report.openings import coverage, openings_read
from mlc_ray.report.text import percent
from mlc_ray.runs import (
    CONFIG_FILE,
    DIVERGED_FILE,
    FAILED_FILE,
    FINISHED_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    PROVENANCE_FILE,
    REQUEST_FILE,
    RESPONSES_FILE,
    RUN_FILE,
    SCORES_FILE,
    SCORES_FOLDER,
    STOPPED_FILE,
    UTILITY_FILE,
    VALUES_FILE,
    complete_checkpoints,
    read_metrics,
)
from mlc_ray.score.results import ScoreResult, load_in_language, load_scores
from mlc_ray.show.lines import Line, age, duration, next_lines, quoted, read_json, values_text
from mlc_ray.stats.rates import KINDS, Interval, SideSummary, Summary
from mlc_ray.storage import Place
from mlc_ray.utility.file import load_utility

_RECENT_STEPS = 20  # of which the time is averaged: the first steps are slower
_SHOWN_METRICS = ("learning_rate", "gradient_norm", "tokens_per_second", "peak_memory_gib")


def run_lines(folder: Place) -> list[Line]:
    """A run: how far it got, its last metrics, checkpoints, scores."""
    facts = read_json(folder / RUN_FILE)
    config = facts.get("resolved_config", {})
    rows = read_metrics(folder)
    checkpoints, faults = _checkpoints(folder)
    total, done = int(facts.get("total_steps", 0)), int(rows[-1]["step"]) if rows else 0
    stopped, model = (folder / STOPPED_FILE).is_file(), (folder / MODEL_FOLDER / PROVENANCE_FILE).is_file()
    ended = model or (folder / FINISHED_FILE).is_file() or bool(total and checkpoints and checkpoints[-1] >= total)
    diverged = {} if ended or stopped else read_json(folder / DIVERGED_FILE)
    failed = {} if ended or stopped or diverged else read_json(folder / FAILED_FILE)
    lines = [("run", str(folder))]
    if (folder / VALUES_FILE).is_file():
        lines.append(("trial", f"of a search, with {values_text(read_json(folder / VALUES_FILE))}"))
    lines += _settings(config, facts)
    if ended:
        lines.append(("state", f"ended, {done} of {total} steps"))
    elif stopped:
        lines.append(("state", f"stopped by the search's scheduler at step {done} of {total}"))
    elif diverged:
        lines.append(("state", f"diverged at step {diverged.get('step')} of {total}{age(folder / DIVERGED_FILE)}"))
        lines.append(("diverged", str(diverged.get("message"))))
    elif failed:
        after = f"after step {done} of {total}" if total else "before its first step"
        lines.append(("state", f"ended early, {after}{age(folder / FAILED_FILE)}"))
        lines.append(("because", str(failed.get("message"))))
    elif rows and total:
        lines.append(("state", f"step {done} of {total} ({100 * done // total} %){age(folder / METRICS_FILE)}"))
        lines.append(("time left", _time_left(rows, total)))
    elif facts:
        lines.append(("state", f"prepared, 0 of {total} steps are done{age(folder / RUN_FILE)}"))
    else:
        lines.append(("state", f"preparing its data{age(folder / CONFIG_FILE)}"))
    if rows:
        lines.append(("last step", _metrics(rows[-1])))
        lines += [("warning", f"step {row['step']}: {text}") for row in rows[-50:] for text in row.get("warnings", ())]
    steps = ", ".join(map(str, checkpoints)) or ("none kept" if ended else "none complete yet")
    lines.append(("checkpoints", f"at step {steps}" if checkpoints else steps))
    lines += [("incomplete", fault) for fault in faults]
    scores = [child for child in (folder / SCORES_FOLDER).iterdir() if child.is_dir()]
    for score in scores:
        lines.append((f"score {score.name}", rates_text(score)))
    if diverged:  # going on would come to the same step with the same batches
        return [*lines, *next_lines(_diverged_next(folder, config))]
    if failed:
        of_search = (folder / VALUES_FILE).is_file()
        search = f"mlc-ray search --resume {quoted(folder.parent.parent)}"
        return [*lines, *next_lines([search if of_search else _go_on(folder)])]
    return [*lines, *next_lines(_run_next(folder, ended or stopped, bool(checkpoints) or model, scores, model))]


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


def _go_on(folder: Place) -> str:
    return f"mlc-ray train --resume {quoted(folder)}"


def _run_next(folder: Place, over: bool, has_model: bool, scores: Sequence[Place], exported: bool) -> list[str]:
    run = quoted(folder)
    if not over:
        return [f"{_go_on(folder)}   # if it is not running any more"]
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
    return [f"mlc-ray train --config {quoted(folder / CONFIG_FILE)} {changes}", f"mlc-ray report {quoted(folder)}"]


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
    return f"about {duration(each * (total - rows[-1]['step']))}, at {each:.1f} s a step"


def score_lines(folder: Place) -> list[Line]:
    """A score: how far it got, its rates and languages."""
    here = quoted(folder)
    if not (folder / SCORES_FILE).is_file():
        request = read_json(folder / REQUEST_FILE)
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
            ("state", f"{state}{age(folder / REQUEST_FILE)}"),
            *next_lines(commands),
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
    lines.append(("language", _in_language(result)))
    lines += _openings(result)
    if (folder / UTILITY_FILE).is_file():
        utility = load_utility(folder).rows
        values = [f"{row.task} {row.metric} {row.value:.4f}" for row in utility if row.value is not None]
        lines.append(("utility", ", ".join(values)))
    commands = [f"mlc-ray report {here} --out report.html", f"mlc-ray judge {here} --judge NAME"]
    return [*lines, ("responses", str(result.responses_file)), *next_lines(commands)]


def _openings(result: ScoreResult) -> list[Line]:
    """How many refusals begin with an opening that the terms of the model's training read, where it has such terms."""
    read = openings_read(result)
    if read is None or not read.by_terms or not result.responses_file.is_file():
        return []
    found = coverage(read_responses(result.responses_file), read.openings).values()
    said = ", ".join(f"{each.language} {each}{' (few)' if each.is_low else ''}" for each in found)
    return [("openings", f"refusals that begin as training's terms read them: {said or 'nothing is refused'}")]


def _in_language(result: ScoreResult) -> str:
    """How many responses are in the language of their prompt, over all benchmarks."""
    if not result.told_by:
        return "which one responses are in was not measured"
    if not result.responses_file.is_file():
        return f"which one responses are in cannot be said without {RESPONSES_FILE}"
    found, benchmark = load_in_language(result), result.summary().benchmark
    rates = [(kind, rate) for kind in KINDS if (rate := found.mean(benchmark, kind)) is not None]
    shown = [(kind, *map(percent, (rate.value, rate.low, rate.high))) for kind, rate in rates]
    each = ", ".join(f"{kind} {value} % ({low} to {high})" for kind, value, low, high in shown)
    return f"that of the prompt: {each}" if each else "which one responses are in could not be told"


def _answered(folder: Place) -> int:
    """The number of responses that are saved, judged or not."""
    import pyarrow.parquet as pq

    if not (folder / RESPONSES_FILE).is_file():
        return 0
    with (folder / RESPONSES_FILE).open() as file:
        return int(pq.ParquetFile(file).metadata.num_rows)


def rates_text(folder: Place) -> str:
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
