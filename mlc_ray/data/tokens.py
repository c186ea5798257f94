"""Bundles -> token ids: the model's own chat template, the tapped token, and what is lost when text is too long.

Where the user's text begins and ends in a rendered prompt is learnt by rendering the template around a sentinel: what
stands before it is the *head*, what stands behind it the *tail*. Text is never searched for in the rendering of real
content, so a prompt that quotes the template's own markers cannot move a boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import local_model
from mlc_ray.types import Bundle, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mlc_ray.data.shortcuts import Shortcuts

NO_PROMPT = -1
"""`TokenRow.response_prompt` of a bundle that has no answers and no prompt in its response language."""

_READ = ["bundle_id", "kind", "languages", "texts", "response_language", *ANSWERS, "answers", "pair"]
_FROM_ROWS = ("bundle_id", "kind", "languages", "response_prompt", *ANSWERS, "answers", "pair")
SENTINEL = "qS7zK2vX9w"
"""A text that no template writes."""
_SHORTCUTS_FROM = 256
"""So many prompts take 30 ms, and 13 with shortcuts (SmolLM2 on an AMD EPYC), which are learnt in 5."""

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

    `head` and `tail` are what it writes around a user's text, `around_answer` what it writes around an answer;
    `minimum` is the number of tokens of a prompt that holds one letter, the least that a limit may be.

    Ids are those of the template's own rendering. Once more than `shortcuts_from` texts were given, `shortcuts` save
    work where they are proven to change nothing; before, each text is rendered.

    Raises:
        TemplateError: there is no usable template, or it does not use what `chat` gives it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat: ChatSection = PLAIN_CHAT,
        *,
        prompts_only: bool = False,
        shortcuts_from: int = _SHORTCUTS_FROM,
    ) -> None:
        if not tokenizer.chat_template:
            what_to_do = "use an instruct model, or save a chat_template into the tokenizer's folder"
            raise TemplateError(
                f"model.path={tokenizer.name_or_path!r}: its tokenizer has no chat template; {what_to_do}"
            )
        self.tokenizer, self.prompts_only = tokenizer, prompts_only
        self.shortcuts: Shortcuts | None = None
        self._texts_before_shortcuts = shortcuts_from
        self._chat = chat
        self._given: dict[str, Any] = {**chat.arguments, **dated(chat.date)}
        if chat.arguments:
            self._check_arguments()
        prompt = self.render(SENTINEL)
        self.head, self.tail = self._split(prompt, "user")
        if chat.system is not None and chat.system.strip() not in self.head + self.tail:
            raise TemplateError(f"chat.system={chat.system!r}: the chat template leaves it out: {prompt!r}")
        self.around_answer = ("", "") if prompts_only else self._answered(prompt)
        self.head_ids = self._ids_of_head()
        self.minimum = len(self._ids(self.head + "x" + self.tail))

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
        """A prompt's ids within `limit`, and how many were cut; see `encode_prompt`.

        Raises:
            TokenizationError: `limit` is too small for head and tail.
        """
        if self.minimum > limit:
            alone = (
                f"the chat template alone takes {self.minimum - 1} tokens; set data.max_prompt_tokens well above that"
            )
            raise TokenizationError(f"data.max_prompt_tokens={limit} leaves no space for any text: {alone}")
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
        if (shortcuts := self._shortcuts_for(len(texts))) is not None:
            return shortcuts.prompt_ids(texts)
        return self.batch([self.prompt(text) for text in texts])

    def answer_ids(self, asked: Sequence[tuple[str, Ids, str]]) -> list[Ids]:
        """Uncut ids of answers alone, end-of-turn token included; each is asked for as (prompt, its uncut ids, answer).

        Both uncut, prompt and answer are the template's own rendering of the conversation, unless the tokenizer would
        merge the generation prompt and the first letters into one token: then the answer is tokenised alone, because
        generation too starts behind a finished prompt.

        Raises:
            TemplateError: the template changes the prompt once it is answered.
        """
        if (shortcuts := self._shortcuts_for(len(asked))) is not None:
            return shortcuts.answer_ids(asked)
        leads = [(self.prompt(prompt), ids) for prompt, ids, _ in asked]
        answers = [self.answer(prompt, answer) for prompt, _, answer in asked]
        return ids_behind(leads, answers, self.batch)

    def opening_ids(self, texts: Sequence[str]) -> list[Ids]:
        """Ids that answers begin with which begin with `texts`, behind the generation prompt; tokenised in one call.

        What the template writes before an answer is in them. An answer that goes on may have other ids where its next
        letters merge with the last ones of the text.
        """
        lead = self.prompt("x")
        return ids_behind(
            [(lead, self._ids(lead))] * len(texts), [self.around_answer[0] + t for t in texts], self.batch
        )

    def prompt(self, text: str) -> str:
        """The rendered prompt that asks `text`, generation prompt included.

        Raises:
            TemplateError: the template puts other text around this one than around others.
        """
        rendered = self.render(text)
        fits = len(rendered) >= len(self.head) + len(self.tail)
        if not (fits and rendered.startswith(self.head) and rendered.endswith(self.tail)):
            raise TemplateError(
                f"the chat template puts other text around the prompt {text!r} than around other prompts: {rendered!r}"
            )
        return rendered

    def answer(self, prompt: str, text: str) -> str:
        """What follows the prompt in the conversation in which `text` answers it.

        Raises:
            TemplateError: the template changes the prompt once it is answered.
        """
        rendered, conversation = self.prompt(prompt), self.render(prompt, text)
        if not conversation.startswith(rendered):
            raise TemplateError(f"the chat template changes the prompt {prompt!r} once it is answered")
        return conversation[len(rendered) :]

    def render(self, user: str, assistant: str | None = None) -> str:
        """What the template writes of a prompt, generation prompt included, or of one that is answered.

        Raises:
            TemplateError: the template refuses the conversation.
        """
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

    def _shortcuts_for(self, texts: int) -> Shortcuts | None:
        """What saves work, once so many further texts are too many to render each."""
        self._texts_before_shortcuts -= texts
        if self.shortcuts is None and self._texts_before_shortcuts < 0:
            self.shortcuts = self._learn_shortcuts()
        return self.shortcuts

    def _learn_shortcuts(self) -> Shortcuts:
        from mlc_ray.data.shortcuts import Shortcuts  # which builds on this module

        return Shortcuts(self)

    def _answered(self, prompt: str) -> tuple[str, str]:
        """What the template writes around an answer, behind a rendered `prompt`."""
        answered = self.render(SENTINEL, SENTINEL)
        if not answered.startswith(prompt):
            raise TemplateError(
                "the chat template renders an answered conversation differently from the prompt that led to it: "
                f"{answered!r} does not start with {prompt!r}"
            )
        return self._split(answered[len(prompt) :], "assistant")

    def _ids_of_head(self) -> Ids:
        """The ids of the head when text follows it: tokenised alone, line breaks at its end can become other tokens."""
        one, other = (self._ids(f"{self.head}{letter}{self.tail}") for letter in "xy")
        common = shared_start(one, other)
        # A blank at its end may have merged with the letter; then the head tokenised alone is more accurate.
        return common if self.tokenizer.decode(common) == self.head else self._ids(self.head)

    def _check_arguments(self) -> None:
        """Refuse an argument that the template never reads, where its code can be read."""
        from mlc_ray.data.tracing import code_of  # which most templates, without arguments, do not need

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
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of rendered texts, tokenised in one call."""
        # The template writes BOS itself, as apply_chat_template(tokenize=True) assumes too. What is too long is cut
        # later: no warning of it.
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [np.array(ids, np.int32) for ids in found]

    @staticmethod
    def _split(rendered: str, role: str) -> tuple[str, str]:
        head, *tails = rendered.split(SENTINEL)
        if len(tails) != 1:
            raise TemplateError(
                f"the chat template writes the {role}'s text {len(tails)} times instead of once: {rendered!r}"
            )
        return head, tails[0]


