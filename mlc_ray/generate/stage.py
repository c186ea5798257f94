"""Stages, which the actors of a pool run: rows in, new columns out; and the first stage of a score, `Generator`.

This module imports neither Ray nor torch; a stage loads what it needs when it is made, in the actor that runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mlc_ray.config import GREEDY, PLAIN_CHAT, AskingSection, ChatSection, EngineSection
from mlc_ray.generate.engine import (
    Device,
    Engine,
    EngineError,
    Generation,
    Warm,
    check_finished,
    check_lengths,
    prepare_process,
)
from mlc_ray.generate.reasoning import Reader
from mlc_ray.storage import fingerprint, fingerprint_tokenizer
from mlc_ray.types import ENGINE_FAULT

if TYPE_CHECKING:
    from mlc_ray.data.tokens import ChatTemplate

_TEXT = pa.string()
PROMPTS = pa.schema(
    {**dict.fromkeys(("benchmark", "bundle_id", "kind", "category", "language", "prompt"), _TEXT), "sample": pa.int32()}
)
"""A prompt to answer; `sample` counts its answers from 0."""
ANSWERS = pa.schema(
    {
        "response": _TEXT, "thoughts": _TEXT, "finish": _TEXT, "prompt_tokens": pa.int32(),
        "response_tokens": pa.int32(), "fault": _TEXT,
    }
)  # fmt: skip
"""The columns that answering adds: `thoughts` is null where none were taken off, `response_tokens` counts both; `fault`
says why an engine gave no answer (finish `ENGINE_FAULT`), else null."""
TOKENS = "response_tokens"
_NO_LIMIT = 1 << 62


def no_answer(fault: str) -> dict[str, Any]:
    """The columns of a prompt on which engines fail."""
    return {
        "response": "", "thoughts": None, "finish": ENGINE_FAULT, "prompt_tokens": None, "response_tokens": 0,
        "fault": fault,
    }  # fmt: skip


class Stage:
    """Gives rows new columns. Made from plain settings in the actor that runs it, engines included.

    `columns` are those it adds. `engine` is the policy's engine where the stage holds one that `EnginePool.swap` may
    give other weights; it is None for a stage whose weights stay.
    """

    columns: pa.Schema
    engine: Engine | None = None

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """The values of `columns`, a dict per row of `table`, in its order; a value left out is null."""
        raise NotImplementedError

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **settings: Any) -> list[dict[str, Any]]:
        """As `rows`, for rows on which engines fail, as `fault` says; they are no property of any text.

        Called without a stage: `settings` are those that one is made with.
        """
        raise NotImplementedError

    @classmethod
    def adds(cls, **settings: Any) -> pa.Schema:
        """The `columns` of a stage that is made with these settings."""
        return cls.columns

    def swap(self, weights: str | None, *, lora: bool) -> dict[str, float]:
        """Serve other weights from now on; returns the seconds that `Engine.swap` does, and raises what it raises.

        `weights` is a folder or hub name; with `lora` a peft folder, or None for no adapter.
        """
        if self.engine is None or (weights is None and not lora):
            raise ValueError(f"{type(self).__name__} cannot be given the weights {weights!r}")
        if weights is None or lora:
            return self.engine.swap_adapter(weights)
        seconds = self.engine.swap(weights)
        self.read_tokenizer(weights)
        return seconds

    def read_tokenizer(self, model: str) -> None:
        """Called with the model whose weights are served from now on: its tokenizer may be another one."""

    def close(self) -> None:
        """Free what the stage holds; it cannot be used afterwards."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """The stage's own columns, row for row."""
        added = pa.Table.from_pylist(self.rows(table), schema=self.columns)
        if len(added) != len(table):
            raise RuntimeError(f"{type(self).__name__}: {len(table)} rows went in, {len(added)} came out")
        return added


class Generator(Stage):
    """`PROMPTS` -> `ANSWERS`: a chat model answers single user messages.

    The prompt's ids come from the same chat template code as in training, generation prompt included, so what is scored
    is exactly what was trained.

    Args:
        model: Hugging Face folder or hub name.
        settings: of the engine.
        chat: the conversation that prompts stand in.
        max_new_tokens: longest answer.
        asking: how answers are drawn, and what becomes of thoughts.
        warm: for an engine whose weights will be swapped.
        shared: an engine that serves `model` already; by default one is started.

    Raises:
        EngineError: as `Engine`, and when the template leaves no space for a prompt.
    """

    columns = ANSWERS

    def __init__(
        self,
        model: str,
        settings: EngineSection,
        *,
        max_new_tokens: int,
        chat: ChatSection = PLAIN_CHAT,
        asking: AskingSection = GREEDY,
        device: Device,
        warm: Warm | None = None,
        shared: Engine | None = None,
    ) -> None:
        check_lengths(model, settings, max_new_tokens)
        prepare_process(settings, device)
        self.settings, self.chat, self.asking = settings, chat, asking
        self.max_new_tokens = max_new_tokens
        self.longest_prompt = settings.max_model_len - max_new_tokens
        self._tokenizer = ""
        self.read_tokenizer(model)
        self.engine: Engine = shared or Engine(model, settings, device=device, warm=warm)

    def read_tokenizer(self, model: str) -> None:
        """Take the chat template of `model`, unless it has the same files as the one before."""
        if (name := fingerprint_tokenizer(model)) == self._tokenizer:
            return

        from mlc_ray.data.tokens import ChatTemplate, load_tokenizer

        self._template: ChatTemplate = ChatTemplate(
            load_tokenizer(model, trust_remote_code=self.settings.trust_remote_code),
            self.chat,
            prompts_only=True,
        )
        if (least := self._template.minimum) > self.longest_prompt:
            lengths = f"engine.max_model_len={self.settings.max_model_len} less max_new_tokens={self.max_new_tokens}"
            raise EngineError(f"{lengths} leaves no space for the chat template, which takes {least - 1} tokens")
        self._reader = Reader.of(self._template.tokenizer, self._template.tail, self.asking.reasoning)
        self._tokenizer = name

    def generate(self, prompts: Sequence[str]) -> list[Generation]:
        """The greedy answer to each prompt, in order; one of more than `longest_prompt` tokens has none, see `Engine`.

        Thoughts are part of it.
        """
        return self.engine.generate(self._ids(prompts), self.max_new_tokens)

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """An answer per row, to its `prompt`.

        Raises:
            RuntimeError: the engine gave an answer up.
        """
        answers = self.engine.generate(
            self._ids(table["prompt"].to_pylist()),
            self.max_new_tokens,
            temperature=self.asking.temperature,
            seeds=None if self.asking.temperature == 0 else seeds_of(table, self.asking.seed),
            special=self._reader.special,
        )
        check_finished(answers)
        return [
            {
                **self._reader.read(answer.text, answer.finish),
                "prompt_tokens": answer.prompt_tokens,
                "response_tokens": answer.response_tokens,
            }
            for answer in answers
        ]

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **_: Any) -> list[dict[str, Any]]:
        """No answer."""
        return [no_answer(fault)] * len(table)

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self._template.encode_prompt(prompt, _NO_LIMIT)[0] for prompt in prompts]

    def close(self) -> None:
        """Free the engine's memory; the generator cannot be used afterwards."""
        self.engine.close()


def seeds_of(table: pa.Table, seed: int) -> list[int]:
    """A seed for every row of `PROMPTS`, made from what names it: the same wherever and beside whatever it is asked."""
    columns = (table[name].to_pylist() for name in ("benchmark", "bundle_id", "language", "sample"))
    return [int(fingerprint([seed, *names])[:8], 16) for names in zip(*columns, strict=True)]
