"""What a study has so far, from the files of its cells: read, counted, and written."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from mlc_ray.config import UNTOUCHED
from mlc_ray.report.study import CellOutcome, CellState, MethodRow, StudyResult, save_study
from mlc_ray.report.study_pages import study_latex, study_markdown
from mlc_ray.runs import (
    CELLS_FOLDER,
    CONFIG_FILE,
    DIVERGED_FILE,
    MODEL_FOLDER,
    PROVENANCE_FILE,
    SCORES_FILE,
    SCORES_FOLDER,
    STUDY_LATEX,
    STUDY_SCORE,
    STUDY_TEXT,
    UNTOUCHED_FOLDER,
    UTILITY_FILE,
    read_metrics,
)
from mlc_ray.score.prompts import Prompts
from mlc_ray.score.results import ScoreResult, load_records, load_scores
from mlc_ray.score.run import TooManyUnparsedError, check_unparsed
from mlc_ray.stats.rates import Judged
from mlc_ray.stats.study import (
    MethodTest,
    Verdicts,
    corrected,
    method_rates,
    method_tests,
    read_verdicts,
    sides_by_benchmark,
)
from mlc_ray.stats.study_languages import method_languages
from mlc_ray.storage import Place, engine_named, library_versions
from mlc_ray.study.cells import Cell
from mlc_ray.study.folder import Plan, StudyError
from mlc_ray.study.supervision import Supervision
from mlc_ray.train.run_folder import load_run_config
from mlc_ray.types import Kind
from mlc_ray.utility.file import UtilityRow, load_utility

logger = logging.getLogger(__name__)


def score_folder(run: Place) -> Place:
    """Where a cell's score is."""
    return run / SCORES_FOLDER / STUDY_SCORE


def untouched_folder(folder: Place, model: str) -> Place:
    """Where the score of a model before training is."""
    return folder / UNTOUCHED_FOLDER / model


def is_complete(score: Place) -> bool:
    """Whether a score folder is whole."""
    return (score / SCORES_FILE).is_file()


def is_read(score: Place, bound: float) -> bool:
    """Whether a score folder is whole, and no larger share of its responses than `bound` got no verdict."""
    return is_complete(score) and load_scores(score).unparsed_share <= bound


def has_model(run: Place) -> bool:
    """Whether a cell was trained to its end and has its model."""
    return (run / MODEL_FOLDER / PROVENANCE_FILE).is_file()


