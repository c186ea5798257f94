"""How responses open that refuse: what terms on decisions, held-out bundles and probes read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from mlc_ray.config.base import LanguageTag, Section


class OpeningsSection(Section):
    """Openings of refusals. In each language those in it and the English ones are read.

    A language's own are the section `[openings]` of its list (`mlc_ray/judges/phrases`); without a list it has the
    English ones alone.
    """

    further: dict[LanguageTag, Annotated[list[str], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="Openings to read beside these, by language; English ones count in every language.",
    )

    @field_validator("further")
    @classmethod
    def _have_text(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for code, texts in value.items():
            if blank := [text for text in texts if not text.strip() or text != text.strip()]:
                raise ValueError(
                    f"openings in {code!r}: {blank[0]!r} is blank, or has blanks around it; a response begins with "
                    "letters: remove them"
                )
        return value
