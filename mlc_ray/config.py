"""Every setting of a run, as frozen pydantic schemas; this module imports neither torch nor ray.

A run is one YAML file plus ``--set section.field=value`` overrides. Unknown or ill-typed fields are refused with
the field, the value and the nearest valid name; a combination that no code path supports is refused here, before
anything starts. Validators reject, they never rewrite.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlc_ray.errors import MlcRayError

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

BundleFormat = Literal["auto", "mlc", "preference", "sft", "multijail", "dataset"]


class ConfigError(MlcRayError, ValueError):
    """A setting is unknown, ill-typed or unsupported; the message quotes it and names the fix."""


class Section(BaseModel):
    """Base of all sections: immutable, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelSection(Section):
    """The policy to align."""

    path: str = Field(description="Local folder or hub name of a Hugging Face causal language model.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type of weights and activations.")
    attention: Literal["packed", "sdpa", "eager", "flash_attention_2"] = Field(
        "packed",
        description="Kernel; all keep packed sequences apart, `sdpa` and `eager` by a mask over the whole row.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model. Off unless you ask.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")
    lora: LoraSection | None = Field(None, description="Train low-rank adapters instead of all parameters.")


class LoraSection(Section):
    """Low-rank adapters (peft)."""

    rank: PositiveInt = Field(16, description="Rank of the update.")
    alpha: PositiveFloat = Field(32.0, description="Scale; the update is multiplied by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Names of the linear layers that get an adapter."
    )


class SourceSection(Section):
    """One source of bundles."""

    path: str = Field(description="File, folder, hub name, or `sample:train` / `sample:test` for the shipped data.")
    format: BundleFormat = Field("auto", description="File format; `auto` looks at the suffix and the first row.")
    kind: Literal["harmful", "benign"] | None = Field(
        None, description="Kind of every bundle, for formats that do not record it (default there: harmful)."
    )
    only: Literal["harmful", "benign"] | None = Field(None, description="Use the source's bundles of this kind alone.")


class DataSection(Section):
    """Which bundles, and how they become tokens."""

    train: Annotated[list[SourceSection], Field(min_length=1)] = Field(description="Training bundles.")
    on_invalid: Literal["fail", "skip"] = Field(
        "fail", description="What an invalid row does; either way every one is written to the rejects file."
    )
    languages: list[str] | None = Field(None, description="Use only these languages of each bundle (default: all).")
    max_prompt_tokens: PositiveInt = Field(
        512, description="A longer prompt loses the front of the user's text, never the template's tail."
    )
    max_response_tokens: PositiveInt = Field(512, description="A longer answer loses its end.")


