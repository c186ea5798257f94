"""Settings of the model that is trained, and of adapters to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mlc_ray.config.base import (
    PositiveFloat,
    PositiveInt,
    Section,
)
from mlc_ray.config.paths import StoredPath

DTYPE = (
    "Type of weights and activations; `auto` is bfloat16 where all that may run it compute in it natively (GPUs from "
    "Ampere, CPUs with avx512_bf16 or amx_bf16), else float32."
)


class ModelSection(Section):
    """The policy to align."""

    path: StoredPath = Field(
        description="Folder, its URL, or hub name `NAME[#REVISION]` of a Hugging Face causal language model."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description=DTYPE)
    attention: Literal["auto", "segments", "varlen", "flex"] = Field(
        "auto",
        description="Kernel: `segments` runs anywhere; `varlen` on GPUs, in bfloat16, without soft-capped scores; "
        "`flex` on GPUs. `auto`: for bfloat16 on a GPU `varlen`, or `flex` for soft-capped scores; else `segments`.",
    )
    kernels: Literal["torch", "liger"] = Field(
        "torch",
        description="What computes norms, rotary embeddings and gated activations: PyTorch, or on GPUs Liger's fused "
        "kernels (pip install 'mlc_ray[liger]').",
    )
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model. Off unless you ask.")
    gradient_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="Recompute activations in backward to save memory: `true` whole blocks, `selective` all but what "
        "matrix products and attention give.",
    )
    router_weight: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Mixtures of experts: what the routers' load-balancing loss is multiplied by; 0 leaves it out "
        "(default: `router_aux_loss_coef` of the model's config).",
    )
    lora: LoraSection | None = Field(None, description="Train low-rank adapters instead of all parameters.")


class LoraSection(Section):
    """Low-rank adapters (peft)."""

    rank: PositiveInt = Field(16, description="Rank of the update.")
    alpha: PositiveFloat = Field(32.0, description="Scale; the update is multiplied by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Names of the linear layers that get an adapter."
    )
