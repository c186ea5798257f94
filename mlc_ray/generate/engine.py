"""Greedy generation and log-probs. The only module that imports vLLM, and it does so when an engine is made."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from mlc_ray.config import EngineSection
from mlc_ray.device import resolved
from mlc_ray.errors import MlcRayError
from mlc_ray.runs import longest_context
from mlc_ray.storage import local_model
from mlc_ray.types import PROMPT_TOO_LONG as PROMPT_TOO_LONG

Device = Literal["cpu", "gpu"]


class EngineError(MlcRayError):
    """The settings do not fit the installed vLLM, the model or each other; the message names the fix."""


@dataclass(frozen=True)
class Generation:
    """One answer. `finish` is vLLM's reason (`stop`: the model ended it, `length`: cut off) or `PROMPT_TOO_LONG`."""

    text: str
    finish: str
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Tail:
    """What a model says of the end of a sequence: log-prob in nats; whether each of its tokens was a likeliest one."""

    log_prob: float
    greedy: bool


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
    """Check before an engine is started that an answer fits, and that the model has so many positions.

    Raises:
        EngineError: it does not, or it has fewer.
    """
    longest = engine.max_model_len
    if max_new_tokens >= longest:
        raise EngineError(
            f"max_new_tokens={max_new_tokens} leaves no space for a prompt in engine.max_model_len={longest}"
        )
    check_positions(model, engine)


def check_positions(model: str, engine: EngineSection) -> None:
    """Check that a local model was made for `max_model_len` positions, by its config.json.

    Raises:
        EngineError: it was made for fewer.
    """
    positions = longest_context(model)
    if positions is not None and engine.max_model_len > positions:
        raise EngineError(
            f"engine.max_model_len={engine.max_model_len} is more than the {positions} positions of {model!r}; "
            f"set engine.max_model_len={positions} or less"
        )


def check_finished(generations: Iterable[Generation]) -> None:
    """Check that what an engine made of a judge's or translator's questions ended in a way that says something of them.

    Raises:
        RuntimeError: the engine gave one up (`abort`, `error`): its own fault, and no property of any text.
    """
    for each in generations:
        if each.finish not in ("stop", "length", PROMPT_TOO_LONG):
            what = f"finish {each.finish!r} after {each.response_tokens} tokens"
            raise RuntimeError(f"the engine ended a reply with {what}")


@dataclass(frozen=True)
class Warm:
    """What an engine that outlives its weights must be started with.

    `lora_rank` is the largest rank of the adapters it is to serve, None where whole models are; `sleeps` whether it
    gives its GPU memory back between uses.
    """

    lora_rank: int | None = None
    sleeps: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """vLLM's own names for it."""
        options: dict[str, Any] = {"worker_extension_cls": "mlc_ray.generate.swap.WeightSampler"}
        if self.lora_rank is not None:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank_that_vllm_has(self.lora_rank)}
        if self.sleeps:
            options["enable_sleep_mode"] = True
        return options


_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Four texts of 16 ids that any vocabulary has, and from where their log-probs are asked.
_CANARIES = ([[3 + (7919 * (16 * text + place)) % 997 for place in range(16)] for text in range(4)], [1] * 4)

# What an adapter may add to a weight without changing any log-prob of the fixed text. Weights are some hundredths, and
# bfloat16 keeps three digits; an adapter whose every element is below adds nothing that a greedy answer would show.
_LOST_IN_ROUNDING = 1e-4


def _rank_that_vllm_has(rank: int) -> int:
    try:
        return next(size for size in _RANKS if size >= rank)
    except StopIteration:
        raise EngineError(f"adapters of rank {rank} cannot be served: vLLM has ranks up to {_RANKS[-1]}") from None