class ObjectiveSection(Section):
    """The alignment loss on the answers in the response language."""

    loss: Literal["sft", "dpo", "ipo", "simpo", "orpo"] = Field("dpo", description="Alignment loss.")
    beta: PositiveFloat = Field(
        0.1, description="Strength of the preference (DPO, IPO, SimPO) or odds-ratio (ORPO) term."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="DPO only: assumed probability that a preference label is flipped."
    )
    margin: Annotated[float, Field(ge=0)] = Field(0.5, description="SimPO only: target reward margin gamma.")

    NEEDS_REFERENCE: ClassVar[frozenset[str]] = frozenset({"dpo", "ipo"})

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a frozen reference."""
        return self.loss in self.NEEDS_REFERENCE

    @model_validator(mode="after")
    def _only_fields_the_loss_reads(self) -> ObjectiveSection:
        for field, owner in {"label_smoothing": "dpo", "margin": "simpo"}.items():
            if field in self.model_fields_set and self.loss != owner:
                raise ValueError(
                    f"objective.{field}={getattr(self, field)!r} is read by {owner} only, but loss={self.loss!r}; "
                    "remove it"
                )
        if "beta" in self.model_fields_set and self.loss == "sft":
            raise ValueError(f"objective.beta={self.beta!r} is not read by loss='sft'; remove it")
        return self


class MlcSection(Section):
    """The multilingual-consistency term: total loss = alignment + weight * mlc."""

    weight: Annotated[float, Field(ge=0)] = Field(0.8, description="Lambda. 0 switches the term off.")
    layer: int | Annotated[float, Field(gt=0, lt=1)] | Literal["last"] = Field(
        "last",
        description=(
            "Index into hidden_states: 0 embeddings, N after the last block and final norm; or a fraction of N."
        ),
    )
    temperature: PositiveFloat = Field(0.2, description="Tau of the softmax over singular values.")
    scaling: Literal["leading", "none"] = Field(
        "leading",
        description=(
            "`leading` divides by the detached first singular value (published code); `none` is the paper's equation."
        ),
    )
    every: PositiveInt = Field(
        1, description="Add the term every this many optimizer steps; other steps skip its forward."
    )
    extractor_dim: PositiveInt = Field(512, description="Output size of the linear extractor.")


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


class TrainSection(Section):
    """How long, and how much at a time."""

    epochs: PositiveInt = Field(3, description="Passes over the bundles.")
    max_steps: PositiveInt | None = Field(None, description="Stop after this many optimizer steps.")
    bundles_per_worker: PositiveInt = Field(1, description="Bundles in one forward of one worker.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Forwards per optimizer step.")


class ZeroSection(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = Field(
        2, description="What is sharded: 1 optimizer state, 2 and gradients, 3 and parameters."
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer state and update on the CPU (stages 1-3).")
    offload_parameters: bool = Field(False, description="Keep parameters on the CPU between uses (stage 3).")
    persistence_threshold: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Stage 3: parameters smaller than this many elements stay whole (default: DeepSpeed's)."
    )

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> ZeroSection:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("zero.offload_optimizer=True needs zero.stage 1, 2 or 3, but zero.stage=0")
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"zero.offload_parameters=True needs zero.stage=3, but zero.stage={self.stage}")
        if self.persistence_threshold is not None and self.stage != 3:
            raise ValueError(
                f"zero.persistence_threshold={self.persistence_threshold} is read at zero.stage=3 only, "
                f"but zero.stage={self.stage}"
            )
        return self


class ClusterSection(Section):
    """Ray resources of one run."""

    address: str = Field(
        "auto",
        description="`auto` joins a running cluster or starts a local one; `local` always starts one; or an address.",
    )
    workers: PositiveInt = Field(1, description="Ray Train workers; one per GPU.")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs reserved per worker; leave some for Ray Data.")
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="`auto` uses GPUs if the cluster has any.")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        0, description="Worker failures to recover from, each from the last checkpoint."
    )


class CheckpointSection(Section):
    """When to save, and how many to keep."""

    every: PositiveInt | None = Field(
        None, description="Optimizer steps between checkpoints (default: only at the end)."
    )
    keep: PositiveInt = Field(2, description="How many of the latest checkpoints stay on disk.")


class LoggingSection(Section):
    """Where the numbers go. metrics.jsonl is always written."""

    every: PositiveInt = Field(1, description="Optimizer steps between rows of the console table.")
    tensorboard: bool = Field(True, description="Write TensorBoard event files into the run folder.")
    wandb: str | None = Field(None, description="Weights & Biases project to log to.")
    mlflow: str | None = Field(None, description="MLflow tracking URI to log to.")


class TrainConfig(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="Folder name of the run.")
    output_dir: str = Field("runs", description="Where run folders go; on a cluster, a path that all nodes share.")
    seed: int = Field(42, description="Seed of data order, extractor initialisation and dropout.")
    reference: Literal["cached", "online"] = Field(
        "cached",
        description="Reference log-probs: computed once beforehand, or by a second frozen engine at every step.",
    )
    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    mlc: MlcSection = MlcSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    zero: ZeroSection = ZeroSection()
    cluster: ClusterSection = ClusterSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _supported_combinations(self) -> TrainConfig:
        if "reference" in self.model_fields_set and not self.objective.needs_reference:
            raise ValueError(
                f"reference={self.reference!r} is not read by objective.loss={self.objective.loss!r}; remove it"
            )
        if self.model.attention == "flash_attention_2" and self.model.dtype == "float32":
            raise ValueError(
                "model.attention='flash_attention_2' has no float32 kernel; "
                "use model.dtype='bfloat16' or attention='packed'"
            )
        if self.model.attention == "flash_attention_2" and self.cluster.accelerator == "cpu":
            raise ValueError(
                "model.attention='flash_attention_2' needs a GPU, but cluster.accelerator='cpu'; use attention='packed'"
            )
        return self


class EngineSection(Section):
    """vLLM engines of the scorer."""

    replicas: PositiveInt = Field(1, description="Engines, each a Ray actor.")
    cpus_per_replica: PositiveFloat = Field(1.0, description="CPUs reserved per engine.")
    tensor_parallel: PositiveInt = Field(1, description="GPUs per engine.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Type of weights and activations.")
    max_model_len: PositiveInt = Field(2048, description="Longest prompt plus answer, in tokens.")
    gpu_memory_utilization: Fraction = Field(0.85, description="Share of each GPU's memory the engine may take.")
    cpu_kv_cache_gib: PositiveInt = Field(2, description="Key-value cache of an engine on CPU, in GiB.")
    enforce_eager: bool = Field(False, description="GPU: skip graph capture; starts faster, generates slower.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model. Off unless you ask.")


class ScoreConfig(Section):
    """One scoring run: generate greedily, judge, count."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = Field(
        None, description="Folder name of the score (default: from the model and the time)."
    )
    output_dir: str = Field("runs/scores", description="Where score folders go.")
    model: str = Field(description="Run folder, checkpoint folder, exported folder or hub name.")
    benchmarks: Annotated[list[SourceSection], Field(min_length=1)] = Field(description="Prompts to score on.")
    judge: str = Field("refusal", description="Name of the judge.")
    languages: list[str] | None = Field(None, description="Score only these languages (default: all present).")
    limit: PositiveInt | None = Field(None, description="At most this many bundles per benchmark and kind.")
    max_new_tokens: PositiveInt = Field(64, description="Longest answer, in tokens.")
    on_invalid: Literal["fail", "skip"] = Field("fail", description="What an invalid row does; every one is reported.")
    max_unparsed: Fraction = Field(0.05, description="The run fails when a larger share of answers gets no verdict.")
    address: str = Field("auto", description="Ray address, as cluster.address of a training run.")
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="`auto` uses GPUs if the cluster has any.")
    engine: EngineSection = EngineSection()


