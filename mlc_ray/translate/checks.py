"""What a translation is checked for. Each check is a function that says why a text fails it, or None.

They read texts alone and ask no model; `CHECKS` has them all by the name under which a rejected text is counted.
Near-duplicates are found among all prompts (`NearDuplicates`), where bundles are put together.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mlc_ray.config.translate import ChecksSection
from mlc_ray.generate.translate import excerpt
from mlc_ray.judges.degenerate import script_of
from mlc_ray.judges.languages import Identifier, scripts_of
from mlc_ray.judges.phrase_lists import normalise
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.types import Answer


@dataclass(frozen=True)
class Pair:
    """A text in English, its translation, and that translated back; None where it was not."""

    source: str
    text: str
    language: str
    back: str | None = None


class Tools:
    """What checks need beside a pair: the settings, who tells languages apart, who reads refusals, and chrF."""

    def __init__(self, settings: ChecksSection, identifier: Identifier) -> None:
        self.settings, self.identifier = settings, identifier
        self._judge = RefusalJudge()

    def refuses(self, text: str, language: str) -> bool:
        """Whether a text opens with a refusal, in its language or in English."""
        [verdict] = self._judge.judge([Answer("", text, language, "benign")])
        return verdict.behaviour == "refused"

    def chrf(self, text: str, reference: str) -> float:
        """chrF of a text against its reference, 0 to 100, case aside (Popović 2015, as sacrebleu computes it)."""
        return float(self._chrf.sentence_score(text.casefold(), [reference.casefold()]).score)

    @cached_property
    def _chrf(self) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF()


Check = Callable[[Pair, Tools], str | None]


def language(pair: Pair, tools: Tools) -> str | None:
    """Another language is likelier than the one asked for."""
    return tools.identifier.fault(marks_out(pair.text), pair.language, tools.settings.min_confidence)


def script(pair: Pair, tools: Tools) -> str | None:
    """Most letters are in a script in which the language is not written; nothing is said of unknown languages.

    URLs, placeholders and the source's own Latin words, such as names, are not counted.
    """
    expected = scripts_of(pair.language)
    letters = [letter for letter in _own_words(pair) if letter.isalpha()]
    if expected is None or not letters:
        return None
    other = Counter(found for letter in letters if (found := script_of(letter)) not in expected)
    if 2 * other.total() <= len(letters):
        return None
    return f"{other.total()} of {len(letters)} letters are not {' or '.join(sorted(expected))}: {excerpt(pair.text)}"


def length(pair: Pair, tools: Tools) -> str | None:
    """Much shorter or longer than the source."""
    ratio = weighted_length(pair.text) / max(1, weighted_length(pair.source))
    least, most = tools.settings.min_length_ratio, tools.settings.max_length_ratio
    if least <= ratio <= most:
        return None
    return f"it is {ratio:.2f} times as long as the source, outside {least:g} to {most:g}"


def kept(pair: Pair, tools: Tools) -> str | None:
    """A number, URL, mail address or placeholder of the source is missing."""
    missing = [*(numbers(pair.source) - numbers(pair.text)), *(marks(pair.source) - marks(pair.text))]
    return f"it lacks {', '.join(map(repr, missing))}" if missing else None


def refusal(pair: Pair, tools: Tools) -> str | None:
    """The translator refused, in place of translating or after it: a line refuses, and none of the source does."""
    if any(tools.refuses(line, "en") for line in pair.source.splitlines()):
        return None
    refusing = [line for line in pair.text.splitlines() if tools.refuses(line, pair.language)]
    return f"it refuses, and the source does not: {excerpt(refusing[0])}" if refusing else None


def copy(pair: Pair, tools: Tools) -> str | None:
    """The source itself, or most of its words."""
    source, text = normalise(pair.source).split(), normalise(pair.text).split()
    if not any(map(str.isalpha, pair.source)):
        return None
    if source == text:
        return "it is the source itself"
    shared = sum((Counter(source) & Counter(text)).values())
    if len(source) >= _FEWEST_WORDS and shared > _SHARED * len(source):
        return f"it has {shared} of the {len(source)} words of the source"
    return None


def template(pair: Pair, tools: Tools) -> str | None:
    """A marker of the request or of a chat template, or words that announce a translation."""
    known = pair.source.casefold()
    for pattern in _LEAKS:
        for found in pattern.finditer(pair.text):
            if found.group().casefold() not in known:
                return f"it has {found.group()!r}, which the source has not"
    return None


def back_translation(pair: Pair, tools: Tools) -> str | None:
    """Translated back, it is too far from the source."""
    if pair.back is None or not tools.settings.min_chrf:
        return None
    if (score := tools.chrf(pair.back, pair.source)) >= tools.settings.min_chrf:
        return None
    return f"translated back it has chrF {score:.1f}, below {tools.settings.min_chrf:g}: {excerpt(pair.back)}"


CHECKS: Mapping[str, Check] = {
    "language": language,
    "script": script,
    "length": length,
    "numbers and placeholders": kept,
    "refusal": refusal,
    "copy": copy,
    "template": template,
    "back-translation": back_translation,
}
NO_TRANSLATION, NO_BACK_TRANSLATION, NEAR_DUPLICATE = "no translation", "no back-translation", "near-duplicate"
BUNDLE_REJECTED: Literal["bundle rejected"] = "bundle rejected"
INCOMPLETE = "incomplete answers"
"""The further names under which a text is rejected; the last two are of texts that pass, and are not used."""


def faults(pair: Pair, tools: Tools) -> dict[str, str]:
    """Why a translation is rejected, by the name of each check that it fails; empty if it is good."""
    found = {name: check(pair, tools) for name, check in CHECKS.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


# --------------------------------------------------------------------------------------------------- what they compare

_FEWEST_WORDS, _SHARED = 4, 0.8
_WIDE = {"Han": 3.0, "Kana": 2.0, "Hangul": 2.0}
_LEAKS = (
    re.compile(r"<\|[^|<>]{1,40}\|>"),
    re.compile(r"</?(?:s|bos|eos|think|start_of_turn|end_of_turn)>", re.IGNORECASE),
    re.compile(r"</?[\w-]+-[0-9a-f]{6}>"),
    re.compile(r"\[/?INST\]"),
    re.compile(r"```"),
    re.compile(r"^\W*(?:here is the translation|the translation(?: is)?|translation)\b", re.IGNORECASE),
)
_MARKS = re.compile(
    # In ASCII alone, since text without spaces goes on behind a URL, a mail address or %s.
    r"(?a:(?:https?://|www\.)(?:(?![<>\"'])[!-~])+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|(?<!\d)%(?:\(\w+\))?[sd]\b)"
    r"|\{\{?[\w. ]+\}?\}|\$\{\w+\}|<[A-Za-z_]+>|\[[A-Z][A-Z_ ]+\]"  # placeholders
)
_LATIN_WORD = re.compile(r"[A-Za-z]+")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[.,٬٫'’\u00a0\u202f ](?=\d{3}(?!\d))")
_NUMBER = re.compile(r"\d+(?:[.,٫]\d+)?")


def weighted_length(text: str) -> float:
    """Characters but for spaces, where those of scripts that write a word in one or two count as two or three."""
    return sum(_WIDE.get(script_of(each), 1.0) if each.isalpha() else 1.0 for each in text if not each.isspace())


def numbers(text: str) -> Counter[str]:
    """The numbers of a text in ASCII digits, without marks between thousands and with a point before decimals."""
    plain = "".join(str(unicodedata.decimal(each, each)) for each in marks_out(text))
    found = _NUMBER.findall(_BETWEEN_DIGITS.sub("", plain))
    return Counter(re.sub("[,٫]", ".", number) for number in found)


def marks(text: str) -> Counter[str]:
    """URLs, mail addresses and placeholders of a text."""
    return Counter(found.rstrip(".,;:!?)") for found in _MARKS.findall(text))


def marks_out(text: str) -> str:
    """A text without what `marks` finds, whose digits are no numbers."""
    return _MARKS.sub(" ", text)


def _own_words(pair: Pair) -> str:
    """A translation without what `marks` finds and without the source's own Latin words."""
    known = {word.casefold() for word in _LATIN_WORD.findall(pair.source)}
    return _LATIN_WORD.sub(lambda word: " " if word[0].casefold() in known else word[0], marks_out(pair.text))