class Engine:
    """One in-process vLLM engine on token ids: it generates greedily, and tells log-probs of given tokens.

    Weights are read from safetensors only. Greedy decoding is a fixed function of weights and ids up to floating-point
    ties. `max_model_len` is the longest sequence in tokens, generated ones included. All state is the object's own, but
    for the variables of `engine_environment`. vLLM's prefix cache is on: what prompts have in common at their front (a
    guard's policies, a system prompt) is computed once, in whole blocks, which on CPU hold 32 tokens.

    With a `warm` it outlives its weights: `swap` gives it others of the same shape without a restart, `sleep` gives its
    GPU memory back.

    Raises:
        EngineError: the model has fewer positions than `settings.max_model_len`, or the installed vLLM is for the other
            device.
    """

    _lora: Any = None
    _adapters = 0  # served so far
    _canary: list[float] | None = None  # log-probs of the canaries under the weights, no adapter
    _sample: Any = None  # `WeightSample` of the weights

    def __init__(self, model: str, settings: EngineSection, *, device: Device, warm: Warm | None = None):
        check_positions(model, settings)
        prepare_process(settings, device)
        self.model = model
        self.max_model_len = settings.max_model_len
        settings = settings.model_copy(update={"dtype": resolved(settings.dtype, gpu=device == "gpu")})
        self._dtype = settings.dtype
        self._batch = 1 if warm is not None and warm.lora_rank is not None else _LOG_PROB_BATCH
        self._llm = _start_engine(model, settings, device, warm)

    def swap(self, model: str) -> dict[str, float]:
        """Serve a Hugging Face folder's (or hub name's) weights from now on, of the same architecture as those before.

        What the engine then holds is compared with the file, and its log-probs of a fixed text with those before
        (`generate.swap`).

        Returns:
            The seconds of the `transfer` of the weights and of the `proof`.

        Raises:
            StaleWeightsError: it is not proved that the engine serves the new weights.
        """
        import torch

        from mlc_ray.generate.swap import StaleWeightsError, compare_samples, file_sample, weights_folder

        dtype = getattr(torch, self._dtype)
        if self._sample is None:  # the first swap
            self._canary, self._sample = self.log_probs(*_CANARIES), file_sample(self.model, dtype)
        started = time.perf_counter()
        folder = str(weights_folder(model))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._llm.collective_rpc("renew_heads")
        self._llm.reset_prefix_cache()  # keys and values in it are the old weights'
        transferred = time.perf_counter()
        expected = file_sample(folder, dtype)
        compare_samples(expected, self._llm.collective_rpc("held_samples", kwargs=expected.wanted), model)
        canary = self.log_probs(*_CANARIES)
        if canary == self._canary and not expected.equals(self._sample):
            raise StaleWeightsError(
                f"after a swap to {model!r}, whose weights differ from those of {self.model!r}, the engine gives a "
                "fixed text the same log-probs as before: it does not serve them; nothing was scored"
            )
        self.model, self._canary, self._sample = model, canary, expected
        return {"transfer": transferred - started, "proof": time.perf_counter() - transferred}

    def swap_adapter(self, folder: str | None) -> dict[str, float]:
        """Serve a LoRA adapter (peft folder) over the weights from now on; None serves the weights alone.

        The adapter gets an id that no other had, so that none kept from before can be taken for it; and the log-probs
        of a fixed text must not be those of the weights alone, unless all it adds is lost in rounding, as after the
        first step of a warm-up.

        Returns:
            Seconds as `swap` does; loading is part of the proof here.

        Raises:
            StaleWeightsError: the log-probs are the same.
        """
        started = time.perf_counter()
        from vllm.lora.request import LoRARequest

        from mlc_ray.generate.swap import StaleWeightsError, adapter_reach

        self._lora = None
        if self._canary is None:
            self._canary = self.log_probs(*_CANARIES)
        if folder is None:
            return {"transfer": 0.0, "proof": 0.0}
        self._adapters += 1
        self._lora = LoRARequest(f"adapter-{self._adapters}", self._adapters, folder)
        if self.log_probs(*_CANARIES) == self._canary and (reach := adapter_reach(folder)) > _LOST_IN_ROUNDING:
            self._lora = None
            raise StaleWeightsError(
                f"with the adapter {folder!r}, which adds up to {reach:.2g} to weights, the engine answers exactly as "
                "without it: it was not loaded; nothing was scored"
            )
        return {"transfer": 0.0, "proof": time.perf_counter() - started}

    def sleep(self) -> None:
        """Give the GPU memory back (weights go to CPU memory) until `wake_up`; needs `Warm(sleeps=True)`."""
        self._llm.sleep(level=1)

    def wake_up(self) -> None:
        """Take the GPU memory again."""
        self._llm.wake_up()

    def generate(
        self,
        ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
        special: bool = False,
    ) -> list[Generation]:
        """A continuation of each prompt, in order, at most `max_new_tokens` long: the greedy one at `temperature` 0.

        A prompt that leaves no space for that many is not cut: it would be another question. It comes back empty with
        finish `PROMPT_TOO_LONG`.

        Args:
            ids: the prompts.
            max_new_tokens: the most tokens of a continuation.
            temperature: that tokens are drawn at.
            seeds: of what is drawn, one for each prompt: it then does not depend on what shares its batch, up to
                floating-point ties.
            special: keep special tokens in the text.
        """
        from vllm import SamplingParams

        longest = self.max_model_len - max_new_tokens
        fitting = [index for index, prompt in enumerate(ids) if len(prompt) <= longest]
        results = [Generation("", PROMPT_TOO_LONG, len(prompt), 0) for prompt in ids]
        params = [
            SamplingParams(
                temperature=temperature,
                seed=None if seeds is None else seeds[index],
                max_tokens=max_new_tokens,
                skip_special_tokens=not special,
            )
            for index in fitting
        ]
        for index, output in zip(fitting, self._run([ids[index] for index in fitting], params), strict=True):
            answer = output.outputs[0]
            results[index] = Generation(
                answer.text, answer.finish_reason or "unknown", len(ids[index]), len(answer.token_ids)
            )
        return results

    def complete(self, ids: Sequence[Sequence[int]], sampling: Sequence[Mapping[str, Any]]) -> list[str]:
        """A text behind each prompt, in order, drawn by vLLM's `SamplingParams` of these fields.

        Raises:
            EngineError: vLLM has no such field, or takes no such value.
            RuntimeError: the engine gave one up.
        """
        from vllm import SamplingParams

        try:
            params = [SamplingParams(**each) for each in sampling]
        except (TypeError, ValueError) as error:
            raise EngineError(f"vLLM cannot sample as the task says: {error}; change its generation_kwargs") from None
        outputs = [output.outputs[0] for output in self._run(ids, params)]
        check_finished(
            Generation(each.text, each.finish_reason or "unknown", 0, len(each.token_ids)) for each in outputs
        )
        return [each.text for each in outputs]

    def log_probs(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> list[float]:
        """The log-probs of `tails` alone, which asks vLLM for less."""
        return [tail.log_prob for tail in self._tails(ids, starts, likeliest=0)]

    def tails(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tail]:
        """log P(ids[i][starts[i]:] | ids[i][:starts[i]]) in nats, summed over tokens, for each sequence i.

        What sequences have in common at their front is computed once, in whole blocks of the key-value cache, if they
        are given together.

        Raises:
            EngineError: a sequence is longer than `max_model_len` - 1 (vLLM samples one token behind it), or a start
                leaves nothing before it or nothing behind it.
        """
        return self._tails(ids, starts, likeliest=1)

    def _tails(self, ids: Sequence[Sequence[int]], starts: Sequence[int], *, likeliest: int) -> list[Tail]:
        for sequence, start in zip(ids, starts, strict=True):
            if len(sequence) >= self.max_model_len or not 0 < start < len(sequence):
                raise EngineError(
                    f"log-probs from token {start} of a sequence of {len(sequence)} tokens cannot be had with "
                    f"engine.max_model_len={self.max_model_len}; the start must lie inside, and one token be left"
                )
        # What an earlier call left in the cache may reach into the tokens that are asked about.
        self._llm.reset_prefix_cache()
        results = self._shared_tails(ids, starts, likeliest)
        # Two continuations that begin alike can share a block that reaches into them: those again, without sharing.
        again = [index for index, value in enumerate(results) if value is None]
        alone = self._shared_tails([ids[i] for i in again], [starts[i] for i in again], likeliest, shared=False)
        whole = dict(zip(again, alone, strict=True))
        return [cast(Tail, whole.get(index, value)) for index, value in enumerate(results)]

    def _shared_tails(
        self, ids: Sequence[Sequence[int]], starts: Sequence[int], likeliest: int, shared: bool = True
    ) -> list[Tail | None]:
        """As `tails`; None where the cache spared vLLM the computation of a token that is asked about."""
        from vllm import SamplingParams

        # Per position the prompt's own token, and the likeliest if asked for. vLLM would not read its cache beside
        # prompt log-probs, because positions found there have none: true, and made up for by looking at
        # `num_cached_tokens`.
        asked = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=likeliest,
            detokenize=False,
            skip_reading_prefix_cache=not shared,
        )
        results: list[Tail | None] = []
        for batch in self._batches(ids):
            for index, output in zip(batch, self._run([ids[i] for i in batch], asked), strict=True):
                # The log-prob of a token comes from the position before it.
                known = (output.num_cached_tokens or 0) < starts[index]
                results.append(_tail(output, ids[index][starts[index] :]) if known else None)
        return results

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[range]:
        """Sequences that are asked about at a time."""
        first = tokens = 0
        for index, sequence in enumerate(ids):
            if index > first and (index - first == self._batch or tokens + len(sequence) > _LOG_PROB_TOKENS):
                yield range(first, index)
                first, tokens = index, 0
            tokens += len(sequence)
        if first < len(ids):
            yield range(first, len(ids))

    def close(self) -> None:
        """Free the engine's memory; it cannot be used afterwards."""
        self._llm = None
        gc.collect()

    def _run(self, ids: Sequence[Sequence[int]], params: Any) -> list[Any]:
        inputs: list[Any] = [{"prompt_token_ids": list(sequence)} for sequence in ids]
        return self._llm.generate(inputs, params, use_tqdm=False, lora_request=self._lora) if inputs else []