class Recorder:
    """Counts the cells' scores, and writes `results.json`, `study.md` and `study.tex`.

    `failures` says by cell what a process of this study could not do; an earlier one's are tried again.
    """

    def __init__(
        self, plan: Plan, folder: Place, prompts: Prompts, supervision: Mapping[str, Supervision], *, gpu: bool
    ) -> None:
        self.failures: dict[str, str] = {}
        self._plan, self._folder, self._gpu, self._supervision = plan, folder, gpu, supervision
        asked = set(zip(*(prompts.table[name].to_pylist() for name in ("benchmark", "bundle_id", "kind")), strict=True))
        counts: Counter[Kind] = Counter(kind for _, _, kind in asked)
        self._bundles = {kind: counts[kind] for kind in sorted(counts, reverse=True)}
        self._unread: set[str] = set()  # whose score has too few verdicts
        self._judge = ""
        self._told_by: dict[str, None] = {}
        self._first: tuple[Place, ScoreResult] | None = None  # of the scores
        self._rows: tuple[MethodRow, ...] = ()
        self._tests: tuple[MethodTest, ...] = ()
        self.count()

    def count(self) -> None:
        """Read all scores that there are: rates of every method, and tests of every pair."""
        rows, tests = [], []
        self._told_by.clear()
        self._first = None
        verdicts = {model: self._verdicts(model) for model in self._plan.config.models}
        alike = len(self._told_by) == 1 and "" not in self._told_by
        for model, found in verdicts.items():
            for method in (UNTOUCHED, *self._plan.config.methods):
                rates = method_rates(found[method], self.trained) if method in found else None
                alone = sides_by_benchmark(found[method], self.trained) if method in found else {}
                told = method_languages(found[method].runs, self.trained) if alike and method in found else ()
                rows.append(MethodRow(model, method, rates, told, alone))
            tests += method_tests(model, found)
        self._rows, self._tests = tuple(rows), tuple(corrected(tests))

    @property
    def trained(self) -> list[str]:
        """The languages of the bundles of any cell."""
        return sorted({code for each in self._supervision.values() for code in each.languages})

    def _verdicts(self, model: str) -> dict[str, Verdicts]:
        """The verdicts of each method of a model that has a score, the model before training first."""
        runs: dict[str, dict[int | None, list[Judged]]] = {}
        places: list[tuple[str, str, int | None, Place]] = []
        places.append((f"{model}-{UNTOUCHED}", UNTOUCHED, None, untouched_folder(self._folder, model)))
        for cell in self._plan.cells:
            if cell.model == model:
                places.append((cell.name, cell.method, cell.seed, score_folder(self._run(cell))))
        for name, method, seed, place in places:
            if not is_complete(place):
                continue
            result = load_scores(place)
            if result.prompts != self._plan.prompts:
                raise StudyError(
                    f"{str(place)!r} is a score on other prompts ({result.prompts}) than this study's "
                    f"({self._plan.prompts}): remove it, and it is made again"
                )
            self._check_alike(place, result)
            try:
                check_unparsed(result, self._plan.scoring.max_unparsed)
            except TooManyUnparsedError as error:
                self.failures[name] = str(error)
                self._unread.add(name)
                continue
            if name in self._unread:  # it was made again
                self._unread.remove(name)
                self.failures.pop(name, None)
            self._judge = ", ".join(f"{by} ({measure})" for measure, by in result.measured_by.items())
            self._told_by[result.told_by] = None
            runs.setdefault(method, {})[seed] = load_records(result)
        return {method: read_verdicts(found) for method, found in runs.items()}

    def _check_alike(self, place: Place, result: ScoreResult) -> None:
        """Refuse scores by two judges or two engines: rates of methods would differ for no reason of theirs."""
        if self._first is None:
            self._first = place, result
        there, first = self._first
        for name, was, now in (
            ("judge", first.judge, result.judge),
            ("engine", engine_named(first.versions), engine_named(result.versions)),
        ):
            if was != now:
                raise StudyError(
                    f"{str(place)!r} is a score by another {name} ({now}) than {str(there)!r} ({was}), so that they "
                    "do not compare: remove those by one of them, and they are made again"
                )

    def _run(self, cell: Cell) -> Place:
        return self._folder / CELLS_FOLDER / cell.name

    def outcomes(self) -> list[CellOutcome]:
        """How far each cell came, by its files; the models before training first."""
        found = [
            self._outcome(f"{model}-{UNTOUCHED}", model, UNTOUCHED, None, untouched_folder(self._folder, model), None)
            for model in self._plan.config.models
        ]
        for cell in self._plan.cells:
            run = self._run(cell)
            found.append(self._outcome(cell.name, cell.model, cell.method, cell.seed, score_folder(run), cell))
        return found

    def _outcome(
        self, name: str, model: str, method: str, seed: int | None, score: Place, cell: Cell | None
    ) -> CellOutcome:
        run = None if cell is None else self._run(cell)
        state: CellState = "waiting"
        message = self.failures.get(name, "")
        if is_complete(score) and name not in self._unread:
            state = "scored"
        elif run is not None and (run / DIVERGED_FILE).is_file() and not has_model(run):
            state = "diverged"
        elif message:
            state = "failed"
        elif run is not None and has_model(run):
            state = "trained"
        seconds = 0.0
        if is_complete(score):
            seconds = float(load_scores(score).config.get("seconds", {}).get("total", 0.0))
        outcome = CellOutcome(name, model, method, seed, state, message, score_seconds=seconds, utility=_utility(score))
        return outcome if cell is None or run is None else self._with_training(outcome, cell, run)

    def _with_training(self, outcome: CellOutcome, cell: Cell, run: Place) -> CellOutcome:
        rows, config = read_metrics(run), cell.config
        if (run / CONFIG_FILE).is_file():  # with the workers that it had, whatever the study has now
            config = load_run_config(run)
        workers = config.cluster.most_workers
        used = self._supervision[cell.name]
        return replace(
            outcome,
            steps=int(rows[-1]["step"]) if rows else 0,
            workers=workers,
            seconds=workers * sum(row.get("step_seconds") or 0.0 for row in rows),
            prompt_tokens=used.prompts,
            answer_tokens=used.answers,
        )

    def write(self) -> StudyResult:
        """Write what there is so far; rates and tests are those of the last `count`."""
        config = self._plan.config
        result = StudyResult(
            name=config.name,
            models={name: section.path for name, section in config.models.items()},
            methods={name: tuple(overrides) for name, overrides in config.methods.items()},
            seeds=tuple(config.seeds),
            trained=tuple(self.trained),
            gpu=self._gpu,
            judge=self._judge,
            bundles=self._bundles,
            rows=self._rows,
            tests=self._tests,
            cells=tuple(self.outcomes()),
            told_by=tuple(self._told_by),
            versions=library_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            folder=self._folder,
        )
        write_study(result)
        return result


def write_study(result: StudyResult) -> None:
    """Write `results.json`, `study.md` and `study.tex` into the study's folder."""
    save_study(result)
    (result.folder / STUDY_TEXT).write_text(study_markdown(result))
    (result.folder / STUDY_LATEX).write_text(study_latex(result))


def _utility(score: Place) -> dict[str, float]:
    if not (score / UTILITY_FILE).is_file():
        return {}
    rows = load_utility(score).rows
    return {_utility_name(row): row.value for row in rows if row.value is not None}


def _utility_name(row: UtilityRow) -> str:
    return f"{row.task} {row.metric}" + (f" ({row.filter})" if row.filter not in ("", "none") else "")
