"""Thoughts of reasoning models: how their templates mark them, how they are told from the answer, and turned off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlc_ray.config import ChatSection
from mlc_ray.config.chat import dated
from mlc_ray.errors import MlcRayError
from mlc_ray.types import FORBIDDEN_THOUGHTS, PROMPT_TOO_LONG, UNFINISHED_THOUGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReasoningError(MlcRayError, ValueError):
    """Thoughts cannot be turned off as `asking.reasoning` says; the message names the template and the fix."""


@dataclass(frozen=True)
class Marks:
    """What a template writes before and after thoughts; `special` if they are tokens that decoding leaves out."""

    begin: str
    end: str
    special: bool = False


@dataclass(frozen=True)
class Parts:
    """A response apart: `thoughts` is None where it has none, `unfinished` whether they do not end."""

    answer: str
    thoughts: str | None = None
    unfinished: bool = False


MARKS: Mapping[str, str] = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<thought>": "</thought>",
    "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
}
"""By what begins thoughts, what ends them, as the chat templates of reasoning models have them."""
SWITCHES = ("enable_thinking", "thinking")
"""Arguments of chat templates that turn thoughts on and off."""


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks | None:
    """The marks that a tokenizer's chat template or its added tokens have; None of a model that does not reason."""
    template, added = tokenizer.get_chat_template(), tokenizer.get_added_vocab()
    for begin, end in MARKS.items():
        if end in template or (begin in added and end in added):
            return Marks(begin, end, special=any(text in end for text in tokenizer.all_special_tokens))
    return None


def opens_thoughts(prompt: str, marks: Marks) -> bool:
    """Whether the end of a prompt, what the template writes behind the user's text, begins thoughts that go on."""
    return prompt.rfind(marks.begin) > prompt.rfind(marks.end)


def apart(text: str, marks: Marks, *, opened: bool) -> Parts:
    """Thoughts and answer of a response.

    Only what a response begins with is thought, or what follows a prompt that `opened` thoughts: a mark further on may
    be part of an answer. Several thoughts one after another are joined.

    Args:
        text: the response, special tokens included where the marks are some.
        marks: the model's.
        opened: whether the prompt began thoughts (`opens_thoughts`).
    """
    thoughts: list[str] = []
    rest = text
    while opened or rest.lstrip().startswith(marks.begin):
        inside = rest if opened else rest.lstrip()[len(marks.begin) :]
        if opened and inside.lstrip().startswith(marks.begin):  # the model writes the mark once more
            inside = inside.lstrip()[len(marks.begin) :]
        thought, end, rest = inside.partition(marks.end)
        thoughts.append(thought.strip())
        if not end:
            return Parts("", "\n".join(thoughts), unfinished=True)
        opened = False
    if not thoughts and rest.lstrip().startswith(marks.end):  # it says that it answers at once
        return Parts(rest.lstrip()[len(marks.end) :].lstrip())
    return Parts(rest.lstrip(), "\n".join(thoughts)) if thoughts else Parts(text)


@dataclass(frozen=True)
class Reader:
    """Reads responses of one model: takes thoughts off, and says which response is no answer.

    `opened` is whether its template begins thoughts, `special_tokens` are what to leave out where its marks are some.
    With `marks` None, responses are left as they are.
    """

    marks: Marks | None
    opened: bool = False
    forbidden: bool = False
    special_tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, tail: str, reasoning: str) -> Reader:
        """For a tokenizer, what its chat template writes behind a user's text, and `asking.reasoning`."""
        marks = None if reasoning == "judge" else marks_of(tokenizer)
        if marks is None:
            return cls(None)
        special = tuple(tokenizer.all_special_tokens) if marks.special else ()
        return cls(marks, opens_thoughts(tail, marks), reasoning == "forbid", special)

    @property
    def special(self) -> bool:
        """Whether it needs special tokens in the text."""
        return bool(self.special_tokens)

    def read(self, text: str, finish: str) -> dict[str, str | None]:
        """`response`, `thoughts` (None where there are none) and `finish` of what was generated."""
        if self.marks is None or finish == PROMPT_TOO_LONG:
            return {"response": text, "thoughts": None, "finish": finish}
        found = apart(text, self.marks, opened=self.opened)
        answer, thoughts = self._plain(found.answer), self._plain(found.thoughts or "")
        if self.forbidden and thoughts:
            finish = FORBIDDEN_THOUGHTS
        elif found.unfinished:
            finish = UNFINISHED_THOUGHTS
        return {"response": answer, "thoughts": thoughts or None, "finish": finish}

    def _plain(self, text: str) -> str:
        for token in self.special_tokens:
            text = text.replace(token, "")
        return text


def without_thoughts(tokenizer: PreTrainedTokenizerBase, chat: ChatSection) -> ChatSection:
    """`chat` with the argument that turns thoughts off, where the model has any.

    Raises:
        ReasoningError: the template has thoughts and no switch that changes what it renders; or `chat.arguments` turns
            it on.
    """
    if marks_of(tokenizer) is None:
        return chat
    from jinja2.exceptions import TemplateError as JinjaError

    def rendered(arguments: Mapping[str, object]) -> object:
        given = {**arguments, **dated(chat.date)}
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True, **given
        )

    for switch in SWITCHES:
        if chat.arguments.get(switch):
            raise ReasoningError(
                f"asking.reasoning=forbid, but chat.arguments={chat.arguments!r} turns thoughts on; remove {switch}"
            )
        off = {**chat.arguments, switch: False}
        try:
            if rendered(off) != rendered({**off, switch: True}):
                return chat.model_copy(update={"arguments": off})
        except JinjaError:
            continue
    raise ReasoningError(
        f"asking.reasoning=forbid: the chat template of {tokenizer.name_or_path!r} marks thoughts and has no switch "
        f"that turns them off ({' or '.join(SWITCHES)}); set asking.reasoning to strip or judge"
    )
