"""Folders -> plain data: what was scored, what was trained, and what was found but could not be used.

A RUN is a training run's folder (`config.yaml`, `run.json`, `metrics.jsonl`, scores in `scores/*/`), a score folder
(`scores.json`, `responses.parquet`, perhaps `utility.json`), a search's (`trials.json`), or a folder of those. Nothing
is computed here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from mlc_ray.errors import MlcRayError
from mlc_ray.report.decisions import LanguageDecision, read_decisions
from mlc_ray.report.search import Search, is_search, read_search, scores_of
from mlc_ray.runs import (
    CONFIG_FILE,
    METRICS_FILE,
    PROBE_FILE,
    RESPONSES_FILE,
    RUN_FILE,
    SCORES_FILE,
    SCORES_FOLDER,
    TRIALS_FILE,
    UTILITY_FILE,
    read_metrics,
)
from mlc_ray.score.results import LANGUAGE_COLUMN, ScoreResult, load_scores
from mlc_ray.stats.rates import Judged
from mlc_ray.stats.response_languages import InLanguage, in_language
from mlc_ray.storage import Place
from mlc_ray.types import Behaviour, Kind, Safety, Via
from mlc_ray.utility.file import UtilityFileError, UtilityRow, load_utility

_COLUMNS = ("benchmark", "bundle_id", "kind", "category", "language", "prompt", "response", "finish", "behaviour",
            "safety", "reason", "categories", "margin", "via_refused", "via_safe",
            "judge_refused", "judge_safe", "sample", "thoughts", LANGUAGE_COLUMN)  # fmt: skip
_UTILITY_ALONE = (
    f"has {UTILITY_FILE} but no {SCORES_FILE}: utility is shown beside the score of the same model; measure it with "
    f"`mlc-ray utility MODEL --tasks ... --scores SCORE_FOLDER`, or move {UTILITY_FILE} into that score folder"
)
_ALLOWED = {
    "kind": get_args(Kind),
    "behaviour": (*get_args(Behaviour), None),
    "safety": (*get_args(Safety), None),
    "via_refused": (*get_args(Via), None),
    "via_safe": (*get_args(Via), None),
}


class ReportError(MlcRayError):
    """A folder is not a run, or a file in it is damaged; the message quotes the path."""


@dataclass(frozen=True)
class Response:
    """A row of `responses.parquet`: a prompt, the response, and what the judge said of it."""

    benchmark: str
    bundle_id: str
    kind: Kind
    category: str
    language: str
    prompt: str
    response: str
    finish: str
    behaviour: Behaviour | None
    safety: Safety | None
    reason: str
    categories: tuple[str, ...]
    margin: float | None
    via_refused: Via | None
    via_safe: Via | None
    judge_refused: str | None
    judge_safe: str | None
    sample: int
    thoughts: str | None
    response_language: str | None

    @property
    def judged(self) -> Judged:
        """The verdict without the texts, as `stats.rates` counts it."""
        return Judged(
            self.benchmark, self.bundle_id, self.kind, self.language, self.behaviour, self.safety,
            self.via_refused, self.via_safe, self.margin, self.judge_refused, self.judge_safe, self.sample,
            self.response_language,
        )  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One score. `label` is unique in the report, short where it can be; `responses` is empty if the file is gone.

    `decisions` are those of a probe of the same model, if one is there. `in_language` is empty where that was not
    measured.
    """

    label: str
    result: ScoreResult
    responses: tuple[Response, ...] = ()
    utility: tuple[UtilityRow, ...] = ()
    decisions: tuple[LanguageDecision, ...] = ()
    in_language: InLanguage = field(default_factory=InLanguage)


@dataclass(frozen=True)
class Training:
    """One training run. `metrics` maps a name to points (step, value); value None where it was not a finite number."""

    label: str
    folder: Place
    config: str
    facts: Mapping[str, Any]
    metrics: Mapping[str, tuple[tuple[int, float | None], ...]]


