"""Bundles -> token ids: the model's own chat template, the tapped token, and what is lost when text is too long.

Where the user's text begins and ends in a rendered prompt is learnt by rendering the template around a sentinel: what
stands before it is the *head*, what stands behind it the *tail*. Text is never searched for in the rendering of real
content, so a prompt that quotes the template's own markers cannot move a boundary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from jinja2.meta import find_undeclared_variables

from mlc_ray.config import PLAIN_CHAT, ChatSection
from mlc_ray.config.chat import dated
from mlc_ray.data.bundles import select_languages
from mlc_ray.data.ragged import shared_start
from mlc_ray.data.tables import ANSWERS, BUNDLES, bundle_columns, table_to_rows, token_table
from mlc_ray.data.tracing import Trace, Traced, code_of, is_traceable, replayed
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import local_model
from mlc_ray.types import Bundle, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_PROMPT = -1
"""`TokenRow.response_prompt` of a bundle that has no answers and no prompt in its response language."""

_READ = ["bundle_id", "kind", "languages", "texts", "response_language", *ANSWERS, "answers"]
_COPIED = ("bundle_id", "kind", "languages", "response_prompt")
_SENTINEL = "qS7zK2vX9w"
_BLANKS = " \n\t\u00a0\u3000"
_PROBES = (f"{_BLANKS}x{_BLANKS}", "\"'<&>\\ {{ x }}{% x %}", "\nA\n\nB", "x" * 5000)
"""Texts that come out otherwise where a template strips, escapes or shortens them."""


Ids: TypeAlias = npt.NDArray[np.int32]


class TemplateError(MlcRayError, ValueError):
    """The tokenizer's chat template is missing, or does something that leaves no clean boundary."""