def ids_behind(
    leads: Sequence[tuple[str, Ids]], texts: Sequence[str], batch: Callable[[Sequence[str]], list[Ids]]
) -> list[Ids]:
    """Ids of each text behind its lead, given with its ids; of the text alone where the tokenizer would merge the two.

    `batch` tokenises texts in one call.
    """
    together = batch([lead + text for (lead, _), text in zip(leads, texts, strict=True)])
    return [
        ids[len(lead) :] if np.array_equal(ids[: len(lead)], lead) else batch([text])[0]
        for (_, lead), ids, text in zip(leads, together, texts, strict=True)
    ]


def tokenize_bundle(
    bundle: Bundle,
    tokenizer: PreTrainedTokenizerBase | ChatTemplate,
    *,
    languages: Sequence[str] | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
    others: int | None = None,
) -> TokenRow:
    """One bundle as ids; its languages in alphabetical order, restricted as by `select_languages`.

    `response_prompt` is `NO_PROMPT` where a bundle without answers lacks its response language.

    Raises:
        BundleError: no language is left, or answers lose the prompt they answer.
        TokenizationError: the template alone exceeds max_prompt_tokens.
        TemplateError: the template is unusable.
    """
    template = tokenizer if isinstance(tokenizer, ChatTemplate) else ChatTemplate(tokenizer)
    kept = select_languages(bundle, languages, others)
    table = pa.Table.from_pylist([bundle_columns(bundle, kept)], schema=BUNDLES)
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_response_tokens": max_response_tokens}
    return table_to_rows(tokenize_table(table, template, **limits))[0]


