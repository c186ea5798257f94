"""What Ray Data's workers run when a model is scored: tables in, tables out; it imports neither Ray nor torch.

A score is up to three phases, each with engines of its own, so that two never share a machine's memory:

    answer      prompts -> responses (or, for the likelihood judge, verdicts at once)
    translate   only if asked for: responses -> responses in English
    judge       responses -> verdicts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from mlc_ray.config import EngineSection, JudgeSettings, TranslateSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import PROMPT_TOO_LONG, Device, Engine, Generator, Warm, check_lengths
from mlc_ray.generate.translate import (
    TranslatedAnswer,
    make_translator,
    translate_answers,
    translated_answers,
)
from mlc_ray.judges.base import Judge, PromptJudge, make_judge, make_reader
from mlc_ray.judges.degenerate import settle
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.storage import write_json_atomic
from mlc_ray.types import Answer, Kind, Measure, Verdict, Via

FAULT = "fault"
"""Column with the message of an error that ends the run: raised in a worker it would arrive in Ray's own traceback."""

NOT_GENERATED = "not_generated"
"""Finish reason where the judge needs no response."""

_TEXT = pa.string()
PROMPTS = pa.schema(dict.fromkeys(("benchmark", "bundle_id", "kind", "category", "language", "prompt"), _TEXT))
"""A prompt to answer."""
RESPONSES = pa.schema(
    [*PROMPTS, ("response", _TEXT), ("finish", _TEXT), ("prompt_tokens", pa.int32()), ("response_tokens", pa.int32())]
)
"""A prompt and its answer."""
VERDICTS = pa.schema(
    {
        "behaviour": _TEXT, "safety": _TEXT, "reason": _TEXT, "categories": pa.list_(_TEXT), "margin": pa.float64(),
        "via_refused": _TEXT, "via_safe": _TEXT,
    }
)  # fmt: skip
"""A verdict, and how the judge behind each measure came to read its language; null where nobody judges a measure."""
JUDGED = pa.schema([*RESPONSES, *VERDICTS])
TRANSLATED = pa.schema({"prompt_en": _TEXT, "response_en": _TEXT, "translation_fault": _TEXT})
"""Null where nothing was to be translated; `translation_fault` says why a translation failed."""


def explode(bundles: pa.Table, benchmark: str, kept: dict[str, list[str]]) -> pa.Table:
    """Rows of bundles -> a row per prompt (`PROMPTS`), for the bundles and languages in `kept`."""
    rows = []
    for bundle in bundles.to_pylist():
        texts = dict(zip(bundle["languages"], bundle["texts"], strict=True))
        for code in kept.get(bundle["bundle_id"], ()):
            row = {name: bundle[name] for name in ("bundle_id", "kind", "category")}
            rows.append({"benchmark": benchmark, **row, "language": code, "prompt": texts[code]})
    return pa.Table.from_pylist(rows, schema=PROMPTS)


class Stage:
    """Adds columns to a table; an `MlcRayError` on the way becomes every row's `FAULT`, and the driver raises it."""

    columns: pa.Schema
    fault: MlcRayError | None = None

    def __init__(self, **settings: Any):
        try:
            self.start(**settings)
        except MlcRayError as error:
            self.fault = error

    def start(self, **settings: Any) -> None:
        """Make what the stage needs, engines above all."""
        raise NotImplementedError

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """The new columns' values, a dict per row of `table`."""
        raise NotImplementedError

    def __call__(self, table: pa.Table) -> pa.Table:
        """`table` with the stage's columns and `FAULT`."""
        rows: list[dict[str, Any]] = []
        if self.fault is None:
            try:
                rows = self.rows(table)
            except MlcRayError as error:
                self.fault = error
        if self.fault is not None:
            rows = [{FAULT: str(self.fault)}] * table.num_rows
        added = pa.Table.from_pylist(rows, schema=pa.schema([*self.columns, (FAULT, _TEXT)]))
        for name in added.column_names:
            table = table.append_column(name, added[name])
        return table


class GenerateStage(Stage):
    """`PROMPTS` -> `RESPONSES`."""

    columns = pa.schema([field for field in RESPONSES if field.name not in PROMPTS.names])

    def start(
        self, *, model: str, engine: EngineSection, max_new_tokens: int, device: Device, warm: Warm | None = None
    ) -> None:
        """Start an engine with the model's weights; with `warm`, one that can be given others."""
        check_lengths(model, engine, max_new_tokens)
        self.engine = Engine(model, engine, device=device, warm=warm)
        self.generator = Generator(model, engine, max_new_tokens=max_new_tokens, device=device, shared=self.engine)

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """An answer per prompt."""
        answers = self.generator.generate(table["prompt"].to_pylist())
        return [
            {
                "response": answer.text,
                "finish": answer.finish,
                "prompt_tokens": answer.prompt_tokens,
                "response_tokens": answer.response_tokens,
            }
            for answer in answers
        ]


