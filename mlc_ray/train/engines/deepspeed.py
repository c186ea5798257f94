"""DeepSpeed as an engine, ZeRO stages 0 to 3; the only place that imports deepspeed.

Ray Train has already joined the workers into one torch.distributed group, which DeepSpeed uses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mlc_ray._registry import register
from mlc_ray.config import EngineSettings
from mlc_ray.config.base import NonNegativeInt, PositiveInt
from mlc_ray.train.engines.base import (
    Engine,
    StateReader,
    StateShard,
    TrainingEngineError,
    each_once,
    parameter_groups,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mlc_ray.config import TrainConfig
    from mlc_ray.train.engines.zero_state import ZeroState
    from mlc_ray.train.model import ModelOutput, PolicyWithExtractor
    from mlc_ray.train.reference import ReferenceModel, ReferenceOutput
    from mlc_ray.types import Batch

STAGES_OF = {
    "offload_optimizer": (1, 2, 3),
    "offload_parameters": (3,),
    "persistence_threshold": (3,),
    "overlap_comm": (2, 3),  # stage 1 then adds wrong gradients up, once they need several buckets (0.19.8: seen)
    "bucket_size": (1, 2, 3),
    "prefetch_size": (3,),
    "secondary_partition": (3,),
}
"""Stages at which DeepSpeed reads a setting."""

EXTRA_SECTIONS = {
    "aio", "bf16", "comms_logger", "dump_state", "flops_profiler", "gradient_predivide_factor", "memory_breakdown",
    "prescale_gradients", "wall_clock_breakdown", "zero_optimization",
}  # fmt: skip
"""What `extra` may hold: not the optimizer, the batch or another precision, which are settings of the run."""


@register("engine", "deepspeed")
class DeepSpeed(Engine):
    """DeepSpeed ZeRO with torch's own AdamW."""

    class Settings(EngineSettings):
        """DeepSpeed ZeRO."""

        stage: Literal[0, 1, 2, 3] = Field(
            2, description="What is sharded: 1 optimizer state, 2 and gradients, 3 and parameters."
        )
        offload_optimizer: bool = Field(False, description="Keep optimizer state and update on the CPU (stages 1-3).")
        offload_parameters: bool = Field(False, description="Keep parameters on the CPU between uses (stage 3).")
        persistence_threshold: NonNegativeInt | None = Field(
            None, description="Stage 3: parameters smaller than this many elements stay whole (default: DeepSpeed's)."
        )

        overlap_comm: bool | None = Field(
            None,
            description=(
                "Stages 2 and 3: reduce gradients while the backward goes on, for a second bucket (default: on)."
            ),
        )
        reduce_dtype: Literal["float32", "bfloat16"] = Field(
            "float32", description="Type in which gradients travel between workers; bfloat16 halves the traffic."
        )
        accumulate_dtype: Literal["float32", "bfloat16"] | None = Field(
            None,
            description=(
                "Type in which a step's gradients are added up (default: float32 at stages 2 and 3; the model's own at "
                "0 and 1, where DeepSpeed has no other)."
            ),
        )
        bucket_size: PositiveInt | None = Field(
            None, description="Stages 1-3: gradient elements that are reduced at a time (default: DeepSpeed's, 5e8)."
        )
        prefetch_size: PositiveInt | None = Field(
            None, description="Stage 3: parameters gathered ahead of their use (default: DeepSpeed's, 5e7)."
        )
        secondary_partition: PositiveInt = Field(
            1,
            description=(
                "Stage 3: workers that keep a second copy of the parameters among them, so that the backward gathers "
                "inside this group; the GPUs of a node (ZeRO++ hpZ). 1 is off."
            ),
        )
        extra: dict[str, Any] = Field(
            default_factory=dict,
            description="More of DeepSpeed's own configuration, by its names; what a setting above decides is refused.",
        )

        def fixes_workers(self) -> str | None:
            """The groups of a secondary partition are of one number of workers."""
            return f"engine.secondary_partition={self.secondary_partition}" if self.secondary_partition > 1 else None

        @model_validator(mode="after")
        def _each_at_its_stages(self) -> DeepSpeed.Settings:
            for name, stages in STAGES_OF.items():
                if self.stage not in stages and getattr(self, name) != type(self).model_fields[name].default:
                    self._refuse(name, " or ".join(map(str, stages)))
            if self.accumulate_dtype == "float32" and self.stage < 2:
                self._refuse("accumulate_dtype", "2 or 3", ": there DeepSpeed adds gradients up in the model's type")
            if self.extra:
                self._check_extra()
            return self

        def _refuse(self, name: str, stages: str, why: str = "") -> None:
            value = getattr(self, name)
            raise ValueError(f"engine.{name}={value!r} needs engine.stage {stages}, but engine.stage={self.stage}{why}")

        def _check_extra(self) -> None:
            if unknown := sorted(self.extra.keys() - EXTRA_SECTIONS):
                raise ValueError(
                    f"engine.extra has {unknown[0]!r}, which is not one of {', '.join(sorted(EXTRA_SECTIONS))}: "
                    "DeepSpeed would ignore it, or it changes what other settings decide"
                )

    @classmethod
    def prepare(cls, device: torch.device) -> None:
        """Tell DeepSpeed which device it runs on, before its first import in the process."""
        os.environ["DS_ACCELERATOR"] = device.type
        import deepspeed.ops

        # An optional shared-memory collective that would be compiled for half a minute inside initialize().
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    @classmethod
    def loading(cls, config: TrainConfig) -> AbstractContextManager[None]:
        """Within, transformers loads a model already sharded at stage 3, so that no worker ever holds all of it."""
        return _loading_sharded(config) if _settings(config).stage == 3 else nullcontext()

    def __init__(self, module: PolicyWithExtractor, config: TrainConfig, device: torch.device) -> None:
        import deepspeed
        import torch
        import torch.distributed as dist

        settings = _settings(config)
        self.device, self._stage = device, settings.stage
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.world_size % settings.secondary_partition:
            raise _uneven(settings.secondary_partition, self.world_size)
        optimizer = torch.optim.AdamW(
            parameter_groups(module.parameters(), config.optimizer.weight_decay, self.shape),
            lr=0.0,  # each step has its own rate; DeepSpeed may take steps of its own before the first, see below
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,  # on a CPU, offloaded to or not, 5 to 10 times faster, see benchmarks/README.md
        )
        _gather_experts_whole(module, settings)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config))
        # DeepSpeed makes the optimizer's state by a step with zero gradients where it can (bfloat16 without ZeRO). At
        # rate 0 that decays no weight, but it counts: Adam's bias correction would take the first real step for the
        # second.
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        self.module = self._engine.module

    @classmethod
    def frozen(
        cls, model: ReferenceModel, config: TrainConfig, device: torch.device
    ) -> Callable[[Batch], ReferenceOutput]:
        """The reference sharded like the policy at stage 3, else replicated."""
        return _frozen_sharded(model, config) if _settings(config).stage == 3 else super().frozen(model, config, device)

    def begin(self, micro_batches: int) -> None:
        """Tell DeepSpeed, whose own count of micro-batches is fixed, which of them is the last."""
        self._left = micro_batches
        self._engine.set_gradient_accumulation_boundary(micro_batches == 1)

    def forward(self, batch: Batch) -> ModelOutput:
        """The module's forward; under stage 3 it gathers parameters from all workers."""
        output: ModelOutput = self._engine(batch)
        return output

    def backward(self, loss: Tensor) -> None:
        """Accumulate; DeepSpeed averages over workers, and divides by nothing else."""
        self._engine.backward(loss, scale_wrt_gas=False)
        self._left -= 1
        if self._left == 1:
            self._engine.set_gradient_accumulation_boundary(True)

    def step(self, learning_rate: float) -> float:
        """One optimizer step, unless the norm of the gradients is not finite."""
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._stage == 0:
            return self._step_without_zero()
        engine.step()
        if not engine.was_step_applied():  # ZeRO looks for itself, and drops the gradients
            return float("inf")
        norm = engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _step_without_zero(self) -> float:
        """Stage 0: DeepSpeed clips but does not say by what norm (float32), or says it in bfloat16; and in float32 it
        applies whatever the gradients are. They are averaged over workers already."""
        import torch

        gradients = [p.grad.float() for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not norm < float("inf"):
            self._engine.zero_grad()
            return norm
        self._engine.step()
        return norm if self._engine.was_step_applied() else float("inf")

    @staticmethod
    def shape(parameter: nn.Parameter) -> tuple[int, ...]:
        """Stage 3 leaves a flat tensor without elements, and keeps the shape beside it."""
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def memory_to_come(self) -> int:
        """Gradients; AdamW's moments are there, but for stage 0 in float32.

        At stages 0 and 1 a whole gradient in the model's type; at 2 and 3 this worker's share, and two buckets in which
        gradients are reduced, in float32. At stage 3 also the parameters that may be gathered at a time.
        """
        config, size = self._engine._config.zero_config, 2 if self._engine.bfloat16_enabled() else 4
        parameters = sum(math.prod(self.shape(p)) for p in self.module.parameters() if p.requires_grad)
        if self._stage < 2:
            return parameters * (size if self._stage == 1 or size == 2 else size + 8)
        gathered = min(int(config.max_live_parameters), parameters) if self._stage == 3 else 0
        buckets = 2 * min(int(config.reduce_bucket_size), parameters)
        return 4 * parameters // self.world_size + 4 * buckets + size * gathered

    def weights(self, *, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Gathered from all workers at stage 3, parameter by parameter; those of rank 0 below."""
        own = each_once(self.module, trainable_only=trainable_only)
        if self._stage == 3:
            yield from self._gathered(own)
        elif self.rank == 0:
            yield from ((name, value.detach()) for name, value in own)

    def _gathered(self, own: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        import deepspeed
        import torch

        self._engine.optimizer.checkpoint_event_prologue()
        for name, value in own:
            sharded = isinstance(value, torch.nn.Parameter)
            with deepspeed.zero.GatheredParameters([value]) if sharded else nullcontext():
                if self.rank == 0:
                    yield name, value.detach()
        self._engine.optimizer.checkpoint_event_epilogue()

    def owned_state(self) -> Iterator[StateShard]:
        """At stages 1 to 3 what ZeRO has given to this worker; at stage 0, where all hold everything, a share of it."""
        return self._state().owned()

    def load_state(self, read: StateReader, steps: int) -> None:
        """Written into DeepSpeed's own tensors; its loaders take no part."""
        self._state().load(read, steps)

    def _state(self) -> ZeroState:
        from mlc_ray.train.engines.zero_state import ZeroState

        return ZeroState(self.module, self._engine.optimizer, self._stage, self.rank, self.world_size)


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for the policy.

    Raises:
        TrainingEngineError: if `engine.extra` sets what is set here or keeps state on NVMe, or gradients are to lose
            digits that they have.
    """
    settings = _settings(config)
    if config.model.dtype != "bfloat16":
        _refuse_bfloat16(settings, config.model.dtype)
    accumulate = settings.accumulate_dtype or ("float32" if settings.stage >= 2 else config.model.dtype)
    ours: dict[str, Any] = {
        # Neither is read where the engine says which micro-batch is the last: see `begin` and `backward`.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "communication_data_type": _DTYPE[settings.reduce_dtype],
        "data_types": {"grad_accum_dtype": _DTYPE[accumulate]},
        "zero_optimization": _zero(settings),
        # The optimizer is torch's own AdamW everywhere: DeepSpeed's CPU Adam needs a compiler on every node.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    return _with_extra(ours, settings.extra) if settings.extra else ours


def _refuse_bfloat16(settings: DeepSpeed.Settings, dtype: str) -> None:
    for name in ("reduce_dtype", "accumulate_dtype"):
        if getattr(settings, name) == "bfloat16":
            raise TrainingEngineError(
                f"engine.{name}='bfloat16' is for models in bfloat16, but model.dtype={dtype!r}; remove it"
            )


def _with_extra(ours: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    whole = _merged(ours, extra)
    for section, setting in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
        if whole["zero_optimization"].get(section, {}).get("device") == "nvme":
            raise TrainingEngineError(
                f"engine.extra sets zero_optimization.{section}.device to 'nvme', but checkpoints are written from "
                f"memory; use engine.{setting}=true"
            )
    return whole


def _gather_experts_whole(module: nn.Module, settings: DeepSpeed.Settings) -> None:
    """At stage 3, blocks with experts are gathered as one, whichever of them a worker's tokens go to."""
    from mlc_ray.train.experts import expert_blocks

    if settings.stage == 3 and (blocks := expert_blocks(module)):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(module, sorted(blocks, key=lambda each: each.__qualname__))


_DTYPE = {"float32": "fp32", "bfloat16": "bf16"}


def _zero(settings: DeepSpeed.Settings) -> dict[str, Any]:
    keeps_none = settings.persistence_threshold is not None
    zero = {
        "stage": settings.stage,
        "overlap_comm": settings.stage >= 2 if settings.overlap_comm is None else settings.overlap_comm,
        "reduce_bucket_size": settings.bucket_size,
        "stage3_prefetch_bucket_size": settings.prefetch_size,
        "zero_hpz_partition_size": settings.secondary_partition if settings.secondary_partition > 1 else None,
        "offload_optimizer": {"device": "cpu"} if settings.offload_optimizer else None,
        "offload_param": {"device": "cpu"} if settings.offload_parameters else None,
        "stage3_gather_16bit_weights_on_model_save": True if settings.stage == 3 else None,
        "stage3_param_persistence_threshold": settings.persistence_threshold,
        # Keeping no gathered parameter around either is what makes a small model really sharded.
        "stage3_max_reuse_distance": 0 if keeps_none else None,
        "stage3_max_live_parameters": 0 if keeps_none else None,
    }
    return {name: value for name, value in zero.items() if value is not None}


def _merged(ours: dict[str, Any], extra: dict[str, Any], path: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for name, value in extra.items():
        here = f"{path}{name}"
        if name not in ours:
            merged[name] = value
        elif isinstance(ours[name], dict) and isinstance(value, dict):
            merged[name] = _merged(ours[name], value, f"{here}.")
        else:
            raise TrainingEngineError(
                f"engine.extra sets {here} to {value!r}, which the settings of the run have made {ours[name]!r}: "
                "remove it from engine.extra, and change the setting instead"
            )
    return merged


@contextmanager
def _loading_sharded(config: TrainConfig) -> Iterator[None]:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    active = HfDeepSpeedConfig(deepspeed_config(config))  # transformers looks for the living object
    try:
        yield
    finally:
        del active


def _frozen_sharded(model: ReferenceModel, config: TrainConfig) -> Callable[[Batch], ReferenceOutput]:
    import deepspeed
    import torch

    whole = deepspeed_config(config)
    whole["zero_optimization"].pop("offload_optimizer", None)
    whole["gradient_clipping"] = 0.0
    del whole["data_types"]  # there are no gradients to add up
    _gather_experts_whole(model, _settings(config))
    engine, *_ = deepspeed.initialize(model=model.requires_grad_(False), config=whole)
    engine.module.eval()

    @torch.no_grad()
    def ask(batch: Batch) -> ReferenceOutput:
        said: ReferenceOutput = engine(batch, state=batch.taps)
        return said

    return ask


def _uneven(groups: int, workers: int) -> TrainingEngineError:
    return TrainingEngineError(
        f"engine.secondary_partition={groups} does not divide {workers} workers into groups; use the number of GPUs of "
        "a node, or 1"
    )


def _settings(config: TrainConfig) -> DeepSpeed.Settings:
    settings = config.engine
    assert isinstance(settings, DeepSpeed.Settings), settings
    return settings
