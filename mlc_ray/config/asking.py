"""Settings of how a model is asked, beside the conversation that prompts stand in (`chat`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mlc_ray.config.base import PositiveInt, Section


class AskingSection(Section):
    """How often a prompt is asked, how the answer is drawn, and what becomes of a reasoning model's thoughts."""

    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0, description="Temperature that answers are drawn at; 0 answers greedily."
    )
    samples: Annotated[PositiveInt, Field(le=1000)] = Field(
        1, description="Answers drawn for each prompt; more than one needs a temperature above 0."
    )
    seed: Annotated[int, Field(ge=0, le=2**31)] = Field(0, description="Seed of what is drawn.")
    reasoning: Literal["strip", "judge", "forbid"] = Field(
        "strip",
        description="Thoughts of a reasoning model: `strip` judges the answer without them, `judge` judges them too, "
        "`forbid` turns them off by the chat template's own switch.",
    )

    @model_validator(mode="after")
    def _drawn(self) -> AskingSection:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} with temperature=0 would be {self.samples} times one greedy answer; set "
                "temperature, e.g. 1.0, or samples=1"
            )
        if "seed" in self.model_fields_set and self.temperature == 0:
            raise ValueError(f"seed={self.seed} is read with a temperature above 0 only; set one, or remove seed")
        return self


GREEDY = AskingSection()
"""One greedy answer a prompt, without the thoughts that led to it."""
