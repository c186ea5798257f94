"""Settings of a training run: the model, the bundles, the loss, the optimizer, and where it all runs."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mlc_ray._registry import resolve
from mlc_ray.config.base import (
    RESUME,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Resume,
    RunName,
    Section,
    refuse_credentials,
)
from mlc_ray.config.chat import ChatSection
from mlc_ray.config.component import ComponentSettings, settings_by_default
from mlc_ray.config.data import DataSection
from mlc_ray.config.logs import LogSection
from mlc_ray.config.model import ModelSection
from mlc_ray.config.objective import ObjectiveConfig
from mlc_ray.config.openings import OpeningsSection
from mlc_ray.config.paths import StoredPath
from mlc_ray.config.placement import ENV, LabelSelector, VariableNames


class OptimizerSection(Section):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = Field(6e-7, description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW betas."
    )
    eps: PositiveFloat = Field(1e-8, description="AdamW epsilon.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_ratio: Fraction = Field(0.1, description="Share of all optimizer steps spent warming up linearly.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Gradient clipping by global norm; 0 is off.")
    max_retries: NonNegativeInt = Field(
        3, description="How often a step whose loss or gradients are not finite is tried again before the run ends."
    )


class TrainSection(Section):
    """How long, and how much at a time."""

    epochs: PositiveInt = Field(3, description="Passes over the bundles.")
    max_steps: PositiveInt | None = Field(None, description="Stop after this many optimizer steps.")
    batch_bundles: PositiveInt = Field(
        32, description="Bundles of an optimizer step, on however many workers and in however many forwards."
    )
    tokens_per_forward: PositiveInt | Literal["auto"] = Field(
        "auto",
        description=(
            "The most tokens that one worker forwards at once; no number changes a result. `auto`: what the GPU's free "
            "memory holds, 2048 on a CPU."
        ),
    )
    group_bundles: Annotated[PositiveInt, Field(ge=2)] = Field(
        8,
        description="The most bundles of a batch that `contrast`, `variance` and `mlc.centring` look at together.",
    )


class EngineSettings(Section):
    """What every engine has; each adds its own settings."""

    name: str = Field("deepspeed", description="The engine: `deepspeed`, or `package.module:Class`.")

    def fixes_workers(self) -> str | None:
        """The setting that needs one number of workers, as `engine.NAME=VALUE`; None where they may change."""
        return None


class ClusterSection(Section):
    """Ray resources of one run."""

    address: str = Field(
        "auto",
        description="`auto` joins a running cluster or starts a local one; `local` always starts one; or an address.",
    )
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1,
        description="Ray Train workers; one per GPU. `[least, most]`: as many as the cluster has room for, fewer when "
        "it loses a node, more when it gets one; each change goes on from the last checkpoint, so that "
        "`checkpoint.every` and `cluster.max_failures` are needed too.",
    )
    cpus_per_worker: PositiveFloat = Field(
        1.0,
        description="CPUs reserved per worker; leave some for Ray Data. A worker on a CPU computes with as many "
        "threads, rounded down and at least one (Ray's `OMP_NUM_THREADS`, unless the environment that Ray starts in "
        "sets one).",
    )
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="`auto` uses GPUs if the cluster has any.")
    label_selector: LabelSelector = Field(
        {},
        description="Labels of the nodes that training workers run on, e.g. `{ray.io/accelerator-type: H100}`; values "
        "as Ray selects by them: `A`, `!A`, `in(A,B)`, `!in(A,B)`.",
    )
    env: VariableNames = ENV
    max_failures: NonNegativeInt = Field(
        0, description="Worker failures to recover from, each from the last checkpoint."
    )
    wait_seconds: PositiveFloat = Field(
        3600.0,
        description="How long workers wait for a place: for nodes that an autoscaler starts, and for CPUs and GPUs "
        "that others hold. Then the run ends and says how many are held; a run that goes on waits anew.",
    )
    hang_timeout: Annotated[float, Field(ge=0)] = Field(
        600.0,
        description="Seconds without any progress after which a worker ends, and says what it waits for; 0 is off. No "
        "step and no part of the loading may take longer; a save may, while its files grow.",
    )

    plan: Literal["check", "skip"] = Field(
        "check",
        description="`check`: a run whose memory cannot fit, by docs/plan.md, is refused before it starts; `skip`: it "
        "is tried.",
    )

    @property
    def least_workers(self) -> int:
        """The fewest workers that a run goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The most workers that a run takes."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _least_is_not_more_than_most(self) -> ClusterSection:
        if self.least_workers > self.most_workers:
            raise ValueError(
                f"cluster.workers=[{self.least_workers}, {self.most_workers}]: the first number is the least, the "
                "second the most; exchange them"
            )
        return self


