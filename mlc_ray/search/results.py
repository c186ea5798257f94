"""The results of a search: tables of trials and of what was confirmed, the Pareto plot, the best config and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from mlc_ray.config import SearchConfig, dump_yaml, parse_yaml
from mlc_ray.report.search import CONFIRMATION_KEY, SHOWN, Progress, is_search, read_trials
from mlc_ray.report.tables import Cell, Row, Table, cell, markdown, row, table
from mlc_ray.report.text import ABSENT, percent, signed
from mlc_ray.runs import (
    BEST_CONFIG_FILE,
    BEST_FOLDER,
    CONFIG_FILE,
    DIVERGED_FILE,
    FINISHED_FILE,
    MODEL_FOLDER,
    PARETO_FILE,
    PROVENANCE_FILE,
    SEARCH_TEXT,
    STOPPED_FILE,
    TRIALS_FILE,
    TRIALS_FOLDER,
    VALUES_FILE,
    read_metrics,
)
from mlc_ray.search.objectives.base import BENIGN, HARMFUL, TrialScore, make_objective, pareto_front
from mlc_ray.stats.rates import Interval
from mlc_ray.storage import Place, new_folder

Ending = Literal["finished", "stopped", "diverged", "unfinished"]


def read_values(folder: Place) -> dict[str, Any]:
    """The values of the trial in a run folder, as they were drawn."""
    values: dict[str, Any] = (folder / VALUES_FILE).read_json()
    return values


def ending(folder: Place) -> Ending:
    """How the trial in a run folder ended; one that runs, failed, or was cut off is "unfinished"."""
    marks: dict[str, Ending] = {FINISHED_FILE: "finished", STOPPED_FILE: "stopped", DIVERGED_FILE: "diverged"}
    return next((ended for mark, ended in marks.items() if (folder / mark).is_file()), "unfinished")


@dataclass(frozen=True)
class Trial:
    """One trial: its values as they were drawn, its last score and at which step, and how it ended.

    `ended` is "finished", "stopped" (by the scheduler), "diverged" or "unfinished"; `seconds` are those of its
    optimizer steps.
    """

    name: str
    values: Mapping[str, Any]
    score: TrialScore
    step: int
    ended: Ending
    seconds: float

    @property
    def finished(self) -> bool:
        """Whether it ran to its end."""
        return self.ended == "finished"

    @staticmethod
    def read(folder: Place, score: TrialScore, step: int) -> Trial:
        """The trial in a run folder of a search, with the score of its last scored step."""
        return Trial(
            name=folder.name,
            values=read_values(folder),
            score=score,
            step=step,
            ended=ending(folder),
            seconds=sum(row.get("step_seconds", 0.0) for row in read_metrics(folder)),
        )


@dataclass(frozen=True)
class Change:
    """The best confirmed model against another on the same prompts: best minus other in points, paired by bundle.

    Of several seeds it is the difference of the mean rates. `told_apart` says whether they differ by a test at 5 %,
    corrected for all comparisons with the best (Holm), of what ranks them, or under a floor of the benign side.
    """

    harmful: Interval
    benign: Interval | None
    told_apart: bool


@dataclass(frozen=True)
class Confirmed:
    """A point on the prompts that chose none: `trial` has its model, `score` is the mean over all `runs` scored.

    `change` is the best minus this one; None of the best itself.
    """

    trial: str
    runs: tuple[str, ...]
    values: Mapping[str, Any]
    score: TrialScore
    change: Change | None = None


@dataclass(frozen=True)
class Confirmation:
    """The result of a search: the points that were confirmed, best first, and the model before training.

    `change` is the best minus that model; both are None where too few of its responses got a verdict. `left_out` says
    which models could not be confirmed, and why; `trials` is how many trials it was made after.
    """

    points: tuple[Confirmed, ...]
    baseline: TrialScore | None
    change: Change | None
    left_out: tuple[str, ...] = ()
    trials: int | None = None

    @property
    def best(self) -> Confirmed:
        """The best of them."""
        return self.points[0]


_CONFIRMATION = TypeAdapter(Confirmation | None)


def read_confirmation(search: Place) -> Confirmation | None:
    """What an earlier process confirmed, from the `trials.json` of a search; None if nothing.

    Raises:
        SearchFileError: The file is damaged.
    """
    return read_trials(search, CONFIRMATION_KEY, _CONFIRMATION) if is_search(search) else None


@dataclass(frozen=True)
class SearchResult:
    """A whole search, or what there is of it. `front` are indices into `trials`.

    The scores of `trials` and `baseline` chose what was confirmed, and so the best of them are too good: `confirmation`
    has the result, None before the trials have ended or where none ran to its end. `failed` has a line for each trial
    that failed; one that had a score before is among the trials as well.
    """

    folder: Place
    config: SearchConfig
    baseline: TrialScore
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    progress: Progress
    failed: tuple[str, ...]
    confirmation: Confirmation | None

    @property
    def best(self) -> Confirmed | None:
        """The best point of those confirmed."""
        return None if self.confirmation is None else self.confirmation.best


def write_results(
    folder: Path | Place,
    config: SearchConfig,
    baseline: TrialScore,
    trials: Sequence[Trial],
    *,
    progress: Progress,
    failed: Sequence[str] = (),
    confirmation: Confirmation | None = None,
    earlier: bool = False,
) -> SearchResult:
    """Write `trials.json`, `search.md`, `pareto.png` and, once something is confirmed, `best.yaml` and `best/`.

    `earlier` says that the confirmation is an earlier one, of which `best.yaml` and `best/` are there.
    """
    folder = Place(folder)
    front = pareto_front([trial.score.point for trial in trials])
    result = SearchResult(folder, config, baseline, tuple(trials), tuple(front), progress, tuple(failed), confirmation)
    if confirmation is not None and not earlier:
        _write_best(folder, confirmation.best.trial)
    (folder / TRIALS_FILE).write_json(_plain(result))
    pareto_plot(result, folder / PARETO_FILE)
    (folder / SEARCH_TEXT).write_text(summary(result))
    return result


# -------------------------------------------------------------------------------------------------------- what is shown


def confirmation_table(result: SearchResult) -> Table | None:
    """The result: a row per confirmed point, best first, and the model before training."""
    found = result.confirmation
    if found is None:
        return None
    space = list(result.config.space)
    rows = []
    for point in found.points:
        cells = [*(_short(point.values[name]) for name in space), *_numbers(result.config, point.score)]
        cells += [str(len(point.runs)), *_change(point.change)]
        rows.append(row(point.trial, cells, tone="strong" if point is found.best else ""))
    empty = [ABSENT] * len(space)
    heads = [*space, *_heads(result), "models", "best less this", "told apart"]
    if found.baseline is None:
        rows.append(row("baseline", [ABSENT] * len(heads)))
    else:
        rows.append(row("baseline", [*empty, *_numbers(result.config, found.baseline), "1", *_change(found.change)]))
    note = (
        "on bundles that chose no trial; the best is the first of the selection unless another is told apart from it; "
        "told apart: by what ranks them, or under a floor by the benign side, at 5 %, corrected for all rows (Holm); "
        "best less this: the harmful side; intervals of rates are those that choose trials (docs/search.md), "
        "computed in another way than a score's own"
    )
    return table("Confirmed", ["trial", *heads], rows, note)


def _change(change: Change | None) -> list[str | Cell]:
    if change is None:
        return [ABSENT, ABSENT]
    limits = f"{signed(change.harmful.low)} to {signed(change.harmful.high)}"
    return [cell(signed(change.harmful.value), limits), "yes" if change.told_apart else "no"]


def trials_table(result: SearchResult) -> Table:
    """A row per trial, best first, and the baseline, on the prompts that chose what was confirmed."""
    space = list(result.config.space)
    confirmed = [] if result.confirmation is None else [point.trial for point in result.confirmation.points]
    rows: list[Row] = []
    for index in sorted(range(len(result.trials)), key=lambda i: -result.trials[i].score.rank):
        trial = result.trials[index]
        mark = ("^" if index in result.front else "") + ("*" if trial.name in confirmed else "")
        values = [_short(trial.values[name]) for name in space]
        cells = [*values, *_numbers(result.config, trial.score), str(trial.step), trial.ended, f"{trial.seconds:.0f}"]
        rows.append(row(trial.name + mark, cells))
    numbers = _numbers(result.config, result.baseline)
    rows.append(row("baseline", [*[ABSENT] * len(space), *numbers, *[ABSENT] * 3]))
    note = "on the bundles that choose; the best of these numbers are too good; * confirmed, ^ on the Pareto front"
    return table("Selection", ["trial", *space, *_heads(result), "step", "ended", "train s"], rows, note)


def _heads(result: SearchResult) -> list[str]:
    own = [f"{name} at least" for name in _own_metrics(result.config).values()]
    return [f"{_harmful(result.baseline)} %", "benign complied %", "worst language", *own]


def _numbers(config: SearchConfig, score: TrialScore) -> list[str | Cell]:
    lowest = _rate(score.worst)
    own = [f"{score.values[index]:.3f}" for index in _own_metrics(config)]
    return [
        _rate(score.harmful),
        _rate(score.benign),
        cell(f"{score.worst_language} {lowest.text}", *lowest.more),
        *own,
    ]


def _own_metrics(config: SearchConfig) -> dict[int, str]:
    """The objective's metrics that are no side of a score, by their index."""
    metrics = make_objective(config.objective).metrics
    return {index: name for index, name in enumerate(metrics) if name not in (HARMFUL, BENIGN)}


