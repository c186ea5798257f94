"""Which stages a score has and where each runs: the same `Part`s for `mlc-ray score`, which opens and closes those that
cannot be up at once one after another (`side_by_side`), and for a search, which keeps them open."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import pyarrow as pa

from mlc_ray.capacity import Need
from mlc_ray.cluster import fits, how_many_fit, with_dtype
from mlc_ray.config import (
    EngineSection,
    JudgeSettings,
    ReadingJudgeSettings,
    ScoringSection,
    TranslateSection,
)
from mlc_ray.generate.engine import Device, Warm
from mlc_ray.generate.replica import Part, place_of
from mlc_ray.generate.stage import Generator
from mlc_ray.judges.base import BaseJudge, Policy, make_judge
from mlc_ray.judges.panel import PanelJudge, Reader, phrases_beside, readers_of, told
from mlc_ray.runs import chat_of, training_chat
from mlc_ray.score.stages import JudgeStage, PromptJudgeStage, TranslateStage
from mlc_ray.storage import Place, pinned_model, without_commit
from mlc_ray.types import Kind, Measure, Via

logger = logging.getLogger(__name__)
USAGE_SUFFIX = "_usage.json"
_TOKENS_REFUSED, _TOKENS_SAFE = 64, 1024
_LIGHT_ROWS = 4096  # of a judge without an engine: fewer are read sooner than another process starts
_LIGHT_ACTORS = 4


ScoringT = TypeVar("ScoringT", bound=ScoringSection)


@dataclass(frozen=True)
class Judging:
    """The judge of a score, and who of it reads what (`judges.panel.Reader`).

    `ways` is how a judge that reads the policy itself reads each language; such a judge has no readers.
    """

    judge: BaseJudge
    readers: Sequence[Reader]
    ways: Mapping[str, Via]

    @property
    def identity(self) -> str:
        """Names all that verdicts depend on: the judge's, and that of the phrase judge where it joins."""
        joined = phrases_beside(self.judge)
        return self.judge.identity if joined is None else f"{self.judge.identity} with {joined.identity}"

    @property
    def measured_by(self) -> dict[Measure, str]:
        """Who is behind each measure: a judge's name, or several and what each of them judges."""
        if not self.readers:
            return dict.fromkeys(self.judge.measures, self.judge.name)
        return {measure: text for measure in get_args(Measure) if (text := told(self.readers, measure))}

    @property
    def translated(self) -> dict[str, Via] | None:
        """How each language is read, "translated" if any judge needs it; None where nothing is translated."""
        ways: dict[str, Via] = {}
        for reader in self.readers:
            for (_, code), cell in reader.cells.items():
                if "translated" in cell.values():
                    ways[code] = "translated"
                ways.setdefault(code, "")
        return ways if "translated" in ways.values() else None


def plan_judging(judge: BaseJudge, prompts: pa.Table) -> Judging:
    """Who judges, and how each language is read; before anything is generated.

    Args:
        prompts: what is asked, with the columns `kind` and `language`.

    Raises:
        UncoveredLanguageError: no judge may be asked about a language.
        JudgeError: a panel leaves a side unjudged.
    """
    cells = prompts.select(["kind", "language"]).group_by(["kind", "language"]).aggregate([]).to_pylist()
    asked: list[tuple[Kind, str]] = sorted((cell["kind"], cell["language"]) for cell in cells)
    ways = judge.coverage({code for _, code in asked}) if judge.runs == "prompts" else {}
    return Judging(judge, readers_of(judge, asked), ways)


def fitted(
    judge: BaseJudge, prompts: Mapping[str, Sequence[str]], scoring: ScoringSection, model: str
) -> JudgeSettings:
    """The settings to judge by, once it is sure that the judge can read all that `model` may write to these prompts.

    Raises:
        MlcRayError: it cannot; the message has the numbers and the fix.
    """
    if judge.runs == "prompts":
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
        return Part("judging", PromptJudgeStage, settings, counted(scoring.engine, device), in_turn=in_turn)
    assert scoring.max_new_tokens is not None, "decided by now (with_longest_answer)"
    settings |= {"max_new_tokens": scoring.max_new_tokens, "asking": scoring.asking}
    return Part("answering", Generator, settings, counted(scoring.engine, device), in_turn=in_turn)


