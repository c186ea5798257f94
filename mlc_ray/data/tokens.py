"""Bundles -> token ids: the model's own chat template, the tapped token, and what is lost when text is too long.

Where the user's text begins and ends in a rendered prompt is learnt by rendering the template around a sentinel: what
stands before it is the *head*, what stands behind it the *tail*. Text is never searched for in the rendering of real
content, so a prompt that quotes the template's own markers cannot move a boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from mlc_ray.data.bundles import select_languages
from mlc_ray.data.tables import BUNDLES, TOKENS, bundle_columns, table_to_rows, token_table
from mlc_ray.errors import MlcRayError
from mlc_ray.storage import local_model
from mlc_ray.types import Bundle, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_PROMPT = -1
"""`TokenRow.response_prompt` of a bundle that has no answers and no prompt in its response language."""

ANSWERS = ("chosen", "rejected")
_READ = ["bundle_id", "kind", "languages", "texts", "response_language", *ANSWERS]
_SENTINEL = "qS7zK2vX9w"


class TemplateError(MlcRayError, ValueError):
    """The tokenizer's chat template is missing, or does something that leaves no clean boundary."""


class TokenizationError(MlcRayError, ValueError):
    """A limit is too small for the template; the message quotes the values and names the setting."""


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, by its path or URL, or of a hub name.

    Raises:
        TemplateError: it cannot be loaded.
    """
    from transformers import AutoTokenizer  # takes 4 s, and who reads prompts or plans a search needs none of it

    try:
        return AutoTokenizer.from_pretrained(local_model(path, weights=False), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TemplateError(f"model.path={path!r}: no tokenizer could be loaded from it: {error}") from error


class ChatTemplate:
    """A tokenizer's chat template, with its boundaries.

    `head_ids` are the tokens before the user's text; `minimum` is the number of tokens of a prompt that holds one
    letter, the least that a limit may be.

    Raises:
        TemplateError: there is no usable template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise TemplateError(
                f"model.path={tokenizer.name_or_path!r}: its tokenizer has no chat template; use an instruct model, "
                "or save a chat_template into the tokenizer's folder"
            )
        self.tokenizer = tokenizer
        self.head, self.tail = self._split(self._render(_SENTINEL), "user")
        answered = self._render(_SENTINEL, "x" + _SENTINEL + "x")
        prompt = self._render(_SENTINEL)
        if not answered.startswith(prompt):
            raise TemplateError(
                "the chat template renders an answered conversation differently from the prompt that led to it: "
                f"{answered!r} does not start with {prompt!r}"
            )
        self._split(answered[len(prompt) :], "assistant")
        self.head_ids = self._head_ids()
        self.minimum = len(self._ids(self.head + "x" + self.tail))

    def encode_prompt(self, text: str, limit: int) -> tuple[list[int], int]:
        """Ids of the prompt that asks `text`, at most `limit` of them, and the number of tokens cut.

        Uncut, they are what `apply_chat_template(..., add_generation_prompt=True)` gives. Cut, they are the head and
        then the end of the uncut ids: the user's text loses its front.

        Raises:
            TokenizationError: `limit` is too small for head and tail.
        """
        return self.cut_prompt(self._ids(self.render_prompt(text)), limit)

    def render_prompt(self, text: str) -> str:
        """The prompt that asks `text`, generation prompt included.

        Raises:
            TemplateError: the template puts other text around this one than around others.
        """
        rendered = self._render(text)
        fits = len(rendered) >= len(self.head) + len(self.tail)
        if not (fits and rendered.startswith(self.head) and rendered.endswith(self.tail)):
            raise TemplateError(
                f"the chat template puts other text around the prompt {text!r} than around other prompts: {rendered!r}"
            )
        return rendered

    def render_answered(self, prompt: str, rendered: str, answer: str) -> str:
        """The conversation in which `answer` follows `prompt`, which alone is `rendered`.

        Raises:
            TemplateError: it does not begin with the prompt.
        """
        conversation = self._render(prompt, answer)
        if not conversation.startswith(rendered):
            raise TemplateError(f"the chat template changes the prompt {prompt!r} once it is answered")
        return conversation

    def cut_prompt(self, ids: list[int], limit: int) -> tuple[list[int], int]:
        """A prompt's ids within `limit`, and how many were cut; see `encode_prompt`."""
        if self.minimum > limit:
            raise TokenizationError(
                f"data.max_prompt_tokens={limit} leaves no space for any text: the chat template alone takes "
                f"{self.minimum - 1} tokens; set data.max_prompt_tokens well above that"
            )
        if len(ids) <= limit:
            return ids, 0
        # The tail is always inside the window that is kept, because limit >= minimum.
        return self.head_ids + ids[len(ids) - (limit - len(self.head_ids)) :], len(ids) - limit

    def answer_ids(self, prompt_ids: list[int], ids: list[int], rendered: str, conversation: str) -> list[int]:
        """Ids of the answer in a `conversation` with the given `ids`, whose prompt is `rendered` with `prompt_ids`.

        Both uncut, prompt and answer are the template's own rendering of the conversation, unless the tokenizer would
        merge the generation prompt and the first letters into one token: then the answer is tokenised alone, because
        generation too starts behind a finished prompt.
        """
        if ids[: len(prompt_ids)] == prompt_ids:
            return ids[len(prompt_ids) :]
        return self._ids(conversation[len(rendered) :])

    def ids_of(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered texts, tokenised in one call."""
        # The template writes BOS itself, as apply_chat_template(tokenize=True) assumes too.
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return ids

    def _head_ids(self) -> list[int]:
        """The ids of the head when text follows it: tokenised alone, line breaks at its end can become other tokens."""
        one, other = self._ids(self.head + "x" + self.tail), self._ids(self.head + "y" + self.tail)
        common = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
        # A blank at its end may have merged with the letter; then the head tokenised alone is more accurate.
        return common if self.tokenizer.decode(common) == self.head else self._ids(self.head)

    def _render(self, user: str, assistant: str | None = None) -> str:
        messages = [{"role": "user", "content": user}]
        if assistant is not None:
            messages.append({"role": "assistant", "content": assistant})
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=assistant is None)
        return cast(str, rendered)

    def _ids(self, text: str) -> list[int]:
        return self.ids_of([text])[0]

    @staticmethod
    def _split(rendered: str, role: str) -> tuple[str, str]:
        head, *tails = rendered.split(_SENTINEL)
        if len(tails) != 1:
            raise TemplateError(
                f"the chat template writes the {role}'s text {len(tails)} times instead of once: {rendered!r}"
            )
        return head, tails[0]


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
    """A table of `BUNDLES` as one of `TOKENS`: all their texts are rendered once and tokenised in one call.

    An answer is tokenised behind its prompt, since the tokenizer may see across the boundary; the prompt's own ids are
    taken from its language.

    Raises:
        TokenizationError: the template alone exceeds max_prompt_tokens.
        TemplateError: the template is unusable.
    """
    rows = bundles.select(_READ).to_pylist()
    asked = [[template.render_prompt(text) for text in row["texts"]] for row in rows]
    answered: list[dict[str, str]] = []  # of each row: name of the answer -> conversation
    for row, rendered in zip(rows, asked, strict=True):
        row["response_prompt"] = NO_PROMPT
        if row["response_language"] in row["languages"]:
            at = row["response_prompt"] = row["languages"].index(row["response_language"])
            texts = {name: row[name] for name in ANSWERS if row[name] is not None}
            prompt = row["texts"][at]
            answered.append({n: template.render_answered(prompt, rendered[at], text) for n, text in texts.items()})
        else:
            answered.append({})
    ids = iter(template.ids_of([*chain(*asked), *chain(*(one.values() for one in answered))]))
    prompt_ids = [[next(ids) for _ in rendered] for rendered in asked]
    columns: dict[str, list[Any]] = {name: [] for name in TOKENS.names if name != "key"}
    for row, rendered, whole, conversations in zip(rows, asked, prompt_ids, answered, strict=True):
        cut = [template.cut_prompt(one, max_prompt_tokens) for one in whole]
        at, lost = row["response_prompt"], 0
        answers: dict[str, list[int] | None] = dict.fromkeys(ANSWERS)
        for name, conversation in conversations.items():
            answer = template.answer_ids(whole[at], next(ids), rendered[at], conversation)
            answers[name] = answer[:max_response_tokens]
            lost += max(0, len(answer) - max_response_tokens)
        values = {
            **row,
            **answers,
            "prompts": [kept for kept, _ in cut],
            "tapped": [len(kept) - 1 for kept, _ in cut],
            "truncated_prompt_tokens": sum(number for _, number in cut),
            "truncated_response_tokens": lost,
            "cut": [number for _, number in cut],
        }
        for name, column in columns.items():
            column.append(values[name])
    return token_table(columns)
