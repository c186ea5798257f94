"""The commands as functions, from settings or a file: `train`, `score`, `search`, `study`, `scale`, `probe`, ...

    from mlc_ray import api

    run = api.train({"name": "mine", "model": {"path": "owner/model"}}, bundles=my_bundles)
    result = api.score({"model": str(run.run_folder)}, bundles=held_out)
    print(result.summary().two_sided)

Only progress is shown, and every error that a user can cause is a subclass of `mlc_ray.MlcRayError`. What a function
needs (torch, Ray, an engine) is imported when it is called.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlc_ray.config import (
    ChatSection,
    ConfigError,
    ModelSection,
    OpeningsSection,
    ScaleConfig,
    ScoreConfig,
    SearchConfig,
    Section,
    SourceSection,
    StudyConfig,
    TrainConfig,
    TranslateConfig,
    apply_override,
    parse_config,
    read_config_file,
)
from mlc_ray.runs import artifact_cache, model_name, output_place
from mlc_ray.storage import Place
from mlc_ray.types import Bundle

if TYPE_CHECKING:
    from mlc_ray.config.search import Criterion
    from mlc_ray.judges.own_openings import OwnOpenings
    from mlc_ray.report.study import StudyResult
    from mlc_ray.score.results import ScoreResult
    from mlc_ray.search.probe import Probe
    from mlc_ray.search.results import SearchResult
    from mlc_ray.train.run_folder import TrainResult
    from mlc_ray.translate.run import TranslateResult

ConfigT = TypeVar("ConfigT", bound=Section)
Settings = Mapping[str, Any] | str | os.PathLike[str]
"""Settings as a nested mapping, or the YAML file that has them."""
Bundles = Iterable[Mapping[str, Any] | Bundle]
"""Bundles in memory: mappings as in a file of bundles (such as rows of a Hugging Face dataset), or `Bundle`s."""


def train(
    config: TrainConfig | Settings | None = None,
    *,
    bundles: Bundles | None = None,
    overrides: Sequence[str] = (),
    resume: str | os.PathLike[str] | None = None,
) -> TrainResult:
    """Align a model.

    Args:
        config: the run's settings. With `resume: auto`, the same call goes on with what an earlier one left.
        bundles: what to train on, instead of `data.train`.
        overrides: `section.field=value`, as after --set.
        resume: the folder or URL of a run to go on with by its own settings, instead of `config`; `overrides` may
            change those that may change (docs/resume.md).

    Returns:
        Where the run is, its newest checkpoint, and the last step's metrics.

    Raises:
        ConfigError: a setting is unknown, ill-typed or unsupported, or both or neither of config and resume are given.
        MlcRayError: whatever else a user can cause and correct.
    """
    given = _config_or_folder(
        "train", TrainConfig, config, overrides, resume, may_change=True, bundles=bundles, place=("data", "train")
    )

    from mlc_ray.train.run import train
    from mlc_ray.train.run_folder import load_run_config

    return train(load_run_config(given, overrides), resume=given) if isinstance(given, Place) else train(given)


def score(
    config: ScoreConfig | Settings | None = None,
    *,
    bundles: Bundles | None = None,
    overrides: Sequence[str] = (),
    resume: str | os.PathLike[str] | None = None,
) -> ScoreResult:
    """Have a model answer prompts, judge the answers, and count.

    Args:
        config: the score's settings.
        bundles: what to ask, instead of `benchmarks`; give harmful and benign ones.
        overrides: `section.field=value`, as after --set.
        resume: the folder or URL of a score to go on with by its own settings, instead of `config`.

    Returns:
        Rates with intervals per benchmark, side and language, and where the responses are.

    Raises:
        ConfigError: a setting is unknown, ill-typed or unsupported, or both or neither of config and resume are given.
        TooManyUnparsedError: too few responses got a verdict; everything is written.
        MlcRayError: whatever else a user can cause and correct.
    """
    given = _config_or_folder("score", ScoreConfig, config, overrides, resume, bundles=bundles, place=("benchmarks",))

    from mlc_ray.score.run import resume_score, score

    return resume_score(given) if isinstance(given, Place) else score(given)


def search(
    config: SearchConfig | Settings | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Search fields of a run, above all its layer; every trial is a run that is scored at its checkpoints.

    Args:
        config: the search's settings.
        overrides: `section.field=value`, as after --set.
        resume: the folder of a search to go on with by its own settings, instead of `config`; of these `trials` and
            `max_hours` may change.

    Returns:
        The baseline, all trials, and what was confirmed of the best of them.

    Raises:
        ConfigError: a setting is unknown, ill-typed or unsupported, or both or neither of config and resume are given.
        MlcRayError: whatever else a user can cause and correct.
    """
    given = _config_or_folder("search", SearchConfig, config, overrides, resume, may_change=True)

    from mlc_ray.search.run import resume_search, search

    return resume_search(given, overrides) if isinstance(given, Place) else search(given)