class NearDuplicates:
    """Prompts of one kind in one language that are nearly the same, among all that were accepted before.

    By MinHash over the 5-grams of their characters (Broder 1997), so that memory grows with the number of prompts and
    time does not grow with its square.

    Args:
        threshold: the Jaccard similarity from which two texts are duplicates.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._indices: dict[tuple[str, str], Any] = {}

    def nearest(self, text: str, kind: str, language: str) -> str | None:
        """The name of an earlier text that this one nearly repeats; None where none does."""
        signature = _signature(text)
        lsh, known = self._index(kind, language)
        for candidate in sorted(lsh.query(signature)):
            if known[candidate].jaccard(signature) >= self._threshold:
                return str(candidate)
        return None

    def add(self, text: str, kind: str, language: str, name: str) -> None:
        """Take a text in, under a name that no other one of its kind and language has."""
        lsh, known = self._index(kind, language)
        known[name] = _signature(text)
        lsh.insert(name, known[name])

    def _index(self, kind: str, language: str) -> Any:
        from datasketch import MinHashLSH

        if (kind, language) not in self._indices:
            lsh = MinHashLSH(threshold=min(self._threshold, _STEEPEST), num_perm=_PERMUTATIONS)
            self._indices[kind, language] = lsh, {}
        return self._indices[kind, language]


def _signature(text: str) -> Any:
    from datasketch import MinHash

    plain = f" {normalise(text)} "
    signature = MinHash(num_perm=_PERMUTATIONS, seed=1)
    signature.update_batch({plain[at : at + 5].encode() for at in range(max(1, len(plain) - 4))})
    return signature


_PERMUTATIONS = 128
_STEEPEST = 0.95  # datasketch has no bands for more; candidates are compared by the threshold itself
