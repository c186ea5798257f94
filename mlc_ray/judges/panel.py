"""A panel: another judge for each kind of prompt, measure and language; and who is asked what in any score.

    judge:
      name: panel
      judges:
        - judge: {name: llama-guard, model: /models/guard}   # says what is safe, in its eight languages
          kinds: [harmful]
        - judge: {name: qwen3guard, model: /models/qwen}     # ... and this one in the others
          kinds: [harmful]
          measures: [safe]
        - judge: refusal                                     # says what is refused, on both sides

The first judge of the list that may judge a prompt of that kind, by that measure, in that language, does. What none of
them may judge is refused before anything is generated.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, get_args

from pydantic import Field, field_validator, model_validator

from mlc_ray._registry import register
from mlc_ray.config import JudgeSettings, ReadingJudgeSettings, TranslateSection
from mlc_ray.config.base import LANGUAGE_TAG, Section
from mlc_ray.config.component import ComponentSettings
from mlc_ray.generate.translate import check_translations
from mlc_ray.judges.base import BaseJudge, Judge, JudgeError, Policy, Runs, UncoveredLanguageError, make_judge
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.types import Answer, Kind, Measure, Via, primary_language

Cells = Mapping[tuple[Kind, str], Mapping[Measure, Via]]
"""What a judge is asked: for (kind, language) the measures, and how it reads the language."""

_MEASURES: tuple[Measure, ...] = get_args(Measure)
_KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Reader:
    """A judge that reads responses of a score; `name` is unique among the readers of the score."""

    name: str
    judge: Judge
    cells: Cells


class PanelMember(Section):
    """A judge of a panel, and what it may judge."""

    judge: Annotated[ReadingJudgeSettings, ComponentSettings("judge")] = Field(description="Who judges.")
    kinds: Annotated[list[Kind], Field(min_length=1)] = Field(
        list(_KINDS), description="It judges responses to prompts of these kinds."
    )
    measures: Annotated[list[Measure], Field(min_length=1)] | None = Field(
        None, description="It says this of them (default: all that it can say)."
    )
    languages: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="In these languages; `zh` is `zh-Hant` too (default: all that it declares)."
    )

    @field_validator("languages")
    @classmethod
    def _tags(cls, codes: list[str] | None) -> list[str] | None:
        if unlike := [code for code in codes or () if not LANGUAGE_TAG.fullmatch(code)]:
            raise ValueError(
                f"languages has {', '.join(map(repr, unlike))}, not a language tag; write them like 'en', 'zh-Hant', "
                "'pt-BR' (BCP 47, with its cases)"
            )
        return codes

    @model_validator(mode="after")
    def _what_the_panel_says_for_all(self) -> PanelMember:
        for name in ("translate", "allow_uncovered"):
            if name in self.judge.model_fields_set:
                raise ValueError(
                    f"judge.{name} of {self.judge.name!r} is not read in a panel, which decides for all its judges; "
                    f"set {name} beside judges"
                )
        return self


class _Member:
    """A member that is made: its judge, and what it may judge."""

    def __init__(self, asked: PanelMember, number: int) -> None:
        judge = make_judge(asked.judge)
        assert isinstance(judge, Judge), "no other has settings that extend ReadingJudgeSettings"
        self.judge, self.asked = judge, asked
        self.measures = tuple(m for m in judge.measures if asked.measures is None or m in asked.measures)
        if unknown := sorted(set(asked.measures or ()) - set(judge.measures)):
            raise JudgeError(
                f"judge.judges.{number}.measures has {unknown[0]!r}, which {judge.name!r} does not say (it says "
                f"{', '.join(judge.measures)}); remove it, or name another judge"
            )

    def may(self, kind: Kind, measure: Measure) -> bool:
        """Whether it may judge prompts of a kind by a measure, in some language."""
        return kind in self.asked.kinds and measure in self.measures

    def speaks(self, code: str) -> bool:
        """Whether it is asked about a language, by its `languages`."""
        wanted = self.asked.languages
        return wanted is None or code in wanted or primary_language(code) in wanted

    def reads(self, code: str) -> bool:
        """Whether it is asked about a language and declares it."""
        declared = self.judge.languages
        return self.speaks(code) and (declared is None or primary_language(code) in declared)

    def identity(self) -> str:
        """The judge, and what it may judge where that is not all."""
        parts = {"kinds": self.asked.kinds, "measures": self.measures, "languages": self.asked.languages}
        told = " ".join(f"{name}={','.join(sorted(values))}" for name, values in parts.items() if values is not None)
        return f"[{self.judge.identity} for {told}]"


@register("judge", "panel")
class PanelJudge(BaseJudge):
    """Several judges, each for kinds of prompts, measures and languages; which one judged is in every table."""

    name = "panel"
    runs: ClassVar[Runs] = "engine"  # it may; what each of its judges needs is planned for each

    class Settings(JudgeSettings):
        """The judges, in the order in which they are considered."""

        name: str = "panel"
        judges: Annotated[list[PanelMember], Field(min_length=1)] = Field(
            description="The first that may judge a response by a measure does."
        )
        translate: TranslateSection | None = Field(
            None, description="Translate languages that none of the judges declares into English first."
        )

        @property
        def translator(self) -> TranslateSection | None:
            """The section `translate`."""
            return self.translate

    settings: Settings

    def __init__(self, settings: JudgeSettings) -> None:
        super().__init__(settings)
        self.members = [_Member(member, number) for number, member in enumerate(self.settings.judges)]
        declared = [member.judge.languages for member in self.members]
        every = None if None in declared else frozenset().union(*(languages or () for languages in declared))
        self.languages = every

    @cached_property
    def measures(self) -> tuple[Measure, ...]:  # type: ignore[override]  # follows from the settings here
        """What any of its judges says."""
        return tuple(measure for measure in _MEASURES if any(measure in each.measures for each in self.members))

    def identity_parts(self) -> list[str]:
        """All its judges, in order."""
        return [member.identity() for member in self.members]

    def check_ready(self, cache_dir: Path) -> None:
        """Check every judge, and the translator."""
        for member in self.members:
            member.judge.check_ready(cache_dir)
        super().check_ready(cache_dir)

    def fitted(self, prompts: Mapping[str, Sequence[str]], policy: Policy) -> JudgeSettings:
        """Each judge fitted to the prompts in languages that it may be asked about."""
        if (translate := self.settings.translate) is not None:
            wanted = {code: texts for code, texts in prompts.items() if self._may_be_translated(code)}
            trust = policy.trust_remote_code
            check_translations(translate, wanted, policy.model, policy.max_new_tokens, trust_remote_code=trust)

        def fitted(member: _Member) -> JudgeSettings:
            own = {code: texts for code, texts in prompts.items() if member.speaks(code)}
            return member.judge.fitted(own, policy) if own else member.judge.settings

        return self._with(map(fitted, self.members))

    def fitted_to(self, answers: Sequence[Answer]) -> JudgeSettings:
        """Each judge fitted to the answers that it may be asked about."""

        def fitted(member: _Member) -> JudgeSettings:
            kinds = member.asked.kinds
            own = [answer for answer in answers if answer.kind in kinds and member.speaks(answer.language)]
            return member.judge.fitted_to(own) if own else member.judge.settings

        return self._with(map(fitted, self.members))

    def _with(self, judges: Iterable[JudgeSettings]) -> JudgeSettings:
        asked = zip(self.settings.judges, judges, strict=True)
        members = [member.model_copy(update={"judge": judge}) for member, judge in asked]
        return self.settings.model_copy(update={"judges": members})

    def _may_be_translated(self, code: str) -> bool:
        translate = self.settings.translate
        if translate is None or primary_language(code) == "en":
            return False
        return translate.all_languages or not all(member.reads(code) for member in self.members)

    def readers(self, asked: Collection[tuple[Kind, str]]) -> list[Reader]:
        """Who judges what of the prompts asked, given as (kind, language); a judge with nothing to do is left out.

        Raises:
            JudgeError: no judge says which benign prompts are refused, or anything of harmful ones.
            UncoveredLanguageError: no judge may judge a kind of prompts in a language by a measure that another does.
        """
        cells: list[dict[tuple[Kind, str], dict[Measure, Via]]] = [{} for _ in self.members]
        missing: list[tuple[Measure, Kind, str]] = []
        for kind, code in sorted(asked):
            measures = [measure for measure in _MEASURES if any(each.may(kind, measure) for each in self.members)]
            self._check_side(kind, measures)
            for measure in measures:
                if (found := self._choose(kind, measure, code)) is None:
                    missing.append((measure, kind, code))
                else:
                    number, via = found
                    cells[number].setdefault((kind, code), {})[measure] = via
        if missing:
            self._refuse(missing)
        names = list(_unique(member.judge.name for member in self.members))
        everyone = zip(names, self.members, cells, strict=True)
        return [Reader(name, member.judge, own) for name, member, own in everyone if own]

    def _choose(self, kind: Kind, measure: Measure, code: str) -> tuple[int, Via] | None:
        """The first judge that reads the language itself; else in translation; else, if allowed, all the same."""
        may = [(number, each) for number, each in enumerate(self.members) if each.may(kind, measure)]
        translate, foreign = self.settings.translate, primary_language(code) != "en"
        if not (translate is not None and translate.all_languages and foreign):
            for number, member in may:
                if member.reads(code):
                    primary = primary_language(code)
                    return number, "unmeasured" if primary in member.judge.unmeasured else ""
        for number, member in may:
            if member.speaks(code) and translate is not None and foreign:
                return number, "translated"
            if member.speaks(code) and self.settings.allow_uncovered:
                return number, "uncovered"
        return None

    def _check_side(self, kind: Kind, measures: Sequence[Measure]) -> None:
        if kind == "benign" and "refused" not in measures:
            raise JudgeError(
                "judge.judges: none says which benign prompts are refused, without which a score has one side only; "
                "add {judge: refusal, kinds: [benign]}"
            )
        if not measures:
            raise JudgeError(f"judge.judges: none judges {kind} prompts; add one, or leave these prompts out (only=)")

    def _refuse(self, missing: Sequence[tuple[Measure, Kind, str]]) -> None:
        lacks: dict[tuple[Measure, Kind], list[str]] = {}
        for measure, kind, code in missing:
            lacks.setdefault((measure, kind), []).append(code)
        what = "; ".join(
            f"what is {measure} of {kind} prompts in {', '.join(map(repr, codes))}"
            for (measure, kind), codes in lacks.items()
        )
        raise UncoveredLanguageError(
            f"no judge of the panel says {what}: add one to judge.judges that reads these languages, have no judge say "
            "it (measures, kinds), leave the languages out (languages=[...]), translate first (judge.translate), or "
            "set judge.allow_uncovered=true, and the tables will mark them"
        )


def readers_of(judge: BaseJudge, asked: Collection[tuple[Kind, str]]) -> list[Reader]:
    """Who reads the responses to prompts of these (kind, language); nobody for a judge that reads the policy.

    A judge alone that does not say what is refused is joined by the phrase judge: without the refusals of benign
    prompts a score means nothing.

    Raises:
        UncoveredLanguageError: no judge may be asked about a language.
        JudgeError: see `PanelJudge.readers`.
    """
    if isinstance(judge, PanelJudge):
        return judge.readers(asked)
    if not isinstance(judge, Judge):
        return []
    joined = phrases_beside(judge)
    why = f"its phrases join because {judge.name} does not say what is refused"
    return [_alone(judge, asked, ""), *([_alone(joined, asked, why)] if joined is not None else [])]


def phrases_beside(judge: BaseJudge) -> RefusalJudge | None:
    """The phrase judge, for a judge that does not say itself what is refused."""
    if isinstance(judge, PanelJudge) or "refused" in judge.measures:
        return None
    settings = judge.settings
    return RefusalJudge(RefusalJudge.Settings(translate=settings.translator, allow_uncovered=settings.allow_uncovered))


def _alone(judge: Judge, asked: Collection[tuple[Kind, str]], why: str) -> Reader:
    ways = judge.coverage({code for _, code in asked}, why=why)
    return Reader(judge.name, judge, {cell: dict.fromkeys(judge.measures, ways[cell[1]]) for cell in sorted(asked)})


def _unique(names: Iterable[str]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


def told(readers: Sequence[Reader], measure: Measure) -> str:
    """Who says what is `measure`, in words: one judge's name, or each with the prompts that it judges by it."""
    asked = {
        reader.name: {cell for cell, ways in reader.cells.items() if measure in ways}
        for reader in readers
        if any(measure in ways for ways in reader.cells.values())
    }
    if len(asked) == 1:
        return next(iter(asked))
    every = set().union(*asked.values()) if asked else set()
    parts = []
    for name, cells in asked.items():
        by_kind = {kind: tuple(sorted(code for each, code in cells if each == kind)) for kind in _KINDS}
        kinds = {kind for kind, _ in every}
        if len({by_kind[kind] for kind in kinds}) == 1:
            where = ", ".join(by_kind[next(iter(kinds))])
        else:
            where = "; ".join(f"{kind}: {', '.join(codes)}" for kind, codes in by_kind.items() if codes)
        parts.append(f"{name} ({where})")
    return ", ".join(parts)
