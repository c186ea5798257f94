"""What the training loop needs of an engine: optimizer steps, gradients over all workers, and its state in pieces.

An engine is one class in one file, with its settings nested in it, named by `engine.name`: `deepspeed`, or one of your
own as `package.module:Class` (see examples/my_engine.py). The loop, checkpoints and the reference use this interface
alone. Workers are joined into one torch.distributed group (gloo on CPU, NCCL on GPU) before an engine is made.

Importing this module loads no torch: settings are validated where none is needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mlc_ray.config import EngineSettings
from mlc_ray.errors import MlcRayError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mlc_ray.config import TrainConfig
    from mlc_ray.train.model import ModelOutput, PolicyWithExtractor
    from mlc_ray.train.reference import ReferenceModel, ReferenceOutput
    from mlc_ray.types import Batch


class TrainingEngineError(MlcRayError):
    """An engine cannot train as configured, or cannot read what a checkpoint holds; the message names the fix."""


STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
"""What a checkpoint keeps of every trainable element: its weight in float32, and AdamW's two moments."""


@dataclass(frozen=True)
class StateShard:
    """A range of one trainable parameter, flattened, with its optimizer state.

    Attributes:
        name: the parameter's, in `module.named_parameters()`.
        start: the range's first element in the whole parameter, flattened.
        stop: the element after its last one.
        tensors: for each of `STATE_KINDS` the values, [stop - start], on any device. They may be views of what is
            trained: whoever keeps them takes a copy.
    """

    name: str
    start: int
    stop: int
    tensors: Mapping[str, Tensor]


PIECE_ELEMENTS = 2**22
"""48 MiB with the two moments, so that files of 512 MiB are at most a tenth larger; an embedding of 250,000 tokens and
4,096 dimensions has a billion elements, 11.4 GiB."""

StateReader = Callable[[str, int, int], Mapping[str, "Tensor"]]
"""`read(name, start, stop)` gives the `tensors` of that range, whoever wrote them and in whatever pieces."""


class Engine(ABC):
    """Trains one module on all workers.

    Attributes:
        module: what was handed over, for its parts and for forwards without gradient; an engine may shard its weights.
        device: where batches go.
        rank: this worker, from 0.
        world_size: the number of workers.
    """

    Settings: ClassVar[type[EngineSettings]] = EngineSettings
    module: PolicyWithExtractor
    device: torch.device
    rank: int
    world_size: int

    @classmethod
    def prepare(cls, device: torch.device) -> None:
        """Called once in every worker before anything else; for what must precede an import."""
        return None

    @classmethod
    def loading(cls, config: TrainConfig) -> AbstractContextManager[None]:
        """Within, models are loaded: an engine that shards parameters has each worker load only its own."""
        return nullcontext()

    @abstractmethod
    def __init__(self, module: PolicyWithExtractor, config: TrainConfig, device: torch.device) -> None:
        """Take over `module`, with AdamW on its trainable parameters as `config.optimizer` says.

        Raises:
            TrainingEngineError: if the engine cannot train as `config` asks.
        """

    @classmethod
    def frozen(
        cls, model: ReferenceModel, config: TrainConfig, device: torch.device
    ) -> Callable[[Batch], ReferenceOutput]:
        """`model` without an optimizer, as a function of a batch; states if the batch taps; no gradient is taken.

        As it stands, whole on every worker.
        """
        import torch

        model.requires_grad_(False).to(device).eval()

        @torch.no_grad()
        def ask(batch: Batch) -> ReferenceOutput:
            said: ReferenceOutput = model(batch, state=batch.taps)
            return said

        return ask

    @abstractmethod
    def begin(self, micro_batches: int) -> None:
        """An optimizer step of so many micro-batches begins: as many for every worker, another number at another step.

        Its forwards, backwards and `step` follow; a step that is tried again begins again.
        """

    @abstractmethod
    def forward(self, batch: Batch) -> ModelOutput:
        """The module's forward of one micro-batch; every worker calls it, and all batches of a step tap or none."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's `loss` (a scalar) to what is accumulated.

        After the last one of the step, gradients are the sum over its micro-batches and the mean over workers.
        """

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clip the accumulated gradients to `optimizer.max_grad_norm`, take one optimizer step, and drop them.

        Returns:
            The global norm of the gradients before clipping, the same on every worker. Where it is not finite, no
            step was taken: weights and optimizer state are what they were, and the gradients are gone.
        """

    @staticmethod
    def shape(parameter: nn.Parameter) -> tuple[int, ...]:
        """The whole shape of a parameter, also of one of which this worker holds a part."""
        return tuple(parameter.shape)

    def memory_to_come(self) -> int:
        """Bytes that a first step allocates on the device beside what forwards keep; for `tokens_per_forward: auto`.

        As it stands, a gradient and AdamW's two moments in float32 for every trainable parameter.
        """
        return 12 * sum(math.prod(self.shape(p)) for p in self.module.parameters() if p.requires_grad)

    @abstractmethod
    def weights(self, *, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The module's weights and buffers one after another, whole, by name, in the order of its `state_dict`.

        Every worker goes through all of it, since they may be gathered; rank 0 alone gets them, others get nothing. A
        tensor, on any device, may be gone or another one once the next is asked for. A weight that has two names comes
        once, by the first.
        """

    @abstractmethod
    def owned_state(self) -> Iterator[StateShard]:
        """What this worker writes into a checkpoint, one range after another; every worker calls it, perhaps twice.

        The ranges of all workers together are every trainable parameter, each element once. Which ranges a worker owns
        is the engine's to say: a checkpoint is read by name and range, by any engine on any number of workers. Cut long
        ones by `pieces`: a file of a checkpoint holds whole shards, and is in host memory until it is written.
        """

    @abstractmethod
    def load_state(self, read: StateReader, steps: int) -> None:
        """Take weights and optimizer state from a checkpoint; every worker calls it.

        Args:
            read: gives the values of any range.
            steps: optimizer steps taken so far, for the bias correction of AdamW.
        """


def pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """A range cut into ranges of at most `PIECE_ELEMENTS`, in which `Engine.owned_state` yields it."""
    for begin in range(start, stop, PIECE_ELEMENTS):
        yield begin, min(begin + PIECE_ELEMENTS, stop)


def owned_ranges(sizes: Mapping[str, int], rank: int, workers: int) -> Iterator[tuple[str, int, int]]:
    """Name, start and stop of what `rank` owns where every worker holds everything: an equal share of all elements.

    They are in `pieces`.

    `sizes` are the parameters' numbers of elements, in the same order on every worker.
    """
    total, offset = sum(sizes.values()), 0
    first, end = total * rank // workers, total * (rank + 1) // workers
    for name, size in sizes.items():
        start, stop = max(first - offset, 0), min(end - offset, size)
        for begin, reached in pieces(start, stop):
            yield name, begin, reached
        offset += size


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    weight_decay: float,
    shape: Callable[[nn.Parameter], Sequence[int]] = Engine.shape,
) -> list[dict[str, Any]]:
    """AdamW's groups of the trainable ones: matrices decay, norms and biases (one dimension) do not."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if len(shape(p)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if len(shape(p)) < 2], "weight_decay": 0.0},
    ]


def each_once(module: nn.Module, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers of `module.state_dict`, in its order, each under its first name alone."""
    trainable = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen and (id(value) in trainable or not trainable_only):
            seen.add(id(value))
            yield name, value
