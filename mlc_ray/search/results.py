"""The results of a search: a table of trials, the Pareto plot, the best config and its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mlc_ray.config import SearchConfig
from mlc_ray.report.tables import Table, markdown, row, table
from mlc_ray.report.text import ABSENT, percent, whole
from mlc_ray.runs import (
    CONFIG_FILE,
    MODEL_FOLDER,
    PROVENANCE_FILE,
    STOPPED_FILE,
    TRIALS_FILE,
    TRIALS_FOLDER,
    VALUES_FILE,
    read_metrics,
)
from mlc_ray.search.objectives.base import BENIGN, HARMFUL, TrialScore, make_objective, pareto_front
from mlc_ray.storage import Place, new_folder

Ending = Literal["finished", "stopped", "failed"]


def read_values(folder: Place) -> dict[str, Any]:
    """The values of the trial in a run folder, as they were drawn."""
    values: dict[str, Any] = (folder / VALUES_FILE).read_json()
    return values


def ending(folder: Place) -> Ending:
    """How the trial in a run folder ended; one that was cut off, or still runs, has "failed" so far."""
    if (folder / STOPPED_FILE).is_file():
        return "stopped"
    return "finished" if (folder / MODEL_FOLDER / PROVENANCE_FILE).is_file() else "failed"


@dataclass(frozen=True)
class Trial:
    """One trial: its values as they were drawn, its last score and at which step, and how it ended.

    `ended` is "finished", "stopped" (by the scheduler) or "failed"; `seconds` those of its optimizer steps.
    """

    name: str
    values: Mapping[str, Any]
    score: TrialScore
    step: int
    ended: Ending
    seconds: float

    @property
    def finished(self) -> bool:
        """Whether it ran to its end, and has a model."""
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
class SearchResult:
    """A whole search. `front` are indices into `trials`; `best` is one too, None if none ran to its end.

    `failed` has a line for each trial that failed; one that had a score before is among the trials as well.
    """

    folder: Place
    config: SearchConfig
    baseline: TrialScore
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    best: int | None
    skipped_layers: tuple[Any, ...]
    failed: tuple[str, ...]


def write_results(
    folder: Path | Place,
    config: SearchConfig,
    baseline: TrialScore,
    trials: Sequence[Trial],
    *,
    skipped_layers: Sequence[Any] = (),
    failed: Sequence[str] = (),
) -> SearchResult:
    """Write `trials.json`, `search.md`, `pareto.png`, `best.yaml` and `best/` into the folder."""
    folder = Place(folder)
    front = pareto_front([trial.score.point for trial in trials])
    best = best_trial(trials)
    result = SearchResult(
        folder, config, baseline, tuple(trials), tuple(front), best, tuple(skipped_layers), tuple(failed)
    )
    (folder / TRIALS_FILE).write_json(_plain(result))
    pareto_plot(result, folder / "pareto.png")
    if best is not None:
        _write_best(folder, trials[best])
    (folder / "search.md").write_text(summary(result))
    return result


def best_trial(trials: Sequence[Trial]) -> int | None:
    """The finished trial that the objective ranks highest, None where no trial ran to its end.

    One below the floor can be best when all are; `verdict` says so.
    """
    finished = [index for index, trial in enumerate(trials) if trial.finished]
    return max(finished, key=lambda index: trials[index].score.rank, default=None)


# -------------------------------------------------------------------------------------------------------- what is shown


def trials_table(result: SearchResult) -> Table:
    """A row per trial, best first, and the baseline."""
    space = list(result.config.space)
    metrics = make_objective(result.config.objective).metrics
    own = [(index, name) for index, name in enumerate(metrics) if name not in (HARMFUL, BENIGN)]
    sides = [f"{_harmful(result.baseline)} %", "benign complied %", "worst language"]

    def numbers(score: TrialScore) -> list[str]:
        worst = min(score.harmful_by_language, key=lambda code: score.harmful_by_language[code])
        lowest = f"{worst} {whole(100 * score.harmful_by_language[worst])}"
        values = [f"{score.values[index]:.3f}" for index, _ in own]
        return [_percent(score.harmful), _percent(score.benign), lowest, *values]

    rows = []
    for index in sorted(range(len(result.trials)), key=lambda i: -result.trials[i].score.rank):
        trial = result.trials[index]
        mark = ("^" if index in result.front else "") + ("*" if index == result.best else "")
        values = [_short(trial.values[name]) for name in space]
        cells = [*values, *numbers(trial.score), str(trial.step), trial.ended, f"{trial.seconds:.0f}"]
        rows.append(row(trial.name + mark, cells, tone="strong" if index == result.best else ""))
    rows.append(row("baseline", [*[ABSENT] * len(space), *numbers(result.baseline), *[ABSENT] * 3]))
    return table("", ["trial", *space, *sides, *(name for _, name in own), "step", "ended", "train s"], rows)


def verdict(result: SearchResult) -> list[str]:
    """The result in a few lines, warnings first."""
    objective = make_objective(result.config.objective)
    lines = [f"WARNING: {objective.warning}"] if objective.warning is not None else []
    lines += [f"WARNING: a trial failed: {fault}" for fault in result.failed]
    if result.best is None:
        return [*lines, "no trial ran to its end"]
    best = result.trials[result.best]
    if not best.score.feasible and objective.floor is not None:
        lines.append(
            f"WARNING: no trial complies with {100 * objective.floor:.0f} % of benign prompts or more; the best is "
            "only the nearest to it"
        )
    values = ", ".join(f"{name}={_short(value)}" for name, value in best.values.items())
    base = result.baseline
    lines.append(
        f"best: {best.name} ({values}): {_harmful(base)} {_percent(best.score.harmful)} % (baseline "
        f"{_percent(base.harmful)} %), benign complied {_percent(best.score.benign)} % (baseline "
        f"{_percent(base.benign)} %)"
    )
    if result.skipped_layers:
        lines.append(f"layers that the probe left out: {', '.join(map(str, result.skipped_layers))}")
    return [*lines, f"config  {result.folder / 'best.yaml'}", f"model   {result.folder / 'best'}"]


def summary(result: SearchResult) -> str:
    """The table and the verdict as a Markdown file."""
    shown = "\n".join(markdown(trials_table(result)))
    lines = "\n".join(f"- {line}" for line in verdict(result))
    marks = "`*` best, `^` on the Pareto front."
    return f"# Search {result.config.name}\n\n{shown}\n{marks}\n\n{lines}\n\n![Pareto](pareto.png)\n"


def pareto_plot(result: SearchResult, place: Place) -> None:
    """Both sides, a point per trial, the front, the floor, and the baseline."""
    from mlc_ray.report.figures import Trade, pareto_png  # matplotlib takes a second to import

    def point(score: TrialScore, label: str = "") -> Trade:
        return Trade(100 * score.point[0], 100 * score.point[1], label)

    base, floor = result.baseline, make_objective(result.config.objective).floor
    benign = "benign complied %" if base.benign is not None else "no benign prompts were asked"
    pareto_png(
        [point(trial.score, ", ".join(map(_short, trial.values.values()))) for trial in result.trials],
        place,
        baseline=point(base),
        front=result.front,
        best=result.best,
        names=(f"{_harmful(base)} %", benign),
        floor=None if floor is None else 100 * floor,
    )


def _harmful(score: TrialScore) -> str:
    return f"harmful {score.measure}"


def _write_best(folder: Place, best: Trial) -> None:
    run = folder / TRIALS_FOLDER / best.name
    raw = yaml.safe_load((run / CONFIG_FILE).read_text())
    raw["name"] = f"{folder.name}-best"
    raw.pop("output_dir", None)  # the trials' own folder; a run made from this file goes where runs go
    text = f"# The best trial of search {folder.name} ({best.name}), ready for `mlc-ray train --config`.\n"
    (folder / "best.yaml").write_text(text + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))
    (folder / "best").remove()
    with new_folder(folder / "best", last=(PROVENANCE_FILE,)) as copy:
        run.storage.fetch(str(run / MODEL_FOLDER), copy)


def _percent(side: float | None) -> str:
    return percent(None if side is None else 100 * side)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(result: SearchResult) -> dict[str, Any]:
    content = {name: value for name, value in vars(result).items() if name != "config"}
    trials = [asdict(trial) for trial in result.trials]
    return {**content, "folder": result.folder.name, "baseline": asdict(result.baseline), "trials": trials}
