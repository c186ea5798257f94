"""The stages of a score after generation, which `generate.pool` runs: translation, and judges.

A score is up to three stages, each with engines of its own; each adds its columns to the row of a prompt:

    answer      `PROMPTS` -> `ANSWERS` (`generate.stage.Generator`), or verdicts at once
    translate   only if asked for: `TRANSLATED`, prompt and response in English
    judge       `VERDICTS`

This module imports neither Ray nor torch.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, cast

import pyarrow as pa

from mlc_ray.config import ChatSection, EngineSection, JudgeSettings, TranslateSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.client import ChatEndpoint
from mlc_ray.generate.engine import PROMPT_TOO_LONG, Device, Engine, Warm
from mlc_ray.generate.stage import ANSWERS, PROMPTS, Stage, no_answer
from mlc_ray.generate.translate import (
    TranslatedAnswer,
    make_translator,
    translate_answers,
    translated_answers,
)
from mlc_ray.judges.base import Judge, JudgeFaultError, PromptJudge, make_judge, make_reader, unparsed
from mlc_ray.judges.degenerate import settle
from mlc_ray.judges.panel import Cells, Reader
from mlc_ray.logs import LOG_FILE
from mlc_ray.storage import Place, user_cache, write_json_atomic
from mlc_ray.types import (
    ENGINE_FAULT,
    FORBIDDEN_THOUGHTS,
    UNFINISHED_THOUGHTS,
    Answer,
    Kind,
    Measure,
    Verdict,
    Via,
)

logger = logging.getLogger(__name__)

NOT_GENERATED = "not_generated"
"""Finish reason where the judge needs no response."""

NO_ANSWER = {
    PROMPT_TOO_LONG: "the prompt was too long for engine.max_model_len; it was not sent",
    ENGINE_FAULT: "engines fail on the prompt, as `fault` says; it has no answer",
    UNFINISHED_THOUGHTS: "its thoughts did not end within max_new_tokens, so there is no answer",
    FORBIDDEN_THOUGHTS: "it begins with thoughts, which asking.reasoning=forbid was to turn off",
}
"""Finish reasons of rows without an answer to judge, and what is said of them: they count as unparsed."""
_PUBLISH_SHARE = 0.05  # of an asker's time at most goes into publishing, which writes all replies anew
_TEXT = pa.string()
VERDICTS = pa.schema(
    {
        "behaviour": _TEXT, "safety": _TEXT, "reason": _TEXT, "categories": pa.list_(_TEXT), "margin": pa.float64(),
        "via_refused": _TEXT, "via_safe": _TEXT, "judge_refused": _TEXT, "judge_safe": _TEXT, "judge_fault": _TEXT,
    }
)  # fmt: skip
"""A verdict, which judge gave it by each measure and how that came to read its language; null where none does.

`judge_fault` says why a judge or its translator gave none (engines failed, an endpoint was out), or is null."""
TRANSLATED = pa.schema(dict.fromkeys(("prompt_en", "response_en", "translation_fault", "translator_fault"), _TEXT))
"""Null where nothing was to be translated; the faults say why there is none, and that a translator was out."""
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
             **_verdict_row(verdict, dict.fromkeys(self.judge.measures, self.ways[code]), self.judge.name)}
            for verdict, code in zip(verdicts, languages, strict=True)
        ]  # fmt: skip

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **settings: Any) -> list[dict[str, Any]]:
        """No verdict."""
        made = make_judge(settings["judge"])
        verdict, ways = unparsed(made.measures, fault), settings["ways"]
        return [
            {**no_answer(fault), **_verdict_row(verdict, dict.fromkeys(made.measures, ways[code]), made.name)}
            for code in table["language"].to_pylist()
        ]

    def close(self) -> None:
        """Free the engine's memory."""
        self.engine.close()


class Asking:
    """What a stage keeps of the endpoint that its judge or translator asks; nothing for one that asks none."""

    def __init__(self, asker: Any, usage_file: str | None, replies_file: str | None) -> None:
        self._chat: ChatEndpoint | None = getattr(asker, "chat", None)
        self._usage_file = usage_file
        self._replies, self._due = None if replies_file is None else Place(replies_file), 0.0
        if self._chat is not None and self._replies is not None:
            self._chat.cache.restore(self._replies)

    def noted(self) -> AbstractContextManager[None]:
        """Write what the questions of the block did and cost, and the replies where other nodes find them."""
        return nullcontext() if self._chat is None else self._noted(self._chat)

    @contextmanager
    def _noted(self, chat: ChatEndpoint) -> Iterator[None]:
        try:
            yield
            if time.monotonic() >= self._due:
                self._try_to_publish()
        except MlcRayError:
            self.publish()
            raise
        finally:
            if self._usage_file is not None:
                write_json_atomic(self._usage_file, asdict(chat.usage))

    def publish(self) -> None:
        """Add the replies to their file."""
        if self._chat is not None and self._replies is not None:
            self._chat.cache.publish(self._replies)

    def _try_to_publish(self) -> None:
        began = time.monotonic()
        try:
            self.publish()
        except OSError as error:  # of a store that is away for a while; this node has them too
            logger.warning("the endpoint's replies could not be published yet: %s", error)
        self._due = time.monotonic() + (time.monotonic() - began) / _PUBLISH_SHARE


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
            done = translate_answers(self.translator, answers_of(table.take(pa.array(wanted, pa.int64()))))
        rows: list[dict[str, Any]] = [{} for _ in range(len(table))]
        for index, english in zip(wanted, done, strict=True):
            texts = (english.prompt, english.response, english.fault or None, english.outage)
            rows[index] = dict(zip(TRANSLATED.names, texts, strict=True))
        return rows

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **settings: Any) -> list[dict[str, Any]]:
        """No translation."""
        ways, failed = settings["ways"], dict.fromkeys(("translation_fault", "translator_fault"), fault)
        return [failed if ways[code] == "translated" else {} for code in table["language"].to_pylist()]

    def close(self) -> None:
        """Free the memory of an engine, or publish an endpoint's replies."""
        self.asking.publish()
        _close(self.translator)


