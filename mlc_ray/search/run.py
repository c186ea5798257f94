"""A search: what its trials share is made once, Ray Tune runs the trials, and the results are saved.

Before the first trial (`checks`, `prepare`): token rows, the reference's log-probs, the prompts to score, the engines,
and the baseline (the score of the model before training). A search folder holds

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
from pathlib import Path

import ray.tune

from mlc_ray.config import SearchConfig
from mlc_ray.config.base import by_dotted_name
from mlc_ray.lease import lease
from mlc_ray.log_files import log_file
from mlc_ray.logs import keep_in
from mlc_ray.runs import (
    BASE_FILE,
    BASELINE_FOLDER,
    COMMITS_FILE,
    KEPT_FOLDER,
    RESPONSES_FILE,
    SEARCH_CONFIG_FILE,
    SEARCH_TEXT,
    output_place,
)
from mlc_ray.score.run import TooManyUnparsedError
from mlc_ray.search.checks import TRIAL_CPUS, as_it_runs, base_of, check_search, with_dtypes_decided
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
from mlc_ray.search.prepare import Prepared, prepare
from mlc_ray.search.record import Recorder
from mlc_ray.search.results import SearchResult, ending, read_values
from mlc_ray.search.space import make_space, with_commits
from mlc_ray.search.trial import SearchError, Shared, run_trial, scores_of, step_of, trial_folders
from mlc_ray.search.tune import CutOff, EndEarly, Ended, Points, make_tuner, number_of_points
from mlc_ray.storage import Place, local_side
from mlc_ray.train.failures import keyboard_interrupt

logger = logging.getLogger(__name__)


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
        given = by_dotted_name(config.model_dump(mode="json"))
        return resume_search(folder, [f"{name}={json.dumps(given[name])}" for name in MAY_CHANGE])
    keep_in(local_side(folder))
    config, space, commits = with_commits(config, space)
    check_search(config, space)
    with lease(folder, wait=config.resume == "auto"), log_file(base_of(space).logging, folder):
        config, space = with_dtypes_decided(config, space)
        write_settings(config, space, folder, commits)
        try:
            prepared = prepare(load_search(folder), space, folder)
        except BaseException:
            _leave(folder)
            raise
        return _search(prepared)


def _leave(folder: Place) -> None:
    """Free the name of a search that ended before its first trial, unless something is answered already.

    Before an answer the fix is another setting; what is cached by content stays.
    """
    if any((folder / BASELINE_FOLDER / name).exists() for name in (KEPT_FOLDER, RESPONSES_FILE)):
        go_on = "what is answered is kept: `mlc-ray search --resume %s` goes on; other settings need another name"
        logger.warning(go_on, folder)
        return
    for name in (BASELINE_FOLDER, SEARCH_CONFIG_FILE, BASE_FILE, COMMITS_FILE):
        (folder / name).remove()


def resume_search(folder: Path | Place, overrides: Sequence[str] = ()) -> SearchResult:
    """Go on with the search in a folder, with the settings it was started with.

    Trials that ended are not repeated; those that were running or failed go on from their last checkpoint, or else
    start over.

    Args:
        folder: The search's folder.
        overrides: `trials=N`, more than before, `max_hours=H` and `scoring.max_unparsed=X`; the folder keeps them.

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
    with lease(folder, wait=config.resume == "auto"), log_file(base_of(space).logging, folder):
        if overrides:
            write_config(config, space, folder)
        return _search(prepare(config, space, folder))


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
                tuner.fit()
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
        confirmation = confirm(shared, prepared.confirmation, list(recorder.trials.values()), end)
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
