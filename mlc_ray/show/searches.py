"""What a search's and a study's folder say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlc_ray.report.search import Point, is_search, read_confirmed, read_progress
from mlc_ray.report.study import load_study
from mlc_ray.report.text import percent
from mlc_ray.runs import (
    BASELINE_FOLDER,
    BEST_CONFIG_FILE,
    BEST_FOLDER,
    CELLS_FOLDER,
    DIVERGED_FILE,
    FAILED_FILE,
    FINISHED_FILE,
    MODEL_FOLDER,
    PROVENANCE_FILE,
    SCALE_FILE,
    SCORES_FILE,
    SCORES_FOLDER,
    SEARCH_CONFIG_FILE,
    STOPPED_FILE,
    STUDY_FILE,
    STUDY_RESULTS_FILE,
    STUDY_SCORE,
    TRIALS_FILE,
    TRIALS_FOLDER,
    VALUES_FILE,
    kind_of,
    read_metrics,
)
from mlc_ray.show.lines import Line, age, duration, next_lines, quoted, read_json, values_text
from mlc_ray.show.runs import rates_text
from mlc_ray.storage import Place

_MOST_TRIALS = 20


def search_lines(folder: Place) -> list[Line]:
    """A search: its trials and the best of them."""
    config = read_json(folder / SEARCH_CONFIG_FILE)
    trials = [child for child in (folder / TRIALS_FOLDER).iterdir() if (child / VALUES_FILE).is_file()]
    marks = (FINISHED_FILE, STOPPED_FILE, DIVERGED_FILE)
    over = [trial for trial in trials if any((trial / mark).is_file() for mark in marks)]
    progress, confirmation = (read_progress(folder), read_confirmed(folder)) if is_search(folder) else (None, None)
    total = _number_of_trials(config) if progress is None else progress.total
    confirmed_after = None if confirmation is None else confirmation.trials
    more = len(over) - (confirmed_after or len(over))  # that ended after what is confirmed
    ended = confirmation is not None and len(over) >= total and more <= 0
    lines = [
        ("search", str(folder)),
        ("space", "; ".join(f"{name}: {_parameter(each)}" for name, each in config.get("space", {}).items())),
        ("state", f"{'ended, ' if ended else ''}{len(over)} of {total} trials have ended" + _unfinished(trials, over)),
        ("baseline", rates_text(folder / BASELINE_FOLDER)),
    ]
    if progress is not None and progress.seconds_left and not ended:
        lines.append(("time left", f"about {duration(progress.seconds_left)}{age(folder / TRIALS_FILE)}"))
    confirmed = () if confirmation is None else confirmation.points
    best = confirmed[0].trial if confirmed else None
    for point in confirmed:
        mark = "   <- best" if point.trial == best else ""
        mark += f"   (before {more} more trials had ended)" if more > 0 else ""
        lines.append((f"confirmed {point.trial}", _confirmed(point) + mark))
    for trial in trials[:_MOST_TRIALS]:
        lines.append((f"trial {trial.name}", _trial(trial)))
    if len(trials) > _MOST_TRIALS:
        lines.append(("", f"and {len(trials) - _MOST_TRIALS} more"))
    if trials:
        lines.append(("note", "the rates of trials chose those that are confirmed: the best of them are too good"))
    here = quoted(folder)
    commands = [] if ended else [f"mlc-ray search --resume {here}   # if it is not running any more"]
    if best is not None:
        commands += [
            f"mlc-ray score {quoted(folder / BEST_FOLDER)} --benchmark sample:test",
            f"mlc-ray train --config {quoted(folder / BEST_CONFIG_FILE)}",
        ]
    return [*lines, *next_lines(commands)]


def _confirmed(point: Point) -> str:
    """Both sides of a point, means over its models, with their intervals."""
    sides = {f"harmful {point.score.measure}": point.score.harmful, "benign complied": point.score.benign}
    said = [
        f"{name} {percent(side.value)} % ({percent(side.low)} to {percent(side.high)})"
        for name, side in sides.items()
        if side is not None
    ]
    models = len(point.runs)
    return "   ".join(said) + (f"   means over {models} models" if models > 1 else "")


def _unfinished(trials: Sequence[Place], over: Sequence[Place]) -> str:
    names: dict[str, list[str]] = {"failed": [], "begun and not ended": []}
    for trial in trials:
        if trial not in over:
            names["failed" if (trial / FAILED_FILE).is_file() else "begun and not ended"].append(trial.name)
    return "".join(f"; {state}: {', '.join(found)}" for state, found in names.items() if found)


def _trial(folder: Place) -> str:
    """A trial's values, its last step and the rates of its last score."""
    of_steps = [child for child in (folder / SCORES_FOLDER).iterdir() if child.name.startswith("step-")]
    scores = [child for child in of_steps if (child / SCORES_FILE).is_file()]
    rows = read_metrics(folder)
    step = f"step {rows[-1]['step'] if rows else 0}"
    end = ", stopped" if (folder / STOPPED_FILE).is_file() else ""
    if diverged := read_json(folder / DIVERGED_FILE):
        end += f", diverged at step {diverged.get('step')}"
    if not end and not (folder / FINISHED_FILE).is_file() and (failed := read_json(folder / FAILED_FILE)):
        end = ", failed: " + str(failed.get("message")).partition("\n")[0]
    rates = rates_text(scores[-1]) if scores else "not scored" if end else "not scored yet"
    return f"{values_text(read_json(folder / VALUES_FILE))}: {step}{end}, {rates}"


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


