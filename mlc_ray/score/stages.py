"""The stages of a score after generation, which `generate.pool` runs: translation, and judges.

A score is up to three stages, each with engines of its own; each adds its columns to the row of a prompt:

    answer      `PROMPTS` -> `ANSWERS` (`generate.stage.Generator`), or verdicts at once
    translate   only if asked for: `TRANSLATED`, prompt and response in English
    judge       `VERDICTS`

This module imports neither Ray nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, cast

import pyarrow as pa

from mlc_ray.config import ChatSection, EngineSection, JudgeSettings, TranslateSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.client import ChatEndpoint
from mlc_ray.generate.engine import PROMPT_TOO_LONG, Device, Engine, Warm
from mlc_ray.generate.stage import ANSWERS, PROMPTS, Stage
from mlc_ray.generate.translate import (
    TranslatedAnswer,
    make_translator,
    translate_answers,
    translated_answers,
)
from mlc_ray.judges.base import Judge, PromptJudge, make_judge, make_reader
from mlc_ray.judges.degenerate import settle
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.storage import Place, user_cache, write_json_atomic
from mlc_ray.types import (
    FORBIDDEN_THOUGHTS,
    UNFINISHED_THOUGHTS,
    Answer,
    Kind,
    Measure,
    Verdict,
    Via,
)

NOT_GENERATED = "not_generated"
"""Finish reason where the judge needs no response."""

NO_ANSWER = {
    PROMPT_TOO_LONG: "the prompt was too long for engine.max_model_len; it was not sent",
    UNFINISHED_THOUGHTS: "its thoughts did not end within max_new_tokens, so there is no answer",
    FORBIDDEN_THOUGHTS: "it begins with thoughts, which asking.reasoning=forbid was to turn off",
}
"""Finish reasons of rows without an answer to judge, and what is said of them: they count as unparsed."""
_TEXT = pa.string()
VERDICTS = pa.schema(
    {
        "behaviour": _TEXT, "safety": _TEXT, "reason": _TEXT, "categories": pa.list_(_TEXT), "margin": pa.float64(),
        "via_refused": _TEXT, "via_safe": _TEXT,
    }
)  # fmt: skip
"""A verdict, and how the judge behind each measure came to read its language; null where no judge gives a measure."""
TRANSLATED = pa.schema({"prompt_en": _TEXT, "response_en": _TEXT, "translation_fault": _TEXT})
"""Null where nothing was to be translated; `translation_fault` says why a translation failed."""
RESPONSES = pa.schema([*PROMPTS, *ANSWERS])
"""A prompt and its answer."""
JUDGED = pa.schema([*RESPONSES, *VERDICTS])


class PromptJudgeStage(Stage):
    """`PROMPTS` -> `ANSWERS` (empty responses) and `VERDICTS`: for judges that need no response."""

    columns = pa.schema([*ANSWERS, *VERDICTS])

    def __init__(
        self,
        model: str,
        settings: EngineSection,
        *,
        judge: JudgeSettings,
        chat: ChatSection,
        device: Device,
        ways: Mapping[str, Via],
        warm: Warm | None = None,
    ) -> None:
        made = make_judge(judge)
        assert isinstance(made, PromptJudge)
        self.judge, self.settings, self.chat, self.device, self.ways = made, settings, chat, device, ways
        self.engine: Engine = Engine(model, settings, device=device, warm=warm)
        self.read_tokenizer(model)

    def read_tokenizer(self, model: str) -> None:
        """Have the judge's texts tokenised by `model`'s own tokenizer."""
        self.scorer = self.judge.scorer(model, self.settings, chat=self.chat, device=self.device, shared=self.engine)

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """A verdict per prompt."""
        languages = table["language"].to_pylist()
        verdicts = self.scorer.score(table["prompt"].to_pylist(), languages)
        return [
            {"response": "", "finish": NOT_GENERATED, "prompt_tokens": None, "response_tokens": 0,
             **_verdict_row(verdict, dict.fromkeys(self.judge.measures, self.ways[code]))}
            for verdict, code in zip(verdicts, languages, strict=True)
        ]  # fmt: skip

    def close(self) -> None:
        """Free the engine's memory."""
        self.engine.close()


class Asking:
    """What a stage keeps of the endpoint that its judge or translator asks; nothing for one that asks none."""

    def __init__(self, asker: Any, usage_file: str | None, replies_file: str | None) -> None:
        self._chat: ChatEndpoint | None = getattr(asker, "chat", None)
        self._usage_file = usage_file
        self._replies = None if replies_file is None else Place(replies_file)
        if self._chat is not None and self._replies is not None:
            self._chat.cache.restore(self._replies)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Write what the questions of the block did and cost, and after an error, which ends the stage, the replies."""
        try:
            yield
        except MlcRayError:
            self.publish()
            raise
        finally:
            if self._chat is not None and self._usage_file is not None:
                write_json_atomic(self._usage_file, asdict(self._chat.usage))

    def publish(self) -> None:
        """Add the replies to their file."""
        if self._chat is not None and self._replies is not None:
            self._chat.cache.publish(self._replies)


class TranslateStage(Stage):
    """`RESPONSES` -> `TRANSLATED`: English prompts and responses for the languages read by translation.

    The translator is a model in an engine, or an endpoint. What that did and cost is written to `usage_file`; its
    replies are taken from `replies_file` and added to it.
    """

    columns = TRANSLATED

    def __init__(
        self,
        settings: TranslateSection,
        *,
        device: Device,
        ways: Mapping[str, Via],
        usage_file: str | None = None,
        replies_file: str | None = None,
    ) -> None:
        self.ways = ways
        self.translator = make_translator(settings, device, user_cache())
        self.asking = Asking(self.translator, usage_file, replies_file)

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """Translate prompts and non-blank responses of the rows that need it."""
        wanted = [index for index, code in enumerate(table["language"].to_pylist()) if self.ways[code] == "translated"]
        with self.asking.noted():
            done = translate_answers(self.translator, answers_of(table.take(wanted)))
        rows: list[dict[str, Any]] = [{} for _ in range(len(table))]
        for index, english in zip(wanted, done, strict=True):
            rows[index] = {
                "prompt_en": english.prompt,
                "response_en": english.response,
                "translation_fault": english.fault or None,
            }
        return rows

    def close(self) -> None:
        """Free the memory of an engine, or publish an endpoint's replies."""
        self.asking.publish()
        _close(self.translator)


