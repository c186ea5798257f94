"""Which stages a score has and where each runs: the same `Part`s for `mlc-ray score`, which opens and closes them one
after another, and for a search, which keeps them open."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlc_ray.cluster import with_dtype
from mlc_ray.config import ChatSection, EngineSection, JudgeSettings, ScoringSection
from mlc_ray.generate.engine import Device, Warm
from mlc_ray.generate.pool import Part
from mlc_ray.generate.stage import Generator
from mlc_ray.judges.base import BaseJudge, Judge, Policy, make_judge
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.runs import training_chat
from mlc_ray.score.stages import JudgeStage, PromptJudgeStage, TranslateStage
from mlc_ray.storage import Place, pinned_model, without_commit
from mlc_ray.types import Measure, Via

logger = logging.getLogger(__name__)
USAGE_FILES = {"judge": "judge_usage.json", "translate": "translate_usage.json"}
_TOKENS_REFUSED, _TOKENS_SAFE = 64, 1024
_LIGHT_ROWS = 4096  # of a judge without an engine: fewer are read sooner than another process starts
_LIGHT_ACTORS = 4


ScoringT = TypeVar("ScoringT", bound=ScoringSection)


@dataclass(frozen=True)
class Judging:
    """The judge, and how it reads each language; `phrase_ways` of the phrase judge, where it has to join in."""

    judge: BaseJudge
    ways: Mapping[str, Via]
    phrase_ways: Mapping[str, Via] | None

    @property
    def measured_by(self) -> dict[Measure, str]:
        """The name of the judge behind each measure."""
        names: dict[Measure, str] = {} if self.phrase_ways is None else {"refused": "refusal"}
        return {**names, **dict.fromkeys(self.judge.measures, self.judge.name)}

    @property
    def translated(self) -> dict[str, Via] | None:
        """How each language is read, "translated" if either judge needs it; None where nothing is translated."""
        ways = {**(self.phrase_ways or {}), **self.ways}
        ways |= {code: via for code, via in (self.phrase_ways or {}).items() if via == "translated"}
        return ways if self.judge.settings.translator is not None and "translated" in ways.values() else None


def plan_judging(judge: BaseJudge, languages: Iterable[str]) -> Judging:
    """Who judges, and how each language is read; before anything is generated.

    Raises:
        UncoveredLanguageError: no judge may be asked about a language.
    """
    codes = sorted(set(languages))
    ways = judge.coverage(codes)
    if "refused" in judge.measures:
        return Judging(judge, ways, None)
    settings = judge.settings
    phrases = RefusalJudge(
        RefusalJudge.Settings(translate=settings.translator, allow_uncovered=settings.allow_uncovered)
    )
    why = f"its phrases join because {judge.name} does not say what is refused"
    return Judging(judge, ways, phrases.coverage(codes, why=why))


def fitted(
    judge: BaseJudge, prompts: Mapping[str, Sequence[str]], scoring: ScoringSection, model: str
) -> JudgeSettings:
    """The settings to judge by, once it is sure that the judge can read all that `model` may write to these prompts.

    Raises:
        MlcRayError: it cannot; the message has the numbers and the fix.
    """
    if not isinstance(judge, Judge):
        return judge.settings
    engine = scoring.engine
    assert scoring.max_new_tokens is not None, "decided by now (with_longest_answer)"
    longest = engine.max_model_len - scoring.max_new_tokens
    policy = Policy(model, longest, scoring.max_new_tokens, trust_remote_code=engine.trust_remote_code)
    return judge.fitted(prompts, policy)


def answering(
    model: str, scoring: ScoringSection, judging: Judging, device: Device, *, warm: Warm | None = None, in_turn: bool
) -> Part:
    """The policy's engines: they answer prompts, or for a judge that reads the policy itself give verdicts at once.

    With `warm` they can be given other weights; `in_turn` as in `Part`.
    """
    assert scoring.chat is not None, "decided by now (with_chat)"
    settings: dict[str, Any] = {
        "model": model, "settings": scoring.engine, "chat": scoring.chat, "device": device, "warm": warm
    }  # fmt: skip
    if judging.judge.runs == "prompts":
        settings |= {"judge": judging.judge.settings, "ways": judging.ways}
        return Part("judging", PromptJudgeStage, settings, scoring.engine, in_turn=in_turn)
    assert scoring.max_new_tokens is not None, "decided by now (with_longest_answer)"
    settings |= {"max_new_tokens": scoring.max_new_tokens, "asking": scoring.asking}
    return Part("answering", Generator, settings, scoring.engine, in_turn=in_turn)


def reading(judging: Judging, device: Device, *, rows: int, usage: Path, replies: Place) -> dict[str, Part]:
    """What reads responses, in order: `translate` if a language needs it, and `judge`.

    Nothing does for a judge that reads the policy itself.

    Args:
        rows: number of responses, by which the actors of a judge without an engine are counted.
        usage: folder for the files that say what an endpoint did and cost.
        replies: the file of an endpoint's replies, which it starts from and adds to.
    """
    judge, translate = judging.judge, judging.judge.settings.translator
    if judge.runs == "prompts":
        return {}

    def common(name: str) -> dict[str, Any]:
        return {"device": device, "usage_file": str(usage / USAGE_FILES[name]), "replies_file": str(replies)}

    parts = {}
    if translate is not None and judging.translated is not None:
        parts["translate"] = Part(
            "translating",
            TranslateStage,
            {"settings": translate, "ways": judging.translated, **common("translate")},
            translate.engine if translate.model is not None else None,
        )
    # An endpoint's cache and its cost cap are one.
    light = 1 if judge.runs == "service" else min(_LIGHT_ACTORS, math.ceil(rows / _LIGHT_ROWS))
    parts["judge"] = Part(
        "judging",
        JudgeStage,
        {"settings": judge.settings, "ways": judging.ways, "phrase_ways": judging.phrase_ways, **common("judge")},
        judge.engine,
        actors=light,
    )
    return parts


def with_chat(scoring: ScoringT, model: str) -> ScoringT:
    """`scoring` with the conversation that prompts stand in: if it says none, the one that `model` was trained in.

    Args:
        model: as the user named it: a run, a checkpoint of it, an exported model, or another model.

    Raises:
        ModelPathError: what describes the model is damaged.
    """
    trained = training_chat(model)
    if scoring.chat is None:
        return scoring.model_copy(update={"chat": trained or ChatSection()})
    if trained is not None and trained != scoring.chat:
        logger.warning("%s was trained with chat=%r, and is scored with chat=%r", model, trained, scoring.chat)
    return scoring


def with_longest_answer(scoring: ScoringT) -> ScoringT:
    """`scoring` with `max_new_tokens` decided: a refusal shows in the first words, harm perhaps only at the end.

    How much a translator may write follows from it where the settings do not say it.
    """
    longest = scoring.max_new_tokens
    if longest is None:
        longest = _TOKENS_SAFE if "safe" in make_judge(scoring.judge).measures else _TOKENS_REFUSED
    judge, translate = scoring.judge, scoring.judge.translator
    if translate is not None:
        judge = judge.model_copy(update={"translate": translate.for_texts_of(longest)})
    return scoring.model_copy(update={"max_new_tokens": longest, "judge": judge})


def with_judge_models(scoring: ScoringT, before: JudgeSettings | None = None) -> ScoringT:
    """`scoring` whose judge and translator, where they are models of the hub, are named with their commits.

    Args:
        scoring: the settings.
        before: the judge with which the same score began; of a name that is the same its commit is kept.

    Raises:
        HubError: the hub has no such model or revision, or cannot say which commit that is.
    """

    def pinned(model: str, known: str | None) -> str:
        return known if known is not None and without_commit(known) == model else pinned_model(model)

    judge, changes = scoring.judge, dict[str, Any]()
    was = before if before is not None and before.name == judge.name else None
    if isinstance(model := getattr(judge, "model", None), str):
        changes["model"] = pinned(model, getattr(was, "model", None))
    if (translate := judge.translator) is not None and translate.model is not None:
        known = None if was is None or was.translator is None else was.translator.model
        changes["translate"] = translate.model_copy(update={"model": pinned(translate.model, known)})
    return scoring.model_copy(update={"judge": judge.model_copy(update=changes)})


def with_dtypes(scoring: ScoringT, *, gpu: bool, before: ScoringSection | None = None) -> ScoringT:
    """`scoring` with `dtype: auto` decided for every engine: the policy's, the judge's and the translator's.

    Args:
        gpu: whether the engines run on GPUs.
        before: settings with which the same score began; what was decided then is kept where `auto` is set now.

    Raises:
        ClusterError: a node did not answer.
    """
    engine = _decided(scoring.engine, None if before is None else before.engine, gpu=gpu)
    judge = judge_with_dtypes(scoring.judge, gpu=gpu, before=None if before is None else before.judge)
    return scoring.model_copy(update={"engine": engine, "judge": judge})


def judge_with_dtypes(judge: JudgeSettings, *, gpu: bool, before: JudgeSettings | None = None) -> JudgeSettings:
    """The same for a judge alone: its engine, and that of `translate.model`."""
    same = before if before is not None and before.name == judge.name else None
    changes: dict[str, Any] = {}
    if isinstance(engine := getattr(judge, "engine", None), EngineSection):
        changes["engine"] = _decided(engine, getattr(same, "engine", None), gpu=gpu)
    if (translate := judge.translator) is not None and translate.model is not None:
        was = None if same is None or same.translator is None else same.translator.engine
        decided = _decided(translate.engine, was, gpu=gpu)
        changes["translate"] = translate.model_copy(update={"engine": decided})
    return judge.model_copy(update=changes)


def _decided(engine: EngineSection, before: EngineSection | None, *, gpu: bool) -> EngineSection:
    if engine.dtype == "auto" and before is not None:
        engine = engine.model_copy(update={"dtype": before.dtype})
    return with_dtype(engine, gpu=gpu)


def places(scoring: ScoringSection, device: Device, *, in_turn: bool = False) -> list[tuple[float, float]]:
    """(CPUs, GPUs) of everything that a score can need at once, known before languages and prompts are."""
    judge = make_judge(scoring.judge)
    parts = [Part("answering", Generator, {}, scoring.engine, in_turn=in_turn)]
    if judge.runs != "prompts":
        parts.append(Part("judging", JudgeStage, {}, judge.engine))
    if (translate := judge.settings.translator) is not None:
        own = translate.engine if translate.model is not None else None
        parts.append(Part("translating", TranslateStage, {}, own))
    return [place for part in parts for place in part.places(device)]
