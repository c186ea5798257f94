"""DeepSpeed engines; the only place that imports deepspeed.

Ray Train has already joined the workers into one torch.distributed group (gloo on CPU, NCCL on GPU); DeepSpeed takes
that group as it finds it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mlc_ray.config import OptimizerSection, TrainConfig


def select_accelerator(device: torch.device) -> None:
    """Tell DeepSpeed which device it runs on; call before the first import of deepspeed in the process."""
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed.ops

    # An optional shared-memory collective that would be compiled for half a minute inside initialize().
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_settings(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for the policy."""
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if config.zero.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if config.zero.persistence_threshold is not None:
        # Keeping no gathered parameter around either is what makes a small model really sharded.
        zero |= {
            "stage3_param_persistence_threshold": config.zero.persistence_threshold,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
        }
    return {
        "train_micro_batch_size_per_gpu": config.train.bundles_per_worker,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        # The optimizer is torch's own AdamW everywhere: DeepSpeed's CPU Adam needs a compiler on every node.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def reference_settings(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for the frozen reference: sharded like the policy at stage 3, else replicated."""
    settings = engine_settings(config)
    zero = settings["zero_optimization"]
    stage3 = {k: v for k, v in zero.items() if k not in ("offload_optimizer",)}
    settings["zero_optimization"] = stage3 if config.zero.stage == 3 else {"stage": 0}
    settings["gradient_accumulation_steps"] = 1
    settings["gradient_clipping"] = 0.0
    return settings


@contextmanager
def partitioned_loading(config: TrainConfig) -> Iterator[None]:
    """Within, transformers loads a model already sharded at ZeRO-3, so that no worker ever holds all of it."""
    if config.zero.stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    active = HfDeepSpeedConfig(engine_settings(config))  # transformers looks for the living object
    try:
        yield
    finally:
        del active


def policy_engine(module: nn.Module, config: TrainConfig, device: torch.device) -> Any:
    """Shard `module` as `config.zero` says, with AdamW on its trainable parameters."""
    import deepspeed

    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trainable if _full_dim(p) >= 2], "weight_decay": config.optimizer.weight_decay},
            {"params": [p for p in trainable if _full_dim(p) < 2], "weight_decay": 0.0},  # norms and biases
        ],
        lr=0.0,  # the loop sets each step's rate; DeepSpeed may take steps of its own before the first, see below
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=device.type == "cuda" and not config.zero.offload_optimizer,
    )
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=engine_settings(config))
    # DeepSpeed makes the optimizer's state by a step with zero gradients where it can (bfloat16 without ZeRO). At rate
    # 0 that decays no weight, but it counts: Adam's bias correction would take the first real step for the second.
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    return engine


def reference_engine(model: nn.Module, config: TrainConfig) -> Any:
    """The frozen reference under DeepSpeed, without an optimizer."""
    import deepspeed

    model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=reference_settings(config))
    engine.module.eval()
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    """Set every parameter group's learning rate for the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def backward_and_step(engine: Any, loss: torch.Tensor) -> float:
    """One micro-batch's backward and, where it completes an optimizer step, that step.

    Returns the global gradient norm before clipping (of the last completed optimizer step).
    """
    engine.backward(loss)
    norm = None
    if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
        # In float32 without ZeRO, DeepSpeed clips but does not say by what norm; gradients are already averaged here.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def learning_rate(step: int, total: int, settings: OptimizerSection) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`; a pure function, so resuming needs no state.

    Linear warm-up over ceil(warmup_ratio * total) steps, then constant, or down to 0 at `total` by line or half cosine.
    """
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.learning_rate * factor[settings.schedule]


def full_state_dict(engine: Any) -> dict[str, torch.Tensor] | None:
    """The whole module's weights on the CPU, on rank 0 (None elsewhere at stage 3); every rank must call it."""
    if engine.zero_optimization_stage() == 3:
        return engine._zero3_consolidated_16bit_state_dict()
    return {key: value.detach().cpu() for key, value in engine.module.state_dict().items()}


def records_in_checkpoints() -> list[type]:
    """DeepSpeed's plain record classes that its checkpoint files hold beside tensors; none runs code when built."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def pickle_enums_by_value() -> None:
    """Have DeepSpeed's ZeRO stage pickled as (class, value), as Python does from 3.11.4 on.

    Before, an enum member is pickled as a call of `getattr`, which a loader that runs no code must refuse.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (type(self), (self.value,))


def _full_dim(parameter: nn.Parameter) -> int:
    # A parameter that ZeRO-3 partitioned at load is a flat, empty placeholder; its shape is kept beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))
