"""Settings of what is minimised: the alignment loss on answers, and the terms beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mlc_ray._registry import resolve
from mlc_ray.config.base import (
    ConfigError,
    Fraction,
    PositiveInt,
    Section,
)
from mlc_ray.config.component import ComponentSettings, settings_by_default
from mlc_ray.config.openings import OpeningsSection


class LossSettings(Section):
    """What every alignment loss has; its own settings are in its class, `mlc_ray.losses.NAME`."""

    loss: str = Field(description="Alignment loss: a name, or package.module:Class of your own.")
    sft_weight: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Factor of the mean negative log-likelihood per token of the chosen answers, added to the loss: "
        "preference losses alone may lower what the chosen answers' own probability is. 0 switches it off.",
    )


class AnswerSettings(LossSettings):
    """What a loss of answers in one language has beside that."""

    answers: Literal["response", "given", "all"] = Field(
        "response",
        description="`response`: answers in the response language alone. `all`: those in every language of a bundle, "
        "each to the prompt in it; a bundle's loss is the mean over them (the fully translated upper bound). `given`: "
        "the same of those languages that a bundle has answers in, which may be some.",
    )
    response_share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="With `answers` in several languages: the weight of the response language's in a bundle's loss, of "
        "which the others have the rest alike (default: all weigh alike).",
    )

    @model_validator(mode="after")
    def _share_of_several(self) -> Self:
        if self.response_share is not None and self.answers == "response":
            raise ValueError(
                f"objective.response_share={self.response_share} is read with answers in several languages, and "
                "objective.answers='response' reads one; set answers=given or all, or remove it"
            )
        return self


class TermSettings(Section):
    """What every further term has; its own settings are in its class, `mlc_ray.losses.NAME`."""

    name: str = Field(description="Term: a name, or package.module:Class of your own (default: its key).")
    weight: Annotated[float, Field(ge=0)] = Field(0.1, description="Factor in the total loss. 0 switches it off.")
    start: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of all optimizer steps after which the term begins; before, it is not computed."
    )
    ramp: Fraction = Field(
        0.0, description="Share of all optimizer steps over which the term's weight rises linearly, from its start on."
    )

    def factor(self, step: int, total_steps: int) -> float:
        """What multiplies `weight` at optimizer step `step` (from 0) of `total_steps`: 0 before the start, 1 in full.

        A ramp of R steps has 1/R, 2/R, ... 1. A pure function, so resuming needs no state.
        """
        since = step - math.floor(self.start * total_steps + 1e-9)  # 0.29 x 100 is a little below 29 in floats
        rising = max(1, round(self.ramp * total_steps))
        return min(1.0, max(0, since + 1) / rising)

    @model_validator(mode="after")
    def _reaches_its_weight(self) -> Self:
        if self.start + self.ramp > 1:
            raise ValueError(
                f"start={self.start} and ramp={self.ramp} end after the last step, so that the term never has its "
                "weight; their sum must be at most 1"
            )
        return self


class TapSection(TermSettings):
    """Where and when prompts are tapped. It stands under `mlc`, whose term adds its own settings to it."""

    layer: Annotated[int, Field(strict=True)] | Annotated[float, Field(gt=0, lt=1)] | Literal["last"] = Field(
        "last",
        description=(
            "Index into hidden_states: 0 embeddings, N after the last block and final norm; or a fraction of N."
        ),
    )
    every: PositiveInt = Field(
        1, description="Add the terms every this many optimizer steps; other steps skip their forward."
    )
    extractor_dim: PositiveInt | None = Field(
        512, description="Output size of the linear extractor; `null`: none, terms read the tapped states themselves."
    )
    centring: bool = Field(
        False,
        description="Whether the term under `mlc` first takes from each representation the mean over its group "
        "(`train.group_bundles`).",
    )

    @field_validator("layer", mode="before")
    @classmethod
    def _index_fraction_or_last(cls, value: Any) -> Any:
        index = isinstance(value, int) and not isinstance(value, bool)
        if not (index or value == "last" or (isinstance(value, float) and 0 < value < 1)):
            raise ValueError(
                "an index is a whole number, written without a point (20); a fraction of the depth lies between 0 and "
                "1, both excluded (0.5); or last"
            )
        return value


def resolve_layer(layer: int | float | str, depth: int) -> int:
    """`mlc.layer` (an index, a fraction of the depth, or "last") as an index 0..N.

    Raises:
        ConfigError: It is out of range.
    """
    index = depth if layer == "last" else round(layer * depth) if isinstance(layer, float) else int(layer)
    if not 0 <= index <= depth:
        raise ConfigError(
            f"mlc.layer={layer!r} is outside 0..{depth}, the layers this model has; use 'last' for {depth}"
        )
    return index


class ObjectiveConfig(Section):
    """What is minimised: total = alignment + sft_weight * sft + mlc.weight * mlc + sum of terms.NAME.weight * NAME."""

    objective: Annotated[LossSettings, ComponentSettings("loss", by="loss", default="dpo")] = Field(
        default_factory=settings_by_default, description="The alignment loss on the answers in the response language."
    )
    mlc: Annotated[TapSection, ComponentSettings("term", default="mlc")] = Field(
        default_factory=settings_by_default,
        description="The multilingual-consistency term, and the tap that all terms read.",
    )
    terms: Annotated[Mapping[str, TermSettings], ComponentSettings("term", by_key=True)] = Field(
        default_factory=dict, description="Further terms by name, on the steps of `mlc.every` (default: none)."
    )
    openings: OpeningsSection = OpeningsSection()

    @property
    def active_terms(self) -> dict[str, TermSettings]:
        """MLC and the further terms, by name, but for those of weight 0."""
        return {name: term for name, term in {"mlc": self.mlc, **self.terms}.items() if term.weight > 0}

    @property
    def needs_reference(self) -> bool:
        """Whether anything in the loss compares the policy with a frozen reference."""
        return resolve("loss", self.objective.loss).needs_reference or any(
            of.needs_reference_state or of.needs_reference_logits
            for of in (resolve("term", term.name) for term in self.active_terms.values())
        )

    @property
    def reads_decisions(self) -> bool:
        """Whether a term reads how likely responses are to open as refusals."""
        return any(resolve("term", term.name).needs_decisions for term in self.active_terms.values())

    @model_validator(mode="after")
    def _one_sft_loss(self) -> Self:
        loss, weight = self.objective.loss, self.objective.sft_weight
        if weight and resolve("loss", loss).is_sft:
            raise ValueError(f"objective.sft_weight={weight} adds what objective.loss={loss!r} is already; remove it")
        return self

    @model_validator(mode="after")
    def _one_tap_and_parts_of_different_names(self) -> Self:
        for name, term in self.terms.items():
            if isinstance(term, TapSection):
                raise ValueError(
                    f"terms.{name}.name={term.name!r} has a tap of its own, but all terms read the one under mlc; "
                    f"set mlc.name={term.name!r} to put it in MLC's place"
                )
        if taken := sorted({"mlc", "alignment", "sft", "total"} & self.terms.keys()):
            raise ValueError(
                f"terms.{taken[0]}: loss/{taken[0]} is the name of another part; give the term another key, and its "
                f"class as terms.KEY.name"
            )
        others = {"loss", "reward", "log_prob", "refusal", "collapse", "validation", "harmful", "benign"}
        if taken := sorted(others & self.terms.keys()):
            raise ValueError(
                f"terms.{taken[0]}: {taken[0]}/... are other numbers that a run logs; give the term another key, and "
                "its class as terms.KEY.name"
            )
        return self