def study_lines(folder: Place) -> list[Line]:
    """A study: its cells and what they gave."""
    plan, here = read_json(folder / STUDY_FILE), quoted(folder)
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
        return [*lines, *next_lines([f"mlc-ray study --resume {here}   # if it is not running any more"])]
    result = load_study(folder)
    for row in result.rows:
        if row.rates is not None:
            harmful, benign = row.rates.harmful, row.rates.benign
            seeds = f"{row.rates.seeds} {'seed' if row.rates.seeds == 1 else 'seeds'}"
            rates = f"harmful {harmful.measure} {percent(harmful.avg.value)} %, benign complied"
            lines.append((f"{row.model} {row.method}", f"{rates} {percent(benign.avg.value)} %, {seeds}"))
    lines += [(cell.name, f"{cell.state}: {cell.message}") for cell in result.cells if cell.message]
    commands = [f"mlc-ray study --resume {here}   # if it is not running any more"] if left else []
    return [*lines, *next_lines([*commands, f"mlc-ray report {here} --out study.html"])]


def scale_lines(folder: Place) -> list[Line]:
    """A scaling study: its searches, and what moves with size."""
    sizes, here = list(read_json(folder / SCALE_FILE).get("searches", {})), quoted(folder)
    states = {size: _search_state(folder / CELLS_FOLDER / size) for size in sizes}
    over = [size for size, state in states.items() if state.startswith("ended")]
    lines = [("scaling study", str(folder)), ("state", f"{len(over)} of {len(sizes)} searches have ended")]
    lines += [(f"search {size}", state) for size, state in states.items()]
    commands = [] if len(over) == len(sizes) else [f"mlc-ray scale --resume {here}   # if it is not running any more"]
    if not (folder / STUDY_RESULTS_FILE).is_file():
        return [*lines, *next_lines(commands)]
    result = load_study(folder)
    lines += [(cell.name, f"{cell.state}: {cell.message}") for cell in result.cells if cell.message]
    if result.scaling is not None:
        for point in result.scaling.points:
            layer = f"{point.layer.value:.2f} ({point.layer.low:.2f} to {point.layer.high:.2f})"
            lines.append((f"best {point.size}", f"layer {layer}, lambda {10**point.log_weight.value:.2g}"))
        lines += [(trend.name, trend.direction) for trend in result.scaling.trends]
    return [*lines, *next_lines([*commands, f"mlc-ray report {here} --out scaling.html"])]


def _search_state(folder: Place) -> str:
    return dict(search_lines(folder))["state"] if kind_of(folder) == "search" else "not begun"
