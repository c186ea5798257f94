"""Settings of a calibration: labelled responses, and the judge whose errors they count."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlc_ray.config.base import PositiveInt, Section
from mlc_ray.config.component import ComponentSettings
from mlc_ray.config.paths import RealPath
from mlc_ray.config.placement import ENV, VariableNames
from mlc_ray.config.score import JudgeSettings

_REFUSAL: Any = {}


class CalibrationConfig(Section):
    """How often a judge errs, on labelled responses."""

    command: ClassVar = "judge --calibrate"
    labelled: Annotated[list[str], Field(min_length=1)] = Field(
        description="Files, folders, or data sets of the hub with a split each (NAME:SPLIT) that hold labelled "
        "responses; `,language=CODE` may follow, and `,split=NAME` for rows alone whose field `split` is that."
    )
    judge: Annotated[JudgeSettings, ComponentSettings("judge", default="refusal")] = Field(
        _REFUSAL, description="Whose errors are counted."
    )
    min_labels: PositiveInt = Field(
        30, description="A language with fewer labels of either class is marked as not measured."
    )
    out: RealPath | None = Field(None, description="File to write (default: calibration-JUDGE.json here).")
    address: str = Field("auto", description="Ray address, for a judge with engines of its own.")
    env: VariableNames = ENV
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="`auto` uses GPUs if the cluster has any.")
