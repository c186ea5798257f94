"""A search: what its trials share is made once, Ray Tune runs the trials, and the results are saved.

Before the first trial: token rows, the reference's log-probs, the prompts to score, the engines, and the baseline (the
score of the model before training). A search folder holds

    config.json      the settings; base.yaml the run that all trials share, as its file was when the search began;
                     commits.json what names of the hub stood for then
    search.json      the order of the layers by a probe, the baseline, what all scores have in common, versions
    trials/ID/       one run folder a trial: `values.json`, `scores/step-...` per score, in the end `model/` and
                     `finished` or, where the scheduler ended it, `stopped`; `--resume` goes by these alone. Of the few
                     that are confirmed also `scores/confirmation`, and `trials/ID-seed-N/` (runs, but no trials)
    baseline/, confirmation/     scores of the model before training, on the prompts that choose and that confirm
    tune/            Ray Tune's own logs
    trials.json, search.md, *.png      the results (`search.results`), written anew after every score
    best.yaml, best/                   the best of those confirmed
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.tune

from mlc_ray.capacity import Need, amount, workers_needed
from mlc_ray.cluster import (
    ClusterError,
    connect,
    could_fit,
    nodes_held,
    nodes_there,
    use_gpu,
    with_dtype,
)
from mlc_ray.config import ConfigError, ScoringSection, SearchConfig, TrainConfig
from mlc_ray.data.store import TokenArtifact
from mlc_ray.generate.engine import Device
from mlc_ray.judges.base import make_judge
from mlc_ray.lease import lease
from mlc_ray.log_files import log_file
from mlc_ray.logs import keep_in
from mlc_ray.nodes import check_nodes
from mlc_ray.plan.check import check_run
from mlc_ray.plan.check_engines import check_beside, check_engine
from mlc_ray.plan.cutting import steps_of
from mlc_ray.plan.hardware import Cluster
from mlc_ray.runs import (
    BASE_FILE,
    BASELINE_FOLDER,
    COMMITS_FILE,
    SEARCH_CONFIG_FILE,
    SEARCH_FILE,
    SEARCH_TEXT,
    TRIALS_FOLDER,
    artifact_cache,
    output_place,
    resolve_model,
)
from mlc_ray.score.plan import fitted, places, with_dtypes, with_longest_answer
from mlc_ray.score.prompts import Prompts
from mlc_ray.score.request import engine_versions
from mlc_ray.score.run import TooManyUnparsedError
from mlc_ray.score.scorer import start_scorer
from mlc_ray.search.confirm import confirm
from mlc_ray.search.folder import (
    MAY_CHANGE,
    changed_config,
    changed_settings,
    check_may_change,
    load_search,
    write_config,
    write_settings,
)
from mlc_ray.search.objectives.base import TrialScore, make_objective
from mlc_ray.search.probe import probe_run
from mlc_ray.search.record import Recorder
from mlc_ray.search.results import SearchResult, ending, read_values
from mlc_ray.search.selection import AskedPrompts, read_asked
from mlc_ray.search.space import Space, check_held_out, make_space, tried, values_of, with_commits
from mlc_ray.search.trial import SearchError, Shared, run_trial, scores_of, step_of, trial_folders
from mlc_ray.search.tune import LAYER, CutOff, EndEarly, Ended, Points, make_tuner, number_of_points, seeds_of
from mlc_ray.storage import (
    Place,
    fingerprint_model,
    library_versions,
    local_side,
    user_cache,
)
from mlc_ray.train.answers import check_answers
from mlc_ray.train.failures import keyboard_interrupt
from mlc_ray.train.model import check_device, model_depth, resolve_layer
from mlc_ray.train.planning import check_kinds, check_terms
from mlc_ray.train.run import paths_read, prepare_data

logger = logging.getLogger(__name__)
TRIAL_CPUS = 0.1  # the process of a trial only waits for its workers


def search(config: SearchConfig) -> SearchResult:
    """Run a search to its end; writes and returns what it found.

    With `resume: auto` an existing folder is resumed, as by `resume_search`.

    Raises:
        ConfigError: the space has values that no run can have.
        ClusterError: the cluster can never give the resources.
        LeaseError: another driver works in the folder.
        SearchError: the folder exists already, with `resume: auto` of a search with other settings; or no trial got a
            score.
    """
    space = make_space(config)
    config = as_it_runs(config, space)
    folder = (output_place(config.output_dir) / config.name).absolute()
    if (folder / SEARCH_CONFIG_FILE).is_file():
        if config.resume == "never":
            raise SearchError(
                f"search folder {str(folder)!r} exists already: choose another name, remove it, or go on with it by "
                f"`mlc-ray search --resume {folder}` or by resume=auto"
            )
        if changed := changed_settings(config, space, folder):
            raise SearchError(
                f"resume='auto': search folder {str(folder)!r} holds a search with other settings "
                f"({', '.join(changed)}): give the search another name, or the settings it has"
            )
        return resume_search(folder, [f"{name}={json.dumps(getattr(config, name))}" for name in MAY_CHANGE])
    keep_in(local_side(folder))
    config, space, commits = with_commits(config, space)
    check_search(config, space)
    with lease(folder, wait=config.resume == "auto"), log_file(_base(space).logging, folder):
        config, space = _with_dtypes(config, space)
        write_settings(config, space, folder, commits)
        try:
            prepared = _prepare(load_search(folder), space, folder)
        except BaseException:
            # The name is free again, since the fix is another setting; what is cached by content stays.
            for name in (BASELINE_FOLDER, SEARCH_CONFIG_FILE, BASE_FILE, COMMITS_FILE):
                (folder / name).remove()
            raise
        return _search(prepared)


def resume_search(folder: Path | Place, overrides: Sequence[str] = ()) -> SearchResult:
    """Go on with the search in a folder, with the settings it was started with.

    Trials that ended are not repeated; those that were running or failed go on from their last checkpoint, or else
    start over.

    Args:
        folder: The search's folder.
        overrides: `trials=N`, more than before, and `max_hours=H`; the folder keeps them.

    Raises:
        ConfigError: another setting is given, or fewer trials than before.
        SearchError: the folder holds no search, or prompts or model are not those it began with. Other errors are those
            of `search`.
    """
    folder = Place(folder).absolute()
    check_may_change(folder, overrides)
    config = load_search(folder)
    if overrides:
        config = changed_config(config, overrides)
    space = make_space(config)
    keep_in(local_side(folder))
    check_search(config, space)
    with lease(folder, wait=config.resume == "auto"), log_file(_base(space).logging, folder):
        if overrides:
            write_config(config, space, folder)
        return _search(_prepare(config, space, folder))


@dataclass(frozen=True)
class Prepared:
    """Everything before the trials: what they share, the prompts that confirm, the baseline, the order of layers."""

    shared: Shared
    confirmation: Prompts
    baseline: TrialScore
    layer_order: list[Any]


def check_search(config: SearchConfig, space: Space) -> None:
    """Join the cluster, and raise if it can never hold the search, or the model lacks a layer of it."""
    base = _base(space)
    _lora_rank(space)
    if twice := sorted(set(config.confirm.seeds) & set(seeds_of(config, space))):
        raise ConfigError(f"confirm.seeds={config.confirm.seeds}: trials are trained with seed {twice[0]} themselves")
    depth = model_depth(base.model.path, trust_remote_code=base.model.trust_remote_code)
    for corner in space.corners():
        resolve_layer(space.run(corner, name="corner").mlc.layer, depth)
    connect(base.cluster.address, base.cluster.env)
    check_device(base.model, gpu=_device(base) == "gpu")
    check_feasible(config, base, _device(base))
    if base.cluster.plan == "check":
        check_plan(*_with_dtypes(config, space), gpu=_device(base) == "gpu")
    check_nodes(output_place(config.output_dir), paths_read(base))


def check_plan(config: SearchConfig, space: Space, *, gpu: bool, cluster: Cluster | None = None) -> None:
    """Refuse a search whose trials, or engines, cannot fit the cluster that is there (or another one).

    Args:
        config: the search, types decided.
        space: of its trials.
        gpu: whether they have GPUs.
        cluster: what it runs on (default: the cluster that is there).

    Raises:
        PlanError: They cannot; the message names what lacks and what would fit.
    """
    runs = [space.run(corner, name="corner") for corner in space.corners()]
    for run in runs:  # a stage or a budget may be part of the space
        check_run(run, gpu=gpu, cluster=cluster)
    check_engine(runs[0].model.path, config.scoring, gpu=gpu, cluster=cluster)
    if not gpu:
        at_once = min(config.concurrency, number_of_points(config, space) * config.repeats)
        check_beside(config.scoring, runs, at_once=at_once, cluster=cluster)


def _prepare(config: SearchConfig, space: Space, folder: Place) -> Prepared:
    """Make what all trials share, or find it in the folder; the engines of the result are up."""
    base = _base(space, output_dir=str(folder / TRIALS_FOLDER))
    device = _device(base)
    judge, model = make_judge(config.scoring.judge), resolve_model(base.model.path)
    judge.check_ready(user_cache())
    prompts = read_asked(config, make_objective(config.objective), rejects=local_side(folder))
    asked: dict[str, list[str]] = {}
    for part in (prompts.selection, prompts.confirmation):
        for language, texts in part.by_language().items():
            asked.setdefault(language, []).extend(texts)
    scoring = config.scoring.model_copy(update={"judge": fitted(judge, asked, config.scoring, model)})
    identity = identity_of(prompts, model, scoring)
    check_same(folder, identity)
    _prepare_data(config, base, space, folder, device)
    order = _layer_order(config, space, base, folder, device)
    lora_rank = _lora_rank(space)
    scorer = start_scorer(
        model, scoring, prompts.selection.table, device=device, folder=local_side(folder), run=folder.name,
        lora_rank=lora_rank,
        in_turn=config.share_gpu, others=[prompts.confirmation.table],
    )  # fmt: skip
    try:
        shared = Shared(config, space, folder, scorer, prompts.selection.fingerprint, model, lora_rank is not None)
        baseline = shared.baseline()
        (folder / SEARCH_FILE).write_json(
            {
                "layer_order": order,
                "baseline": asdict(baseline),
                "fingerprints": identity,
                "versions": library_versions(),
            }
        )
    except BaseException:
        scorer.close()
        raise
    return Prepared(shared, prompts.confirmation, baseline, order)


def _search(prepared: Prepared) -> SearchResult:
    """Run the trials, confirm the best, and write the results."""
    shared = prepared.shared
    config, folder = shared.config, shared.folder
    total = number_of_points(config, shared.space) * config.repeats
    end = EndEarly(config.max_hours)
    recorder = Recorder(shared, prepared.baseline, total=total, end=end)
    go_on = f"mlc-ray search --resume {folder}"
    try:
        ended, cut_off = _earlier_trials(shared)
        if remaining := max(0, total - len(ended)):
            points = Points(
                config, shared.space, folder, languages=list(prepared.baseline.harmful_by_language), ended=ended,
                cut_off=cut_off, layers=prepared.layer_order,
            )  # fmt: skip
            trainable = ray.tune.with_resources(ray.tune.with_parameters(run_trial, shared=shared), {"cpu": TRIAL_CPUS})
            tuner = make_tuner(config, trainable, folder, points, remaining=remaining, callbacks=[recorder], stop=end)
            with keyboard_interrupt(f"to go on: {go_on}"):
                recorder.failed = [str(error).strip().splitlines()[-1] for error in tuner.fit().errors]
        recorder.over = True
        shared.drop_optimizer_states()
        if end.fault is not None:
            recorder.write()
            raise SearchError(f"{end.fault}; what was scored is in {str(folder / SEARCH_TEXT)!r}; go on by `{go_on}`")
        if not recorder.trials:
            first = recorder.failed[0] if recorder.failed else end.reason or "none"
            raise SearchError(f"no trial got as far as a score; the first fault: {first}")
        if end.reason:
            logger.info("%s; what has ended is confirmed, and `%s` goes on with the others", end.reason, go_on)
        recorder.write()
        confirmation = confirm(shared, prepared.confirmation, list(recorder.trials.values()))
    finally:
        shared.scorer.close()
    return recorder.write(confirmation)


def _earlier_trials(shared: Shared) -> tuple[list[Ended], list[CutOff]]:
    """The trials of earlier processes: those not to be repeated, and those to go on with."""
    ended, cut_off = [], []
    for folder in trial_folders(shared.folder):
        values, state, scores = read_values(folder), ending(folder), scores_of(folder)
        if state == "diverged":
            ended.append(Ended(values, state))
        elif state != "unfinished" and scores:
            try:
                ended.append(Ended(values, state, shared.score_in(scores[-1]).values, step_of(scores[-1])))
            except TooManyUnparsedError as error:
                logger.warning("trial %s ended without a value: %s", folder.name, error)
                ended.append(Ended(values, "without value"))
        else:
            cut_off.append(CutOff(values, folder.name))
    return ended, cut_off


def identity_of(prompts: AskedPrompts, model: str, scoring: ScoringSection) -> dict[str, str]:
    """What all scores of a search have in common, so that they can be compared."""
    versions = library_versions()
    engine = ", ".join(map(" ".join, engine_versions(versions).items()))
    return {
        "prompts": prompts.fingerprint,
        "model": fingerprint_model(model),
        "judge": make_judge(scoring.judge).identity,
        "engine": engine or "no vllm",
        "version of mlc_ray": versions["mlc_ray"],
    }


def check_same(folder: Place, identity: dict[str, str]) -> None:
    """Refuse to go on with another of those that `identity_of` has than this search began with.

    Raises:
        SearchError: One differs.
    """
    if not (folder / SEARCH_FILE).is_file():
        return
    before = (folder / SEARCH_FILE).read_json().get("fingerprints", {})
    for name, value in identity.items():
        if before.get(name) != value:
            raise SearchError(
                f"the {name} of search {str(folder)!r} changed since it began ({before.get(name)} is now {value}), so "
                "its trials could not be compared: restore them, or start a new search under another name"
            )


# -------------------------------------------------------------------------------------------------- before the trials


def check_feasible(config: SearchConfig, base: TrainConfig, device: Device) -> None:
    """Refuse a search that the cluster can never hold, since Ray would wait for it without end.

    Placed, largest first: the engines, what reads their responses, and for each concurrent trial its own process and
    its workers; a little is left for Ray Data.

    Raises:
        ClusterError: The trials asked for do not fit beside the engines, or have no fixed number of workers; or they
            are to share a GPU with the engine, and there are several.
    """
    gpu = device == "gpu"
    if config.share_gpu and not gpu:
        raise ClusterError("share_gpu=True, but this search runs on CPU, where engines cannot sleep; remove it")
    if config.share_gpu and [node.size[1] for node in nodes_there()] != [1.0]:
        # Ray Train makes a placement group of its own for each trial and joins none that is there, while the engine
        # lives from the first trial to the last: no group can hold both.
        raise ClusterError(
            f"share_gpu=True, but {nodes_held()}: the engine and the trials meet for certain only where there is one "
            "node with one GPU, since Ray Train places each trial anew; give the engine a GPU of its own "
            "(share_gpu: false), or start Ray on one GPU (ray start --head --num-gpus=1)"
        )
    if not isinstance(base.cluster.workers, int):
        raise ClusterError(
            f"cluster.workers={list(base.cluster.workers)}: a trial of a search keeps its number of workers, "
            "since other trials would take what it gives up; set one number"
        )
    engines = places(config.scoring, device, in_turn=config.share_gpu)
    workers = workers_needed(base.cluster, gpu=gpu)
    trials = [Need(TRIAL_CPUS, 0), *workers] * config.concurrency
    if not could_fit([*engines, *trials]):
        raise ClusterError(
            f"concurrency={config.concurrency} trials of {amount(trials[: len(workers) + 1])} (its own process, and "
            f"cluster.workers x cluster.cpus_per_worker) beside engines of {amount(engines)}, and some CPU for Ray "
            f"Data, are more than the nodes can hold; {nodes_held()}: ask for less, add nodes, or where there is one "
            "GPU let the engine sleep beside training (share_gpu: true)"
        )


def _lora_rank(space: Space) -> int | None:
    """The largest rank of adapters in the space, None for whole models.

    Raises:
        ConfigError: The space has both.
    """
    loras = [space.run(corner, name="corner").model.lora for corner in space.corners()]
    if any(lora is None for lora in loras) and any(lora is not None for lora in loras):
        raise ConfigError("the space has runs with LoRA adapters and runs without; search them apart")
    ranks = [lora.rank for lora in loras if lora is not None]
    return max(ranks) if ranks else None


def _prepare_data(config: SearchConfig, base: TrainConfig, space: Space, folder: Place, device: Device) -> None:
    """Make what trials train on, and look for answers and steps that one of them needs, though the base does not.

    Raises:
        ConfigError: No held-out bundle has what the scheduler compares, or a term of a trial has no step,
            or not the bundles of both kinds that it needs.
        MissingAnswersError: Answers are missing.
    """
    depth = model_depth(base.model.path, trust_remote_code=base.model.trust_remote_code)
    layer = resolve_layer(base.mlc.layer, depth)
    data = prepare_data(base, cache_dir=artifact_cache(folder / TRIALS_FOLDER), layer=layer, gpu=device == "gpu")
    held_out = None if data.held_out is None else TokenArtifact.open(data.held_out.tokens_folder)
    if config.scheduler_metric is not None and held_out is not None:
        check_held_out(config.scheduler_metric, held_out)
    for values in tried(config, space):
        run = space.run(values, name="corner")
        check_answers(run, data.tokens)
        try:
            check_terms(run, steps_of(run, data.tokens))
            check_kinds(run, data.tokens)
        except ConfigError as error:
            raise ConfigError(f"with {values!r}: {error}") from None
        if held_out is not None and base.data.validation is not None:
            check_answers(run, held_out)


def _layer_order(
    config: SearchConfig, space: Space, base: TrainConfig, folder: Place, device: Device
) -> list[str | int | float]:
    """The layers of the space in the order in which a probe ranks them; empty where none is asked for."""
    if config.probe is None:
        return []
    every = values_of(space.parameters[LAYER])
    if (folder / SEARCH_FILE).is_file():  # resumed: in the order that the search began with
        return list((folder / SEARCH_FILE).read_json()["layer_order"])
    criterion = config.probe.criterion
    result = probe_run(base, folder / "probe", limit=config.probe.limit, criterion=criterion, gpu=device == "gpu")
    order = sorted(every, key=result.rank_of)
    logger.info("probe: layers are tried in the order of %s: %s", criterion, ", ".join(map(str, order)))
    return order


def _with_dtypes(config: SearchConfig, space: Space) -> tuple[SearchConfig, Space]:
    """What trials and engines compute in is decided once, and written down: a resumed search keeps it."""
    base = _base(space)
    gpu = _device(base) == "gpu"
    scoring = with_dtypes(config.scoring, gpu=gpu)
    labels = base.cluster.label_selector
    model = {**space.base["model"], "dtype": with_dtype(base.model, gpu=gpu, labels=labels).dtype}
    return config.model_copy(update={"scoring": scoring}), replace(space, base={**space.base, "model": model})


def as_it_runs(config: SearchConfig, space: Space) -> SearchConfig:
    """A search with the conversation of its runs, and the length of answers decided.

    Raises:
        ConfigError: `scoring.chat` is another conversation.
    """
    config = _with_chat(config, space)
    return config.model_copy(update={"scoring": with_longest_answer(config.scoring)})


def _with_chat(config: SearchConfig, space: Space) -> SearchConfig:
    """Trials are scored in the conversation that they train in.

    Raises:
        ConfigError: `scoring.chat` is another one.
    """
    chat, asked = _base(space).chat, config.scoring.chat
    if asked is not None and asked != chat:
        raise ConfigError(
            f"scoring.chat={asked!r}, but the runs train with chat={chat!r}; give chat in the file of the runs, or by "
            "set, alone"
        )
    if config.scoring.asking.reasoning == "forbid":
        raise ConfigError(
            "scoring.asking.reasoning='forbid' would score trials in another conversation than they train in; turn "
            "thoughts off in the chat of the runs, e.g. set: [chat.arguments={enable_thinking: false}]"
        )
    return config.model_copy(update={"scoring": config.scoring.model_copy(update={"chat": chat})})


def _base(space: Space, **own: Any) -> TrainConfig:
    return space.run(next(iter(space.corners())), name="base", **own)


def _device(base: TrainConfig) -> Device:
    return "gpu" if use_gpu(base.cluster.accelerator) else "cpu"
