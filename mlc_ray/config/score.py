"""Settings of a score: the prompts, the engines that answer them, the judge; and of a measurement of utility."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from mlc_ray._registry import resolve
from mlc_ray.config.asking import GREEDY, AskingSection
from mlc_ray.config.base import (
    LANGUAGE_TAG,
    RESUME,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Resume,
    RunName,
    Section,
)
from mlc_ray.config.chat import ChatSection
from mlc_ray.config.component import ComponentSettings
from mlc_ray.config.data import SourceSection
from mlc_ray.config.logs import LoggedSection
from mlc_ray.config.model import DTYPE
from mlc_ray.config.paths import RealPath, StoredPath
from mlc_ray.config.placement import ENV, LabelSelector, VariableNames

# What of vLLM's own settings `engine.options` may hold: how an engine computes, not what it is asked or what it loads.
ENGINE_OPTIONS = (
    "attention_backend", "cpu_offload_gb", "disable_cascade_attn", "enable_chunked_prefill", "enable_expert_parallel",
    "kv_cache_dtype", "max_num_batched_tokens", "max_num_seqs", "quantization", "safetensors_load_strategy",
)  # fmt: skip
_OPTION_FIXES = {
    "dtype": "engine.dtype sets it",
    "enforce_eager": "engine.enforce_eager sets it",
    "gpu_memory_utilization": "engine.gpu_memory_utilization sets it",
    "max_model_len": "engine.max_model_len sets it",
    "tensor_parallel_size": "engine.tensor_parallel sets it",
    "trust_remote_code": "engine.trust_remote_code sets it",
    "pipeline_parallel_size": "an engine lies on one node, since one over several could not be tested; set "
    "engine.tensor_parallel to at most the GPUs of a node",
    "data_parallel_size": "engine.replicas sets it",
}


class EngineSection(Section):
    """vLLM engines of the scorer."""

    replicas: PositiveInt | Literal["auto"] = Field(
        1, description="Engines, each a Ray actor; `auto`: as many as the nodes hold when they start."
    )
    cpus_per_replica: PositiveFloat = Field(1.0, description="CPUs reserved per engine.")
    tensor_parallel: PositiveInt = Field(1, description="GPUs per engine.")
    label_selector: LabelSelector = Field(
        {},
        description="Labels of the nodes that these engines run on, as `cluster.label_selector` of a run: a judge and "
        "the model that answers may lie on nodes of different kinds.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description=DTYPE)
    max_model_len: PositiveInt = Field(2048, description="Longest prompt plus answer, in tokens.")
    gpu_memory_utilization: Fraction = Field(0.85, description="Share of each GPU's memory the engine may take.")
    cpu_kv_cache_gib: PositiveInt = Field(2, description="Key-value cache of an engine on CPU, in GiB.")
    enforce_eager: bool = Field(False, description="GPU: skip graph capture; starts faster, generates slower.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model. Off unless you ask.")
    options: dict[str, Any] = Field(
        {},
        description="Further settings of vLLM by its own names, e.g. `max_num_seqs: 64`: " + ", ".join(ENGINE_OPTIONS),
    )
    block_rows: PositiveInt | None = Field(
        None, description="Prompts given to an engine at a time (default: 16 to 64 on CPU, 128 to 512 on GPU)."
    )
    start_seconds: PositiveFloat = Field(
        1800.0,
        description="Longest start of an engine, from when it is asked for; also until its first step, and a swap.",
    )
    hang_seconds: PositiveFloat = Field(
        300.0, description="An engine that makes no step for so long while it has work is started again."
    )
    retries: NonNegativeInt = Field(
        2, description="Further tries of a block that an engine fails on, before its halves are tried; and of a start."
    )

    @property
    def computing(self) -> list[Any]:
        """What an engine's answers follow from beside its model and prompts, as JSON: length, number type, options."""
        return [self.max_model_len, self.dtype, self.options]

    @field_validator("options")
    @classmethod
    def _options_that_are_known(cls, options: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(options.keys() - set(ENGINE_OPTIONS)):
            fixes = "".join(f"; {name}: {_OPTION_FIXES[name]}" for name in unknown if name in _OPTION_FIXES)
            held, known = ", ".join(map(repr, unknown)), ", ".join(ENGINE_OPTIONS)
            raise ValueError(f"engine.options cannot hold {held}, but only {known}{fixes}")
        return options


_REQUEST_FIXES = {
    "model": "endpoint.model sets it",
    "messages": "they are what is asked",
    "max_tokens": "endpoint.max_reply_tokens sets it",
    "max_completion_tokens": "endpoint.max_reply_tokens sets it, with endpoint.token_limit=max_completion_tokens",
    "stream": "replies are read whole",
    "n": "one reply is read",
}


class EndpointSection(Section):
    """An OpenAI-compatible chat endpoint."""

    base_url: str = Field(description="Address up to and including /v1, e.g. https://api.openai.com/v1.")
    model: str = Field(description="Model name that the endpoint knows.")
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the key (default: none is sent). Keys are never stored."
    )
    request: dict[str, Any] = Field(
        {},
        description="Further fields of the request, e.g. `reasoning_effort: low`; null leaves out `temperature` (0).",
    )
    concurrency: PositiveInt = Field(8, description="Requests in flight at once.")
    timeout_seconds: PositiveFloat = Field(60.0, description="Longest silence while waiting for a reply.")
    retries: Annotated[int, Field(ge=0)] = Field(
        8, description="Further tries after a rate limit, server error or lost connection, with growing waits."
    )
    max_reply_tokens: PositiveInt = Field(256, description="Longest reply, in tokens.")
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="Request field that carries max_reply_tokens; some newer models take only the second."
    )
    usd_per_million_input_tokens: Annotated[float, Field(ge=0)] = Field(0.0, description="Price, for the cost cap.")
    usd_per_million_output_tokens: Annotated[float, Field(ge=0)] = Field(0.0, description="Price, for the cost cap.")
    max_cost_usd: PositiveFloat | None = Field(
        None, description="Stop asking before this is exceeded; answers not asked about are unparsed."
    )
    cache_dir: RealPath | None = Field(
        None, description="Folder on a local disk for the cache of replies (default: the user's cache)."
    )

    @property
    def asked(self) -> str:
        """The model, and what else of the request its replies depend on."""
        return self.model + (f" request={json.dumps(self.request, sort_keys=True)}" if self.request else "")

    @field_validator("request")
    @classmethod
    def _fields_without_a_setting(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(fields.keys() & _REQUEST_FIXES.keys()):
            fixes = "; ".join(f"{name}: {_REQUEST_FIXES[name]}" for name in taken)
            raise ValueError(f"endpoint.request cannot hold {', '.join(map(repr, taken))} ({fixes}); remove it")
        return fields

    @model_validator(mode="after")
    def _no_key_in_the_settings(self) -> EndpointSection:
        # Neither message quotes the value: settings are stored and shown, and it may be the key itself.
        if re.fullmatch(r"https?://[^\s/@]+(/[^\s?#]*)?", self.base_url) is None:
            raise ValueError(
                "endpoint.base_url must be http:// or https://, a host without user or password, and a path without "
                "query, e.g. https://api.openai.com/v1 (what was given is not shown: it may hold a key)"
            )
        try:
            urlsplit(self.base_url).port  # noqa: B018, reading it checks it
        except ValueError:
            raise ValueError("endpoint.base_url has a port that is no number up to 65535") from None
        if self.api_key_env is not None and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env) is None:
            raise ValueError(
                "endpoint.api_key_env must be the name of an environment variable, e.g. OPENAI_API_KEY (what was given "
                "is not shown: it may be the key itself)"
            )
        return self

    @model_validator(mode="after")
    def _a_cap_needs_prices(self) -> EndpointSection:
        prices = ("usd_per_million_input_tokens", "usd_per_million_output_tokens")
        missing = [name for name in prices if name not in self.model_fields_set]
        if not any(getattr(self, name) for name in prices):
            missing = list(prices)  # two prices of 0 never add up to a cap
        if self.max_cost_usd is not None and missing:
            raise ValueError(
                f"max_cost_usd={self.max_cost_usd} can only be kept with the prices of both directions: set "
                f"{' and '.join(missing)}" + (" (0 if it is free)" if len(missing) == 1 else "")
            )
        return self