class JudgeStage(Stage):
    """`RESPONSES`, with `TRANSLATED` where something was, -> `VERDICTS`.

    Each of `readers` judges the responses that it is asked about, by the measures that it is asked for. A score whose
    judges need engines or endpoints of their own has a stage for each: all but the last give one column `column` with
    what `VERDICTS` holds, and the last takes these (`earlier`) into its verdicts. Then degenerate answers are told
    apart (`degenerate.settle`). What the endpoint of the first reader did and cost is written to `usage_file`; its
    replies are taken from `replies_file` and added to it.
    """

    def __init__(
        self,
        readers: Sequence[tuple[str, JudgeSettings, Cells]],
        *,
        device: Device,
        column: str | None = None,
        earlier: Sequence[str] = (),
        usage_file: str | None = None,
        replies_file: str | None = None,
    ) -> None:
        self.readers: list[Reader] = []
        for name, settings, cells in readers:
            judge = make_reader(settings)
            assert isinstance(judge, Judge)
            judge.start(device, user_cache())
            self.readers.append(Reader(name, judge, cells))
        self.asking = Asking(self.readers[0].judge, usage_file, replies_file)
        self.column, self.earlier = column, earlier
        self.columns = self.adds(column=column)

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """A verdict per response."""
        answers = answers_of(table)
        english = _translations(table)
        found = [table[name].to_pylist() for name in self.earlier]
        with self.asking.noted():
            found += [_read(reader, table, answers, english) for reader in self.readers]
        joined = [_joined(rows) for rows in zip(*found, strict=True)]
        if self.column is not None:
            return [{self.column: row} for row in joined]
        return [_settled(row, answer) for row, answer in zip(joined, answers, strict=True)]

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **settings: Any) -> list[dict[str, Any]]:
        """No verdict by any of the stage's readers: one side alone would say that the other is known."""
        rows = []
        column, earlier = settings["column"], [table[name].to_pylist() for name in settings["earlier"]]
        for index, answer in enumerate(answers_of(table)):
            found = [given[index] for given in earlier]
            for name, _, cells in settings["readers"]:
                ways = cells.get((answer.kind, answer.language), {})
                row = _verdict_row(unparsed([*ways], fault if ways else ""), ways, name)
                found.append({**row, "judge_fault": fault if ways else None})
            rows.append({column: _joined(found)} if column is not None else _settled(_joined(found), answer))
        return rows

    @classmethod
    def adds(cls, **settings: Any) -> pa.Schema:
        """`VERDICTS`, or a column that holds what it says."""
        column = settings["column"]
        return VERDICTS if column is None else pa.schema({column: pa.struct(list(VERDICTS))})

    def close(self) -> None:
        """Free the memory of a guard's engine, or publish an endpoint's replies."""
        self.asking.publish()
        for reader in self.readers:
            _close(reader.judge)


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
    return [TranslatedAnswer(one, other, fault or "", lost) for one, other, fault, lost in zip(*columns, strict=True)]


def _close(user: Any) -> None:
    """Free the engine of a judge or translator that has one."""
    if (close := getattr(user, "close", None)) is not None:
        close()


def _read(
    reader: Reader, table: pa.Table, answers: Sequence[Answer], english: Sequence[TranslatedAnswer]
) -> list[dict[str, Any]]:
    """The reader's verdicts as rows of `VERDICTS`; empty ones for answers that it is not asked about.

    What was never sent or not translated is `unparsed`, unasked.
    """
    rows: list[dict[str, Any]] = [dict.fromkeys(VERDICTS.names) for _ in answers]
    mine = [index for index, answer in enumerate(answers) if (answer.kind, answer.language) in reader.cells]
    own = [answers[index] for index in mine]
    ways = [reader.cells[answer.kind, answer.language] for answer in own]
    read = [english[index] if "translated" in way.values() else None for index, way in zip(mine, ways, strict=True)]
    asked = [
        reader.judge.unparsed(NO_ANSWER[answer.finish]) if answer.finish in NO_ANSWER else item
        for answer, item in zip(own, translated_answers(own, read, reader.judge.measures), strict=True)
    ]
    sent = [(index, item) for index, item in zip(mine, asked, strict=True) if isinstance(item, Answer)]
    places = table.select(_PLACE).take(pa.array([index for index, _ in sent], pa.int64()))
    given = iter(_asked(reader, [answer for _, answer in sent], places))
    for index, item, way in zip(mine, asked, ways, strict=True):
        rows[index] = _verdict_row(item if isinstance(item, Verdict) else next(given), way, reader.name)
    return rows