def tokenize_table(
    bundles: pa.Table, template: ChatTemplate, *, max_prompt_tokens: int, max_response_tokens: int
) -> pa.Table:
    """A table of `BUNDLES` as one of `TOKENS`: all prompts are tokenised in one call, then all answers.

    With shortcuts, the first prompt of each language and the first two answers are compared with whole renderings.

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
    whole = template.prompt_ids(texts)
    said = template.answer_ids([(texts[prompt], whole[prompt], pair[name]) for _, pair, name, prompt in answers])
    if template.shortcuts is not None:
        _verify(template.shortcuts, rows, [(texts[prompt], pair[name]) for _, pair, name, prompt in answers[:2]])
    kept, cuts = zip(*(template.cut_prompt(ids, max_prompt_tokens) for ids in whole), strict=True)
    lengths, cut = np.fromiter(map(len, kept), np.int32), np.array(cuts, dtype=np.int32)
    lost = np.zeros(len(rows), dtype=np.int32)
    for (number, pair, name, _), ids in zip(answers, said, strict=True):
        pair[name] = ids[:max_response_tokens]
        lost[number] += max(0, len(ids) - max_response_tokens)
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in _FROM_ROWS}
    ends = np.cumsum([0, *lengths])
    columns["prompts"] = _lists(starts, _lists(ends, pa.array(np.concatenate(kept))))
    columns["tapped"], columns["cut"] = _lists(starts, pa.array(lengths - 1)), _lists(starts, pa.array(cut))
    columns["truncated_prompt_tokens"] = np.add.reduceat(cut, starts[:-1])
    columns["truncated_response_tokens"] = lost
    return token_table(columns)


def _verify(shortcuts: Shortcuts, rows: Sequence[dict[str, Any]], answered: Sequence[tuple[str, str]]) -> None:
    """Compare the first prompt of each language and some answered ones with whole renderings."""
    first = {code: text for row in rows for code, text in zip(row["languages"], row["texts"], strict=True)}
    shortcuts.verify([*((text, None) for text in first.values()), *answered])


def _lists(bounds: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    """A column of lists that lie one after another in `values`, with these bounds [N + 1]."""
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), values)
