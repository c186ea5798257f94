"""What is decided of a translation's settings before it runs, what results follow from, and where both are noted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeVar

from mlc_ray.cluster import with_dtype
from mlc_ray.config import ChatSection, EngineSection, TranslateConfig, TranslatorSection, parse_config
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import check_lengths
from mlc_ray.generate.translate import check_translator, translator_identity
from mlc_ray.judges.base import make_reader
from mlc_ray.report.languages import language_name
from mlc_ray.runs import TRANSLATION_FILE, chat_of, pinned_weights
from mlc_ray.score.plan import judge_at_commits
from mlc_ray.storage import Place, fingerprint_model, user_cache
from mlc_ray.translate.answers import check_judge
from mlc_ray.translate.languages import meant

_TOKENS = 448  # of a text, where settings do not say how long a translation may be: 512 with its markers
SectionT = TypeVar("SectionT", TranslatorSection, Any)


class TranslationError(MlcRayError):
    """A translation cannot be made as asked; the message names the setting to change."""


@dataclass(frozen=True)
class Decided:
    """Settings with models by what they stand for, lengths and number types decided; `chat` is of the own answers.

    `given` are the settings as they were given, `resolved` what each model's name in them stands for.
    """

    given: TranslateConfig
    config: TranslateConfig
    resolved: Mapping[str, str]
    chat: ChatSection | None

    def request(self) -> dict[str, Any]:
        """What is noted in the folder."""
        return {
            "config": self.given.model_dump(mode="json", exclude_unset=True),
            "resolved": dict(self.resolved),
            "dtypes": {name: engine.dtype for name, engine in _engines(self.config).items()},
        }

    def answers_identity(self) -> list[Any]:
        """What a model's own answers follow from, beside the prompt."""
        settings, chat = self.config.answers, self.chat
        assert settings is not None and chat is not None
        lengths = [settings.max_new_tokens, *settings.engine.computing]
        return [fingerprint_model(settings.model), chat.model_dump(mode="json"), *lengths]


def decide(config: TranslateConfig, before: Mapping[str, Any] | None) -> Decided:
    """Settings with what can be decided without a cluster, all checked that can be.

    Args:
        config: the settings as they are given.
        before: what `read_request` found of the translation that goes on.

    Raises:
        TranslationError: a package is missing, or a language has no known name.
        MlcRayError: a model is not there, lengths do not fit, a key is missing, a judge may not be asked.
    """
    if missing := [name for name in ("datasketch", "lingua", "sacrebleu") if find_spec(name) is None]:
        raise TranslationError(
            f"translate needs packages that are not installed ({', '.join(missing)}): pip install 'mlc_ray[translate]'"
        )
    for code in config.languages:
        if not language_name(code):
            near = meant(code)
            hint = f"; did you mean {near!r} ({language_name(near)})?" if near else ""
            raise TranslationError(
                f"languages has {code!r}, a language without a known name, by which a translator is asked{hint}"
            )
    known: dict[str, str] = {} if before is None else before["resolved"]
    resolved: dict[str, str] = {}

    def pinned(model: str) -> str:
        resolved[model] = known.get(model) or pinned_weights(model)
        return resolved[model]

    def translator(section: TranslatorSection) -> TranslatorSection:
        section = section.for_texts_of(_TOKENS)
        if section.model is not None:
            section = section.model_copy(update={"model": pinned(section.model)})
        check_translator(section, user_cache())
        return section

    changes: dict[str, Any] = {}
    if config.translator is not None:
        changes["translator"] = translator(config.translator)
    if config.twins is not None and config.twins.judge is not None:
        changes["twins"] = config.twins.model_copy(update={"judge": translator(config.twins.judge)})
    chat = None
    if (own := config.answers) is not None:
        chat = chat_of(own.chat, own.model)
        judge = judge_at_commits(own.judge)
        changes["answers"] = own.model_copy(update={"model": pinned(own.model), "judge": judge})
        check_lengths(changes["answers"].model, own.engine, own.max_new_tokens)
        languages = ["en", *config.languages] if own.languages != "english" else ["en"]  # bundles bring more, once read
        check_judge(changes["answers"], languages, user_cache())
    return Decided(config, config.model_copy(update=changes), resolved, chat)


def with_dtypes(decided: Decided, before: Mapping[str, Any] | None, *, gpu: bool) -> Decided:
    """The same with `dtype: auto` of every engine decided: as it was before, or as the nodes compute natively.

    Raises:
        ClusterError: a node did not answer.
    """
    was: Mapping[str, str] = {} if before is None else before["dtypes"]

    def engine(name: str, section: EngineSection) -> EngineSection:
        if section.dtype == "auto" and name in was:
            section = section.model_copy(update={"dtype": was[name]})
        return with_dtype(section, gpu=gpu)

    def inside(name: str, section: SectionT) -> SectionT:
        if name not in _engines(decided.config):
            return section
        return section.model_copy(update={"engine": engine(name, section.engine)})

    config, changes = decided.config, dict[str, Any]()
    if config.translator is not None:
        changes["translator"] = inside("translator", config.translator)
    if config.twins is not None and config.twins.judge is not None:
        changes["twins"] = config.twins.model_copy(update={"judge": inside("twins.judge", config.twins.judge)})
    if config.answers is not None:
        changes["answers"] = inside("answers", config.answers)
    return replace(decided, config=config.model_copy(update=changes))


def identity(decided: Decided) -> list[Any]:
    """All that a translation follows from but its bundles, as JSON: how fast and for how much does not count."""
    config, own = decided.config, decided.config.answers
    found: list[Any] = [
        config.languages,
        config.translate_answers,
        config.checks.model_dump(mode="json"),
        config.min_languages,
        config.shard_bundles,
        config.translator and translator_identity(config.translator),
    ]
    if config.twins is not None:
        judge = config.twins.judge
        found += [config.twins.of, judge and translator_identity(judge)]
    if own is not None:
        fields = own.model_dump(
            mode="json", include={"kinds", "languages", "pairs", "refusals", "otherwise", "cut_off"}
        )
        found += [fields, make_reader(own.judge).identity, decided.answers_identity()]
    return found


def read_request(place: Place) -> dict[str, Any] | None:
    """What is noted in the folder of a translation, its `config` as settings; None where none began.

    Raises:
        TranslationError: the note is damaged.
    """
    file = place / TRANSLATION_FILE
    try:
        content: dict[str, Any] = file.read_json()
        return {**content, "config": parse_config(TranslateConfig, content["config"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise TranslationError(f"{str(file)!r} is damaged: {error}") from None


def _engines(config: TranslateConfig) -> dict[str, EngineSection]:
    """The engines that there will be, by where they stand in the settings."""
    judge = None if config.twins is None else config.twins.judge
    sections = {"translator": config.translator, "twins.judge": judge}
    found: dict[str, EngineSection] = {
        name: section.engine for name, section in sections.items() if section is not None and section.model is not None
    }
    return found if config.answers is None else {**found, "answers": config.answers.engine}
