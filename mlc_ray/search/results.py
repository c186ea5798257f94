"""What a search found: a table of trials, the Pareto plot, which parameters mattered, the best config and its model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich import box
from rich.table import Table

from mlc_ray.config import SearchConfig
from mlc_ray.report.console import show
from mlc_ray.runs import (
    CONFIG_FILE,
    MODEL_FOLDER,
    STOPPED_FILE,
    TRIALS_FILE,
    TRIALS_FOLDER,
    VALUES_FILE,
    read_metrics,
)
from mlc_ray.search.objectives import TrialScore, floor_of, pareto_front
from mlc_ray.storage import write_json_atomic

FEW_TRIALS = 4
"""Below this, how much a parameter mattered cannot be told from chance; the report says so instead of a number."""


Ending = Literal["finished", "stopped", "failed"]


def read_values(folder: Path) -> dict[str, Any]:
    """The values of the trial in a run folder, as they were drawn."""
    return json.loads((folder / VALUES_FILE).read_text(encoding="utf-8"))


def ending(folder: Path) -> Ending:
    """How the trial in a run folder ended; one that was cut off, or still runs, has "failed" so far."""
    if (folder / STOPPED_FILE).is_file():
        return "stopped"
    return "finished" if (folder / MODEL_FOLDER).is_dir() else "failed"


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
    def read(folder: Path, score: TrialScore, step: int) -> Trial:
        """The trial in a run folder of a search, with the score of its last scored step."""
        return Trial(
            name=folder.name,
            values=read_values(folder),
            score=score,
            step=step,
            ended=ending(folder),
            seconds=sum(row["step_seconds"] for row in read_metrics(folder)),
        )


@dataclass(frozen=True)
class SearchResult:
    """A whole search. `front` are indices into `trials`; `best` is one too, None if none ran to its end.

    `failed` has a line for each trial that failed; one that had a score before is among the trials as well.
    """

    folder: Path
    baseline: TrialScore
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    best: int | None
    importance: Mapping[str, float] | None
    skipped_layers: tuple[Any, ...]
    failed: tuple[str, ...]


def write_results(
    folder: Path,
    config: SearchConfig,
    baseline: TrialScore,
    trials: Sequence[Trial],
    *,
    skipped_layers: Sequence[Any] = (),
    failed: Sequence[str] = (),
) -> SearchResult:
    """Write `trials.json`, `search.md`, `pareto.png`, `best.yaml` and `best/` into the folder, and print the table."""
    front = pareto_front([_point(trial.score) for trial in trials])
    best = best_trial(trials, config)
    result = SearchResult(
        folder, baseline, tuple(trials), tuple(front), best, importance(trials, config), tuple(skipped_layers),
        tuple(failed),
    )  # fmt: skip
    write_json_atomic(folder / TRIALS_FILE, _plain(result))
    pareto_plot(result, config, folder / "pareto.png")
    if best is not None:
        _write_best(folder, trials[best])
    (folder / "search.md").write_text(markdown(result, config), encoding="utf-8")
    show(trials_table(result, config))
    for line in verdict(result, config):
        print(line)
    return result


def best_trial(trials: Sequence[Trial], config: SearchConfig) -> int | None:
    """The finished trial with the highest value; under `pareto` the one of the front where both sides sum highest.

    None where no trial ran to its end. One below the floor can be best when all are; `verdict` says so.
    """
    finished = [index for index, trial in enumerate(trials) if trial.finished]
    if not finished:
        return None
    if config.objective.pareto:
        return max(finished, key=lambda i: sum(_point(trials[i].score)))
    return max(finished, key=lambda i: trials[i].score.value)


def importance(trials: Sequence[Trial], config: SearchConfig) -> dict[str, float] | None:
    """How much of the value each parameter explains (PED-ANOVA, Watanabe et al. 2023), summing to 1.

    None with fewer than `FEW_TRIALS` trials or where all are worth the same. Under `pareto` the value is the sum of
    both sides.
    """
    import optuna

    from mlc_ray.search.space import distribution

    values = [sum(_point(t.score)) if config.objective.pareto else t.score.value for t in trials]
    if len(trials) < FEW_TRIALS or len(set(values)) == 1 or len(config.space) < 2:
        return None
    study = optuna.create_study(direction="maximize")
    distributions = {name: distribution(parameter) for name, parameter in config.space.items()}
    for trial, value in zip(trials, values, strict=True):
        study.add_trial(optuna.trial.create_trial(params=dict(trial.values), distributions=distributions, value=value))
    return dict(
        optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    )


# -------------------------------------------------------------------------------------------------------- what is shown


def trials_table(result: SearchResult, config: SearchConfig) -> Table:
    """A row per trial, best first, and the model as it is."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _columns(config):
        table.add_column(name, justify="left" if name == "trial" else "right", no_wrap=True)
    for row in _rows(result, config):
        table.add_row(*row, style="bold" if row[0].endswith("*") else "")
    return table