def study(
    config: StudyConfig | Settings | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: str | os.PathLike[str] | None = None,
) -> StudyResult:
    """Compare methods over models and seeds: every cell is a run and a score.

    Args:
        config: the study's settings.
        overrides: `section.field=value`, as after --set.
        resume: the folder of a study to go on with by its own settings, instead of `config`.

    Returns:
        Both sides of every method with intervals over bundles and seeds, tests of every pair, and how far each cell
        came.

    Raises:
        ConfigError: a setting is unknown, ill-typed or unsupported, or both or neither of config and resume are given.
        MlcRayError: whatever else a user can cause and correct.
    """
    given = _config_or_folder("study", StudyConfig, config, overrides, resume)

    from mlc_ray.study.run import resume_study, study

    return resume_study(given) if isinstance(given, Place) else study(given)


def scale(
    config: ScaleConfig | Settings | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: str | os.PathLike[str] | None = None,
) -> StudyResult:
    """Search layer and lambda over sizes of models: every cell is a search, of which the best is confirmed.

    Args:
        config: the study's settings.
        overrides: `section.field=value`, as after --set.
        resume: the folder of a scaling study to go on with by its own settings, instead of `config`.

    Returns:
        Both sides of each size's best point, and in `scaling` the points, their trends over sizes, and the budget.

    Raises:
        ConfigError: a setting is unknown, ill-typed or unsupported, or both or neither of config and resume are given.
        MlcRayError: whatever else a user can cause and correct.
    """
    given = _config_or_folder("scale", ScaleConfig, config, overrides, resume)

    from mlc_ray.study.scale import resume_scale, scale

    return resume_scale(given) if isinstance(given, Place) else scale(given)


def probe(
    model: ModelSection | Mapping[str, Any] | str | os.PathLike[str],
    bundles: Bundles | Sequence[str],
    *,
    out: str | os.PathLike[str] | None = None,
    chat: ChatSection | Mapping[str, Any] | None = None,
    languages: Sequence[str] | None = None,
    limit: int | None = None,
    criterion: Criterion = "headroom",
    openings: OpeningsSection | Mapping[str, Any] | None = None,
    address: str = "auto",
) -> Probe:
    """Measure every layer of a model, forward only: how consistent, distinct and separable its states are.

    And in every language, how well its own odds of opening with a refusal tell harmful prompts from benign ones.

    Args:
        model: a Hugging Face folder or hub name, or settings as under `model` of a run.
        bundles: in memory, or paths as of a source (`sample:train`, a file, a hub name); of both kinds.
        out: folder to write (default: runs/probes/MODEL).
        chat: the conversation that prompts stand in, as `chat` of a run (default: the one the model was trained in).
        languages: measure only these (default: all).
        limit: at most this many bundles of each kind (default: 64).
        criterion: what ranks the layers: headroom, silhouette, separation or transfer; all are computed.
        openings: how refusals open, as `openings` of a run.
        address: Ray's, as `cluster.address` of a run.

    Returns:
        Statistics of all layers, and their ranking.

    Raises:
        MlcRayError: whatever a user can cause and correct.
    """
    if isinstance(model, str | os.PathLike):
        model = {"path": os.fspath(model)}
    section = model if isinstance(model, ModelSection) else parse_config(ModelSection, model)
    default = Path("runs", "probes", model_name(section.path))
    folder = output_place(str(default if out is None else out), setting="out")
    given = list(bundles)
    if given and all(isinstance(item, str) for item in given):
        sources = [parse_config(SourceSection, {"path": item}) for item in given]
    else:
        sources = [_as_source(given, artifact_cache(folder.parent))]  # type: ignore[arg-type]

    from mlc_ray.search.probe import probe

    return probe(
        section,
        sources,
        folder,
        chat=chat if isinstance(chat, ChatSection | None) else parse_config(ChatSection, dict(chat)),
        languages=None if languages is None else list(languages),
        limit=limit,
        criterion=criterion,
        openings=openings
        if isinstance(openings, OpeningsSection | None)
        else parse_config(OpeningsSection, dict(openings)),
        address=address,
    )


