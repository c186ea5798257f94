"""Judges give verdicts on responses. A judge declares its languages, and says `unparsed` where it cannot tell.

A judge is one file: a class with its settings nested in it, its facts, and how it judges.

    @register("judge", "my-judge")
    class MyJudge(Judge):
        name, measures, languages = "my-judge", ("refused",), None

        class Settings(ReadingJudgeSettings):
            words: list[str] = ["no"]

        def judge(self, answers): ...

Settings name it by `judge: {name: my-judge}`, or one from outside this package by where it is:
`judge: {name: "my_pkg.my_module:MyJudge"}`.
A judge answers one or both of two questions, each a *measure*: does the response refuse (`refused`), and is it harmless
(`safe`)? What runs where (`runs`):

    inline    pure Python, beside the data (`refusal`)
    engine    a guard model in vLLM engines, one per Ray actor (`guards`)
    service   one actor that asks an endpoint, so that its cache and its cost cap are one (`endpoint`)
    prompts   needs no response: it reads the policy's own log-probs (`likelihood`)
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from mlc_ray._registry import resolve
from mlc_ray.config import ChatSection, EngineSection, JudgeSettings, ReadingJudgeSettings, TranslateSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, Engine
from mlc_ray.generate.translate import check_translations, check_translator, translator_identity
from mlc_ray.judges import degenerate
from mlc_ray.storage import fingerprint, fingerprint_source, installed_engines
from mlc_ray.types import Answer, Measure, Verdict, Via, primary_language

Runs = Literal["inline", "engine", "service", "prompts"]


class JudgeError(MlcRayError):
    """A judge cannot be made as asked, or its word lists are damaged."""


class JudgeFaultError(MlcRayError):
    """A judge broke its contract: it raised on a response, or gave verdicts that are none; the message names it."""


class UncoveredLanguageError(MlcRayError):
    """The judge cannot read a language that is to be scored; the message names it and the fixes."""


@dataclass(frozen=True)
class Policy:
    """The model whose responses are to be judged: its tokenizer's folder or hub name, and its lengths in tokens."""

    model: str
    longest_prompt: int
    max_new_tokens: int
    trust_remote_code: bool = False


def _computing(engine: EngineSection) -> str:
    options = f" options={json.dumps(engine.options, sort_keys=True)}" if engine.options else ""
    versions = [f" {name}={version}" for name, version in installed_engines().items()]
    return f"dtype={engine.dtype}{options}{''.join(versions)}"


def _translated_by(translate: TranslateSection) -> str:
    by = _computing(translate.engine) if translate.endpoint is None else translate.endpoint.model
    every = " (all languages)" if translate.all_languages else ""
    return f"translated by {fingerprint(translator_identity(translate))} {by}{every}"


class BaseJudge(ABC):
    """A judge's settings and what is known of it before it reads anything; making one starts nothing.

    `name` is what tables show. `measures` are the questions it answers. `languages` holds the primary codes it declares
    (`zh` covers `zh-Hant`), or is None for a judge that declares all. In `unmeasured` are those of them in which nobody
    has counted how often it errs; tables mark them. `sources` are modules whose code decides on verdicts, beside those
    of the class.
    """

    name: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    languages: frozenset[str] | None
    unmeasured: frozenset[str] = frozenset()
    sources: ClassVar[tuple[str, ...]] = (degenerate.__name__,)
    runs: ClassVar[Runs]
    Settings: ClassVar[type[JudgeSettings]]
    settings: JudgeSettings

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings

    @property
    def engine(self) -> EngineSection | None:
        """The engines that a judge with `runs` "engine" starts; None for others."""
        return None

    @property
    def identity(self) -> str:
        """Names the judge: scores with different identities do not compare.

        The name, what `identity_parts` gives, what its engine computes in and by which version, who translates and is
        asked how, and as `rules` the source of the judge's module and of `sources`. Not in it are code that judges
        share (stages, engines, endpoints, templates, how translations are read), and how fast or often it is asked.
        """
        parts = [self.settings.name, *self.identity_parts()]
        if self.engine is not None:
            parts.append(_computing(self.engine))
        if self.settings.translator is not None:
            parts.append(_translated_by(self.settings.translator))
        parts.append(f"rules={fingerprint_source(type(self), self.sources, base=BaseJudge)}")
        return " ".join(parts)

    def identity_parts(self) -> list[str]:
        """What verdicts depend on beside the judge's name; by default all settings that are the judge's own."""
        own = sorted(type(self.settings).model_fields.keys() - ReadingJudgeSettings.model_fields.keys())
        return [f"{field}={getattr(self.settings, field)}" for field in own]

    def check_ready(self, cache_dir: Path) -> None:
        """Check all that can be wrong and be known before anything is generated: weights, lengths, keys, folders.

        Raises:
            MlcRayError: what the judge or its translator would raise hours later.
        """
        if self.settings.translator is not None:
            check_translator(self.settings.translator, cache_dir, setting="judge.translate.model")

    def coverage(self, languages: Iterable[str], *, why: str = "") -> dict[str, Via]:
        """How the judge comes to read each of `languages`; asked before anything is generated.

        Args:
            languages: BCP 47 tags.
            why: A sentence on why this judge is asked at all, where the settings name another.

        Raises:
            UncoveredLanguageError: names every language that the judge may not be asked to read, and the fixes.
        """
        ways = {code: self._how_read(code) for code in sorted(set(languages))}
        read = {code: via for code, via in ways.items() if via is not None}
        if len(read) < len(ways):
            raise self._uncovered([code for code in ways if code not in read], why)
        return read

    def _uncovered(self, missing: Sequence[str], why: str) -> UncoveredLanguageError:
        return UncoveredLanguageError(
            f"the judge {self.name!r} does not cover {', '.join(map(repr, missing))}: "
            f"{', '.join(self.coverage_fixes(missing))}" + (f" ({why})" if why else "")
        )

    def coverage_fixes(self, missing: Sequence[str]) -> list[str]:
        """What a user can do about languages that the judge does not cover."""
        return [
            f"leave it out with languages=[...] (this judge reads {','.join(sorted(self.languages or ()))})",
            "translate first (judge.translate)",
            "or set judge.allow_uncovered=true, and the tables will mark it",
        ]

    def fitted(self, prompts: Mapping[str, Sequence[str]], policy: Policy) -> JudgeSettings:
        """The settings to judge by, once it is sure that all that `policy` may write to these prompts can be read.

        Asked before anything is generated.

        Args:
            prompts: all that are asked, by language.

        Raises:
            MlcRayError: it cannot; the message has the numbers and the fix.
        """
        return self.settings

    def fitted_to(self, answers: Sequence[Answer]) -> JudgeSettings:
        """The settings to judge answers by that are there already."""
        return self.settings

    def _how_read(self, code: str) -> Via | None:
        covered = self.languages is None or primary_language(code) in self.languages
        translate = self.settings.translator
        if translate is not None and primary_language(code) != "en" and (translate.all_languages or not covered):
            return "translated"
        if covered:
            return "unmeasured" if primary_language(code) in self.unmeasured else ""
        return "uncovered" if self.settings.allow_uncovered else None


