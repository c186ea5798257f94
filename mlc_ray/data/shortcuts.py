"""What saves work where many texts are rendered by a chat template and tokenised, and is proven to change nothing.

A rendering is put together without the template where `tracing` knows what that does with a text. And only what lies
between the special tokens next to a text is tokenised: a tokenizer splits at those before all else, so what lies beyond
them always has the same ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from mlc_ray.data.tokens import SENTINEL, ChatTemplate, Ids, TemplateError, ids_behind
from mlc_ray.data.tracing import Trace, Traced, is_traceable, replayed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLANKS = " \n\t\u00a0\u3000"
_PROBES = (f"{_BLANKS}x{_BLANKS}", "\"'<&>\\ {{ x }}{% x %}", "\nA\n\nB", "x" * 5000)
"""Texts that come out otherwise where a template strips, escapes or shortens them."""


class Shortcuts:
    """`ChatTemplate.prompt_ids` and `answer_ids` with less work; made once, by some thirty renderings."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template, self._backend = template, _backend_of(template.tokenizer)
        self._lead: tuple[str, Ids] | None
        self._traces = {"user": Trace(), "assistant": Trace()}
        asked, said = (Traced(SENTINEL, trace) for trace in self._traces.values())
        template.render(asked)
        if not template.prompts_only:
            template.render(asked, said)
        self._learn_changes()
        self._learn_fixed_ids()

    def prompt_ids(self, texts: Sequence[str]) -> list[Ids]:
        """As the template's."""
        (before, before_ids), (after, after_ids) = self._fixed
        pieces = [self._prompt(text)[len(before) :].removesuffix(after) for text in texts]
        return [np.concatenate([before_ids, ids, after_ids]) for ids in self._batch(pieces)]

    def answer_ids(self, asked: Sequence[tuple[str, Ids, str]]) -> list[Ids]:
        """As the template's."""
        leads = [self._lead or (self._prompt(prompt), ids) for prompt, ids, _ in asked]
        return ids_behind(leads, [self._answer(prompt, text) for prompt, _, text in asked], self._batch)

    def verify(self, conversations: Iterable[tuple[str, str | None]]) -> None:
        """Compare what is put together for some prompts, each with an answer or none, with renderings.

        Raises:
            TemplateError: they differ, so that ids of other texts may be wrong.
        """
        for prompt, answer in conversations:
            if not (self._fills("user", prompt) and (answer is None or self._fills("assistant", answer))):
                continue
            whole = self._filled(prompt, answer)
            if whole != (rendered := self._template.render(prompt, answer)):
                raise TemplateError(
                    f"the chat template of {self._template.tokenizer.name_or_path!r} renders {rendered!r}, where other "
                    f"conversations lead to {whole!r}; what it writes may depend on nothing but the conversation: take "
                    "the time, random numbers and the like out of it"
                )

    def _filled(self, prompt: str, answer: str | None) -> str:
        """A conversation put together without the template."""
        filled = f"{self._template.head}{replayed(prompt, self._changes['user'])}{self._template.tail}"
        return filled if answer is None else filled + self._filled_answer(answer)

    def _filled_answer(self, answer: str) -> str:
        before, behind = self._template.around_answer
        return f"{before}{replayed(answer, self._changes['assistant'])}{behind}"

    def _fills(self, role: str, text: str) -> bool:
        """Whether a text can be filled in without the template."""
        return self._traces[role].holds_for(text)

    def _prompt(self, text: str) -> str:
        return self._filled(text, None) if self._fills("user", text) else self._template.prompt(text)

    def _answer(self, prompt: str, text: str) -> str:
        filled = self._fills("user", prompt) and self._fills("assistant", text)
        return self._filled_answer(text) if filled else self._template.answer(prompt, text)

    def _learn_changes(self) -> None:
        """Which of the changes that were traced reach the output, by texts that differ under each.

        Unless exactly one way to fill in both texts agrees with all renderings, they are opaque.
        """
        user, assistant = self._traces.values()
        code = self._template.tokenizer.get_chat_template()
        prompts, answers = _probes_of(user), _probes_of(assistant)
        if is_traceable(code) and prompts and answers:
            said = (None, *(() if self._template.prompts_only else answers))
            pairs = [(prompt, answer) for prompt in prompts for answer in said]
            rendered = {pair: self._template.render(*pair) for pair in pairs}
            agreeing = []
            for changes in product(sorted(user.changes, key=repr), sorted(assistant.changes, key=repr)):
                self._changes = dict(zip(self._traces, changes, strict=True))
                if all(self._filled(*pair) == text for pair, text in rendered.items()):
                    agreeing.append(self._changes)
            if len(agreeing) == 1:
                self._changes = agreeing[0]
                return
        user.opaque = assistant.opaque = True

    def _learn_fixed_ids(self) -> None:
        """What of head and tail lies beyond special tokens, and the last of these, behind which answers begin."""
        marks, head, tail = self._marks(), self._template.head, self._template.tail
        before = head[: max(0, *(head.rfind(mark) for mark in marks))] if marks else ""
        found = [(at, mark) for mark in marks if (at := tail.find(mark)) >= 0]
        after, after_ids, self._lead = "", self._ids(""), None
        if found:
            at, mark = min(found)
            after, after_ids = tail[at + len(mark) :], self._ids(tail[at:])[1:]
            lead = tail[max(tail.rfind(mark) for mark in marks) :]
            self._lead = lead, self._ids(lead)
        self._fixed = (before, self._ids(before)), (after, after_ids)

    def _marks(self) -> list[str]:
        """Added tokens in head or tail at which text is split whatever stands around them."""
        if self._backend is None or self._backend.encode_special_tokens:
            return []
        added = list(self._backend.get_added_tokens_decoder().values())

        def is_mark(token: Any) -> bool:
            text = token.content
            awkward = token.normalized or token.single_word or token.lstrip or token.rstrip
            # No other one begins earlier and reaches into it, or begins with it and goes on.
            return not awkward and not any(
                text[0] in other.content[1:] or (other.content != text and other.content.startswith(text))
                for other in added
            )

        around = self._template.head + self._template.tail
        return [token.content for token in added if token.content in around and is_mark(token)]

    def _ids(self, text: str) -> Ids:
        return self._batch([text])[0]

    def _batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of rendered texts, tokenised in one call."""
        if self._backend is None:
            return self._template.batch(texts)
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        # One at a time: tens of thousands of lists that live at once would be walked by the garbage collector.
        return [np.array(each.ids, np.int32) for each in found]


def _probes_of(trace: Trace) -> list[str]:
    """Texts that tell a template's changes apart, all treated as the traced one was; none where `_PROBES` are not."""
    if not all(trace.holds_for(probe) for probe in _PROBES):
        return []
    calls = {call for changes in trace.changes for call in changes}
    stripped = sorted({"".join(arguments) or _BLANKS for _, arguments in calls})
    derived = [f"{characters}A{characters}" for characters in (*stripped, "".join(stripped))]
    return [*_PROBES, *(probe for probe in derived if trace.holds_for(probe))]


def _backend_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The `tokenizers.Tokenizer` that gives the same ids with less work; None where a class has its own way."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    own = type(tokenizer)
    if getattr(own, "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
        return None
    if own.__call__ is not PreTrainedTokenizerBase.__call__:
        return None
    tokenizer("x", add_special_tokens=False)  # sets the backend to neither cut nor pad
    return tokenizer.backend_tokenizer