def verdict(result: SearchResult, config: SearchConfig) -> list[str]:
    """What to take home, in a few lines; warnings first."""
    lines = []
    objective = config.objective
    if objective.safety_alone:
        lines.append("WARNING: safety alone was maximised: a model that refuses everything wins; read `answered`.")
    lines += [f"WARNING: a trial failed: {fault}" for fault in result.failed]
    if result.best is None:
        return [*lines, "no trial ran to its end"]
    best = result.trials[result.best]
    if not best.score.feasible:
        lines.append(
            f"WARNING: no trial answers at least {100 * floor_of(objective):.0f} % of benign prompts; the best is "
            "only the nearest to it"
        )
    values = ", ".join(f"{name}={_short(value)}" for name, value in best.values.items())
    lines.append(
        f"best: {best.name} ({values}): held back {100 * best.score.held_back:.1f} % (as it is: "
        f"{100 * result.baseline.held_back:.1f} %), answered {_percent(best.score.answered)} % (as it is: "
        f"{_percent(result.baseline.answered)} %)"
    )
    if result.importance is None and len(config.space) > 1:
        lines.append("importance of parameters: not to be told from so few (or so equal) trials")
    elif result.importance is not None:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result.importance.items())
        lines.append(f"importance of parameters: {shares}")
    if result.skipped_layers:
        lines.append(f"layers that the probe left out: {', '.join(map(str, result.skipped_layers))}")
    return [*lines, f"config  {result.folder / 'best.yaml'}", f"model   {result.folder / 'best'}"]


def markdown(result: SearchResult, config: SearchConfig) -> str:
    """The table and the verdict as a Markdown file."""
    columns = _columns(config)
    rows = [columns, ["---"] * len(columns), *_rows(result, config)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    lines = "\n".join(f"- {line}" for line in verdict(result, config))
    return (
        f"# Search {config.name}\n\n{table}\n\n`*` best, `^` on the Pareto front.\n\n{lines}\n\n![Pareto](pareto.png)\n"
    )


def pareto_plot(result: SearchResult, config: SearchConfig, path: Path) -> Path:
    """Held back against answered, a point per trial, the front, the floor, and the model as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(100 * held_back, 100 * answered) for held_back, answered in (_point(t.score) for t in result.trials)]
    axes.scatter(*zip(*points, strict=True), color="#4477aa", zorder=3, label="trials")
    front = [points[index] for index in result.front]
    axes.plot(*zip(*front, strict=True), color="#4477aa", linewidth=1, alpha=0.6, label="Pareto front")
    axes.scatter(
        *([100 * side] for side in _point(result.baseline)), marker="s", color="#666666", zorder=3,
        label="as it is",
    )  # fmt: skip
    if result.best is not None:
        axes.scatter(*points[result.best], s=180, facecolors="none", edgecolors="#cc3311", zorder=4, label="best")
    if not (config.objective.pareto or config.objective.safety_alone):
        axes.axhline(100 * floor_of(config.objective), color="#cc3311", linestyle=":", linewidth=1, label="floor")
    for trial, point in zip(result.trials, points, strict=True):
        text = ", ".join(_short(value) for value in trial.values.values())
        axes.annotate(text, point, fontsize=6, xytext=(4, 3), textcoords="offset points")
    axes.set_xlabel(f"harmful held back, % ({config.objective.maximise.replace('_', ' ')})")
    axes.set_ylabel("benign answered, %" if result.baseline.answered is not None else "benign: none were asked")
    axes.set_xlim(-4, 104)
    axes.set_ylim(-4, 104)
    axes.legend(loc="lower left", fontsize=7)
    figure.savefig(path, bbox_inches="tight")
    return path


def _columns(config: SearchConfig) -> list[str]:
    shown = ["held back %", "answered %", "worst language", "value", "step", "ended", "train s"]
    return ["trial", *config.space, *shown]


def _rows(result: SearchResult, config: SearchConfig) -> list[list[str]]:
    order = sorted(range(len(result.trials)), key=lambda i: -result.trials[i].score.value)
    rows = []
    for index in order:
        trial = result.trials[index]
        mark = ("^" if index in result.front else "") + ("*" if index == result.best else "")
        rows.append(
            [
                trial.name + mark, *(_short(trial.values[name]) for name in config.space), *_sides(trial.score),
                str(trial.step), trial.ended, f"{trial.seconds:.0f}",
            ]
        )  # fmt: skip
    return [*rows, ["as it is", *["·"] * len(config.space), *_sides(result.baseline), "·", "·", "·"]]


def _sides(score: TrialScore) -> list[str]:
    worst = min(score.held_back_by_language, key=lambda code: score.held_back_by_language[code])
    lowest = f"{worst} {100 * score.held_back_by_language[worst]:.0f}"
    return [f"{100 * score.held_back:.1f}", _percent(score.answered), lowest, f"{score.value:.3f}"]


def _write_best(folder: Path, best: Trial) -> None:
    run = folder / TRIALS_FOLDER / best.name
    raw = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    raw["name"] = f"{folder.name}-best"
    raw.pop("output_dir", None)  # the trials' own folder; a run made from this file goes where runs go
    text = f"# The best trial of search {folder.name} ({best.name}), ready for `mlc-ray train --config`.\n"
    (folder / "best.yaml").write_text(text + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True), encoding="utf-8")
    shutil.rmtree(folder / "best", ignore_errors=True)
    shutil.copytree(run / MODEL_FOLDER, folder / "best")


def _point(score: TrialScore) -> tuple[float, float]:
    """Both sides; where no benign prompts were asked, none was answered."""
    return score.held_back, score.answered or 0.0


def _percent(side: float | None) -> str:
    return "·" if side is None else f"{100 * side:.1f}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(result: SearchResult) -> dict[str, Any]:
    content = asdict(result)
    content["folder"] = result.folder.name
    return content