def openings(responses: Sequence[str | os.PathLike[str]], *, most: int = 8) -> OwnOpenings:
    """Find how a model's own refusals open; its `further` is what `openings.further` of a run takes.

    Args:
        responses: folders of scores, and of translations with own answers; or labelled responses.
        most: at most so many a language.

    Returns:
        The openings by language, and how many refusals begin with one, before and with them.

    Raises:
        MlcRayError: whatever a user can cause and correct.
    """
    from mlc_ray.translate.openings import openings

    return openings([os.fspath(each) for each in responses], most=most)


def translate(
    config: TranslateConfig | Settings | None = None,
    *,
    bundles: Bundles | None = None,
    overrides: Sequence[str] = (),
    resume: str | os.PathLike[str] | None = None,
) -> TranslateResult:
    """Make bundles from English ones: prompts in further languages, twins of the other kind, a model's own answers.

    Args:
        config: the translation's settings.
        bundles: what to start from, instead of `sources`.
        overrides: `section.field=value`, as after --set.
        resume: the folder or URL of a translation to go on with by its own settings, instead of `config`.

    Returns:
        Its folder, where `bundles` are, and the quality report.

    Raises:
        ConfigError: a setting is unknown, ill-typed or unsupported, or both or neither of config and resume are given.
        MlcRayError: whatever else a user can cause and correct.
    """
    given = _config_or_folder(
        "translate", TranslateConfig, config, overrides, resume, bundles=bundles, place=("sources",)
    )

    from mlc_ray.translate.run import resume_translation, translate

    return resume_translation(given) if isinstance(given, Place) else translate(given)


# ------------------------------------------------------------------------------------------------------------- settings


_FOLDERS = {"train": "run", "scale": "study", "translate": "translation"}  # of a command, where it is not its name


def _config_or_folder(
    command: str,
    schema: type[ConfigT],
    config: Any,
    overrides: Sequence[str],
    resume: str | os.PathLike[str] | None,
    *,
    may_change: bool = False,
    bundles: Bundles | None = None,
    place: tuple[str, ...] = (),
) -> ConfigT | Place:
    """The settings, validated, or the folder to go on with; `may_change` says whether `overrides` go with that.

    Raises:
        ConfigError: both or neither are given, a setting is unsupported, or overrides or bundles do not go with the
            folder.
    """
    folder = _FOLDERS.get(command, command)
    if (config is None) == (resume is None):
        raise ConfigError(f"{command} needs config, or resume with the folder of a {folder}; one of them, not both")
    if resume is None:
        return _settings(schema, config, overrides, bundles, place)
    if overrides and not may_change:
        raise ConfigError(f"overrides={list(overrides)!r} cannot go with resume: a {folder} keeps its own settings")
    if bundles is not None:
        raise ConfigError(f"bundles cannot go with resume: a {folder} keeps its own")
    return Place(os.fspath(resume))


def _settings(
    schema: type[ConfigT],
    config: Any,
    overrides: Sequence[str],
    bundles: Bundles | None = None,
    place: tuple[str, ...] = (),
) -> ConfigT:
    """The settings, validated; `bundles` become a source that stands at `place`."""
    if isinstance(config, schema):
        raw: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    elif isinstance(config, Mapping):
        raw = copy.deepcopy(dict(config))
    else:
        raw = read_config_file(config, schema)
    for override in overrides:
        apply_override(raw, override)
    if bundles is None:
        return parse_config(schema, raw)
    section = raw
    for name in place[:-1]:
        section = section.setdefault(name, {})
    if section.get(place[-1]):
        raise ConfigError(f"bundles are given, and so is {'.'.join(place)}={section[place[-1]]!r}: leave one out")
    output_dir = raw.get("output_dir", schema.model_fields["output_dir"].default)
    source = _as_source(bundles, artifact_cache(output_place(output_dir)))
    section[place[-1]] = [source.model_dump(mode="json", exclude_unset=True)]
    return parse_config(schema, raw)


def _as_source(bundles: Bundles, folder: Place) -> SourceSection:
    from mlc_ray.data.given import as_source

    return as_source(bundles, folder)
