"""How responses open that refuse: what terms on decisions, held-out bundles and probes read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from mlc_ray.config.base import LanguageTag, Section


class OpeningsSection(Section):
    """Openings of refusals. In each language those in it are read and, unless switched off, the English ones.

    A language's own are the section `[openings]` of its list (`mlc_ray/judges/phrases`); without a list it has the
    English ones alone.
    """

    english_everywhere: bool = Field(
        True,
        description="Whether English openings count in every language, since models refuse in English anywhere. false: "
        "the loss prefers refusals in the prompt's language, and a language without a list needs `further`.",
    )
    further: dict[LanguageTag, Annotated[list[str], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="Openings to read beside these, by language.",
    )

    @property
    def described(self) -> str:
        """What is read, in words."""
        english = "" if self.english_everywhere else ", English ones in English alone"
        return f"those listed, {sum(map(len, self.further.values()))} further ones{english}"

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
