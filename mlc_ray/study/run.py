"""A study: every cell is trained, then each model's cells are scored by engines that stay warm, then it is counted.

Of one model all cells are trained first, one after another with all that the cluster has, and exported. Then engines
are started once and given the weights of each cell in turn: training and engines never share memory or GPUs. A cell
that fails or diverges is a row that says so. What a killed study finished is not done again: the folder says what is
there (`runs`), and `study.json` what it is to be.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlc_ray.capacity import workers_needed
from mlc_ray.cluster import ClusterError, check_fits, connect, use_gpu, with_dtype
from mlc_ray.config import (
    UNTOUCHED,
    ConfigError,
    ScoreConfig,
    ScoringSection,
    StudyConfig,
    UtilityConfig,
    parse_config,
    resolve_layer,
)
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, check_lengths
from mlc_ray.judges.base import make_judge
from mlc_ray.lease import lease
from mlc_ray.log_files import log_file
from mlc_ray.logs import keep_in
from mlc_ray.nodes import check_nodes
from mlc_ray.plan.lengths import Weighing, of_artifact, same_tokens
from mlc_ray.plan.there import known_cluster
from mlc_ray.report.study import StudyResult
from mlc_ray.runs import (
    CELLS_FOLDER,
    DIVERGED_FILE,
    FINISHED_FILE,
    MODEL_FOLDER,
    STUDY_FILE,
    TRAIN_FOLDER,
    UTILITY_FILE,
    artifact_cache,
    output_place,
    resolve_model,
    training_languages,
)
from mlc_ray.score.counted_prompts import Prompts as Counted
from mlc_ray.score.plan import Judging, fitted, judge_at_commits, places, plan_judging, with_dtypes
from mlc_ray.score.prompts import Prompts, read_prompts
from mlc_ray.score.request import Request
from mlc_ray.score.results import load_scores
from mlc_ray.score.scorer import ScorerDiedError, WarmScorer, start_scorer, write_warm_score
from mlc_ray.storage import Place, fingerprint_model, local_side, user_cache
from mlc_ray.study.cell_budget import state_budget
from mlc_ray.study.cells import Cell, Commits, make_cells, scoring_of
from mlc_ray.study.contents import CellData, check_contents
from mlc_ray.study.failing import failing
from mlc_ray.study.folder import Plan, StudyError, check_goes_on, load_plan
from mlc_ray.study.record import Recorder, has_model, is_complete, is_read, score_folder, untouched_folder
from mlc_ray.study.supervision import supervision_of
from mlc_ray.train.divergence import DivergedError
from mlc_ray.train.export import export
from mlc_ray.train.model import check_device, model_depth
from mlc_ray.train.preemption import PreemptedError
from mlc_ray.train.run import check_tokens, paths_read, train
from mlc_ray.utility.file import load_utility
from mlc_ray.utility.run import measure_utility

logger = logging.getLogger(__name__)


def study(config: StudyConfig) -> StudyResult:
    """Run a study to its end; writes and returns what it found.

    With `resume: auto` an existing folder is gone on with: models, methods and seeds may have been added.

    Raises:
        ConfigError: a cell's settings are invalid, or lack a term's steps.
        MissingAnswersError: the bundles of a cell lack answers that its loss needs.
        StudyError: the folder exists already, with `resume: auto` with another study or cells of another content; a
            language has prompts of one kind alone; or no cell got as far as a score.
        ClusterError: the cluster can never hold a cell, or the engines.
        LeaseError: another driver works in the folder.
        PreemptedError: the driver got SIGTERM; the study can be gone on with.
        MlcRayError: what reading data and models raises, before any cell starts.
    """
    cells = make_cells(config)
    scoring = scoring_of(config, cells)
    folder = (output_place(config.output_dir) / config.name).absolute()
    _before(config, folder)  # refused before anything is started
    keep_in(local_side(folder))
    connect(cells[0].config.cluster.address, cells[0].config.cluster.env)
    with lease(folder, wait=config.resume == "auto"), log_file(cells[0].config.logging, folder):
        before = _before(config, folder)  # meanwhile another driver may have started it, or added to it
        plan, prompts = _planned(config, cells, scoring, before, folder)
        if before is not None:
            check_goes_on(before, plan, folder)
        return _study(plan, prompts, folder)


def _before(config: StudyConfig, folder: Place) -> Plan | None:
    """The study that is in the folder already.

    Raises:
        StudyError: There is one, and with `resume: never`.
    """
    if not (folder / STUDY_FILE).is_file():
        return None
    if config.resume == "never":
        raise StudyError(
            f"study folder {str(folder)!r} exists already: choose another name, remove it, or go on with it by "
            f"`mlc-ray study --resume {folder}` or by resume=auto"
        )
    return load_plan(folder)


def resume_study(folder: Path | Place) -> StudyResult:
    """Go on with the study in a folder, with the settings it has; cells that failed are tried again.

    Raises:
        StudyError: the folder holds no study, or prompts, models, bundles or openings are not those it began with.
            Other errors are those of `study`.
    """
    place = Place(folder).absolute()
    plan = load_plan(place)
    keep_in(local_side(place))
    connect(plan.cells[0].config.cluster.address, plan.cells[0].config.cluster.env)
    with lease(place, wait=plan.config.resume == "auto"), log_file(plan.cells[0].config.logging, place):
        plan = load_plan(place)  # meanwhile another driver may have added to it
        prompts = read_prompts(plan.scoring, rejects=local_side(place))
        if prompts.fingerprint != plan.prompts:
            raise StudyError(
                f"the prompts of study {str(place)!r} changed since it began ({plan.prompts} is now "
                f"{prompts.fingerprint}), so that its cells could not be compared: restore them, or start a new study "
                "under another name"
            )
        return _study(plan, prompts, place)


def _planned(
    config: StudyConfig, cells: Sequence[Cell], scoring: ScoringSection, before: Plan | None, folder: Place
) -> tuple[Plan, Prompts]:
    """The study with absolute paths, commits and types decided: as they were when it began, where it goes on."""
    commits = Commits() if before is None else before.commits
    known = {} if before is None else {cell.model: cell.config.model.dtype for cell in before.cells}
    found = []
    for cell in map(commits.cell, cells):
        model, gpu = cell.config.model, use_gpu(cell.config.cluster.accelerator)
        if model.dtype == "auto" and cell.model in known:
            model = model.model_copy(update={"dtype": known[cell.model]})
        model = with_dtype(model, gpu=gpu, labels=cell.config.cluster.label_selector)
        found.append(Cell(cell.model, cell.method, cell.seed, cell.config.model_copy(update={"model": model})))
    judge = judge_at_commits(scoring.judge, None if before is None else before.scoring.judge)
    scoring = scoring.model_copy(update={"benchmarks": commits.sources(scoring.benchmarks), "judge": judge})
    gpu = _device(cells[0]) == "gpu"
    scoring = with_dtypes(scoring, gpu=gpu, before=None if before is None else before.scoring)
    prompts = read_prompts(scoring, rejects=local_side(folder))
    return Plan(config, tuple(found), scoring, commits, prompts.fingerprint), prompts


def _study(plan: Plan, prompts: Prompts, folder: Place) -> StudyResult:
    """The lease on the folder is held. What it is to be is written once it can be: the fix may be another setting."""
    _check(plan, prompts, folder)
    data = _prepare(plan, folder)
    check_contents(plan, folder, data)
    supervision = {cell.name: supervision_of(cell.config, data[cell.name].tokens) for cell in plan.cells}
    _state(plan, prompts, data)
    plan.save(folder)
    recorder = Recorder(plan, folder, prompts, supervision, gpu=_device(plan.cells[0]) == "gpu")
    for model in plan.config.models:
        cells = [cell for cell in plan.cells if cell.model == model]
        for cell in cells:
            with failing(recorder.failures, cell.name, again=f"mlc-ray study --resume {folder}"):
                _train(cell, folder)
            recorder.write()
        _score(plan, prompts, folder, model, cells, recorder)
        recorder.count()
        _measure_utility(plan, folder, model, cells, recorder)
        if not plan.config.keep_models:
            _remove_models(plan, folder, cells)
        recorder.write()
    result = recorder.write()
    if not any(cell.state == "scored" and cell.seed is not None for cell in result.cells):
        first = next((cell for cell in result.cells if cell.message), None)
        said = "nothing was trained" if first is None else f"the first fault, of {first.name}: {first.message}"
        raise StudyError(f"no cell of study {str(folder)!r} got as far as a score; {said}")
    return result


# ------------------------------------------------------------------------------------------------ before the first cell


def _device(cell: Cell) -> Device:
    return "gpu" if use_gpu(cell.config.cluster.accelerator) else "cpu"


def _check(plan: Plan, prompts: Prompts, folder: Place) -> None:
    """Raise what would end a cell or a score for a setting's sake; nothing has started yet."""
    if plan.config.utility is not None and not folder.is_local:
        raise StudyError(
            f"utility writes beside scores on a disk, but output_dir is {str(folder.parent)!r}; leave it out"
        )
    _check_sides(prompts)
    scoring, device = plan.scoring, _device(plan.cells[0])
    judge = make_judge(scoring.judge)
    judge.check_ready(user_cache())
    check_says_refused(plan_judging(judge, prompts.table), prompts)
    check_fits("engine (scoring.engine.replicas x cpus_per_replica)", places(scoring, device))
    for cell in plan.cells:
        config = cell.config
        if not isinstance(config.cluster.workers, int):
            raise ClusterError(
                f"cluster.workers={list(config.cluster.workers)}: the cells of a study keep their number of workers, "
                "since their seconds are counted; set one number"
            )
        depth = model_depth(config.model.path, trust_remote_code=config.model.trust_remote_code)
        try:
            resolve_layer(config.mlc.layer, depth)
        except MlcRayError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from None
        check_device(config.model, gpu=_device(cell) == "gpu")
        workers = workers_needed(config.cluster, gpu=_device(cell) == "gpu")
        check_fits(f"cell {cell.name} (cluster.workers x cluster.cpus_per_worker)", workers)
    for model in plan.config.models:
        path = _path(plan, model)
        if judge.runs != "prompts":
            assert scoring.max_new_tokens is not None, "decided by now (with_longest_answer)"
            check_lengths(path, scoring.engine, scoring.max_new_tokens)
        fitted(judge, prompts.by_language(), scoring, path)
        check_nodes(folder.parent, paths_read(next(cell.config for cell in plan.cells if cell.model == model)))