class Judge(BaseJudge):
    """A judge that reads responses.

    `start` is called once in the process where it is to run, then `judge` for one batch after another.
    """

    runs: ClassVar[Runs] = "inline"
    Settings: ClassVar[type[JudgeSettings]] = ReadingJudgeSettings

    def start(self, device: Device, cache_dir: Path) -> None:
        """Make what the judge needs: an engine on `device`, a connection whose cache is in `cache_dir`."""

    def fitted(self, prompts: Mapping[str, Sequence[str]], policy: Policy) -> JudgeSettings:
        """As `BaseJudge.fitted`: the translator's window must hold what the policy may write, too."""
        if self.settings.translator is not None:
            self._check_translations(self.settings.translator, prompts, policy)
        return self.settings

    def _check_translations(
        self, translate: TranslateSection, prompts: Mapping[str, Sequence[str]], policy: Policy
    ) -> None:
        ways = self.coverage(prompts)
        wanted = {code: texts for code, texts in prompts.items() if ways[code] == "translated"}
        check_translations(
            translate, wanted, policy.model, policy.max_new_tokens, trust_remote_code=policy.trust_remote_code
        )

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict per answer, in order.

        Never raises on what a model may answer: what cannot be read is `unparsed`. A verdict's `behaviour` is None
        unless `refused` is among the judge's measures, its `safety` None unless `safe` is.
        """

    def unparsed(self, reason: str) -> Verdict:
        """`unparsed` on every question that this judge answers."""
        return unparsed(self.measures, reason)


class PromptScorer(ABC):
    """What a `PromptJudge` starts: it gives verdicts on the policy itself, prompt by prompt."""

    @abstractmethod
    def score(self, prompts: Sequence[str], languages: Sequence[str]) -> list[Verdict]:
        """A verdict per prompt, in order; `languages[i]` is the BCP 47 tag of prompt i."""


class PromptJudge(BaseJudge):
    """A judge that reads the policy instead of its responses; no response is generated."""

    runs: ClassVar[Runs] = "prompts"
    Settings: ClassVar[type[JudgeSettings]] = JudgeSettings

    @abstractmethod
    def scorer(
        self, model: str, settings: EngineSection, *, chat: ChatSection, device: Device, shared: Engine | None
    ) -> PromptScorer:
        """What gives the verdicts on `model`, in an engine of its own unless one that serves it is given.

        `chat` is the conversation that prompts stand in.
        """


def unparsed(measures: Sequence[Measure], reason: str) -> Verdict:
    """`unparsed` on each of `measures`."""
    return Verdict(
        behaviour="unparsed" if "refused" in measures else None,
        safety="unparsed" if "safe" in measures else None,
        reason=reason,
    )


def make_judge(settings: JudgeSettings) -> BaseJudge:
    """The judge that `settings` name; starts nothing.

    Raises:
        UnknownComponentError: no judge has that name.
        JudgeError: what has that name is not a judge.
    """
    found: Any = resolve("judge", settings.name)
    if not issubclass(found, BaseJudge):
        raise JudgeError(f"judge.name={settings.name!r}: {found.__qualname__} extends neither Judge nor PromptJudge")
    return cast(BaseJudge, found(settings))


def make_reader(settings: JudgeSettings) -> BaseJudge:
    """The judge that `settings` name, one that reads responses (a `Judge`, or a panel of them); starts nothing.

    Raises:
        JudgeError: the judge reads a model, not responses.
    """
    judge = make_judge(settings)
    if judge.runs == "prompts":
        raise JudgeError(f"the {judge.name} judge reads a model, not responses: score the model with it")
    return judge