def _rate(rate: Interval | None) -> Cell:
    return cell(ABSENT) if rate is None else cell(percent(rate.value), f"{percent(rate.low)} to {percent(rate.high)}")


def verdict(result: SearchResult) -> list[str]:
    """The result in a few lines, warnings first, and where the best is."""
    places = [f"config  {result.folder / BEST_CONFIG_FILE}", f"model   {result.folder / BEST_FOLDER}"]
    return [*findings(result), *(places if result.confirmation is not None else ())]


def findings(result: SearchResult) -> list[str]:
    """The result in a few lines, warnings first."""
    objective = make_objective(result.config.objective)
    lines = [f"WARNING: {objective.warning}"] if objective.warning is not None else []
    lines += [f"WARNING: a trial failed: {fault}" for fault in result.failed]
    lines += _engine_faults(result)
    progress, found = result.progress, result.confirmation
    if progress.ended < progress.total:
        lines.append(f"{progress.ended} of {progress.total} trials have ended{_time_left(progress)}")
    if found is None:
        over = progress.ended >= progress.total and not any(trial.finished for trial in result.trials)
        return [*lines, "no trial ran to its end" if over else "nothing is confirmed yet"]
    lines += [f"WARNING: not confirmed, {fault}" for fault in found.left_out]
    if found.trials is not None and (more := progress.ended - found.trials) > 0:
        lines.append(f"the best was confirmed before {more} more trials had ended")
    best = found.best
    if not best.score.feasible and objective.floor is not None:
        lines.append(
            f"WARNING: it is not sure that the best complies with {100 * objective.floor:.0f} % of benign prompts: its "
            "interval reaches below"
        )
    values = ", ".join(f"{name}={_short(value)}" for name, value in best.values.items())
    lines.append(f"best: {best.trial} ({values})")
    change, base = found.change, found.baseline
    for name, side in ((_harmful(best.score), "harmful"), ("benign complied", "benign")):
        before, changed = getattr(base, side, None), getattr(change, side, None)
        lines.append(_against_baseline(name, getattr(best.score, side), before, changed, compared=base is not None))
    if len(best.runs) > 1:
        lines.append(f"these are means over {len(best.runs)} seeds; intervals are over prompts, not over seeds")
    if change is not None and not change.told_apart:
        lines.append("not told apart from the baseline")
    alike = [point for point in found.points[1:] if point.change is not None and not point.change.told_apart]
    if alike:
        lines.append(f"not told apart from: {', '.join(map(_named, alike))}")
    elif len(found.points) > 1:
        lines.append(f"told apart from {', '.join(point.trial for point in found.points[1:])}")
    return lines