def prepare_process(engine: EngineSection, device: Device) -> None:
    """What torch and vLLM read from the environment when they are loaded."""
    os.environ.update(engine_environment(engine, device))
    if device == "gpu" and importlib.util.find_spec("flashinfer") is None:
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # vLLM would choose it and fail


def _tail(output: Any, tail: Sequence[int]) -> Tail:
    """Of the last tokens of a prompt; by position from the end, since cached ones may be left out."""
    rows = list(zip(output.prompt_logprobs[-len(tail) :], tail, strict=True))
    greedy = all(row[token].logprob >= max(each.logprob for each in row.values()) for row, token in rows)
    return Tail(float(sum(row[token].logprob for row, token in rows)), greedy)


# vLLM gives back an object per token of every sequence: what is held at a time stays within some hundred MB. Engines
# that serve adapters take one: vLLM's LoRA layer of the LM head has an index per sampled token, not per prompt token,
# and fails on the second sequence.
_LOG_PROB_BATCH = 1024
_LOG_PROB_TOKENS = 1 << 18


def _start_engine(model: str, engine: EngineSection, device: Device, warm: Warm | None) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (device == "cpu"):
        raise EngineError(_other_device(device, current_platform.device_type or "no device here"))
    # On CPU compiling takes a minute or two at every start, needs a C++ compiler, and gained a tenth in tokens/s. The
    # block is the least the CPU kernels take (vLLM's own choice is 128): the cache is shared in whole blocks only.
    options = {"enforce_eager": True, "block_size": 32} if device == "cpu" else _gpu_options(engine)
    options |= (warm.options if warm is not None else {}) | engine.options
    folder = local_model(model)
    llm = LLM(
        model=folder,
        tokenizer=folder,
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
    _count_steps(llm)
    return llm


def _other_device(device: Device, found: str) -> str:
    wanted, extra = ("CPU", "cpu") if device == "cpu" else ("GPU", "cuda")
    return (
        f"scoring is to run on {wanted}, but the installed vLLM is for {found}; install this package with [{extra}], "
        "or change accelerator"
    )


def _gpu_options(engine: EngineSection) -> dict[str, Any]:
    options: dict[str, Any] = {
        "enforce_eager": engine.enforce_eager,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
    }
    if engine.tensor_parallel > 1:
        # Inside a Ray actor vLLM would otherwise ask Ray for GPUs of its own, which the actor already holds.
        options |= {"tensor_parallel_size": engine.tensor_parallel, "distributed_executor_backend": "mp"}
    return options


_steps = 0


def steps_done() -> int:
    """Steps that all engines of this process have made: while one has work, a number that stands still says it hangs.

    A step is one forward over what is in the batch: a token of every answer, or a piece of some prompts.
    """
    return _steps


def _count_steps(llm: Any) -> None:
    step = llm.llm_engine.step

    def counted() -> Any:
        global _steps
        found = step()
        _steps += 1
        return found

    llm.llm_engine.step = counted
