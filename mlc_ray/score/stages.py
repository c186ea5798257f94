"""What Ray Data's workers run when a model is scored: tables in, tables out; it imports neither Ray nor torch."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import pyarrow as pa

from mlc_ray.config import EngineSection
from mlc_ray.errors import MlcRayError
from mlc_ray.score.generate import PROMPT_TOO_LONG, Device, Generation, Generator
from mlc_ray.score.judges import Judge, get_judge
from mlc_ray.types import Kind, Verdict

ENGINE_FAULT = "engine_fault"
"""Finish reason of rows whose `response` is the message of an error that ends the run."""

_TEXT = pa.string()
PROMPTS = pa.schema(dict.fromkeys(("benchmark", "bundle_id", "kind", "category", "language", "prompt"), _TEXT))
"""A prompt to answer."""


def explode(bundles: pa.Table, benchmark: str, kept: dict[str, list[str]]) -> pa.Table:
    """Rows of bundles -> a row per prompt (`PROMPTS`), for the bundles and languages in `kept`."""
    rows = []
    for bundle in bundles.to_pylist():
        texts = dict(zip(bundle["languages"], bundle["texts"], strict=True))
        for code in kept.get(bundle["bundle_id"], ()):
            row = {name: bundle[name] for name in ("bundle_id", "kind", "category")}
            rows.append({"benchmark": benchmark, **row, "language": code, "prompt": texts[code]})
    return pa.Table.from_pylist(rows, schema=PROMPTS)


class GenerateStage:
    """Prompts -> prompts with `response`, `finish`, `prompt_tokens`, `response_tokens`; one engine per actor."""

    def __init__(self, model: str, engine: EngineSection, max_new_tokens: int, device: Device):
        self.fault: MlcRayError | None = None
        try:
            self.generator = Generator(model, engine, max_new_tokens=max_new_tokens, device=device)
        except MlcRayError as error:  # carried as data: raised here it would arrive wrapped in Ray's own traceback
            self.fault = error

    def __call__(self, prompts: pa.Table) -> pa.Table:
        """Answer the prompts of one batch; a fault that kept the engine from starting is every answer's text."""
        if self.fault is not None:
            answers = [Generation(str(self.fault), ENGINE_FAULT, 0, 0)] * prompts.num_rows
        else:
            answers = self.generator.generate(prompts["prompt"].to_pylist())
        columns: dict[str, pa.Array[Any]] = {
            "response": pa.array([answer.text for answer in answers], _TEXT),
            "finish": pa.array([answer.finish for answer in answers], _TEXT),
            "prompt_tokens": pa.array([answer.prompt_tokens for answer in answers], pa.int32()),
            "response_tokens": pa.array([answer.response_tokens for answer in answers], pa.int32()),
        }
        for name, values in columns.items():
            prompts = prompts.append_column(name, values)
        return prompts


def judge_batch(responses: pa.Table, judge: str) -> pa.Table:
    """Responses -> responses with `verdict` and `reason`. A prompt that was not sent is `unparsed`, unjudged."""
    columns = [responses[name].to_pylist() for name in ("prompt", "response", "language", "kind", "finish")]
    verdicts = [
        _verdict(_judge(judge), prompt, response, language, cast(Kind, kind), finish)
        for prompt, response, language, kind, finish in zip(*columns, strict=True)
    ]
    responses = responses.append_column("verdict", pa.array([verdict.label for verdict in verdicts], _TEXT))
    return responses.append_column("reason", pa.array([verdict.reason for verdict in verdicts], _TEXT))


def _verdict(judge: Judge, prompt: str, response: str, language: str, kind: Kind, finish: str) -> Verdict:
    if finish == PROMPT_TOO_LONG:
        return Verdict("unparsed", "the prompt was too long for engine.max_model_len; it was not sent")
    return judge.judge(prompt, response, language, kind)


@cache
def _judge(name: str) -> Judge:
    return get_judge(name)