class TokenizationError(MlcRayError, ValueError):
    """A limit is too small for the template; the message quotes the values and names the setting."""


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, by its path or URL, or of a hub name.

    Raises:
        TemplateError: it cannot be loaded.
        StorageFaultError: it lies on a store that cannot be read now.
    """
    from transformers import AutoTokenizer  # takes 4 s, and who reads prompts or plans a search needs none of it

    folder = local_model(path, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TemplateError(f"model.path={path!r}: no tokenizer could be loaded from it: {error}") from error


class ChatTemplate:
    """A tokenizer's chat template, with its boundaries: texts become the ids of what it renders.

    `chat` is what the template is given beside the user's message. With `prompts_only` no answer is ever rendered, and
    the template may do anything with one: those of reasoning models leave out thoughts that the prompt began.

    `head` and `tail` are what it writes around a user's text; `minimum` is the number of tokens of a prompt that holds
    one letter, the least that a limit may be.

    Ids are those of the template's own rendering. Two things save work where they are proven to change nothing. A
    rendering is put together without the template where `tracing` knows what that does with a text. And only what
    lies between the special tokens next to a text is tokenised: a tokenizer splits at those before all else, so what
    lies beyond them always has the same ids.

    Raises:
        TemplateError: there is no usable template, or it does not use what `chat` gives it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat: ChatSection = PLAIN_CHAT, *, prompts_only: bool = False
    ) -> None:
        if not tokenizer.chat_template:
            raise TemplateError(
                f"model.path={tokenizer.name_or_path!r}: its tokenizer has no chat template; use an instruct model, "
                "or save a chat_template into the tokenizer's folder"
            )
        self.tokenizer = tokenizer
        self._chat = chat
        self._given: dict[str, Any] = {**chat.arguments, **dated(chat.date)}
        self._check_arguments()
        self._prompts_only = prompts_only
        self._traces = {"user": Trace(), "assistant": Trace()}
        asked, said = (Traced(_SENTINEL, trace) for trace in self._traces.values())
        prompt = self._render(asked)
        answered = f"{prompt}{_SENTINEL}" if prompts_only else self._render(asked, said)
        self.head, self.tail = self._split(prompt, "user")
        if chat.system is not None and chat.system.strip() not in self.head + self.tail:
            raise TemplateError(f"chat.system={chat.system!r}: the chat template leaves it out: {prompt!r}")
        if not answered.startswith(prompt):
            raise TemplateError(
                "the chat template renders an answered conversation differently from the prompt that led to it: "
                f"{answered!r} does not start with {prompt!r}"
            )
        self._around_answer = self._split(answered[len(prompt) :], "assistant")
        self._backend = _backend_of(tokenizer)
        self.head_ids = self._ids_of_head()
        self.minimum = len(self._ids(self.head + "x" + self.tail))
        self._learn_changes()
        self._learn_fixed_ids()

    def encode_prompt(self, text: str, limit: int) -> tuple[list[int], int]:
        """Ids of the prompt that asks `text`, at most `limit` of them, and the number of tokens cut.

        Uncut, they are what `apply_chat_template(..., add_generation_prompt=True)` gives. Cut, they are the head and
        then the end of the uncut ids: the user's text loses its front.

        Raises:
            TokenizationError: `limit` is too small for head and tail.
            TemplateError: the template puts other text around this one than around others.
        """
        ids, cut = self.cut_prompt(self.prompt_ids([text])[0], limit)
        return ids.tolist(), cut

    def cut_prompt(self, ids: Ids, limit: int) -> tuple[Ids, int]:
        """A prompt's ids within `limit`, and how many were cut; see `encode_prompt`."""
        if self.minimum > limit:
            raise TokenizationError(
                f"data.max_prompt_tokens={limit} leaves no space for any text: the chat template alone takes "
                f"{self.minimum - 1} tokens; set data.max_prompt_tokens well above that"
            )
        if len(ids) <= limit:
            return ids, 0
        # The tail is always inside the window that is kept, because limit >= minimum.
        kept = ids[len(ids) - (limit - len(self.head_ids)) :]
        return np.concatenate([self.head_ids, kept]), len(ids) - limit

    def prompt_ids(self, texts: Sequence[str]) -> list[Ids]:
        """Uncut ids of the prompts that ask `texts`, generation prompt included; tokenised in one call.

        Raises:
            TemplateError: the template puts other text around one of them than around others.
        """
        (before, before_ids), (after, after_ids) = self._fixed
        pieces = [self._prompt(text)[len(before) :].removesuffix(after) for text in texts]
        return [np.concatenate([before_ids, ids, after_ids]) for ids in self._batch(pieces)]

    def answer_ids(self, asked: Sequence[tuple[str, Ids, str]]) -> list[Ids]:
        """Uncut ids of answers alone, end-of-turn token included; each is asked for as (prompt, its uncut ids, answer).

        Both uncut, prompt and answer are the template's own rendering of the conversation, unless the tokenizer would
        merge the generation prompt and the first letters into one token: then the answer is tokenised alone, because
        generation too starts behind a finished prompt.

        Raises:
            TemplateError: the template changes the prompt once it is answered.
        """
        alone = [self._answer(prompt, text) for prompt, _, text in asked]
        leads = [self._lead or (self._prompt(prompt), ids) for prompt, ids, _ in asked]
        behind = self._batch([lead + text for (lead, _), text in zip(leads, alone, strict=True)])
        return [
            ids[len(lead) :] if np.array_equal(ids[: len(lead)], lead) else self._ids(text)
            for (_, lead), ids, text in zip(leads, behind, alone, strict=True)
        ]

    def opening_ids(self, texts: Sequence[str]) -> list[Ids]:
        """Ids that answers begin with which begin with `texts`, behind the generation prompt; tokenised in one call.

        What the template writes before an answer is in them. An answer that goes on may have other ids where its next
        letters merge with the last ones of the text.
        """
        before, _ = self._around_answer
        lead, lead_ids = self._lead or (self._prompt("x"), self.prompt_ids(["x"])[0])
        behind = self._batch([f"{lead}{before}{text}" for text in texts])
        return [
            ids[len(lead_ids) :] if np.array_equal(ids[: len(lead_ids)], lead_ids) else self._ids(before + text)
            for text, ids in zip(texts, behind, strict=True)
        ]

    def verify(self, conversations: Iterable[tuple[str, str | None]]) -> None:
        """Compare what is put together for some prompts, each with an answer or none, with renderings.

        Raises:
            TemplateError: they differ, so that ids of other texts may be wrong.
        """
        for prompt, answer in conversations:
            if not (self._fills("user", prompt) and (answer is None or self._fills("assistant", answer))):
                continue
            whole = self._filled(prompt, answer)
            if whole != (rendered := self._render(prompt, answer)):
                raise TemplateError(
                    f"the chat template of {self.tokenizer.name_or_path!r} renders {rendered!r}, where other "
                    f"conversations lead to {whole!r}; what it writes may depend on nothing but the conversation: take "
                    "the time, random numbers and the like out of it"
                )

    def _filled(self, prompt: str, answer: str | None) -> str:
        """A conversation put together without the template."""
        filled = f"{self.head}{replayed(prompt, self._changes['user'])}{self.tail}"
        if answer is None:
            return filled
        before, behind = self._around_answer
        return f"{filled}{before}{replayed(answer, self._changes['assistant'])}{behind}"

    def _fills(self, role: str, text: str) -> bool:
        """Whether a text can be filled in without the template."""
        return self._traces[role].holds_for(text)

    def _prompt(self, text: str) -> str:
        """The prompt that asks `text`, generation prompt included."""
        if self._fills("user", text):
            return self._filled(text, None)
        rendered = self._render(text)
        fits = len(rendered) >= len(self.head) + len(self.tail)
        if not (fits and rendered.startswith(self.head) and rendered.endswith(self.tail)):
            raise TemplateError(
                f"the chat template puts other text around the prompt {text!r} than around other prompts: {rendered!r}"
            )
        return rendered

    def _answer(self, prompt: str, text: str) -> str:
        """What follows the prompt in the conversation in which `text` answers it."""
        if self._fills("user", prompt) and self._fills("assistant", text):
            before, behind = self._around_answer
            return f"{before}{replayed(text, self._changes['assistant'])}{behind}"
        rendered, conversation = self._prompt(prompt), self._render(prompt, text)
        if not conversation.startswith(rendered):
            raise TemplateError(f"the chat template changes the prompt {prompt!r} once it is answered")
        return conversation[len(rendered) :]

    def _learn_changes(self) -> None:
        """Which of the changes that were traced reach the output, by texts that differ under each.

        Unless exactly one way to fill in both texts agrees with all renderings, they are opaque.
        """
        user, assistant = self._traces.values()
        code = self.tokenizer.get_chat_template()
        prompts, answers = _probes_of(user), _probes_of(assistant)
        if is_traceable(code) and prompts and answers:
            pairs = [
                (prompt, answer) for prompt in prompts for answer in (None, *(() if self._prompts_only else answers))
            ]
            rendered = {pair: self._render(*pair) for pair in pairs}
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
        marks = self._marks()
        start = max((self.head.rfind(mark) for mark in marks), default=-1)
        found = [(at, mark) for mark in marks if (at := self.tail.find(mark)) >= 0]
        self._fixed = (self.head[: max(0, start)], self._ids(self.head[: max(0, start)])), ("", self._ids(""))
        self._lead: tuple[str, Ids] | None = None
        if found:
            at, mark = min(found)
            self._fixed = self._fixed[0], (self.tail[at + len(mark) :], self._ids(self.tail[at:])[1:])
            lead = self.tail[max(self.tail.rfind(mark) for mark in marks) :]
            self._lead = lead, self._ids(lead)

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

        return [token.content for token in added if token.content in self.head + self.tail and is_mark(token)]

    def _ids_of_head(self) -> Ids:
        """The ids of the head when text follows it: tokenised alone, line breaks at its end can become other tokens."""
        one, other = (self._ids(f"{self.head}{letter}{self.tail}") for letter in "xy")
        common = shared_start(one, other)
        # A blank at its end may have merged with the letter; then the head tokenised alone is more accurate.
        return common if self.tokenizer.decode(common) == self.head else self._ids(self.head)

    def _render(self, user: str, assistant: str | None = None) -> str:
        said = [("system", self._chat.system), ("user", user), ("assistant", assistant)]
        messages = [{"role": role, "content": text} for role, text in said if text is not None]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=assistant is None, **self._given
            )
        except jinja2.TemplateError as error:
            raise TemplateError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses a conversation of "
                f"{', '.join(message['role'] for message in messages)}, with {self._chat!r}: {error}"
            ) from None
        return cast(str, rendered)

    def _check_arguments(self) -> None:
        """Refuse an argument that the template never reads, where its code can be read."""
        try:
            read = find_undeclared_variables(code_of(self.tokenizer.get_chat_template()))
        except jinja2.TemplateSyntaxError:
            return
        if unread := sorted(self._chat.arguments.keys() - read):
            there = ", ".join(sorted(read - {"messages", "add_generation_prompt"})) or "nothing"
            raise TemplateError(
                f"chat.arguments has {unread[0]!r}, which the chat template of {self.tokenizer.name_or_path!r} does "
                f"not read; beside the messages it reads {there}"
            )

    def _ids(self, text: str) -> Ids:
        return self._batch([text])[0]

    def _batch(self, texts: list[str]) -> list[Ids]:
        """Ids of rendered texts, tokenised in one call."""
        # The template writes BOS itself, as apply_chat_template(tokenize=True) assumes too.
        if self._backend is not None:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            # One at a time: tens of thousands of lists that live at once would be walked by the garbage collector.
            return [np.array(each.ids, np.int32) for each in found]
        return [np.array(ids, np.int32) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    @staticmethod
    def _split(rendered: str, role: str) -> tuple[str, str]:
        head, *tails = rendered.split(_SENTINEL)
        if len(tails) != 1:
            raise TemplateError(
                f"the chat template writes the {role}'s text {len(tails)} times instead of once: {rendered!r}"
            )
        return head, tails[0]


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


def tokenize_bundle(
    bundle: Bundle,
    tokenizer: PreTrainedTokenizerBase | ChatTemplate,
    *,
    languages: Sequence[str] | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
) -> TokenRow:
    """One bundle as ids; its languages in alphabetical order, restricted to `languages` (None: all).

    `response_prompt` is `NO_PROMPT` where a bundle without answers lacks its response language.

    Raises:
        BundleError: no language is left, or answers lose the prompt they answer.
        TokenizationError: the template alone exceeds max_prompt_tokens.
        TemplateError: the template is unusable.
    """
    template = tokenizer if isinstance(tokenizer, ChatTemplate) else ChatTemplate(tokenizer)
    table = pa.Table.from_pylist([bundle_columns(bundle, select_languages(bundle, languages))], schema=BUNDLES)
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_response_tokens": max_response_tokens}
    return table_to_rows(tokenize_table(table, template, **limits))[0]


def tokenize_table(
    bundles: pa.Table, template: ChatTemplate, *, max_prompt_tokens: int, max_response_tokens: int
) -> pa.Table:
    """A table of `BUNDLES` as one of `TOKENS`: all prompts are tokenised in one call, then all answers.

    The first prompt of each language, and the first two answers, are compared with whole renderings.

    Raises:
        TokenizationError: the template alone exceeds max_prompt_tokens.
        TemplateError: the template is unusable.
    """
    rows = bundles.select(_READ).to_pylist()
    texts = [text for row in rows for text in row["texts"]]
    starts = np.cumsum([0, *(len(row["texts"]) for row in rows)])  # of each row's prompts
    answers: list[tuple[int, dict[str, Any], str, int]] = []  # row, what it belongs to, name, prompt
    for number, row in enumerate(rows):
        continued = row["response_language"] in row["languages"]
        row["response_prompt"] = row["languages"].index(row["response_language"]) if continued else NO_PROMPT
        pairs = [(row, row["response_prompt"])] if continued else []
        for further in row["answers"]:
            further["prompt"] = row["languages"].index(further.pop("language"))
            pairs.append((further, further["prompt"]))
        answers += [
            (number, pair, name, int(starts[number]) + at) for pair, at in pairs for name in ANSWERS if pair[name]
        ]
    first_of_languages = {code: text for row in rows for code, text in zip(row["languages"], row["texts"], strict=True)}
    template.verify([(text, None) for text in first_of_languages.values()])
    template.verify([(texts[prompt], pair[name]) for _, pair, name, prompt in answers[:2]])
    whole = template.prompt_ids(texts)
    said = template.answer_ids([(texts[prompt], whole[prompt], pair[name]) for _, pair, name, prompt in answers])
    kept, cuts = zip(*(template.cut_prompt(ids, max_prompt_tokens) for ids in whole), strict=True)
    lengths, cut = np.fromiter(map(len, kept), np.int32), np.array(cuts, dtype=np.int32)
    lost = np.zeros(len(rows), dtype=np.int32)
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in _COPIED}
    for (number, pair, name, _), ids in zip(answers, said, strict=True):
        pair[name] = ids[:max_response_tokens]
        lost[number] += max(0, len(ids) - max_response_tokens)
    columns |= {name: [row[name] for row in rows] for name in (*ANSWERS, "answers")}
    ends = np.cumsum([0, *lengths])
    columns["prompts"] = _lists(starts, _lists(ends, pa.array(np.concatenate(kept))))
    columns["tapped"], columns["cut"] = _lists(starts, pa.array(lengths - 1)), _lists(starts, pa.array(cut))
    columns["truncated_prompt_tokens"] = np.add.reduceat(cut, starts[:-1])
    columns["truncated_response_tokens"] = lost
    return token_table(columns)


def _lists(bounds: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    """A column of lists that lie one after another in `values`, with these bounds [N + 1]."""
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values)
