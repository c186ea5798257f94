"""Bundle -> TokenRow: the model's own chat template, the tapped token, and what is lost when text is too long.

Where the user's text begins and ends in a rendered prompt is learnt by rendering the template around a sentinel: what
stands before it is the *head*, what stands behind it the *tail*. Text is never searched for in the rendering of real
content, so a prompt that quotes the template's own markers cannot move a boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlc_ray.data.bundles import select_languages
from mlc_ray.errors import MlcRayError
from mlc_ray.types import Bundle, TokenRow

NO_PROMPT = -1
"""`TokenRow.response_prompt` of a bundle that has no answers and no prompt in its response language."""

_SENTINEL = "qS7zK2vX9w"


class TemplateError(MlcRayError, ValueError):
    """The tokenizer's chat template is missing, or does something that leaves no clean boundary."""


class TokenizationError(MlcRayError, ValueError):
    """The settings leave no room for the template; the message quotes the values and names the setting."""


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub name. Raises `TemplateError` if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TemplateError(f"model.path={path!r}: no tokenizer could be loaded from it: {error}") from error


class ChatTemplate:
    """A tokenizer's chat template, with its boundaries.

    `head_ids` are the tokens before the user's text; `minimum` is the number of tokens of a prompt that holds one
    letter, the least that a limit must leave room for. Raises `TemplateError` if there is no usable template.
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
        then the end of the uncut ids: the user's text loses its front. Raises `TokenizationError` if `limit` has no
        room for head and tail.
        """
        whole = self._prompt_ids(text)
        if self.minimum > limit:
            raise TokenizationError(
                f"data.max_prompt_tokens={limit} leaves no room for any text: the chat template alone takes "
                f"{self.minimum - 1} tokens; set data.max_prompt_tokens well above that"
            )
        if len(whole) <= limit:
            return whole, 0
        # The tail is always inside the window that is kept, because limit >= minimum.
        return self.head_ids + whole[len(whole) - (limit - len(self.head_ids)) :], len(whole) - limit

    def encode_answer(self, prompt: str, answer: str, limit: int) -> tuple[list[int], int]:
        """Ids of `answer` to `prompt` with the template's end of turn, at most `limit`, and the number cut off its end.

        The ids of the uncut prompt followed by the uncut answer are the template's own rendering of the conversation,
        unless the tokenizer would melt the generation prompt and the first letters into one token: then the answer is
        tokenised alone, because generation too starts behind a finished prompt.
        """
        rendered = self._render(prompt)
        conversation = self._render(prompt, answer)
        if not conversation.startswith(rendered):
            raise TemplateError(f"the chat template changes the prompt {prompt!r} once it is answered")
        prompt_ids, ids = self._ids(rendered), self._ids(conversation)
        if ids[: len(prompt_ids)] == prompt_ids:
            ids = ids[len(prompt_ids) :]
        else:
            ids = self._ids(conversation[len(rendered) :])
        return ids[:limit], max(0, len(ids) - limit)

    def _head_ids(self) -> list[int]:
        """The head as it is tokenised before text; alone, line breaks at its end can come out otherwise."""
        one, other = self._ids(self.head + "x" + self.tail), self._ids(self.head + "y" + self.tail)
        common = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
        # A blank at its end may have melted into the letter; then the head alone is the better account of it.
        return common if self.tokenizer.decode(common) == self.head else self._ids(self.head)

    def _prompt_ids(self, text: str) -> list[int]:
        rendered = self._render(text)
        fits = len(rendered) >= len(self.head) + len(self.tail)
        if not (fits and rendered.startswith(self.head) and rendered.endswith(self.tail)):
            raise TemplateError(
                f"the chat template puts other text around the prompt {text!r} than around other prompts: {rendered!r}"
            )
        return self._ids(rendered)

    def _render(self, user: str, assistant: str | None = None) -> str:
        messages = [{"role": "user", "content": user}]
        if assistant is not None:
            messages.append({"role": "assistant", "content": assistant})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=assistant is None)

    def _ids(self, text: str) -> list[int]:
        # The template writes BOS itself, as apply_chat_template(tokenize=True) assumes too.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

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
    """A bundle as ids; its languages in alphabetical order, restricted to `languages` (None: all).

    `response_prompt` is `NO_PROMPT` where a bundle without answers lacks its response language. Pass a `ChatTemplate`
    to look at the template once instead of once a bundle. Raises `BundleError` when no language is left or when
    answers lose the prompt they answer, `TokenizationError` when the template alone exceeds max_prompt_tokens,
    `TemplateError` when the template is unusable.
    """
    return tokenize_and_count(
        bundle,
        tokenizer,
        languages=languages,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
    )[0]


def tokenize_and_count(
    bundle: Bundle, tokenizer: PreTrainedTokenizerBase | ChatTemplate, *, languages: Sequence[str] | None, **limits: Any
) -> tuple[TokenRow, list[int]]:
    """`tokenize_bundle`, and how many tokens the prompt of each language lost (parallel to `TokenRow.languages`)."""
    template = tokenizer if isinstance(tokenizer, ChatTemplate) else ChatTemplate(tokenizer)
    kept = select_languages(bundle, languages)
    encoded = [template.encode_prompt(bundle.prompts[code], limits["max_prompt_tokens"]) for code in kept]
    answers: dict[str, list[int] | None] = {"chosen": None, "rejected": None}
    cut_responses = 0
    for name in answers:
        if (text := getattr(bundle, name)) is not None:
            prompt = bundle.prompts[bundle.response_language]
            answers[name], cut = template.encode_answer(prompt, text, limits["max_response_tokens"])
            cut_responses += cut
    cut_prompts = [cut for _, cut in encoded]
    row = TokenRow(
        bundle_id=bundle.bundle_id,
        kind=bundle.kind,
        languages=kept,
        prompts=[ids for ids, _ in encoded],
        tapped=[len(ids) - 1 for ids, _ in encoded],
        response_prompt=kept.index(bundle.response_language) if bundle.response_language in kept else NO_PROMPT,
        chosen=answers["chosen"],
        rejected=answers["rejected"],
        truncated_prompt_tokens=sum(cut_prompts),
        truncated_response_tokens=cut_responses,
    )
    return row, cut_prompts
