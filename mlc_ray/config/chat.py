"""Settings of the conversation that a prompt stands in: the same for training, probing and scoring."""

from __future__ import annotations

import datetime
from typing import Any

from pydantic import Field, field_validator

from mlc_ray.config.base import Section

DATE = "2024-07-26"
"""The date that Llama 3's own templates fall back to where they cannot ask for today's."""
_GIVEN_BY_US = ("messages", "conversation", "tokenize", "add_generation_prompt", "strftime_now", "chat_template")


class ChatSection(Section):
    """What a chat template is given beside the user's message."""

    system: str | None = Field(
        None, min_length=1, description="System prompt (default: none is given; a template may write one of its own)."
    )
    arguments: dict[str, bool | int | float | str] = Field(
        {}, description="Arguments of the model's chat template by name, e.g. {enable_thinking: false}."
    )
    date: str = Field(
        DATE,
        description="What templates that write today's date are told, as YYYY-MM-DD: else the same prompt would be "
        "other tokens tomorrow.",
    )

    @field_validator("date")
    @classmethod
    def _a_day(cls, date: str) -> str:
        try:
            if datetime.date.fromisoformat(date).isoformat() == date:
                return date
        except ValueError:
            pass
        raise ValueError(f"date={date!r} is no day; write it as YYYY-MM-DD, e.g. {DATE}")

    @field_validator("arguments")
    @classmethod
    def _of_the_template(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in arguments if name in _GIVEN_BY_US]:
            raise ValueError(f"arguments has {taken[0]!r}, which is given by this package; remove it")
        return arguments


def dated(date: str = DATE) -> dict[str, Any]:
    """The argument of `apply_chat_template` that pins what a template takes for the present: noon of `date`."""
    noon = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time(12))
    return {"strftime_now": noon.strftime}


PLAIN_CHAT = ChatSection()
"""The user's message alone."""
