"""Openings of refusals as tokens: what steps read of them, and how many they add behind a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mlc_ray.config import ChatSection, OpeningsSection
from mlc_ray.data.branches import Branches, OpeningsError
from mlc_ray.data.tokens import ChatTemplate
from mlc_ray.judges.openings import openings_by_language, refusal_openings
from mlc_ray.types import Scope, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_branches(
    settings: OpeningsSection, tokenizer: PreTrainedTokenizerBase, chat: ChatSection, languages: Iterable[str]
) -> Branches:
    """The openings in some languages behind a prompt, with what the chat template writes before an answer.

    Raises:
        OpeningsError: A language has none.
        ConfigError: Some are given for a language that none of these reads.
    """
    return _branches(openings_by_language(languages, settings), tokenizer, chat)


def _branches(openings: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, chat: ChatSection) -> Branches:
    template = ChatTemplate(tokenizer, chat)
    return Branches({code: [ids.tolist() for ids in template.opening_ids(of)] for code, of in openings.items()})


ENGLISH, EVERYWHERE, ALONE = 43, 136, 97
"""Tokens of the openings behind an English prompt, and behind one in ten languages (ar, bn, en, es, fr, ja, ru, sw, ur,
zh) on average, with the English ones everywhere and without; by the tokenizer of Qwen2.5."""


def assumed_opened(settings: OpeningsSection) -> dict[Scope, int]:
    """Tokens of openings behind a prompt of each scope, where neither data nor tokenizer is at hand."""
    return {"response": ENGLISH, "all": EVERYWHERE if settings.english_everywhere else ALONE}


def opened(
    settings: OpeningsSection, tokenizer: PreTrainedTokenizerBase, chat: ChatSection, rows: Sequence[TokenRow]
) -> Mapping[Scope, int]:
    """The same as means over some bundles; nothing where a language has none, which a run that reads them refuses.

    Openings of further languages, which other bundles may have, are left out.
    """
    answered = Counter(row.languages[row.response_prompt] for row in rows if row.response_prompt >= 0)
    prompts = Counter(code for row in rows for code in row.languages)
    try:
        branches = _branches({code: refusal_openings(code, settings) for code in prompts}, tokenizer, chat)
    except OpeningsError:
        return {}

    def mean(of: Counter[str]) -> int:
        return round(sum(len(branches.of(code).ids) * number for code, number in of.items()) / max(1, of.total()))

    return {"response": mean(answered), "all": mean(prompts)}