ModelSection.model_rebuild()

ConfigT = TypeVar("ConfigT", TrainConfig, ScoreConfig)


def load_config(schema: type[ConfigT], path: str | Path | None, overrides: Iterable[str] = ()) -> ConfigT:
    """Read a YAML file (if any), apply ``section.field=value`` overrides, and validate.

    Values of overrides are parsed as YAML, so ``--set mlc.layer=20`` is an integer and ``--set data.languages=[en,ur]``
    a list. Raises `ConfigError`, which lists every fault at once.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"config file {str(path)!r} does not exist") from None
        except OSError as error:
            raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {str(path)!r} is not valid YAML: {error}") from None
        if not isinstance(loaded, dict):
            raise ConfigError(
                f"config file {str(path)!r} holds {type(loaded).__name__}, expected sections such as `model:`"
            )
        raw = loaded
    for override in overrides:
        apply_override(raw, override)
    return parse_config(schema, raw)


def parse_config(schema: type[ConfigT], raw: Mapping[str, Any]) -> ConfigT:
    """Validate a nested mapping; raises `ConfigError` quoting every offending field and value."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines: list[str] = [_explain(schema, item) for item in error.errors()]
        raise ConfigError("\n".join(["invalid configuration:", *(f"  - {line}" for line in lines)])) from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one ``section.field=value`` in a nested dict, in place; raises `ConfigError` on bad syntax."""
    dotted, separator, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    node: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(
                    f"override {override!r}: {'.'.join(keys[:depth])} is a list of {len(node)}, "
                    f"{key!r} is not an index of it"
                )
            if last:
                node[int(key)] = value
                return
            node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
                return
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:depth])} is {node!r}, not a section")


def config_schema(schema: type[Section] = TrainConfig) -> dict[str, Any]:
    """The JSON schema, for editors and for people."""
    return schema.model_json_schema()


def _explain(schema: type[Section], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        names = _field_names(schema, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.0)
        return (
            f"{path}={value!r}: no such field; did you mean {near[0]!r}? (valid here: {', '.join(names)})"
            if near
            else f"{path}={value!r}: no such field"
        )
    if item["type"] == "missing":
        return f"{path}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    return (
        f"{path}={value!r}: {message}"
        if path and not isinstance(value, dict)
        else f"{path}: {message}"
        if path
        else message
    )


def _field_names(schema: type[Section], location: Iterable[str | int]) -> list[str]:
    current: type[Section] = schema
    for part in location:
        if isinstance(part, int) or part not in current.model_fields:
            continue
        nested = _section_of(current.model_fields[part].annotation)
        if nested is not None:
            current = nested
    return sorted(current.model_fields)


def _section_of(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _section_of(argument)) is not None:
            return found
    return None