def reading(judging: Judging, device: Device, *, rows: int, usage: Path, replies: Place) -> dict[str, Part]:
    """What reads responses, in order: `translate` if a language needs it, and `judge`.

    A panel whose judges need engines or endpoints of their own has `judge`, `judge-2`, ..., one for each; its judges
    that need neither are in the last one. Nothing reads for a judge that reads the policy itself.

    Args:
        rows: number of responses, by which the actors of a judge without an engine are counted.
        usage: folder for the files that say what an endpoint did and cost.
        replies: the file of an endpoint's replies, which it starts from and adds to.
    """
    if not judging.readers:
        return {}

    def common(name: str) -> dict[str, Any]:
        return {"device": device, "usage_file": str(usage / usage_file(name)), "replies_file": str(replies)}

    parts = {}
    translate = judging.judge.settings.translator
    if translate is not None and judging.translated is not None:
        parts["translate"] = _translating(translate, judging.translated, device, common("translate"))
    stages = _stages(judging.readers)
    columns = [f"verdict_{number}" for number in range(1, len(stages))]
    for number, (readers, column) in enumerate(zip(stages, [*columns, None], strict=True)):
        settings = {
            "readers": [(reader.name, reader.judge.settings, reader.cells) for reader in readers],
            "column": column,
            "earlier": columns if column is None else (),
        }
        # An endpoint's cache and its cost cap are one.
        own = readers[0].judge
        light = 1 if own.runs == "service" else min(_LIGHT_ACTORS, math.ceil(rows / _LIGHT_ROWS))
        name = "judge" if number == 0 else f"judge-{number + 1}"
        parts[name] = Part(
            "judging",
            JudgeStage,
            {**settings, **common(name)},
            None if own.engine is None else counted(own.engine, device),
            actors=light,
            once=own.runs == "service",
        )
    return parts


def _translating(
    translate: TranslateSection, ways: Mapping[str, Via], device: Device, common: Mapping[str, Any]
) -> Part:
    return Part(
        "translating",
        TranslateStage,
        {"settings": translate, "ways": ways, **common},
        counted(translate.engine, device) if translate.model is not None else None,
        once=translate.endpoint is not None,
    )


def side_by_side(parts: Sequence[Part], device: Device, *, is_open: bool) -> list[list[Part]]:
    """Which parts work at once; each group follows the one before it, whose engines have ended by then.

    A part joins those before it if the nodes hold all of them at once. On CPU two engines never do: CPUs are reserved,
    but not the memory, which one engine alone may fill. Neither does one join engines that work in turn with training,
    of whose GPU Ray knows nothing.

    Args:
        parts: in order.
        device: of the engines.
        is_open: the engines of the first part are up, and stay up.
    """
    groups: list[list[Part]] = []
    held = parts[0].places(device) if is_open else []
    for part in parts:
        group = groups[-1] if groups else []
        engines = [each for each in (*group, *([parts[0]] if is_open else [])) if each.engine is not None]
        apart = part.engine is not None and engines and (device == "cpu" or any(each.in_turn for each in engines))
        new = [each for each in (*group, part) if not (is_open and each is parts[0])]
        if group and not apart and fits([*held, *(place for each in new for place in each.places(device))]):
            group.append(part)
        else:
            groups.append([part])
    return groups


def _stages(readers: Sequence[Reader]) -> list[list[Reader]]:
    """The readers of each stage: one that needs an engine or an endpoint comes first in a stage of its own."""
    own = [[reader] for reader in readers if reader.judge.runs != "inline"]
    inline = [reader for reader in readers if reader.judge.runs == "inline"]
    if not own:
        return [inline]
    return [*own[:-1], [*own[-1], *inline]]


def usage_file(name: str) -> str:
    """The file that says what the endpoint of a part of `reading` did and cost."""
    return f"{name}{USAGE_SUFFIX}"