class CheckpointSection(Section):
    """When to save, and how many to keep."""

    every: PositiveInt | None = Field(
        None, description="Optimizer steps between checkpoints (default: only at the end)."
    )
    keep: PositiveInt = Field(2, description="How many of the latest checkpoints stay on disk.")
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints of multiples of so many steps stay for good; a multiple of `every`."
    )
    background: bool | Literal["auto"] = Field(
        "auto",
        description="Write while training goes on, from a copy in host memory: 12 bytes for each trained parameter, "
        "over all workers. `auto`: where the copies of each host take at most half of the memory that is free on it.",
    )

    @model_validator(mode="after")
    def _kept_ones_are_written(self) -> CheckpointSection:
        if self.keep_every is not None and (self.every is None or self.keep_every % self.every):
            raise ValueError(
                f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every, which is "
                f"{self.every}: other steps write no checkpoint"
            )
        return self


class CollapseSection(Section):
    """When to warn that bundles of different meanings become one; see docs/collapse.md. 0 switches a bound off."""

    window: NonNegativeInt = Field(
        64, description="Bundles whose tapped states the harmful/benign probe reads; 0 switches the probe off."
    )
    sample: NonNegativeInt = Field(
        512,
        description=(
            "Bundles of a step that cosine and effective rank compare, drawn by the seed where there are more; 0 "
            "switches both off."
        ),
    )
    min_spread: Fraction = Field(
        0.4, description="Warn when 1 - between-bundle cosine falls below this share of what it was at the start."
    )
    min_effective_rank: Fraction = Field(
        0.7, description="Warn when the effective rank's share falls below this share of what it was at the start."
    )
    min_separability: Fraction = Field(
        0.75, description="Warn when the AUC of the harmful/benign probe, once above this, falls below; 0.5 is chance."
    )

    @model_validator(mode="after")
    def _enough_bundles(self) -> CollapseSection:
        if self.sample == 1:
            raise ValueError("collapse.sample=1 compares nothing; use 2 or more, or 0 to switch the comparison off")
        if 0 < self.window < 16:
            raise ValueError(
                f"collapse.window={self.window} is too small: the probe needs 8 bundles of each kind; "
                "use 16 or more, or 0 to switch it off"
            )
        return self