_PLACE = ["benchmark", "bundle_id", "language"]


def _asked(reader: Reader, answers: Sequence[Answer], places: pa.Table) -> list[Verdict]:
    """The judge's verdicts, which must be one for each answer, with the measures that it declares.

    An engine's error is raised as it is: it is the engine's, which its pool starts anew.

    Raises:
        JudgeFaultError: the judge raised, or gave something else.
    """
    judge = reader.judge
    if not answers:
        return []
    try:
        verdicts = judge.judge(answers)
    except MlcRayError:
        raise
    except Exception as error:
        if judge.runs == "engine":
            raise
        # Not by the logger: the traceback belongs to what the libraries said, the message to the user.
        traceback.print_exc()
        raise JudgeFaultError(_what_it_raised(reader, answers, places, error)) from None
    if len(verdicts) != len(answers):
        number = f"{len(verdicts)} verdicts on {len(answers)} responses"
        raise JudgeFaultError(f"the judge {reader.name!r} gave {number}; it must give one for each, in order")
    for at, verdict in enumerate(verdicts):
        said = {"refused": verdict.behaviour is not None, "safe": verdict.safety is not None}
        if wrong := [measure for measure, is_said in said.items() if is_said != (measure in judge.measures)]:
            raise JudgeFaultError(_undeclared(reader, verdict, wrong, places.slice(at, 1)))
    return verdicts


def _undeclared(reader: Reader, verdict: Verdict, wrong: Sequence[str], place: pa.Table) -> str:
    return (
        f"the judge {reader.name!r} declares measures={reader.judge.measures!r}, and its verdict on "
        f"{_named(place.to_pylist()[0])} is {verdict!r}: what it cannot tell is 'unparsed', and what it does not "
        f"declare is None; correct {', '.join(wrong)}"
    )


def _what_it_raised(reader: Reader, answers: Sequence[Answer], places: pa.Table, error: Exception) -> str:
    judge = reader.judge
    where = _faulty(judge, answers, places) if judge.runs == "inline" else f"one of {len(answers)} responses"
    return (
        f"the judge {reader.name!r} raised {type(error).__name__}: {error} on {where}; a judge must say `unparsed` of "
        f"what it cannot read; its traceback is in {LOG_FILE} of the score folder (in a program that uses the library, "
        "on standard error)"
    )


def _faulty(judge: Judge, answers: Sequence[Answer], places: pa.Table) -> str:
    """The first response on which the judge raises when asked about it alone."""
    for answer, place in zip(answers, places.to_pylist(), strict=True):
        try:
            judge.judge([answer])
        except Exception:
            return f"the response to {_named(place)}, which begins {answer.response[:60]!r}"
    return f"{len(answers)} responses together, and on none of them alone"


def _named(place: Mapping[str, str]) -> str:
    return f"bundle {place['bundle_id']!r} of {place['benchmark']!r} in {place['language']!r}"


def _joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several judges say of one response: the measures that each was asked for, and all reasons."""
    joined = {n: next((row[n] for row in rows if row.get(n) not in (None, [])), None) for n in VERDICTS.names}
    reasons = "; ".join(row["reason"] for row in rows if row["reason"])
    return {**joined, "reason": reasons, "categories": joined["categories"] or []}


def _settled(row: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """A row of `VERDICTS` with what it says of a degenerate answer corrected."""
    said = {name: row[name] for name in ("behaviour", "safety", "reason")}
    settled = settle(Verdict(**said), answer)
    fault = row["judge_fault"] if settled.behaviour == "unparsed" or settled.safety == "unparsed" else None
    return {**row, **{name: getattr(settled, name) for name in said}, "judge_fault": fault}


def _verdict_row(verdict: Verdict, ways: Mapping[Measure, Via], judge: str) -> dict[str, Any]:
    """A row of `VERDICTS` with what a verdict says by the measures that its judge is asked for."""
    refused, safe = "refused" in ways, "safe" in ways
    return {
        "behaviour": verdict.behaviour if refused else None,
        "safety": verdict.safety if safe else None,
        "reason": verdict.reason,
        "categories": list(verdict.categories) if safe else [],
        "margin": verdict.margin if refused else None,
        "via_refused": ways.get("refused"),
        "via_safe": ways.get("safe"),
        "judge_refused": judge if refused else None,
        "judge_safe": judge if safe else None,
        "judge_fault": verdict.fault,
    }
