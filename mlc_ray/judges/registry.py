"""Which judge a name stands for: its facts, which cost nothing, and the judge itself, which may start an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlc_ray.config import JudgeSection
from mlc_ray.generate.engine import Device, check_lengths
from mlc_ray.generate.translate import EndpointTranslator
from mlc_ray.judges.base import Judge, JudgeError, Runs
from mlc_ray.judges.endpoint import ENDPOINT_LANGUAGES, ENDPOINT_MEASURES, EndpointJudge
from mlc_ray.judges.guards.judge import GuardJudge, check_guard, guard_facts
from mlc_ray.judges.likelihood import LANGUAGES as LIKELIHOOD_LANGUAGES
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.runs import resolve_model
from mlc_ray.storage import fingerprint_model
from mlc_ray.types import Measure


@dataclass(frozen=True)
class JudgeFacts:
    """What is known of a judge before it exists: the questions it answers, the languages it declares, where it runs.

    `languages` are primary codes; None means that it declares every language.
    """

    name: str
    measures: tuple[Measure, ...]
    languages: frozenset[str] | None
    runs: Runs


def judge_facts(settings: JudgeSection) -> JudgeFacts:
    """The facts of the judge that `settings` asks for; starts nothing."""
    if settings.is_guard:
        measures, languages = guard_facts(settings.name)
        return JudgeFacts(settings.name, measures, languages, "engine")
    if settings.name == "endpoint":
        return JudgeFacts("endpoint", ENDPOINT_MEASURES, ENDPOINT_LANGUAGES, "service")
    if settings.name == "likelihood":
        return JudgeFacts("likelihood", ("refused",), LIKELIHOOD_LANGUAGES, "prompts")
    return JudgeFacts("refusal", RefusalJudge.measures, RefusalJudge().languages, "inline")


def judge_identity(settings: JudgeSection) -> str:
    """Names the judge with all that its verdicts depend on: two scores with another identity do not compare.

    The name; a guard's weights and their fingerprint, an endpoint's model; the settings that change verdicts; and who
    translates. How fast, how often and for how much it is asked does not count.
    """
    parts = [settings.name]
    if settings.model is not None:
        parts.append(f"{settings.model}@{fingerprint_model(resolve_model(settings.model))}")
    if settings.name == "qwen3guard":
        parts.append(f"controversial={settings.controversial}")
    if settings.endpoint is not None:
        parts.append(f"{settings.endpoint.model} protocol={settings.protocol}")
    if (translate := settings.translate) is not None:
        by = translate.model if translate.endpoint is None else translate.endpoint.model
        parts.append(f"translated by {by}{' (all languages)' if translate.all_languages else ''}")
    return " ".join(parts)


def check_ready(settings: JudgeSection, cache_dir: Path) -> None:
    """Whatever can be known to be wrong with a judge before anything is generated: weights, lengths, keys, folders.

    Raises what the judge itself would raise hours later.
    """
    if settings.is_guard:
        check_guard(settings)
    if settings.endpoint is not None:
        EndpointJudge(settings, cache_dir)
    if (translate := settings.translate) is not None:
        if translate.endpoint is not None:
            EndpointTranslator(translate, cache_dir)
        elif translate.model is not None:
            check_lengths(resolve_model(translate.model), settings.engine, translate.max_new_tokens)


def make_judge(settings: JudgeSection, device: Device, cache_dir: Path) -> Judge:
    """The judge itself, in the process where it is to run. Raises what its class raises, `JudgeError` for likelihood.

    `likelihood` has no judge of responses: it reads the policy's log-probs of prompts (`LikelihoodScorer`).
    """
    if settings.is_guard:
        return GuardJudge(settings, device)
    if settings.name == "endpoint":
        return EndpointJudge(settings, cache_dir)
    if settings.name == "likelihood":
        raise JudgeError("the likelihood judge reads a model, not responses: score the model with it")
    return RefusalJudge()
