"""Greedy generation. The only module that imports vLLM, and it does so when an engine is made."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlc_ray.config import EngineSection
from mlc_ray.errors import MlcRayError
from mlc_ray.score.models import longest_context

PROMPT_TOO_LONG = "prompt_too_long"
"""Finish reason of a prompt that left no room for an answer and was not sent to the model."""

Device = Literal["cpu", "gpu"]


class EngineError(MlcRayError):
    """The settings and the installed vLLM, or the settings among themselves, do not fit."""


@dataclass(frozen=True)
class Generation:
    """One answer. `finish` is vLLM's reason (`stop`: the model ended it, `length`: cut off) or `PROMPT_TOO_LONG`."""

    text: str
    finish: str
    prompt_tokens: int
    response_tokens: int


def engine_environment(engine: EngineSection, device: Device) -> dict[str, str]:
    """Variables an engine's process needs, set before torch is loaded there: OpenMP reads some of them only then.

    On CPU: as many threads as reserved CPUs, not bound to cores, and *sleeping* while they wait. Threads that spin, or
    that are bound, lose whole time slices at every barrier when something else runs on their core. SmolLM2-135M with
    two threads on two cores that others used too: 20 to 27 tokens/s spinning, 36 bound (load 9 to 14), 115 to 165
    sleeping (load 5 to 9).
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process: no child that outlives an actor
        # vLLM warns a dozen times at every healthy start on CPU; its errors are shown, and a user's own level wins.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning"),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(engine.cpu_kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(math.ceil(engine.cpus_per_replica)),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    return environment


def check_lengths(model: str, engine: EngineSection, max_new_tokens: int) -> None:
    """Raise `EngineError` if an answer cannot fit, or the model has no such positions; before an engine is started."""
    if max_new_tokens >= engine.max_model_len:
        raise EngineError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in "
            f"engine.max_model_len={engine.max_model_len}"
        )
    positions = longest_context(model)
    if positions is not None and engine.max_model_len > positions:
        raise EngineError(
            f"engine.max_model_len={engine.max_model_len} is more than the {positions} positions of {model!r}; "
            f"set engine.max_model_len={positions} or less"
        )


class Generator:
    """One in-process vLLM engine that answers single user messages greedily.

    The prompt's ids come from the same chat template code as in training, generation prompt included, so what is scored
    is exactly what was trained. Weights are read from safetensors only. Greedy decoding is a fixed function of weights
    and ids up to floating-point ties. Raises `EngineError` when the installed vLLM is for the other device.
    """

    def __init__(self, model: str, engine: EngineSection, *, max_new_tokens: int, device: Device):
        check_lengths(model, engine, max_new_tokens)
        os.environ.update(engine_environment(engine, device))
        if device == "gpu" and importlib.util.find_spec("flashinfer") is None:
            os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # vLLM would choose it and fail

        from mlc_ray.data.tokens import ChatTemplate, load_tokenizer

        self.model = model
        self.max_new_tokens = max_new_tokens
        self.longest_prompt = engine.max_model_len - max_new_tokens
        self._template = ChatTemplate(load_tokenizer(model, trust_remote_code=engine.trust_remote_code))
        if self._template.minimum > self.longest_prompt:
            raise EngineError(
                f"engine.max_model_len={engine.max_model_len} less max_new_tokens={max_new_tokens} leaves no room for "
                f"the chat template, which takes {self._template.minimum - 1} tokens"
            )
        self._llm = _start_engine(model, engine, device)

    def generate(self, prompts: Sequence[str]) -> list[Generation]:
        """The answer to each prompt, in order.

        A prompt of more than `longest_prompt` tokens is not cut: it would be another question. It comes back empty with
        finish `PROMPT_TOO_LONG`.
        """
        from vllm import SamplingParams

        ids = [self._template.encode_prompt(prompt, _NO_LIMIT)[0] for prompt in prompts]
        fitting = [index for index, prompt in enumerate(ids) if len(prompt) <= self.longest_prompt]
        results = [Generation("", PROMPT_TOO_LONG, len(prompt), 0) for prompt in ids]
        greedy = SamplingParams(temperature=0.0, max_tokens=self.max_new_tokens)
        inputs: list[Any] = [{"prompt_token_ids": ids[index]} for index in fitting]
        outputs = self._llm.generate(inputs, greedy, use_tqdm=False) if inputs else []
        for index, output in zip(fitting, outputs, strict=True):
            answer = output.outputs[0]
            results[index] = Generation(
                answer.text, answer.finish_reason or "unknown", len(ids[index]), len(answer.token_ids)
            )
        return results

    def close(self) -> None:
        """Free the engine's memory; the generator cannot be used afterwards."""
        del self._llm
        gc.collect()


_NO_LIMIT = 1 << 62


def _start_engine(model: str, engine: EngineSection, device: Device) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (device == "cpu"):
        wanted, extra = ("CPU", "cpu") if device == "cpu" else ("GPU", "cuda")
        found = current_platform.device_type or "no device here"
        raise EngineError(
            f"scoring is to run on {wanted}, but the installed vLLM is for {found}; "
            f"install this package with [{extra}], or change accelerator"
        )
    options: dict[str, Any] = {"enforce_eager": engine.enforce_eager}
    if device == "cpu":
        # Compiling takes a minute or two at every start, needs a C++ compiler, and gained a tenth in tokens/s.
        options["enforce_eager"] = True
    elif engine.tensor_parallel > 1:
        # Inside a Ray actor vLLM would otherwise ask Ray for GPUs of its own, which the actor already holds.
        options |= {"tensor_parallel_size": engine.tensor_parallel, "distributed_executor_backend": "mp"}
    if device == "gpu":
        options["gpu_memory_utilization"] = engine.gpu_memory_utilization
    return LLM(
        model=model,
        tokenizer=model,
        load_format="safetensors",
        dtype=engine.dtype,
        max_model_len=engine.max_model_len,
        trust_remote_code=engine.trust_remote_code,
        # The folder's own sampling defaults (temperature, repetition penalty) must not touch a greedy comparison.
        generation_config="vllm",
        seed=0,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **options,
    )