class JudgeStage(Stage):
    """`RESPONSES`, with `TRANSLATED` where something was, -> `VERDICTS`.

    A judge that does not say whether a response refuses is joined by the phrase judge, because without the refusal rate
    of benign prompts a score means nothing: `phrase_ways` is how the phrase judge reads each language, None if it is
    not needed. Then degenerate answers are told apart (`degenerate.settle`). What an endpoint did and cost is written
    to `usage_file`; its replies are taken from `replies_file` and added to it.
    """

    columns = VERDICTS

    def __init__(
        self,
        settings: JudgeSettings,
        *,
        device: Device,
        ways: Mapping[str, Via],
        phrase_ways: Mapping[str, Via] | None,
        usage_file: str | None = None,
        replies_file: str | None = None,
    ) -> None:
        judge = make_reader(settings)
        judge.start(device, user_cache())
        self.asking = Asking(judge, usage_file, replies_file)
        self.judges: list[tuple[Judge, Mapping[str, Via]]] = [(judge, ways)]
        if phrase_ways is not None:
            self.judges.append((RefusalJudge(), phrase_ways))

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """A verdict per response."""
        answers = answers_of(table)
        english = _translations(table)
        verdicts = [Verdict() for _ in answers]
        with self.asking.noted():
            for judge, ways in self.judges:
                given = _verdicts(judge, ways, answers, english)
                verdicts = [_joined(a, b) for a, b in zip(verdicts, given, strict=True)]
        return [
            _verdict_row(settle(verdict, answer), _read_by(self.judges, answer.language))
            for verdict, answer in zip(verdicts, answers, strict=True)
        ]

    def close(self) -> None:
        """Free the memory of a guard's engine, or publish an endpoint's replies."""
        self.asking.publish()
        for judge, _ in self.judges:
            _close(judge)


def answers_of(table: pa.Table) -> list[Answer]:
    """The rows of a table of `RESPONSES` as judges take them."""
    columns = (table[name].to_pylist() for name in ("prompt", "response", "language", "kind", "finish"))
    return [
        Answer(prompt, response, code, cast(Kind, kind), finish)
        for prompt, response, code, kind, finish in zip(*columns, strict=True)
    ]


def _translations(table: pa.Table) -> list[TranslatedAnswer]:
    """The translation of each row; empty where there was no translator, because no language needs one."""
    if not set(TRANSLATED.names) <= set(table.column_names):
        return []
    columns = (table[name].to_pylist() for name in TRANSLATED.names)
    return [TranslatedAnswer(prompt, response, fault or "") for prompt, response, fault in zip(*columns, strict=True)]


def _close(user: Any) -> None:
    """Free the engine of a judge or translator that has one."""
    if (close := getattr(user, "close", None)) is not None:
        close()


def _verdicts(
    judge: Judge, ways: Mapping[str, Via], answers: Sequence[Answer], english: Sequence[TranslatedAnswer]
) -> list[Verdict]:
    """The judge's verdict on each answer; what was never sent or not translated is `unparsed`, unasked."""
    read = [english[index] if ways[answer.language] == "translated" else None for index, answer in enumerate(answers)]
    asked = translated_answers(answers, read, judge.measures)
    given = iter(judge.judge([a for a in asked if isinstance(a, Answer) and a.finish not in NO_ANSWER]))
    found = []
    for answer, item in zip(answers, asked, strict=True):
        if answer.finish in NO_ANSWER:
            found.append(judge.unparsed(NO_ANSWER[answer.finish]))
        else:
            found.append(item if isinstance(item, Verdict) else next(given))
    return found


def _joined(first: Verdict, second: Verdict) -> Verdict:
    """Both verdicts in one: what the first does not say, the second does."""
    return replace(
        first,
        behaviour=first.behaviour if first.behaviour is not None else second.behaviour,
        safety=first.safety if first.safety is not None else second.safety,
        categories=first.categories or second.categories,
        margin=first.margin if first.margin is not None else second.margin,
        reason="; ".join(reason for reason in (first.reason, second.reason) if reason),
    )


def _read_by(judges: Sequence[tuple[Judge, Mapping[str, Via]]], language: str) -> dict[Measure, Via]:
    """How each measure's judge, the first that answers it as in `_joined`, reads `language`."""
    return {measure: ways[language] for judge, ways in reversed(judges) for measure in judge.measures}


def _verdict_row(verdict: Verdict, via: Mapping[Measure, Via]) -> dict[str, Any]:
    return {
        "behaviour": verdict.behaviour,
        "safety": verdict.safety,
        "reason": verdict.reason,
        "categories": list(verdict.categories),
        "margin": verdict.margin,
        "via_refused": via.get("refused"),
        "via_safe": via.get("safe"),
    }