class LoggingSection(LogSection):
    """Where the numbers and the logs go. metrics.jsonl is always written."""

    every: PositiveInt = Field(1, description="Optimizer steps between rows of the console table.")
    tensorboard: bool = Field(True, description="Write TensorBoard event files into the run folder.")
    wandb: str | None = Field(None, description="Weights & Biases project to log to.")
    mlflow: str | None = Field(
        None, description="MLflow tracking URI to log to; user and password belong into the environment."
    )
    mlflow_experiment: str | None = Field(None, description="MLflow experiment of the run (default: the run's name).")

    @model_validator(mode="after")
    def _an_experiment_of_mlflow(self) -> LoggingSection:
        if self.mlflow_experiment is not None and self.mlflow is None:
            raise ValueError(
                f"logging.mlflow_experiment={self.mlflow_experiment!r} is read with logging.mlflow, which is not set; "
                "set it to a tracking URI, or remove the experiment"
            )
        return self

    @model_validator(mode="after")
    def _no_secrets_in_a_uri(self) -> LoggingSection:
        if self.mlflow is not None:
            refuse_credentials(
                "logging.mlflow", self.mlflow, "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


class TrainConfig(ObjectiveConfig):
    """One training run."""

    command: ClassVar = "train"
    name: RunName = Field(description="Folder name of the run.")
    output_dir: StoredPath = Field(
        "runs", description="Where run folders go; on a cluster, a path that all nodes share, or a URL."
    )
    seed: int = Field(42, description="Seed of data order, extractor initialisation and dropout.")
    resume: Resume = Field(
        "never",
        description=f"{RESUME} These decide what a step computes (docs/resume.md).",
    )
    reference: Literal["cached", "online"] = Field(
        "cached",
        description=(
            "What the reference says: computed once beforehand, or by a frozen model at every step, which is a second "
            "one, or with model.lora the policy without its adapters."
        ),
    )
    model: ModelSection
    chat: ChatSection = ChatSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    engine: Annotated[EngineSettings, ComponentSettings("engine", default="deepspeed")] = Field(
        default_factory=settings_by_default,
        description="What trains: `deepspeed` and its settings, or an engine of your own.",
    )
    cluster: ClusterSection = ClusterSection()
    checkpoint: CheckpointSection = CheckpointSection()
    collapse: CollapseSection = CollapseSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _supported_combinations(self) -> TrainConfig:
        if "reference" in self.model_fields_set and not self.needs_reference:
            raise ValueError(
                f"reference={self.reference!r} is not read by objective.loss={self.objective.loss!r}; remove it"
            )
        asked = resolve("loss", self.objective.loss)(self.objective)
        if self.reference == "cached" and asked.needs_reference and asked.reference_pairing in ("shared", "crossed"):
            raise ValueError(
                f"objective.loss={self.objective.loss!r} asks the reference about answers behind several prompts, but "
                "reference='cached' keeps one number of each answer; set reference: online"
            )
        for name, term in self.active_terms.items():
            if self.reference == "cached" and resolve("term", term.name).needs_reference_logits:
                raise ValueError(
                    f"terms.{name} compares whole distributions of next tokens, too many numbers for reference="
                    "'cached'; set reference: online, where model.lora makes it cheapest: its base is at hand"
                )
        terms = {"mlc": self.mlc, **self.terms}
        comparing = [name for name, term in terms.items() if resolve("term", term.name)(term).needs_group]
        if self.train.batch_bundles < 2 and (active := [name for name in comparing if name in self.active_terms]):
            where, fix = (
                ("mlc.centring", "set it to false") if active[0] == "mlc" else (f"terms.{active[0]}", "remove the term")
            )
            raise ValueError(
                f"{where} compares the bundles of a batch, but train.batch_bundles={self.train.batch_bundles} gives it "
                f"a single one; raise it, or {fix}"
            )
        if self.train.group_bundles != TrainSection.model_fields["group_bundles"].default and not comparing:
            raise ValueError(
                f"train.group_bundles={self.train.group_bundles} is read by terms that compare bundles, and this run "
                "has none; remove it, or add terms.contrast, terms.variance or mlc.centring"
            )
        if self.model.attention == "varlen" and self.model.dtype == "float32":
            raise ValueError(
                "model.attention='varlen' has no float32 kernel; use model.dtype='bfloat16' or attention='auto'"
            )
        if self.model.attention in ("varlen", "flex") and self.cluster.accelerator == "cpu":
            raise ValueError(
                f"model.attention={self.model.attention!r} needs a GPU, but cluster.accelerator='cpu'; "
                "use attention='auto'"
            )
        if self.model.kernels == "liger" and self.cluster.accelerator == "cpu":
            raise ValueError("model.kernels='liger' needs a GPU, but cluster.accelerator='cpu'; use kernels='torch'")
        return self

    @model_validator(mode="after")
    def _openings_are_read(self) -> TrainConfig:
        held_out = self.data.validation
        measured = held_out is not None and held_out.min_decision_auc is not None
        if self.openings != OpeningsSection() and not (self.reads_decisions or measured):
            raise ValueError(
                "openings is read by terms.decision, terms.consistency and data.validation.min_decision_auc, and this "
                "run has none of them; remove it, or add one"
            )
        return self

    @model_validator(mode="after")
    def _workers_may_change(self) -> TrainConfig:
        if isinstance(self.cluster.workers, int):
            return self
        changing = f"cluster.workers={list(self.cluster.workers)}"
        if (fixing := self.engine.fixes_workers()) is not None:
            raise ValueError(f"{fixing} needs one number of workers, but {changing}; give one, or remove {fixing}")
        if self.checkpoint.every is None:
            raise ValueError(
                f"{changing}: each change goes on from the last checkpoint, but checkpoint.every is not set, so that "
                "all steps would be taken again; set it, e.g. checkpoint.every=100"
            )
        if self.cluster.max_failures == 0:
            raise ValueError(
                f"{changing}: a lost node counts as a failure, but cluster.max_failures=0 ends the run at the first; "
                "set it, e.g. cluster.max_failures=10"
            )
        return self


ModelSection.model_rebuild()