def _engine_faults(result: SearchResult) -> list[str]:
    """The scores that lack what engines or an endpoint failed on, which counts on neither side."""
    scores = {"the baseline": result.baseline, **{f"trial {trial.name}": trial.score for trial in result.trials}}
    if (found := result.confirmation) is not None:
        scores |= {f"{point.trial} as confirmed": point.score for point in found.points}
        scores |= {} if found.baseline is None else {"the baseline as confirmed": found.baseline}
    faults = [f"{score.faults} of {name}" for name, score in scores.items() if score.faults]
    said = "WARNING: engines or an endpoint failed on prompts or responses, which count on neither side"
    return [f"{said}: {', '.join(faults)}"] if faults else []


def _named(point: Confirmed) -> str:
    assert point.change is not None
    changes = {"harmful": point.change.harmful, "benign": point.change.benign}
    said = [f"{side} {signed(each.value)}" for side, each in changes.items() if each is not None]
    return f"{point.trial} (best less this: {', '.join(said)} points)"


def _against_baseline(
    name: str, best: Interval | None, baseline: Interval | None, change: Interval | None, *, compared: bool
) -> str:
    if best is not None and not compared:
        value = _rate(best)
        return f"{name} {value.text} % ({value.more[0]}); not compared with the baseline"
    if best is None or baseline is None or change is None:
        return f"{name}: no such prompts were asked"
    value, before = _rate(best), percent(baseline.value)
    changed = f"{signed(change.value)} points, {signed(change.low)} to {signed(change.high)}, paired"
    return f"{name} {value.text} % ({value.more[0]}); baseline {before} %, change {changed}"