TRANSLATION_MARKERS = 64
"""Tokens that the two markers around a translation may take."""


class TranslateEngineSection(EngineSection):
    """vLLM engines of a translator, which reads a response and writes one."""

    max_model_len: PositiveInt = Field(4096, description="Longest instruction, text and translation, in tokens.")


class TranslatorSection(Section):
    """Who translates: a chat model, or an endpoint."""

    model: StoredPath | None = Field(
        None, description="Folder, its URL, or hub name `NAME[#REVISION]` of a chat model, run by vLLM."
    )
    endpoint: EndpointSection | None = Field(None, description="An endpoint that translates instead.")
    max_new_tokens: PositiveInt | None = Field(
        None,
        description="Longest translation by `model`, in tokens (default: of a judge's translator the scoring's "
        "max_new_tokens and 64 for the markers around it, at least 512, else 512; so is that of "
        "endpoint.max_reply_tokens).",
    )
    engine: TranslateEngineSection = Field(TranslateEngineSection(), description="vLLM engines of `model`.")

    def for_texts_of(self, tokens: int) -> Self:
        """The settings with the longest translation decided, where they do not say it, by texts of so many tokens."""
        longest = max(tokens + TRANSLATION_MARKERS, 512)
        if self.endpoint is None:
            return self.model_copy(update={"max_new_tokens": self.max_new_tokens or longest})
        if "max_reply_tokens" in self.endpoint.model_fields_set:
            return self
        return self.model_copy(update={"endpoint": self.endpoint.model_copy(update={"max_reply_tokens": longest})})

    @model_validator(mode="after")
    def _one_translator(self) -> Self:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError(
                f"a translator needs exactly one of model and endpoint, got model={self.model!r} and "
                f"endpoint={'set' if self.endpoint else None!r}"
            )
        if self.model is None and (unread := {"engine", "max_new_tokens"} & self.model_fields_set):
            raise ValueError(f"{min(unread)} is read with a translator's model only, not with an endpoint; remove it")
        return self


