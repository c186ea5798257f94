"""What a plan says: plain records, which `show` prints and `--json` writes."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """A part of memory or disk: its name, its bytes, and the formula with its numbers."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class Memory:
    """What a run holds.

    Attributes:
        worker: on the GPU of the worker with the most, or of a worker on a CPU in its process.
        node: in the memory of one node, by all its workers.
        disk: what is written to the run's folder.
        worker_limit: bytes that the worker can have.
        node_limit: bytes that the node can have; None where that is not known.
    """

    worker: tuple[Part, ...]
    node: tuple[Part, ...]
    disk: tuple[Part, ...]
    worker_limit: int
    node_limit: int | None

    @property
    def worker_bytes(self) -> int:
        """The sum on the GPU."""
        return sum(part.bytes for part in self.worker)

    @property
    def node_bytes(self) -> int:
        """The sum in a node's memory."""
        return sum(part.bytes for part in self.node)

    @property
    def disk_bytes(self) -> int:
        """The sum in the run's folder, at its end."""
        return sum(part.bytes for part in self.disk)

    @property
    def breaks(self) -> Part | None:
        """The largest part of the place that is too small; None where everything fits."""
        if self.worker_bytes > self.worker_limit:
            return max(self.worker, key=lambda part: part.bytes)
        if self.node_limit is not None and self.node_bytes > self.node_limit:
            return max(self.node, key=lambda part: part.bytes)
        return None

    @property
    def fits(self) -> bool:
        """Whether everything fits."""
        return self.breaks is None


@dataclass(frozen=True)
class Seconds:
    """An optimizer step, in seconds: products of matrices and attention, what travels between workers and is not hidden
    behind them, AdamW, and what each forward costs beside its tokens."""

    compute: float
    exchange: float
    optimizer: float
    overhead: float

    @property
    def step(self) -> float:
        """The whole step."""
        return self.compute + self.exchange + self.optimizer + self.overhead


@dataclass(frozen=True)
class Work:
    """What an optimizer step computes: means over the run's steps.

    Attributes:
        tokens: of all workers.
        forwards: of each worker.
        largest_forward: tokens of the largest forward of the run.
        head_rows: most rows of logits of a forward.
        flops: useful operations of all workers.
        repeated: what checkpointing adds to the time of forward and backward, as a share.
    """

    tokens: float
    forwards: float
    largest_forward: int
    head_rows: int
    flops: float
    repeated: float


@dataclass(frozen=True)
class RunPlan:
    """A training run.

    Attributes:
        model: the shape's name.
        parameters: of the model, all of them.
        trained: those that are trained, the extractor's too.
        gpu: what it runs on.
        workers: of the run.
        nodes: that they are on.
        settings: what of the settings decides memory and time, by dotted name.
        memory: by part.
        work: of a step.
        seconds: of a step.
        steps: of the run.
        bundles: of a step.
        idle_workers: for which a step has no bundle.
        reference_seconds: of the pass of the frozen reference beforehand; 0 where there is none.
        checkpoint_bytes: of one checkpoint with its state.
        checkpoint_seconds: that training stops for one: the copy to host memory, and all of model/ but its last 2 GiB;
            all of it where it is not written in the background.
        checkpoint_behind_seconds: that the rest of one is written beside training; 0 where training stops for it.
        saving_seconds: that training stops for all checkpoints of the run, waits for the one before where that is still
            being written, and waits for the last.
        assumed: what is neither counted nor measured, each as a sentence.
        data: where lengths are from, as a sentence.
    """

    model: str
    parameters: int
    trained: int
    gpu: str
    workers: int
    nodes: int
    settings: dict[str, object]
    memory: Memory
    work: Work
    seconds: Seconds
    steps: int
    bundles: int
    idle_workers: int
    reference_seconds: float
    checkpoint_bytes: int
    checkpoint_seconds: float
    checkpoint_behind_seconds: float
    saving_seconds: float
    assumed: tuple[str, ...]
    data: str

    @property
    def wall_seconds(self) -> float:
        """From the first step to the end of the last checkpoint, and the reference's pass before; without starting and
        failures."""
        return self.steps * self.seconds.step + self.saving_seconds + self.reference_seconds

    @property
    def gpu_hours(self) -> float:
        """All workers, for that long."""
        return self.workers * self.wall_seconds / 3600
