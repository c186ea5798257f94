"""An engine of your own: plain PyTorch DistributedDataParallel instead of DeepSpeed, for models that fit on one device.

Name it in the settings of a run; the module must be importable on every worker (here: run from the repository, or send
the folder along with `ray job submit --working-dir`):

    mlc-ray train --config run.yaml --set 'engine={name: examples.my_engine:TorchDdp}'

It keeps everything whole on every worker and trains in float32: there are no master weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mlc_ray.config import EngineSettings, TrainConfig
from mlc_ray.train.engines.base import (
    STATE_KINDS,
    Engine,
    StateReader,
    StateShard,
    TrainingEngineError,
    each_once,
    owned_ranges,
    parameter_groups,
)
from mlc_ray.train.model import ModelOutput, PolicyWithExtractor
from mlc_ray.types import Batch


class TorchDdp(Engine):
    """One replica a worker; gradients are averaged in the backward of a step's last micro-batch."""

    class Settings(EngineSettings):
        """Settings of `engine:` beside its name."""

        bucket_mb: int = Field(25, ge=1, description="Size of the buckets in which gradients are averaged, in MiB.")

    def __init__(self, module: PolicyWithExtractor, config: TrainConfig, device: torch.device) -> None:
        if config.model.dtype != "float32":
            raise TrainingEngineError(f"model.dtype={config.model.dtype!r}: TorchDdp knows float32 only; set that")
        settings = config.engine
        assert isinstance(settings, TorchDdp.Settings)
        self.module = module.to(device)
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.ddp = DistributedDataParallel(self.module, bucket_cap_mb=settings.bucket_mb)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(module.parameters(), config.optimizer.weight_decay),
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
        )
        self.max_norm = config.optimizer.max_grad_norm
        self.left = 0  # micro-batches of the step that is going on

    def begin(self, micro_batches: int) -> None:
        """The step's last micro-batch is another one than the others."""
        self.left = micro_batches

    def forward(self, batch: Batch) -> ModelOutput:
        """Only the last micro-batch's backward averages over workers; DDP is told so in the forward."""
        with nullcontext() if self.left == 1 else self.ddp.no_sync():
            output: ModelOutput = self.ddp(batch)
        return output

    def backward(self, loss: Tensor) -> None:
        """Accumulate this worker's gradient, or (last micro-batch) average what is accumulated over all."""
        loss.backward()
        self.left -= 1

    def step(self, learning_rate: float) -> float:
        """Clip and step, unless the norm is not finite."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if norm.isfinite():
            if self.max_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def weights(self, *, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """All of it is here, on every worker."""
        if self.rank == 0:
            for name, value in each_once(self.module, trainable_only=trainable_only):
                yield name, value.detach()

    def owned_state(self) -> Iterator[StateShard]:
        """All workers hold all of it: each writes its share."""
        trainable = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        for name, start, stop in owned_ranges(
            {name: p.numel() for name, p in trainable.items()}, self.rank, self.world_size
        ):
            state = {"master": trainable[name], **self.optimizer.state[trainable[name]]}
            tensors = {kind: state[kind].detach().flatten()[start:stop] for kind in STATE_KINDS}
            yield StateShard(name, start, stop, tensors)

    def load_state(self, read: StateReader, steps: int) -> None:
        """Every worker reads all of it."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                values = read(name, 0, parameter.numel())
                whole = {kind: values[kind].view_as(parameter).to(self.device) for kind in STATE_KINDS}
                parameter.data.copy_(whole.pop("master"))
                self.optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=self.device), **whole}