class TranslateSection(TranslatorSection):
    """Translate prompt and response into English before the judge reads them: by a chat model, or an endpoint."""

    all_languages: bool = Field(
        False, description="Translate every language but English; by default only those the judge does not cover."
    )


class JudgeSettings(Section):
    """What the settings of every judge share; a judge adds its own fields in its nested `Settings`."""

    name: str = Field(description="Judge: a name, or package.module:Class for one from outside this package.")
    allow_uncovered: bool = Field(
        False, description="Judge languages that the judge does not declare; they are marked in every table."
    )

    @property
    def translator(self) -> TranslateSection | None:
        """Who translates before this judge reads; None for a judge that reads what it is given."""
        return None


class ReadingJudgeSettings(JudgeSettings):
    """... and of every judge that reads responses, which can be translated for it."""

    translate: TranslateSection | None = Field(None, description="Translate into English first.")

    @property
    def translator(self) -> TranslateSection | None:
        """The section `translate`."""
        return self.translate


_REFUSAL: Any = {}  # validated like any other value: the settings of the judge that is the default


class ScoringSection(Section):
    """What a model is asked, how it answers, and who judges: the part of a score that a search has for all trials."""

    benchmarks: Annotated[list[SourceSection], Field(min_length=1)] = Field(description="Prompts to score on.")
    judge: Annotated[JudgeSettings, ComponentSettings("judge", default="refusal")] = Field(
        _REFUSAL, description="Who judges the responses."
    )
    chat: ChatSection | None = Field(
        None, description="The conversation that prompts stand in (default: the one that the model was trained in)."
    )
    asking: AskingSection = GREEDY
    languages: list[str] | None = Field(None, description="Score only these languages (default: all present).")
    limit: PositiveInt | None = Field(None, description="At most this many bundles per benchmark and kind.")
    max_new_tokens: PositiveInt | None = Field(
        None,
        description="Longest answer, in tokens (default: 1,024 for a judge of what is safe, as harm may come late; 64 "
        "for one of refusals alone, which show early).",
    )
    on_invalid: Literal["fail", "skip"] = Field("fail", description="What an invalid row does; every one is reported.")
    max_unparsed: Fraction = Field(0.05, description="The run fails when a larger share of answers gets no verdict.")
    tell_languages: bool = Field(
        True, description="Tell which language each response is in, for how often it is the prompt's."
    )
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _asked_at_all(self) -> ScoringSection:
        unread = sorted(self.asking.model_fields_set - ({"reasoning"} if self.asking.reasoning == "forbid" else set()))
        if unread and resolve("judge", self.judge.name).runs == "prompts":
            raise ValueError(
                f"asking.{unread[0]}={getattr(self.asking, unread[0])!r} is not read by judge={self.judge.name!r}, "
                "which reads the model itself and no answers; remove it"
            )
        if self.max_new_tokens is not None and resolve("judge", self.judge.name).runs == "prompts":
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} is not read by judge={self.judge.name!r}, which reads the model "
                "itself and no answers; remove it"
            )
        return self