def _time_left(progress: Progress) -> str:
    return "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"


def duration(seconds: float) -> str:
    """Seconds in the two units that tell most: `3 h 05 min`, `12 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(1, minutes)} min"


def summary(result: SearchResult) -> str:
    """The tables and the verdict as a Markdown file."""
    found = confirmation_table(result)
    confirmed = "" if found is None else "\n".join(markdown(found)) + "\n"
    lines = "\n".join(f"- {line}" for line in verdict(result))
    shown = "\n".join(markdown(trials_table(result)))
    marks = "Rates have their 95 % intervals."
    return f"# Search {result.config.name}\n\n{lines}\n\n{confirmed}{shown}\n{marks}\n\n![Pareto](pareto.png)\n"


def pareto_plot(result: SearchResult, place: Place) -> None:
    """Both sides of the selection, a point per trial, the front, the floor, and the baseline."""
    from mlc_ray.report.figures import Trade, pareto_png  # matplotlib takes a second to import

    def point(score: TrialScore, label: str = "") -> Trade:
        return Trade(*score.point, label)

    base, floor = result.baseline, make_objective(result.config.objective).floor
    benign = "benign complied %" if base.benign is not None else "no benign prompts were asked"
    names = [trial.name for trial in result.trials]
    pareto_png(
        [point(trial.score, ", ".join(map(_short, trial.values.values()))) for trial in result.trials],
        place,
        baseline=point(base),
        front=result.front,
        best=names.index(result.best.trial) if result.best is not None else None,
        names=(f"{_harmful(base)} %", benign),
        floor=None if floor is None else 100 * floor,
    )


def _harmful(score: TrialScore) -> str:
    return f"harmful {score.measure}"


def _write_best(folder: Place, trial: str) -> None:
    run = folder / TRIALS_FOLDER / trial
    raw = parse_yaml((run / CONFIG_FILE).read_text(), str(run / CONFIG_FILE))
    raw["name"] = f"{folder.name}-best"
    raw.pop("output_dir", None)  # the trials' own folder; a run made from this file goes where runs go
    text = f"# The best trial of search {folder.name} ({trial}), ready for `mlc-ray train --config`.\n"
    (folder / BEST_CONFIG_FILE).write_text(text + dump_yaml(raw))
    (folder / BEST_FOLDER).remove()
    with new_folder(folder / BEST_FOLDER, last=(PROVENANCE_FILE,)) as copy:
        run.storage.fetch(str(run / MODEL_FOLDER), copy)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(result: SearchResult) -> dict[str, Any]:
    content = {name: value for name, value in vars(result).items() if name != "config"}
    for name in ("baseline", "progress", CONFIRMATION_KEY):
        content[name] = None if content[name] is None else asdict(content[name])
    tables = filter(None, (confirmation_table(result), trials_table(result)))
    return {
        **content,
        "folder": result.folder.name,
        "trials": [asdict(trial) for trial in result.trials],
        SHOWN: {"findings": findings(result), "tables": [asdict(each) for each in tables]},  # for reports
    }
