"""Judges: what a response is. A judge declares its languages, and says `unparsed` where it cannot tell.

This is the interface and the list of judges; each judge is a module of its own. A judge answers one or both of two
questions, each a *measure*: does the response refuse (`refused`), and is it harmless (`safe`)? What runs where:

    inline    pure Python, beside the data (`refusal`)
    engine    a guard model in vLLM engines, one per Ray actor (`guards`)
    service   one actor that asks an endpoint, so that its cache and its cost cap are one (`endpoint`)
    prompts   needs no response: it reads the policy's own log-probs (`likelihood`)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from mlc_ray.config import JudgeSection
from mlc_ray.errors import MlcRayError
from mlc_ray.types import Answer, Measure, Verdict, Via, primary_language

Runs = Literal["inline", "engine", "service", "prompts"]


class JudgeError(MlcRayError):
    """A judge cannot be made as asked, or its word lists are damaged."""


class UncoveredLanguageError(MlcRayError):
    """The judge cannot read a language that is to be scored; the message names it and the ways out."""


class Judge(Protocol):
    """Turns responses into verdicts.

    `measures` are the questions it answers: a verdict's `behaviour` is None unless `refused` is among them, its
    `safety` None unless `safe` is. `languages` holds the primary codes it declares (`zh` covers `zh-Hant`), or is None
    for a judge that declares all. `judge` gives a verdict per answer, in order, and never raises on what a model may
    answer: what cannot be read is `unparsed`.
    """

    name: str
    measures: tuple[Measure, ...]
    languages: frozenset[str] | None

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """The verdict on each answer."""
        ...


def how_read(code: str, languages: frozenset[str] | None, settings: JudgeSection) -> Via | None:
    """How a judge of `languages` comes to read `code` under `settings`; None if it may not be asked to."""
    covered = languages is None or primary_language(code) in languages
    translate = settings.translate
    if translate is not None and primary_language(code) != "en" and (translate.all_languages or not covered):
        return "translated"
    if covered:
        return ""
    return "uncovered" if settings.allow_uncovered else None


def check_coverage(
    name: str, languages: frozenset[str] | None, asked: Iterable[str], settings: JudgeSection, *, why: str = ""
) -> dict[str, Via]:
    """How each language of `asked` is read by the judge `name`; before anything is generated.

    `why` tells in a sentence why that judge is asked at all, where the settings name another. Raises
    `UncoveredLanguageError` naming every language that the judge cannot read, and the ways out.
    """
    ways = {code: how_read(code, languages, settings) for code in sorted(set(asked))}
    if missing := [code for code, via in ways.items() if via is None]:
        covered = ",".join(sorted(languages or ()))
        fixes = [
            f"leave it out with languages=[...] (this judge reads {covered})",
            "translate first (judge.translate)",
            "or set judge.allow_uncovered=true, and the tables will mark it",
        ]
        if name == "refusal":
            fixes.insert(1, f"add its refusal phrases as mlc_ray/judges/phrases/{primary_language(missing[0])}.txt")
        raise UncoveredLanguageError(
            f"the judge {name!r} does not cover {', '.join(map(repr, missing))}: {', '.join(fixes)}"
            + (f" ({why})" if why else "")
        )
    return {code: via for code, via in ways.items() if via is not None}