def read_usage(folder: Path) -> dict[str, Any]:
    """What those files in a folder say, by the names of the parts."""
    files = sorted(folder.glob(f"*{USAGE_SUFFIX}"))
    return {file.name.removesuffix(USAGE_SUFFIX): json.loads(file.read_text(encoding="utf-8")) for file in files}


def counted(engine: EngineSection, device: Device) -> EngineSection:
    """`engine` with `replicas: auto` decided by the nodes that there are."""
    if engine.replicas != "auto":
        return engine
    return engine.model_copy(update={"replicas": how_many_fit(place_of(engine, device))})


def with_chat(scoring: ScoringT, model: str) -> ScoringT:
    """`scoring` with the conversation that prompts stand in: if it says none, the one that `model` was trained in.

    Args:
        model: as the user named it: a run, a checkpoint of it, an exported model, or another model.

    Raises:
        ModelPathError: what describes the model is damaged.
    """
    chat = chat_of(scoring.chat, model)
    if scoring.chat is not None and (trained := training_chat(model)) not in (None, chat):
        logger.warning("%s was trained with chat=%r, and is scored with chat=%r", model, trained, chat)
    return scoring.model_copy(update={"chat": chat})


def with_longest_answer(scoring: ScoringT) -> ScoringT:
    """`scoring` with `max_new_tokens` decided: a refusal shows in the first words, harm perhaps only at the end.

    How much a translator may write follows from it where the settings do not say it.
    """
    longest, read = scoring.max_new_tokens, make_judge(scoring.judge)
    if read.runs == "prompts":
        return scoring  # nothing is answered
    if longest is None:
        longest = _TOKENS_SAFE if "safe" in read.measures else _TOKENS_REFUSED
    judge, translate = scoring.judge, scoring.judge.translator
    if translate is not None:
        judge = judge.model_copy(update={"translate": translate.for_texts_of(longest)})
    return scoring.model_copy(update={"max_new_tokens": longest, "judge": judge})


def with_judge_models(scoring: ScoringT, before: JudgeSettings | None = None) -> ScoringT:
    """`scoring` whose judges and translator, where they are models of the hub, are named with their commits.

    Args:
        scoring: the settings.
        before: the judge with which the same score began; of a name that is the same its commit is kept.

    Raises:
        HubError: the hub has no such model or revision, or cannot say which commit that is.
    """
    return scoring.model_copy(update={"judge": judge_at_commits(scoring.judge, before)})


def judge_at_commits(judge: JudgeSettings, before: JudgeSettings | None = None) -> JudgeSettings:
    """The same for a judge alone, or a panel."""
    return _at_commits(judge, before) if _asks_models(judge) else judge


def _asks_models(judge: JudgeSettings) -> bool:
    """Whether a judge, its translator or a judge of its panel may be a model."""
    own = isinstance(judge, PanelJudge.Settings) or judge.translator is not None
    return own or any(hasattr(judge, name) for name in ("model", "engine"))


def _at_commits(judge: JudgeSettings, before: JudgeSettings | None) -> JudgeSettings:
    def pinned(model: str, known: str | None) -> str:
        return known if known is not None and without_commit(known) == model else pinned_model(model)

    same, changes = _same(before, judge), dict[str, Any]()
    if isinstance(model := getattr(judge, "model", None), str):
        changes["model"] = pinned(model, getattr(same, "model", None))
    if (translate := judge.translator) is not None and translate.model is not None:
        known = None if same is None or same.translator is None else same.translator.model
        changes["translate"] = translate.model_copy(update={"model": pinned(translate.model, known)})
    return _of_members(judge.model_copy(update=changes), same, judge_at_commits)


def commits_of(given: JudgeSettings, pinned: JudgeSettings) -> dict[str, str]:
    """What each name of the hub in `given` stands for in `pinned`, which `judge_at_commits` made of it."""
    pairs = zip(_models(given), _models(pinned), strict=True)
    return {one: other for one, other in pairs if one != other}


