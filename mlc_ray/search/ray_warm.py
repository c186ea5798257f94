"""Engines that outlive the models they serve: a pool that takes each trial's weights without restarting.

A pool is a few Ray actors: *answerers*, each a vLLM engine, and one *judge*. `WarmPool` is a handle to them that can be
sent to any process of the cluster; scoring a checkpoint is one call from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from mlc_ray.artifacts import fingerprint
from mlc_ray.config import ScoringSection
from mlc_ray.errors import MlcRayError
from mlc_ray.score.generate import Device, Warm, engine_environment
from mlc_ray.score.metrics import Judged
from mlc_ray.score.registry import judge_facts
from mlc_ray.score.results import records_of
from mlc_ray.score.stages import FAULT, JUDGED, RESPONSES, GenerateStage, JudgeStage, LikelihoodStage
from mlc_ray.types import Via

_LIGHT_CPUS = 0.1


class WarmPoolError(MlcRayError):
    """An engine of the pool failed; the message is the engine's."""


@dataclass(frozen=True)
class PoolScore:
    """Verdicts on one checkpoint's responses, and the seconds each part took (`swap` with its proof)."""

    records: tuple[Judged, ...]
    responses: pa.Table
    seconds: Mapping[str, float]


class Answerer:
    """An actor: one engine that swaps weights and answers its share of the prompts."""

    def __init__(self, stage: str, settings: Mapping[str, Any], sleeps: bool):
        self.stage: GenerateStage | LikelihoodStage = _ANSWERERS[stage](**settings)
        self.sleeps = sleeps
        if self.stage.fault is None and sleeps:
            self.stage.engine.sleep()

    def ready(self) -> str | None:
        """None once the engine is up, else its fault."""
        return None if self.stage.fault is None else str(self.stage.fault)

    def answer(self, weights: str, lora: bool, prompts: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        """Responses (or verdicts) of the model in the folder `weights`; a fault is a column, as of any stage."""
        started = time.perf_counter()
        if self.sleeps:
            self.stage.engine.wake_up()
        woken = time.perf_counter()
        engine = self.stage.engine
        swap = engine.swap_adapter(weights or None) if lora else engine.swap(weights)
        swapped = time.perf_counter()
        table = self.stage(prompts)
        answered = time.perf_counter()
        if self.sleeps:
            self.stage.engine.sleep()
        seconds = {
            "wake": woken - started,
            **swap,
            "answer": answered - swapped,
            "sleep": time.perf_counter() - answered,
        }
        return table, seconds


_ANSWERERS: dict[str, Any] = {"generate": GenerateStage, "likelihood": LikelihoodStage}


class WarmPool:
    """A handle to the actors; make one with `start_pool`, `close` it to free their memory."""

    def __init__(self, answerers: list[Any], judge: Any | None, prompts: Any, n_prompts: int) -> None:
        self.answerers, self.judge = answerers, judge
        self.prompts, self.n_prompts = prompts, n_prompts  # prompts lie in the object store, once for all trials

    def score(self, weights: str, *, lora: bool = False) -> PoolScore:
        """Verdicts on the model in the folder `weights` (`lora`: an adapter for the model the pool started with).

        Raises `WarmPoolError` with the fault of an engine: weights that are not served (`StaleWeightsError`) above all.
        """
        started = time.perf_counter()
        prompts: pa.Table = ray.get(self.prompts)
        share = math.ceil(len(prompts) / len(self.answerers))
        parts = [prompts.slice(index * share, share) for index in range(len(self.answerers))]
        answers = ray.get(
            [a.answer.remote(weights, lora, part) for a, part in zip(self.answerers, parts, strict=True) if len(part)]
        )
        table = _checked(pa.concat_tables(table for table, _ in answers))
        before_judge = time.perf_counter()
        if self.judge is not None:
            table = _checked(ray.get(self.judge.__call__.remote(table.select(RESPONSES.names))))
        ended = time.perf_counter()
        slowest = {name: max(seconds[name] for _, seconds in answers) for name in answers[0][1]}
        seconds = {**slowest, "judge": ended - before_judge, "total": ended - started}
        table = table.select(JUDGED.names).cast(JUDGED)
        return PoolScore(tuple(records_of(table)), table, seconds)

    def close(self) -> None:
        """End the actors and free what they hold."""
        for actor in [*self.answerers, *([self.judge] if self.judge is not None else [])]:
            ray.kill(actor)


def start_pool(
    model: str,
    scoring: ScoringSection,
    prompts: pa.Table,
    *,
    device: Device,
    ways: Mapping[str, Via],
    phrase_ways: Mapping[str, Via] | None,
    cache_dir: str,
    lora_rank: int | None = None,
    sleeps: bool = False,
    gpus_per_engine: float | None = None,
) -> WarmPool:
    """Start the engines of `scoring.engine` with `model`'s weights, and wait until all are up.

    `lora_rank` is the rank of adapters to be served, None where whole models are. With `sleeps` engines give their GPU
    memory back between scores. `gpus_per_engine` is what each reserves of Ray (default: tensor_parallel; 0 shares the
    first GPU with its owner). Raises
    `WarmPoolError`.
    """
    engine = scoring.engine
    settings: dict[str, Any] = {
        "model": model, "engine": engine, "device": device, "warm": Warm(lora_rank, sleeps),
    }  # fmt: skip
    facts = judge_facts(scoring.judge)
    kind = "likelihood" if facts.runs == "prompts" else "generate"
    settings |= {"ways": ways} if kind == "likelihood" else {"max_new_tokens": scoring.max_new_tokens}
    gpus = 0.0 if device == "cpu" else engine.tensor_parallel if gpus_per_engine is None else gpus_per_engine
    actor = ray.remote(Answerer).options(
        num_cpus=engine.cpus_per_replica,
        num_gpus=gpus,
        runtime_env={"env_vars": engine_environment(engine, device)},
    )
    answerers = [actor.remote(kind, settings, sleeps) for _ in range(engine.replicas)]
    judge = None
    if kind == "generate":
        runs_engine = facts.runs == "engine"
        judging = scoring.judge.engine
        options: dict[str, Any] = {"num_cpus": _LIGHT_CPUS}
        if runs_engine:
            options = {
                "num_cpus": judging.cpus_per_replica,
                "num_gpus": judging.tensor_parallel if device == "gpu" else 0,
                "runtime_env": {"env_vars": engine_environment(judging, device)},
            }
        judge = (
            ray.remote(JudgeStage)
            .options(**options)
            .remote(settings=scoring.judge, device=device, ways=ways, phrase_ways=phrase_ways, cache_dir=cache_dir)
        )
    pool = WarmPool(answerers, judge, ray.put(prompts), len(prompts))
    faults = [fault for fault in ray.get([a.ready.remote() for a in answerers]) if fault is not None]
    if faults:
        pool.close()
        raise WarmPoolError(faults[0])
    return pool


def prompts_fingerprint(prompts: pa.Table) -> str:
    """Names a set of prompts: two scores with the same can be compared."""
    columns = ("benchmark", "bundle_id", "kind", "language")
    return fingerprint(sorted(zip(*(prompts[name].to_pylist() for name in columns), strict=True)))


def _checked(table: pa.Table) -> pa.Table:
    if faults := [text for text in table[FAULT].to_pylist() if text is not None]:
        raise WarmPoolError(faults[0])
    return table.drop_columns([FAULT])
