"""Settings of bundles made from English: their translation, its checks, twins, and a model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mlc_ray._registry import resolve
from mlc_ray.config.base import (
    RESUME,
    Fraction,
    LanguageTag,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Resume,
    RunName,
    Section,
)
from mlc_ray.config.chat import ChatSection
from mlc_ray.config.component import ComponentSettings
from mlc_ray.config.data import SourceSection
from mlc_ray.config.logs import LoggedSection
from mlc_ray.config.paths import StoredPath
from mlc_ray.config.placement import ENV, VariableNames
from mlc_ray.config.score import EngineSection, JudgeSettings, TranslatorSection

Kind = Literal["harmful", "benign"]
_REFUSAL: Any = {}  # validated like any other value: the settings of the judge that is the default


def _refuse_repeated(field: str, values: Sequence[str]) -> None:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{field} has {', '.join(map(repr, repeated))} more than once; name each once")


class ChecksSection(Section):
    """What a translation must satisfy."""

    markers: bool = Field(
        True,
        description="Take a reply only between the markers that the request asks for. Small models forget them: false "
        "takes the whole reply, and leaves it to the other checks.",
    )
    min_confidence: Fraction = Field(
        0.2, description="Where another language is likelier than the one asked for, its least share by lingua."
    )
    min_length_ratio: PositiveFloat = Field(
        0.4,
        description="Shortest translation, in characters of the source's; Han counts as three, Kana and Hangul as two.",
    )
    max_length_ratio: PositiveFloat = Field(2.5, description="Longest translation, counted alike.")
    min_chrf: Annotated[float, Field(ge=0, le=100)] = Field(
        40.0, description="Least chrF of the translation back into English against the source; 0 leaves it out."
    )
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Jaccard similarity of characters' 5-grams from which two prompts of a kind are duplicates."
    )

    @model_validator(mode="after")
    def _a_range(self) -> ChecksSection:
        if self.min_length_ratio >= self.max_length_ratio:
            raise ValueError(
                f"min_length_ratio={self.min_length_ratio} is not below max_length_ratio={self.max_length_ratio}"
            )
        return self


class TwinsSection(Section):
    """Prompts of the other kind in the same form, written by the translator."""

    of: Annotated[list[Kind], Field(min_length=1)] = Field(
        ["harmful"], description="Kinds of the bundles that get a twin: `harmful` ones a benign twin, and the reverse."
    )
    judge: TranslatorSection | None = Field(
        None, description="Who says whether a twin is harmful or benign (default: the translator itself)."
    )

    @model_validator(mode="after")
    def _each_kind_once(self) -> TwinsSection:
        _refuse_repeated("twins.of", self.of)
        return self


class OnPolicySection(Section):
    """Answers of a model itself: benign prompts answered and the answer chosen, harmful ones declined."""

    model: StoredPath = Field(
        description="The untouched model: a folder, its URL, or hub name `NAME[#REVISION]`; also a run's folder."
    )
    kinds: Annotated[list[Kind], Field(min_length=1)] = Field(["benign"], description="Kinds of prompts it answers.")
    languages: Literal["english", "one_other", "all"] = Field(
        "english",
        description="`english` prompts alone; those in English and in `one_other` language of each bundle, by a hash "
        "of its `pair` or else content; or those in `all` that it has.",
    )
    pairs: bool = Field(True, description="Also the rejected answer: to a benign prompt a refusal.")
    refusals: dict[LanguageTag, str] = Field(
        {}, description="A refusal by language, used as it is; in other languages the model is asked to decline."
    )
    otherwise: Literal["reject", "given"] = Field(
        "reject", description="Without an own answer in English: `reject` the bundle, or keep the answers `given`."
    )
    cut_off: Literal["shorten", "reject"] = Field(
        "shorten", description="An answer cut off at max_new_tokens: end it at its last whole sentence, or reject it."
    )
    max_new_tokens: PositiveInt = Field(128, description="Longest answer, in tokens.")
    chat: ChatSection | None = Field(
        None, description="The conversation that prompts stand in (default: the one that the model was trained in)."
    )
    engine: EngineSection = EngineSection()
    judge: Annotated[JudgeSettings, ComponentSettings("judge", default="refusal")] = Field(
        _REFUSAL, description="Who says what refuses; one without an engine (`refusal`, `endpoint`)."
    )

    def needs_refusal(self, kind: Kind) -> bool:
        """Whether a prompt of `kind` takes a refusal: what is rejected, or of a harmful one what is chosen."""
        return self.pairs or kind == "harmful"

    def asks(self, kind: Kind, code: str) -> bool:
        """Whether anything that the model says to a prompt as it stands could be used."""
        return kind == "benign" or self.pairs or code not in self.refusals

    @model_validator(mode="after")
    def _refusals_are_read(self) -> OnPolicySection:
        _refuse_repeated("answers.kinds", self.kinds)
        if not self.refusals:
            return self
        if blank := [code for code, text in self.refusals.items() if not text.strip()]:
            raise ValueError(
                f"answers.refusals.{blank[0]}={self.refusals[blank[0]]!r} is blank; write a refusal, or leave it out"
            )
        if not any(map(self.needs_refusal, self.kinds)):
            raise ValueError(
                "answers.refusals is read for rejected answers and harmful prompts, and answers.pairs=false with "
                "answers.kinds=['benign'] has neither; remove it"
            )
        if self.languages == "english" and (others := sorted(self.refusals.keys() - {"en"})):
            raise ValueError(
                f"answers.refusals.{others[0]} is not read with answers.languages='english'; remove it, or set "
                "answers.languages=all"
            )
        return self

    @model_validator(mode="after")
    def _judged_here(self) -> OnPolicySection:
        runs = resolve("judge", self.judge.name).runs
        if runs not in ("inline", "service"):
            raise ValueError(
                f"answers.judge={self.judge.name!r} runs {'an engine' if runs == 'engine' else 'on prompts alone'}, "
                "for which there is no place beside the model that answers; set judge=refusal or judge=endpoint"
            )
        translator = self.judge.translator
        if translator is not None and translator.model is not None:
            raise ValueError(
                f"answers.judge.translate.model={translator.model!r} needs an engine beside the model that answers; "
                "set judge.translate.endpoint, or leave translate out"
            )
        return self


class TranslateConfig(LoggedSection):
    """Bundles made from English ones: prompts in further languages, twins, and a model's own answers."""

    command: ClassVar = "translate"
    name: RunName = Field(description="Folder name of what is made.")
    output_dir: StoredPath = Field("runs/translations", description="Where its folder goes.")
    sources: Annotated[list[SourceSection], Field(min_length=1)] = Field(description="Bundles with English prompts.")
    languages: list[LanguageTag] = Field(
        [], description="Languages to translate into; prompts that a bundle has in them already are kept."
    )
    translator: TranslatorSection | None = Field(None, description="Who translates, and writes twins.")
    translate_answers: bool | Literal["complete"] = Field(
        False,
        description="Translate the given answers, too; not with `answers`. `complete` leaves out of a bundle each "
        "language in which its answers are not used, for losses that need them in all of its languages.",
    )
    checks: ChecksSection = ChecksSection()
    twins: TwinsSection | None = Field(None, description="Write twins of prompts, and translate these too.")
    answers: OnPolicySection | None = Field(None, description="Let a model answer the prompts itself.")
    min_languages: NonNegativeInt = Field(
        1, description="A bundle with prompts in fewer of `languages` that pass the checks is rejected."
    )
    limit: PositiveInt | None = Field(None, description="At most this many bundles of each kind.")
    on_invalid: Literal["fail", "skip"] = Field("fail", description="What an invalid row does; every one is reported.")
    shard_bundles: PositiveInt = Field(1000, description="Bundles of the sources worked on at once, a file of bundles.")
    resume: Resume = Field("never", description=RESUME)
    address: str = Field("auto", description="Ray address, as cluster.address of a training run.")
    env: VariableNames = ENV
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="`auto` uses GPUs if the cluster has any.")

    @model_validator(mode="after")
    def _something_to_do(self) -> TranslateConfig:
        writes = [name for name in ("languages", "twins") if getattr(self, name)]
        if not writes and self.answers is None:
            raise ValueError("nothing is asked for: set languages, twins or answers")
        if writes and self.translator is None:
            raise ValueError(f"{writes[0]} needs a translator: set translator.model or translator.endpoint")
        if self.translator is not None and not writes:
            raise ValueError("translator is read with languages or twins only; set one of them, or remove it")
        if self.translate_answers and not self.languages:
            raise ValueError("translate_answers is read with languages only; set them, or remove it")
        if self.translate_answers and self.answers is not None:
            raise ValueError(
                "translate_answers translates the given answers, which are not those that answers lets the model "
                "give; make own answers first, by this command with --set translate_answers=false --set "
                f"answers.languages=english, then translate them: mlc-ray translate --bundles {self.output_dir}/"
                f"{self.name}/bundles --languages {','.join(self.languages)} --translator MODEL --out FOLDER --set "
                "translate_answers=true"
            )
        if "min_languages" in self.model_fields_set and self.min_languages > len(self.languages):
            raise ValueError(
                f"min_languages={self.min_languages} is more than the {len(self.languages)} of languages; lower it"
            )
        return self

    @model_validator(mode="after")
    def _checks_are_read(self) -> TranslateConfig:
        unread = [] if self.languages else ["min_chrf"]
        if not (self.languages or self.twins):
            unread += ["markers", "min_length_ratio", "max_length_ratio"]
        for name in unread:
            if (value := getattr(self.checks, name)) != ChecksSection.model_fields[name].default:
                needed = "languages" if name == "min_chrf" else "languages or twins"
                raise ValueError(f"checks.{name}={value} is read with {needed} only; remove it, or set {needed}")
        return self

    @model_validator(mode="after")
    def _other_languages(self) -> TranslateConfig:
        if english := [code for code in self.languages if code.partition("-")[0] == "en"]:
            raise ValueError(f"languages has {english[0]!r}, which is what is translated from; leave it out")
        _refuse_repeated("languages", self.languages)
        return self