def check_says_refused(judging: Judging, prompts: Prompts) -> None:
    """Refuse a judge that does not say of every kind in every language what is refused.

    Raises:
        StudyError: It does not.
    """
    asked = set(zip(prompts.table["kind"].to_pylist(), prompts.table["language"].to_pylist(), strict=True))
    if judging.readers:
        told = {cell for reader in judging.readers for cell, says in reader.cells.items() if "refused" in says}
    else:
        told = asked if "refused" in judging.judge.measures else set()
    if lacking := sorted(asked - told):
        where = ", ".join(f"{kind} in {code}" for kind, code in lacking[:5])
        raise StudyError(
            f"scoring.judge={judging.judge.name!r} does not say what is refused of {where}"
            f"{' and others' if len(lacking) > 5 else ''}, so that a model that refuses every benign prompt would look "
            "perfect; take one that does, or a panel with one"
        )


def _check_sides(prompts: Prompts) -> None:
    """Refuse languages with prompts of one kind alone.

    Raises:
        StudyError: There are some.
    """
    pairs = set(zip(prompts.table["kind"].to_pylist(), prompts.table["language"].to_pylist(), strict=True))
    sides = {kind: {code for found, code in pairs if found == kind} for kind in ("harmful", "benign")}
    lacking = {"harmful": sides["benign"] - sides["harmful"], "benign": sides["harmful"] - sides["benign"]}
    if faults := [f"no {kind} prompts in {', '.join(sorted(codes))}" for kind, codes in lacking.items() if codes]:
        raise StudyError(
            f"scoring.benchmarks: {'; '.join(faults)}. A model that refuses everything there, or nothing, would not be "
            "told from a good one: add such prompts, or leave the languages out (scoring.languages)"
        )


