"""What the two published training formats share: one turn, English answers, and `prompt_xx` for other languages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from mlc_ray.data.bundles import BundleError, check_language
from mlc_ray.data.formats.base import Format

# The published formats do not record the language of their answers and of the main prompt: it is English.
ANSWER_LANGUAGE = "en"
USER = ("human", "user")
ASSISTANT = ("gpt", "assistant")

_PROMPT_COLUMN = re.compile(r"prompt_(.+)")
_LABELS = frozenset({"id", "source", "category"})


class TurnFormat(Format):
    """A format with keys of its `own`, `prompt_<language>` for further languages, and labels."""

    own: ClassVar[tuple[str, ...]]
    default_kind = "harmful"

    def check_key(self, key: str) -> None:
        """One of the format's own keys, a label, or `prompt_<language>` of another language than English."""
        if key in self.own or key in _LABELS:
            return
        if not (match := _PROMPT_COLUMN.fullmatch(key)):
            raise BundleError(f"unknown key {key!r}; expected {', '.join(self.own)}, prompt_<language>")
        if check_language(match[1], f"key {key!r}") == ANSWER_LANGUAGE:
            raise BundleError(
                f"key {key!r} repeats the prompt in {ANSWER_LANGUAGE!r}, which this format keeps elsewhere"
            )


def other_prompts(record: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts of the columns `prompt_<language>`."""
    columns = {key: match[1] for key in record if (match := _PROMPT_COLUMN.fullmatch(key))}
    return {code: said(record[key], key, USER) for key, code in columns.items() if record[key] is not None}


def labels(record: Mapping[str, Any]) -> dict[str, Any]:
    """`source` and `category`, where they are given."""
    return {name: record[name] for name in ("source", "category") if record.get(name) is not None}


def said(value: Any, where: str, roles: tuple[str, ...]) -> Any:
    """The text of one message, given as text, as {from, value}, or as a list of one such message.

    Raises:
        BundleError: there are several messages, or one that is not from any of `roles`.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise BundleError(f"{where} has {len(value)} messages; only single-turn prompts can be aligned")
        value = value[0]
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"from", "value"}:
        raise BundleError(f"{where}: a message has the keys 'from' and 'value', not {sorted(value)!r}")
    if value["from"] not in roles:
        raise BundleError(f"{where}: the message is from {value['from']!r}, expected one of {list(roles)!r}")
    return value["value"]
