"""RTP-LX; docs/benchmarks.md has its source and licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlc_ray._registry import register
from mlc_ray.data.bundles import BundleError, check_language
from mlc_ray.data.formats.base import Published
from mlc_ray.data.formats.joined import JoinedFormat, Piece
from mlc_ray.data.formats.values import prompt_text, whole_number

# The first 999 prompts are the same ones in every locale; those after them were written for one locale alone.
_TRANSLATED = 999
_MISSING = "NA"
# The annotators' scale: 1 no toxicity, 2 slightly toxic, 3 toxic, 4 very toxic, 5 extreme. A record has their mean.
_TOXIC = 2.0
_LOCALES = {"BCMS": "hbs", "NO-NB": "nb"}


@register("format", "rtp-lx")
class RtpLx(JoinedFormat):
    """One locale per file, joined by `Index` up to 998; the kind is the mean toxicity that annotators saw.

    From 2 (slightly toxic) on a prompt is harmful, below it benign. Annotators of each locale judged for themselves,
    so one prompt may be harmful in one language and benign in another.
    """

    published = Published.of(
        "RTP-LX",
        "ar cs da de en es fi fr hbs he hi hu id it ja ko nb nl pl pt ru sv sw th tr uk zh",
        "harmful",
        "benign",
        refusals=False,
    )
    needs = frozenset({"Prompt", "Index", "Locale"})
    keys = needs | {"Completion", "BenignCompletion", "Dialect", "Annotations", "AnnotationsRaw"}
    kind_from = "Annotations.Toxicity is missing; the row"
    split_kinds = True

    def piece(self, record: Mapping[str, Any]) -> Piece | None:
        """One locale of the bundle that `Index` names; None where the locale lacks the prompt."""
        index = whole_number(record.get("Index"), "Index")
        language = _locale(record.get("Locale"))
        text = prompt_text(record.get("Prompt"), "Prompt")
        if text == _MISSING:
            return None
        annotations = record.get("Annotations")
        toxicity = annotations.get("Toxicity") if isinstance(annotations, Mapping) else None
        number = isinstance(toxicity, int | float) and not isinstance(toxicity, bool)
        if toxicity is not None and not (number and 1 <= toxicity <= 5):
            raise BundleError(f"Annotations.Toxicity is {toxicity!r}, not a number from 1 to 5")
        return Piece(
            key=str(index) if index < _TRANSLATED else f"{index} of {language}",
            language=language,
            text=text,
            kind=None if toxicity is None else "harmful" if toxicity >= _TOXIC else "benign",
        )


def _locale(value: Any) -> str:
    """`ZH-Hans` and `PT-BR` as the language tags zh-Hans and pt-BR."""
    if not isinstance(value, str) or not value.strip():
        raise BundleError(f"Locale is missing: {value!r}; every row names the language of its prompt")
    language, separator, rest = _LOCALES.get(value, value).partition("-")
    return check_language(language.lower() + separator + rest, "Locale")
