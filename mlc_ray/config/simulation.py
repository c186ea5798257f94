"""Settings of a simulated run: what it is to do, what its steps and checkpoints cost, and how often nodes are lost."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mlc_ray.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section

NonNegative = Annotated[float, Field(ge=0)]


class SimulationConfig(Section):
    """A run of any size, of which nothing is loaded: numbers alone. GB and kB are 10⁹ and 10³ bytes."""

    command: ClassVar = "plan --simulate"
    gpus: PositiveInt = Field(description="GPUs of the run, a worker each.")
    gpus_per_node: PositiveInt = Field(8, description="GPUs of a node; a node is lost as a whole.")
    bundles: PositiveInt = Field(description="Bundles of the data set.")
    epochs: PositiveInt = Field(3, description="Passes over the bundles.")
    bundles_per_gpu: PositiveFloat = Field(
        4, description="Bundles of an optimizer step for each GPU: train.batch_bundles / GPUs."
    )
    step_seconds: PositiveFloat = Field(
        description="Seconds of an optimizer step for which no worker is late and no data are waited for."
    )
    step_spread: Annotated[float, Field(ge=0, le=2)] = Field(
        0.02,
        description="Standard deviation of the logarithm of a worker's step time; a step takes as long as its slowest "
        "worker's.",
    )
    state_gb: NonNegative = Field(
        description="state/ of a checkpoint, which all workers write: 12 bytes for each trained parameter."
    )
    model_gb: NonNegative = Field(
        description="model/ of a checkpoint, which the first worker writes: 2 bytes for each parameter in bfloat16. "
        "Every node reads as much at a start."
    )
    checkpoint_every: PositiveInt | Literal["best"] = Field(
        "best", description="Optimizer steps between checkpoints; `best` looks for the best number."
    )
    background: bool = Field(True, description="Checkpoints are written while training goes on.")
    copy_gb_per_second: PositiveFloat = Field(
        10.0, description="At which a node copies its state to host memory; training stops for it."
    )
    storage_gb_per_second: PositiveFloat = Field(
        description="What the storage reads and writes in all, for data, checkpoints and models together."
    )
    node_gb_per_second: PositiveFloat = Field(2.0, description="What a node reads from the storage or writes to it.")
    bundle_kb: NonNegative = Field(
        6.0, description="Token rows of a bundle, as read: 4 bytes a token, 5.6 for a bundle of 1,390 tokens."
    )
    node_mtbf_hours: PositiveFloat | None = Field(
        6300.0,
        description="Mean hours between failures of a node; null: none fails. Default: 419 unexpected interruptions of "
        "16,384 GPUs in 54 days (Llama 3, arXiv 2407.21783), for nodes of eight.",
    )
    preemptions_per_node_day: NonNegative = Field(0.0, description="How often a node is taken away, with a notice.")
    notice_seconds: NonNegative = Field(120.0, description="Seconds from that notice until the node is gone.")
    spare_nodes: NonNegativeInt = Field(0, description="Nodes that stand by, and take a lost one's place at once.")
    replace_seconds: NonNegative = Field(300.0, description="Seconds until there is another node for a lost one.")
    restart_seconds: NonNegative = Field(
        90.0,
        description="Seconds of a start, without what is read for it: placing workers, loading libraries, joining them "
        "(90 after the loss of a node, docs/reliability.md).",
    )
    repetitions: Annotated[int, Field(ge=2)] = Field(20, description="Simulated runs; intervals are over them.")
    seed: NonNegativeInt = Field(42, description="Seed of all that is drawn.")

    @model_validator(mode="after")
    def _steps_and_nodes(self) -> SimulationConfig:
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus={self.gpus} are no whole nodes of gpus_per_node={self.gpus_per_node}; give a multiple of it"
            )
        return self

    @property
    def nodes(self) -> int:
        """Nodes of the run."""
        return max(1, self.gpus // self.gpus_per_node)