class ScoreConfig(ScoringSection, LoggedSection):
    """One scoring run: generate, judge, count."""

    command: ClassVar = "score"
    name: RunName | None = Field(None, description="Folder name of the score (default: from the model and the time).")
    output_dir: StoredPath = Field("runs/scores", description="Where score folders go.")
    model: StoredPath = Field(
        description="Folder of a run, a checkpoint or an exported model, its URL, or hub name `NAME[#REVISION]`."
    )
    seen_languages: list[str] | None = Field(
        None, description="Languages that training saw, to tell seen from unseen (default: what the run recorded)."
    )
    calibration: StoredPath | None = Field(
        None,
        description="File of `mlc-ray judge --calibrate` for this judge: corrected rates stand beside those counted.",
    )
    resume: Resume = Field("never", description=RESUME)
    address: str = Field("auto", description="Ray address, as cluster.address of a training run.")
    env: VariableNames = ENV
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="`auto` uses GPUs if the cluster has any.")
    plan: Literal["check", "skip"] = Field(
        "check",
        description="`check`: a score whose engines cannot hold the model, by docs/plan.md, is refused before they "
        "start; `skip`: it is tried.",
    )

    @field_validator("seen_languages")
    @classmethod
    def _tags(cls, codes: list[str] | None) -> list[str] | None:
        if unlike := [code for code in codes or () if not LANGUAGE_TAG.fullmatch(code)]:
            raise ValueError(
                f"seen_languages has {', '.join(map(repr, unlike))}, not a language tag; write them like 'en', "
                "'zh-Hant', 'pt-BR' (BCP 47, with its cases)"
            )
        return codes

    @model_validator(mode="after")
    def _what_goes_on_has_a_name(self) -> ScoreConfig:
        if self.resume == "auto" and self.name is None:
            raise ValueError(
                "resume='auto' needs a name: without one the folder is named by the time, and the same command would "
                "find nothing to go on with; set name"
            )
        return self


# Those that `utility.run` hands to transformers; threads on CPU follow cpus_per_replica.
HF_ENGINE_FIELDS = ("cpus_per_replica", "dtype", "max_model_len", "trust_remote_code")


class UtilityEngineSection(EngineSection):
    """The engine of a measurement of utility, whose questions come with worked examples."""

    max_model_len: PositiveInt = Field(4096, description="Longest prompt plus answer, in tokens.")


class UtilitySection(Section):
    """What is asked of a model by lm-evaluation-harness, and what runs it."""

    tasks: Annotated[list[str], Field(min_length=1)] = Field(
        description="Tasks or groups of lm-evaluation-harness, e.g. mmlu, mmmlu_sw_ke."
    )
    include_path: RealPath | None = Field(None, description="Folder with task files (YAML) of your own.")
    limit: PositiveInt | None = Field(None, description="At most this many questions per task; for a first look only.")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Worked examples before each question (default: the task's own)."
    )
    chat_template: bool = Field(False, description="Put questions into the model's chat template.")
    chat: ChatSection | None = Field(
        None,
        description="Conversation that questions stand in, with `chat_template: true` (default: that of training, or "
        "the question alone).",
    )
    backend: Literal["vllm", "hf"] = Field(
        "vllm", description="What runs the model: a pool of vLLM engines, or plain transformers in one process."
    )
    address: str = Field("auto", description="Ray address, as cluster.address of a training run.")
    env: VariableNames = ENV
    accelerator: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="`auto`: GPUs if the cluster, or torch with backend=hf, has some."
    )
    engine: UtilityEngineSection = UtilityEngineSection()

    @model_validator(mode="after")
    def _chat_is_read(self) -> Self:
        if self.chat is not None and not self.chat_template:
            raise ValueError("chat: not read with chat_template=false; set chat_template=true, or remove chat")
        return self

    @model_validator(mode="after")
    def _what_transformers_read(self) -> Self:
        if self.backend != "hf":
            return self
        if "address" in self.model_fields_set:
            raise ValueError(f"address={self.address!r}: not read with backend='hf', which needs no Ray; remove it")
        if self.env:
            raise ValueError(f"env={self.env!r}: not read with backend='hf', which needs no Ray; remove it")
        if unread := sorted(self.engine.model_fields_set - set(HF_ENGINE_FIELDS)):
            given = ", ".join(f"engine.{name}={getattr(self.engine, name)!r}" for name in unread)
            raise ValueError(
                f"{given}: not read with backend='hf', which reads engine.{', engine.'.join(HF_ENGINE_FIELDS)} alone; "
                "remove it, or set backend=vllm"
            )
        return self


class UtilityConfig(UtilitySection):
    """One run of lm-evaluation-harness: what the model still knows."""

    command: ClassVar = "utility"
    model: StoredPath = Field(
        description="Folder of a run, a checkpoint or an exported model, its URL, or hub name `NAME[#REVISION]`."
    )
    scores: RealPath | None = Field(None, description="Score folder of the same model; utility.json goes into it.")
    output_dir: RealPath = Field("runs/utility", description="Where a folder is made if `scores` is not given.")
