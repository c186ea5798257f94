"""Engines that outlive the models they serve: a pool that takes each trial's weights without restarting.

A pool is a few Ray actors: *answerers*, each a vLLM engine, and what reads their responses: a translator where one is
asked for, and a judge. `WarmPool` is a handle to them that can be sent to any process of the cluster; scoring a
checkpoint is one call from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from mlc_ray.config import EngineSection, ScoringSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, Warm, engine_environment
from mlc_ray.judges.base import make_judge
from mlc_ray.score.run import USAGE_FILES, Judging, plan_judging
from mlc_ray.score.stages import FAULT, JUDGED, RESPONSES, GenerateStage, JudgeStage, PromptJudgeStage, TranslateStage

READER_CPUS = 0.1  # of a translator or judge without an engine


class WarmPoolError(MlcRayError):
    """An engine of the pool failed; the message is the engine's."""


@dataclass(frozen=True)
class PoolScore:
    """One checkpoint's responses with their verdicts (`score.stages.JUDGED`), and the seconds each part took."""

    judged: pa.Table
    seconds: Mapping[str, float]


class Answerer:
    """An actor: one engine that swaps weights and answers its share of the prompts."""

    def __init__(self, stage: str, settings: Mapping[str, Any], sleeps: bool):
        self.stage: GenerateStage | PromptJudgeStage = _ANSWERERS[stage](**settings)
        self.sleeps = sleeps
        if self.stage.fault is None and sleeps:
            self.stage.engine.sleep()

    def ready(self) -> str | None:
        """None once the engine is up, else its fault."""
        return None if self.stage.fault is None else str(self.stage.fault)

    def answer(self, weights: str, lora: bool, prompts: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        """Responses (or verdicts) of the model in the folder `weights`; a fault is a column, as of any stage."""
        engine = self.stage.engine
        started = time.perf_counter()
        if self.sleeps:
            engine.wake_up()
        woken = time.perf_counter()
        try:
            swap = engine.swap_adapter(weights or None) if lora else engine.swap(weights)
            swapped = time.perf_counter()
            table = self.stage(prompts)
            answered = time.perf_counter()
        finally:  # training needs the memory whatever happened here
            if self.sleeps:
                engine.sleep()
        seconds = {"wake": woken - started, **swap, "answer": answered - swapped,
                   "sleep": time.perf_counter() - answered}  # fmt: skip
        return table, seconds


_ANSWERERS: dict[str, Any] = {"generate": GenerateStage, "judge": PromptJudgeStage}


class WarmPool:
    """A handle to the actors; make one with `start_pool`, `close` it to free their memory."""

    def __init__(self, answerers: list[Any], readers: list[Any], prompts: Any) -> None:
        self.answerers, self.readers = answerers, readers
        self.prompts = prompts  # in the object store, once for all trials

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
        if self.readers:
            table = table.select(RESPONSES.names)
        for reader in self.readers:
            table = _checked(ray.get(reader.__call__.remote(table)))
        ended = time.perf_counter()
        slowest = {name: max(seconds[name] for _, seconds in answers) for name in answers[0][1]}
        seconds = {**slowest, "judge": ended - before_judge, "total": ended - started}
        return PoolScore(table.select(JUDGED.names).cast(JUDGED), seconds)

    def close(self) -> None:
        """End the actors and free what they hold."""
        for actor in [*self.answerers, *self.readers]:
            ray.kill(actor)


def start_pool(
    model: str,
    scoring: ScoringSection,
    prompts: pa.Table,
    *,
    device: Device,
    folder: Path,
    lora_rank: int | None = None,
    sleeps: bool = False,
) -> WarmPool:
    """Start the engines of `scoring.engine` with `model`'s weights, and wait until all are up.

    `lora_rank` is the rank of adapters to be served, None where whole models are. With `sleeps` engines give their GPU
    memory back between scores; they reserve no GPU of Ray, and use the first one of their machine. An endpoint's cache,
    and what it did and cost, are kept in `folder`. Raises `WarmPoolError`.
    """
    engine = scoring.engine
    judging = plan_judging(make_judge(scoring.judge), prompts["language"].unique().to_pylist())
    settings: dict[str, Any] = {"model": model, "engine": engine, "device": device, "warm": Warm(lora_rank, sleeps)}
    answers_itself = judging.judge.runs == "prompts"
    settings |= (
        {"settings": scoring.judge, "ways": judging.ways}
        if answers_itself
        else {"max_new_tokens": scoring.max_new_tokens}
    )
    actor = ray.remote(Answerer).options(**_engine_options(engine, device, gpus=0.0 if sleeps else None))
    kind = "judge" if answers_itself else "generate"
    answerers = [actor.remote(kind, settings, sleeps) for _ in range(engine.replicas)]
    readers = [] if answers_itself else _start_readers(judging, device, folder)
    pool = WarmPool(answerers, readers, ray.put(prompts))
    faults = [fault for fault in ray.get([a.ready.remote() for a in answerers]) if fault is not None]
    if faults:
        pool.close()
        raise WarmPoolError(faults[0])
    return pool


def pool_parts(scoring: ScoringSection, *, device: Device, sleeps: bool) -> list[tuple[float, float]]:
    """The (CPUs, GPUs) of every actor that `start_pool` starts; a translator is counted where one may be needed."""
    judge = make_judge(scoring.judge)
    translate = judge.settings.translator
    answerer = _engine_options(scoring.engine, device, gpus=0.0 if sleeps else None)
    reading = [] if judge.runs == "prompts" else [judge.engine]
    reading += [] if translate is None else [translate.engine if translate.model is not None else None]
    readers = [_engine_options(own, device) if own is not None else {"num_cpus": READER_CPUS} for own in reading]
    return [(each["num_cpus"], each.get("num_gpus", 0)) for each in [*[answerer] * scoring.engine.replicas, *readers]]


def _start_readers(judging: Judging, device: Device, folder: Path) -> list[Any]:
    """Actors that take responses one after the other and end with verdicts: a translator if need be, and the judge."""
    judge, translate = judging.judge, judging.judge.settings.translator
    light = {"num_cpus": READER_CPUS}
    common: dict[str, Any] = {"device": device, "cache_dir": str(folder / "cache")}
    readers = []
    if translate is not None and judging.translated is not None:
        options = _engine_options(translate.engine, device) if translate.model is not None else light
        readers.append(
            ray.remote(TranslateStage)
            .options(**options)
            .remote(settings=translate, ways=judging.translated,
                    usage_file=str(folder / USAGE_FILES["translate"]), **common)
        )  # fmt: skip
    stage = ray.remote(JudgeStage).options(**(light if judge.engine is None else _engine_options(judge.engine, device)))
    readers.append(
        stage.remote(settings=judge.settings, ways=judging.ways, phrase_ways=judging.phrase_ways,
                     usage_file=str(folder / USAGE_FILES["judge"]), **common)
    )  # fmt: skip
    return readers


def _engine_options(engine: EngineSection, device: Device, *, gpus: float | None = None) -> dict[str, Any]:
    return {
        "num_cpus": engine.cpus_per_replica,
        "num_gpus": 0 if device == "cpu" else engine.tensor_parallel if gpus is None else gpus,
        "runtime_env": {"env_vars": engine_environment(engine, device)},
    }


def _checked(table: pa.Table) -> pa.Table:
    if faults := [text for text in table[FAULT].to_pylist() if text is not None]:
        raise WarmPoolError(faults[0])
    return table.drop_columns([FAULT])
