"""What is made before the first trial of a search, or found in its folder: what all of its trials share."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from mlc_ray.config import ConfigError, ScoringSection, SearchConfig, TrainConfig, resolve_layer
from mlc_ray.data.store import TokenArtifact
from mlc_ray.generate.engine import Device
from mlc_ray.judges.base import make_judge
from mlc_ray.plan.cutting import steps_of
from mlc_ray.runs import SEARCH_FILE, TRIALS_FOLDER, artifact_cache, resolve_model
from mlc_ray.score.plan import fitted
from mlc_ray.score.prompts import Prompts
from mlc_ray.score.scorer import start_scorer
from mlc_ray.search.checks import base_of, device_of, lora_rank_of
from mlc_ray.search.objectives.base import TrialScore, make_objective
from mlc_ray.search.probe import probe_run
from mlc_ray.search.selection import AskedPrompts, read_asked
from mlc_ray.search.space import Space, check_held_out, tried, values_of
from mlc_ray.search.trial import SearchError, Shared
from mlc_ray.search.tune import LAYER
from mlc_ray.storage import Place, engine_named, fingerprint_model, library_versions, local_side, user_cache
from mlc_ray.train.answers import check_answers
from mlc_ray.train.model import model_depth
from mlc_ray.train.planning import check_kinds, check_terms
from mlc_ray.train.run import prepare_data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything before the trials: what they share, the prompts that confirm, the baseline, the order of layers."""

    shared: Shared
    confirmation: Prompts
    baseline: TrialScore
    layer_order: list[Any]


def prepare(config: SearchConfig, space: Space, folder: Place) -> Prepared:
    """Make what all trials share, or find it in the folder; the engines of the result are up."""
    base = base_of(space, output_dir=str(folder / TRIALS_FOLDER))
    device = device_of(base)
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
    lora_rank = lora_rank_of(space)
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


def identity_of(prompts: AskedPrompts, model: str, scoring: ScoringSection) -> dict[str, str]:
    """What all scores of a search have in common, so that they can be compared."""
    versions = library_versions()
    return {
        "prompts": prompts.fingerprint,
        "model": fingerprint_model(model),
        "judge": make_judge(scoring.judge).identity,
        "engine": engine_named(versions),
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