@dataclass(frozen=True)
class Collection:
    """All that a report is made of. `notes` says what was found but could not be used, to be shown in the report."""

    models: tuple[Model, ...]
    trainings: tuple[Training, ...]
    notes: tuple[str, ...] = ()
    searches: tuple[Search, ...] = ()


def without_folders(collection: Collection) -> Collection:
    """`collection` without what names folders: no notes, and labels that are the last folder's name, then `name #2`."""
    models = _numbered([model.label for model in collection.models])
    trainings = _numbered([training.label for training in collection.trainings])
    searches = _numbered([search.label for search in collection.searches])
    return Collection(
        tuple(replace(model, label=label) for model, label in zip(collection.models, models, strict=True)),
        tuple(replace(each, label=label) for each, label in zip(collection.trainings, trainings, strict=True)),
        searches=tuple(replace(each, label=label) for each, label in zip(collection.searches, searches, strict=True)),
    )


def _numbered(labels: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    found = []
    for name in (label.rpartition(" / ")[2] for label in labels):
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return found


def collect(paths: Sequence[str | Path | Place]) -> Collection:
    """Read every RUN. The order is that of `paths`; in one run, scores come in the order they were made.

    Raises:
        ReportError: A path is not a run, or is given twice; a file is damaged.
        ScoresFileError: A `scores.json` is damaged.
        SearchFileError: A `trials.json` is damaged.
    """
    if not paths:
        raise ReportError("no run was given; name at least one run folder, score folder or search folder")
    every = _Found()
    for path in map(Place, paths):
        _find(path, every)
    runs, scores, notes = every.runs, every.scores, every.notes
    for kind, found in (("search", every.searches), ("run", runs), ("score", scores)):
        if twice := [str(p) for p, count in Counter(p.absolute() for p in found).items() if count > 1]:
            raise ReportError(f"{kind} folder {twice[0]!r} is in the report twice; give it once")
    labels = _labels([every.names.get(folder, _names(folder)) for folder in scores])
    models = [_read_model(folder, label, notes) for folder, label in zip(scores, labels, strict=True)]
    models = _with_decisions(models, every.probes, notes)
    labels = _labels(list(map(_names, runs)))
    trainings = [_read_training(folder, label) for folder, label in zip(runs, labels, strict=True)]
    labels = _labels(list(map(_names, every.searches)))
    searches = [read_search(folder, label) for folder, label in zip(every.searches, labels, strict=True)]
    if not models and not searches and not any(training.metrics for training in trainings):
        raise ReportError(
            f"{', '.join(repr(str(path)) for path in paths)}: neither a score nor training metrics there yet; "
            "score the run with `mlc-ray score`"
        )
    return Collection(tuple(models), tuple(trainings), tuple(notes), tuple(searches))


# --------------------------------------------------------------------------------------------- what is where


def _is_score(folder: Place) -> bool:
    return (folder / SCORES_FILE).is_file()


def _is_run(folder: Place) -> bool:
    return (folder / CONFIG_FILE).is_file() and (
        (folder / RUN_FILE).is_file() or (folder / METRICS_FILE).is_file() or (folder / SCORES_FOLDER).is_dir()
    )


def _is_probe(folder: Place) -> bool:
    return (folder / PROBE_FILE).is_file()


def _is_utility(folder: Place) -> bool:
    return (folder / UTILITY_FILE).is_file() and not _is_score(folder)


@dataclass
class _Found:
    """Folders of each kind. `names` has what a search calls scores that do not bear the names of their folders."""

    runs: list[Place] = field(default_factory=list)
    scores: list[Place] = field(default_factory=list)
    searches: list[Place] = field(default_factory=list)
    probes: list[Place] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    names: dict[Place, list[str]] = field(default_factory=dict)


def _find(path: Place, found: _Found) -> None:
    scores, notes = found.scores, found.notes
    if not path.exists():
        raise ReportError(
            f"{str(path)!r} does not exist; give a run folder, a score folder, a search folder, or a folder of those"
        )
    if not path.is_dir():
        raise ReportError(f"{str(path)!r} is a file; give the folder it is in")
    if _is_score(path):
        scores.append(path)
        return
    if _is_probe(path):
        found.probes.append(path)
        return
    if is_search(path):
        found.searches.append(path)
        for name, folder in scores_of(path).items():
            if _is_score(folder):
                scores.append(folder)
                found.names[folder] = [*_names(path), name]
            else:
                notes.append(f"of {str(path)!r}, the score of {name} is not there")
        return
    if _is_run(path):
        found.runs.append(path)
        scores.extend(_scores_in(path / SCORES_FOLDER, notes))
        return
    if _is_utility(path):
        raise ReportError(f"{str(path)!r} {_UTILITY_ALONE}")
    inside = [child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")]
    known = [child for child in inside if any(is_one(child) for is_one in (_is_score, is_search, _is_run, _is_probe))]
    alone = [child for child in inside if child not in known and _is_utility(child)]
    if alone and not known:
        raise ReportError(f"{str(alone[0])!r} {_UTILITY_ALONE}")
    if not known:
        raise ReportError(
            f"{str(path)!r} is neither a run (no {CONFIG_FILE} with {RUN_FILE}, {METRICS_FILE} or scores/) nor a score "
            f"(no {SCORES_FILE}) nor a search (no {TRIALS_FILE}), and holds none; give a folder that `mlc-ray train`, "
            "`mlc-ray score` or `mlc-ray search` wrote"
        )
    for child in [child for child in known if not _is_score(child)]:
        _find(child, found)
    scores.extend(_by_time([child for child in known if _is_score(child)]))
    notes += [f"{str(child)!r} {_UTILITY_ALONE}" for child in alone]
    if others := [child.name for child in inside if child not in [*known, *alone]]:
        notes.append(f"in {str(path)!r}, neither a run, a search nor a finished score: {', '.join(others)}")


def _scores_in(folder: Place, notes: list[str]) -> list[Place]:
    if not folder.is_dir():
        return []
    inside = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    if unfinished := [child.name for child in inside if not _is_score(child)]:
        notes.append(f"in {str(folder)!r}, without {SCORES_FILE} (not finished): {', '.join(unfinished)}")
    return _by_time([child for child in inside if _is_score(child)])


def _by_time(folders: Iterable[Place]) -> list[Place]:
    return sorted(folders, key=lambda folder: (load_scores(folder).created, folder.name))


def _names(folder: Place) -> list[str]:
    return [part for part in str(folder.absolute()).split("/") if part != SCORES_FOLDER]


def _labels(parts: Sequence[Sequence[str]]) -> list[str]:
    """The shortest ends of the paths that tell them apart, without the folder `scores`: `after`, or `run / after`."""
    depths = [1] * len(parts)
    while True:
        labels = [" / ".join(names[-depth:]) for names, depth in zip(parts, depths, strict=True)]
        again = {label for label, count in Counter(labels).items() if count > 1}
        grow = [i for i, label in enumerate(labels) if label in again and depths[i] < len(parts[i])]
        if not grow:
            return labels
        for i in grow:
            depths[i] += 1


# --------------------------------------------------------------------------------------------- the readers


def _read_model(folder: Place, label: str, notes: list[str]) -> Model:
    result = load_scores(folder)
    file = folder / RESPONSES_FILE
    if not file.is_file():
        notes.append(f"{str(file)!r} is missing: no comparison prompt by prompt, and no sample of responses")
    responses = tuple(read_responses(file)) if file.is_file() else ()
    if responses and len(responses) != result.responses:
        raise ReportError(
            f"{str(file)!r} has {len(responses)} responses, but {SCORES_FILE} beside it counts {result.responses}; "
            "they are not of one score: score again"
        )
    told = in_language([each.judged for each in responses] if result.told_by else ())
    return Model(label, result, responses, read_utility(folder, result), in_language=told)


def _with_decisions(models: Sequence[Model], probes: Sequence[Place], notes: list[str]) -> list[Model]:
    """The models with the decisions of those probes that are of the same weights; of several, the last."""
    found = list(models)
    for folder in probes:
        file = folder / PROBE_FILE
        content = file.read_object(ReportError)
        try:
            decisions, fingerprint = read_decisions(content), content["model_fingerprint"]
        except (KeyError, TypeError) as error:
            raise ReportError(f"{str(file)!r} is damaged, or of another version ({error}): probe again") from None
        same = [index for index, model in enumerate(found) if model.result.fingerprint == fingerprint]
        if not same:
            notes.append(f"{str(folder)!r} is a probe of a model that no score here is of: it is not shown")
        elif not decisions:
            notes.append(f"{str(folder)!r} has no decisions by language: too few bundles of either kind")
        for index in same:
            found[index] = replace(found[index], decisions=decisions)
    return found


def read_responses(path: Place | Path) -> list[Response]:
    """Rows of a `responses.parquet`.

    Raises:
        ReportError: The file is damaged, lacks a column, or has an unknown verdict.
    """
    file = Place(path)
    try:
        with file.open() as opened:
            table = pq.read_table(opened)
    except (pa.ArrowException, OSError) as error:
        raise ReportError(f"{str(file)!r} is damaged: {error}") from None
    if LANGUAGE_COLUMN not in table.column_names:  # where no language was told
        table = table.append_column(LANGUAGE_COLUMN, pa.nulls(len(table), pa.string()))
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise ReportError(f"{str(file)!r} lacks the columns {', '.join(missing)}; score again with this version")
    columns = {name: table[name].to_pylist() for name in _COLUMNS}
    for name, default in (("category", ""), ("response", ""), ("reason", ""), ("finish", "")):
        columns[name] = [default if value is None else value for value in columns[name]]
    columns["categories"] = [tuple(value or ()) for value in columns["categories"]]
    for name, allowed in _ALLOWED.items():
        if unknown := [value for value in dict.fromkeys(columns[name]) if value not in allowed]:
            raise ReportError(
                f"{str(file)!r}: {name}={unknown[0]!r} is not one of {', '.join(map(str, allowed))}; "
                "score again with this version"
            )
    names = ("benchmark", "bundle_id", "kind", "language", "sample")
    asked = Counter(zip(*(columns[name] for name in names), strict=True))
    if twice := [prompt for prompt, count in asked.items() if count > 1]:
        raise ReportError(f"{str(file)!r} is damaged: {', '.join(names)} {twice[0]} is there twice")
    return [Response(*row) for row in zip(*(columns[name] for name in _COLUMNS), strict=True)]


def read_utility(folder: Place, result: ScoreResult) -> tuple[UtilityRow, ...]:
    """Rows of a score folder's `utility.json`, none if there is no such file.

    Raises:
        ReportError: It is damaged, or of another model than the score's.
    """
    file = folder / UTILITY_FILE
    if not file.is_file():
        return ()
    try:
        utility = load_utility(file)
    except UtilityFileError as error:
        raise ReportError(str(error)) from None
    if utility.fingerprint != result.fingerprint:
        raise ReportError(
            f"{str(file)!r} is of the model {utility.resolved!r} with fingerprint {utility.fingerprint!r}, but "
            f"{SCORES_FILE} beside it is of {result.fingerprint!r}; remove it and measure again with `mlc-ray utility "
            "--scores`"
        )
    return utility.rows


def _read_training(folder: Place, label: str) -> Training:
    config = folder / CONFIG_FILE
    try:
        text = config.read_text()
    except UnicodeDecodeError as error:
        raise ReportError(f"{str(config)!r} is damaged: not UTF-8 ({error})") from None
    file = folder / RUN_FILE
    facts = file.read_object(ReportError) if file.is_file() else {}
    return Training(label, folder, text, facts, metric_series(read_metrics(folder)))


def metric_series(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[tuple[int, float | None], ...]]:
    """Points (step, value) of every number that was logged, by name, in the order the names first occur.

    A value is None where it was not a finite number.
    """
    series: dict[str, list[tuple[int, float | None]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and (value is None or isinstance(value, (int, float))):
                series.setdefault(name, []).append((row["step"], finite(value)))
    return {name: tuple(points) for name, points in series.items()}


def finite(value: float | None) -> float | None:
    """`value` as a float, None if there is none or it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None