def _path(plan: Plan, model: str) -> str:
    return resolve_model(next(cell.config.model.path for cell in plan.cells if cell.model == model))


def _prepare(plan: Plan, folder: Place) -> dict[str, CellData]:
    """Tokenise what the cells train on, and see that each has the answers and steps that its loss needs."""
    cache = artifact_cache(folder / CELLS_FOLDER)
    made: dict[str, TokenArtifact] = {}
    found: dict[str, CellData] = {}
    for cell in plan.cells:
        config = cell.config
        if (key := same_tokens(config)) not in made:
            made[key] = prepare_token_rows(config.data, config.model, chat=config.chat, cache_dir=cache)
        try:
            held_out = check_tokens(config, made[key], cache_dir=cache, gpu=_device(cell) == "gpu")
        except MlcRayError as error:
            raise type(error)(f"cell {cell.name}: {error}") from None
        found[cell.name] = CellData(made[key], held_out)
    return found


def _state(plan: Plan, prompts: Prompts, data: Mapping[str, CellData]) -> None:
    """Say what the whole study takes on the cluster that is there."""
    rows = prompts.table.select(["kind", "language", "sample"]).to_pylist()
    asked = ((row["kind"], row["language"]) for row in rows if not row["sample"])
    decides = any(cell.config.reads_decisions for cell in plan.cells)  # else no tokenizer is needed here
    weigh = Weighing(lambda run: of_artifact(data[run.name].tokens, run if decides else None))
    state_budget(
        plan.cells, plan.scoring, Counted(Counter(asked)), weigh,
        known_cluster(gpu=_device(plan.cells[0]) == "gpu", labels=plan.cells[0].config.cluster.label_selector),
        keep_models=plan.config.keep_models,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- cells


def _train(cell: Cell, folder: Place) -> None:
    """Train a cell to its end and export its model, unless that is done, or it diverged."""
    run = folder / CELLS_FOLDER / cell.name
    if is_complete(score_folder(run)) or has_model(run):
        _finish(run)  # a driver may have died before it did
        return
    if (run / DIVERGED_FILE).is_file():
        said = (run / DIVERGED_FILE).read_json().get("message", "")
        raise DivergedError(said)
    logger.info("cell %s", cell.name)
    train(cell.config.model_copy(update={"output_dir": str(run.parent)}))
    (run / MODEL_FOLDER).remove()  # half of it, where storage has no rename and a process died while it wrote it
    adapters = cell.config.model.lora is not None  # engines are given whole weights
    export(run, run / MODEL_FOLDER, merge_lora=adapters, trust_remote_code=True)  # its code ran in this very study
    _finish(run)


def _finish(run: Place) -> None:
    """Mark a cell whose model is exported, and remove its checkpoints."""
    if not (run / FINISHED_FILE).is_file():
        (run / FINISHED_FILE).write_text("")
    (run / TRAIN_FOLDER).remove()


def _score(plan: Plan, prompts: Prompts, folder: Place, model: str, cells: Sequence[Cell], recorder: Recorder) -> None:
    """Score the model before training and all its cells that are not, by engines that are started once.

    Those on whose prompts or responses engines failed are scored again.
    """
    path = _path(plan, model)
    judge = make_judge(plan.scoring.judge)
    scoring = plan.scoring.model_copy(update={"judge": fitted(judge, prompts.by_language(), plan.scoring, path)})
    jobs = [(untouched_folder(folder, model), f"{model}-{UNTOUCHED}", path)]
    for cell in cells:
        run = folder / CELLS_FOLDER / cell.name
        if has_model(run):
            jobs.append((score_folder(run), cell.name, str(run / MODEL_FOLDER)))
    jobs = [job for job in jobs if not is_read(job[0], scoring.max_unparsed) or load_scores(job[0]).faults]
    if not jobs:
        return
    try:
        scorer = start_scorer(
            path, scoring, prompts.table, device=_device(cells[0]), folder=local_side(folder), run=folder.name
        )
    except (PreemptedError, ScorerDiedError):
        raise
    except MlcRayError as error:  # of this model's: the other models can be run all the same
        logger.warning("the engines of %s did not start: %s", model, error)
        recorder.failures |= {name: f"the engines of {model} did not start: {error}" for _, name, _ in jobs}
        return
    try:
        for target, name, weights in jobs:
            with failing(recorder.failures, name, again=f"mlc-ray study --resume {folder}"):
                _score_one(scorer, scoring, prompts, target, weights)
            if name in recorder.failures:
                scorer.check()
            recorder.write()
    finally:
        scorer.close()


def _score_one(scorer: WarmScorer, scoring: ScoringSection, prompts: Prompts, target: Place, weights: str) -> None:
    own = {"name": target.name, "output_dir": str(target.parent), "model": weights}
    request = Request(
        config=parse_config(ScoreConfig, {**scoring.model_dump(mode="json", exclude_unset=True), **own}),
        resolved=weights,
        fingerprint=fingerprint_model(weights),
        prompts=prompts.fingerprint,
        seen_languages=training_languages(weights),
    )
    scored = scorer.score(weights, request=request, place=target)
    write_warm_score(scored, request, target)


def _measure_utility(plan: Plan, folder: Place, model: str, cells: Sequence[Cell], recorder: Recorder) -> None:
    """Measure what is not measured yet; the engines that score have ended.

    A task that was added when a cell's model was gone is a failure of that cell.
    """
    section = plan.config.utility
    if section is None:
        return
    jobs: list[tuple[str, Place, str | None]] = []
    jobs.append((f"{model}-{UNTOUCHED}", untouched_folder(folder, model), _path(plan, model)))
    for cell in cells:
        run = folder / CELLS_FOLDER / cell.name
        jobs.append((cell.name, score_folder(run), str(run / MODEL_FOLDER) if has_model(run) else None))
    for name, score, weights in jobs:
        if not is_read(score, plan.scoring.max_unparsed):
            continue
        if wanted := unmeasured(section.tasks, score):
            own = {"model": weights, "scores": str(score), "tasks": wanted}
            with failing(recorder.failures, name, again=f"mlc-ray study --resume {folder}"):
                if weights is None:
                    raise StudyError(
                        f"utility.tasks={wanted} cannot be measured: the model was removed once it was scored, by "
                        "keep_models: false; start a new study with these tasks or with keep_models: true, or remove "
                        f"{str(folder / CELLS_FOLDER / name)!r}, and it is trained, scored and measured again"
                    )
                measure_utility(parse_config(UtilityConfig, {**section.model_dump(exclude_unset=True), **own}))
            recorder.write()


def unmeasured(tasks: Sequence[str], score: Place) -> list[str]:
    """Those of `tasks` that the utility beside a score does not have."""
    there = {row.task for row in load_utility(score).rows} if (score / UTILITY_FILE).is_file() else set[str]()
    return [task for task in tasks if task not in there]


def _remove_models(plan: Plan, folder: Place, cells: Sequence[Cell]) -> None:
    for cell in cells:
        run = folder / CELLS_FOLDER / cell.name
        tasks = [] if plan.config.utility is None else plan.config.utility.tasks
        if is_read(score_folder(run), plan.scoring.max_unparsed) and not unmeasured(tasks, score_folder(run)):
            (run / MODEL_FOLDER).remove()