def _models(judge: JudgeSettings) -> list[str]:
    """The models of a judge, its translator, and for a panel of all its judges."""
    translate = judge.translator
    own = [getattr(judge, "model", None), None if translate is None else translate.model]
    members = judge.judges if isinstance(judge, PanelJudge.Settings) else []
    return [*(model for model in own if isinstance(model, str)), *(m for each in members for m in _models(each.judge))]


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
    """The same for a judge alone: its engine, and that of `translate.model`; for a panel, those of all its judges."""
    return _with_dtypes(judge, before, gpu=gpu) if _asks_models(judge) else judge


def _with_dtypes(judge: JudgeSettings, before: JudgeSettings | None, *, gpu: bool) -> JudgeSettings:
    same, changes = _same(before, judge), dict[str, Any]()
    if isinstance(engine := getattr(judge, "engine", None), EngineSection):
        changes["engine"] = _decided(engine, getattr(same, "engine", None), gpu=gpu)
    if (translate := judge.translator) is not None and translate.model is not None:
        was = None if same is None or same.translator is None else same.translator.engine
        decided = _decided(translate.engine, was, gpu=gpu)
        changes["translate"] = translate.model_copy(update={"engine": decided})
    return _of_members(
        judge.model_copy(update=changes), same, lambda member, was: judge_with_dtypes(member, gpu=gpu, before=was)
    )


def _same(before: JudgeSettings | None, judge: JudgeSettings) -> JudgeSettings | None:
    """The settings that a score began with, where they are those of the same judge."""
    return before if before is not None and before.name == judge.name else None


def _of_members(
    judge: JudgeSettings,
    before: JudgeSettings | None,
    change: Callable[[ReadingJudgeSettings, JudgeSettings | None], JudgeSettings],
) -> JudgeSettings:
    """A panel whose judges are changed, each given what it was in `before`; any other judge as it is."""
    if not isinstance(judge, PanelJudge.Settings):
        return judge
    known: Sequence[JudgeSettings | None] = [None] * len(judge.judges)
    if isinstance(before, PanelJudge.Settings) and len(before.judges) == len(judge.judges):
        known = [member.judge for member in before.judges]
    judges = [
        member.model_copy(update={"judge": change(member.judge, was)})
        for member, was in zip(judge.judges, known, strict=True)
    ]
    return judge.model_copy(update={"judges": judges})


_OF_ONE_DEVICE = {True: ("cpu_kv_cache_gib",), False: ("gpu_memory_utilization", "enforce_eager", "tensor_parallel")}
"""Settings of an engine that are not read on GPUs, and on CPUs."""


def _decided(engine: EngineSection, before: EngineSection | None, *, gpu: bool) -> EngineSection:
    for name in _OF_ONE_DEVICE[gpu]:
        if name in engine.model_fields_set:
            where = "GPUs" if gpu else "CPUs"
            logger.warning("engine.%s=%r is not read where engines run on %s", name, getattr(engine, name), where)
    if engine.dtype == "auto" and before is not None:
        engine = engine.model_copy(update={"dtype": before.dtype})
    return with_dtype(engine, gpu=gpu)


def places(scoring: ScoringSection, device: Device, *, in_turn: bool = False) -> list[Need]:
    """(CPUs, GPUs) of everything that a score can need at once, known before languages and prompts are."""
    judge = make_judge(scoring.judge)
    parts = [Part("answering", Generator, {}, counted(scoring.engine, device), in_turn=in_turn)]
    judges = [member.judge for member in judge.members] if isinstance(judge, PanelJudge) else [judge]
    own = [each for each in judges if each.runs in ("engine", "service")]
    if judge.runs != "prompts":
        engines = [None if each.engine is None else counted(each.engine, device) for each in own or judges[:1]]
        parts += [Part("judging", JudgeStage, {}, engine) for engine in engines]
    if (translate := judge.settings.translator) is not None:
        engine = counted(translate.engine, device) if translate.model is not None else None
        parts.append(Part("translating", TranslateStage, {}, engine))
    return [place for part in parts for place in part.places(device)]