class PromptJudgeStage(Stage):
    """`PROMPTS` -> `JUDGED`, with empty responses: for judges that need none."""

    columns = pa.schema([field for field in JUDGED if field.name not in PROMPTS.names])

    def start(
        self,
        *,
        settings: JudgeSettings,
        model: str,
        engine: EngineSection,
        device: Device,
        ways: Mapping[str, Via],
        warm: Warm | None = None,
    ) -> None:
        """Start an engine with the model's weights; with `warm`, one that can be given others."""
        judge = make_judge(settings)
        assert isinstance(judge, PromptJudge)
        self.measures = judge.measures
        self.engine = Engine(model, engine, device=device, warm=warm)
        self.scorer = judge.scorer(model, engine, device=device, shared=self.engine)
        self.ways = ways

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """A verdict per prompt."""
        languages = table["language"].to_pylist()
        verdicts = self.scorer.score(table["prompt"].to_pylist(), languages)
        return [
            {"response": "", "finish": NOT_GENERATED, "prompt_tokens": None, "response_tokens": 0,
             **_verdict_row(verdict, dict.fromkeys(self.measures, self.ways[code]))}
            for verdict, code in zip(verdicts, languages, strict=True)
        ]  # fmt: skip


class TranslateStage(Stage):
    """`RESPONSES` -> with `TRANSLATED`: English prompts and responses for the languages read by translation."""

    columns = TRANSLATED

    def start(
        self,
        *,
        settings: TranslateSection,
        device: Device,
        ways: Mapping[str, Via],
        cache_dir: str,
        usage_file: str | None = None,
    ) -> None:
        """Make the translator: a model in an engine, or an endpoint, whose usage is written to `usage_file`."""
        self.ways = ways
        self.usage_file = usage_file
        self.translator = make_translator(settings, device, Path(cache_dir))

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """Translate prompts and non-blank responses of the rows that need it."""
        records = table.to_pylist()
        wanted = [index for index, row in enumerate(records) if self.ways[row["language"]] == "translated"]
        done = translate_answers(self.translator, [_answer(records[index]) for index in wanted])
        _note_usage(self.translator, self.usage_file)
        rows: list[dict[str, Any]] = [{} for _ in records]
        for index, english in zip(wanted, done, strict=True):
            rows[index] = {
                "prompt_en": english.prompt,
                "response_en": english.response,
                "translation_fault": english.fault or None,
            }
        return rows


class JudgeStage(Stage):
    """`RESPONSES` -> `JUDGED`.

    A judge that does not say whether a response refuses is joined by the phrase judge, because a score without the
    benign side's refusals is no score. Then degenerate answers are told apart (`degenerate.settle`).
    """

    columns = VERDICTS

    def start(
        self,
        *,
        settings: JudgeSettings,
        device: Device,
        ways: Mapping[str, Via],
        phrase_ways: Mapping[str, Via] | None,
        cache_dir: str,
        usage_file: str | None = None,
    ) -> None:
        """Make the judge; `phrase_ways` is how the phrase judge reads each language, None if it is not needed.

        What an endpoint did and cost is written to `usage_file`.
        """
        self.usage_file = usage_file
        judge = make_reader(settings)
        judge.start(device, Path(cache_dir))
        self.judges: list[tuple[Judge, Mapping[str, Via]]] = [(judge, ways)]
        if phrase_ways is not None:
            self.judges.append((RefusalJudge(), phrase_ways))

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """A verdict per response."""
        records = table.to_pylist()
        verdicts = [Verdict() for _ in records]
        for judge, ways in self.judges:
            verdicts = [_joined(a, b) for a, b in zip(verdicts, _verdicts(judge, ways, records), strict=True)]
            _note_usage(judge, self.usage_file)
        return [
            _verdict_row(
                settle(verdict, _answer(row)),
                _read_by(self.judges, row["language"]),
            )
            for verdict, row in zip(verdicts, records, strict=True)
        ]


def _note_usage(asked: Any, file: str | None) -> None:
    """Write what an endpoint did and cost so far; models have no `usage`."""
    if file is not None and (usage := getattr(asked, "usage", None)) is not None:
        write_json_atomic(file, asdict(usage))


def _verdicts(judge: Judge, ways: Mapping[str, Via], records: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """The judge's verdict on each record; what was never sent or not translated is `unparsed`, unasked."""
    english = [_english(row) if ways[row["language"]] == "translated" else None for row in records]
    asked = translated_answers([_answer(row) for row in records], english, judge.measures)
    answers = [item for item in asked if isinstance(item, Answer) and item.finish != PROMPT_TOO_LONG]
    given = iter(judge.judge(answers))
    too_long = judge.unparsed("the prompt was too long for engine.max_model_len; it was not sent")
    found = []
    for row, item in zip(records, asked, strict=True):
        if row["finish"] == PROMPT_TOO_LONG:
            found.append(too_long)
        else:
            found.append(item if isinstance(item, Verdict) else next(given))
    return found


def _english(row: Mapping[str, Any]) -> TranslatedAnswer:
    return TranslatedAnswer(row["prompt_en"], row["response_en"], row["translation_fault"] or "")


def _answer(row: Mapping[str, Any]) -> Answer:
    return Answer(row["prompt"], row["response"], row["language"], cast(Kind, row["kind"]), row["finish"])


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
