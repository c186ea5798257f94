"""Settings of the bundles: where they come from, what is read of them, and what is held out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mlc_ray.config.base import (
    Fraction,
    PositiveFloat,
    PositiveInt,
    Section,
)
from mlc_ray.config.component import ComponentName
from mlc_ray.config.paths import SourcePath


class SourceSection(Section):
    """One source of bundles."""

    path: SourcePath = Field(
        description="Path or URL of a file or folder, hub name `NAME[@CONFIG][:SPLIT][#REVISION]`, or, of the shipped "
        "data, `sample:train`, `sample:large`, `sample:select` or `sample:test`."
    )
    format: Annotated[str, ComponentName("format", "auto")] = Field(
        "auto",
        description=(
            "What a record is; `auto` tells it from the first record's keys. One of your own: package.module:Class."
        ),
    )
    kind: Literal["harmful", "benign"] | None = Field(
        None, description="Kind of every bundle, for formats that do not record it (default there: harmful)."
    )
    only: Literal["harmful", "benign"] | None = Field(None, description="Use the source's bundles of this kind alone.")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Use about this share of these bundles, by a hash of each one's `pair` or else content: twins stay "
        "together, and a larger share adds bundles and takes none away.",
    )


class ValidationSection(Section):
    """Held-out bundles, measured while training."""

    sources: Annotated[list[SourceSection], Field(min_length=1)] = Field(
        description="Bundles with answers, none of which is trained on."
    )
    every: PositiveInt = Field(
        50, description="Optimizer steps between measurements; the first is before training, the last at its end."
    )
    max_chosen_drop: PositiveFloat | None = Field(
        1.0,
        description="Warn when the chosen answers' summed log-prob has fallen by more nats than this since the start, "
        "as a preference loss can do that lowers the rejected ones more; null switches it off.",
    )
    min_decision_auc: Fraction | None = Field(
        0.75,
        description="Warn when a term that relates languages begins while, in the response language, the AUC of the "
        "refusal's log-odds (`openings`) over harmful against benign bundles is below this; null: do not measure it "
        "where no term does.",
    )


class DataSection(Section):
    """Which bundles, and how they become tokens."""

    train: Annotated[list[SourceSection], Field(min_length=1)] = Field(description="Training bundles.")
    validation: ValidationSection | None = Field(None, description="Held-out bundles, measured while training.")
    on_invalid: Literal["fail", "skip"] = Field(
        "fail", description="What an invalid row does; either way every one is written to the rejects file."
    )
    languages: list[str] | None = Field(None, description="Use only these languages of each bundle (default: all).")
    other_languages: PositiveInt | None = Field(
        None,
        description="Train on the response language and so many others of each bundle, first those that it has answers "
        "in, then drawn from `languages` by a hash of its `pair` or else content (default: all). Held-out bundles keep "
        "all.",
    )
    max_prompt_tokens: PositiveInt = Field(
        512, description="A longer prompt loses the front of the user's text, never the template's tail."
    )
    max_response_tokens: PositiveInt = Field(512, description="A longer answer loses its end.")
