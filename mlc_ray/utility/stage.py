"""What engines of a pool do for the harness: log-probs of continuations, and texts."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from mlc_ray.config import EngineSection
from mlc_ray.generate.engine import Device, Engine, Warm, prepare_process
from mlc_ray.generate.stage import Stage

ASKED = pa.schema({"ids": pa.list_(pa.int32()), "start": pa.int32(), "sampling": pa.string()})
"""A question in tokens. With `start`, the log-prob of `ids[start:]` behind the others is asked for; else a text behind
all of them, drawn by `sampling` (vLLM's `SamplingParams`, as JSON)."""
SAID = pa.schema({"log_prob": pa.float64(), "greedy": pa.bool_(), "text": pa.string(), "fault": pa.string()})
"""Log-prob in nats, and whether each token of the continuation was the likeliest; or a text. `fault` says why engines
gave neither."""


class Completer(Stage):
    """`ASKED` -> `SAID`, by an engine of its own.

    Raises:
        EngineError: as `Engine`; or vLLM has no such sampling.
    """

    columns = SAID

    def __init__(self, model: str, settings: EngineSection, *, device: Device, warm: Warm | None = None) -> None:
        prepare_process(settings, device)
        self.engine: Engine = Engine(model, settings, device=device, warm=warm)

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        """What the engine says, a row per question."""
        asked = table.to_pylist()
        scored = [row for row in asked if row["start"] is not None]
        drawn = [row for row in asked if row["start"] is None]
        tails = iter(self.engine.tails([row["ids"] for row in scored], [row["start"] for row in scored]))
        texts = iter(
            self.engine.complete([row["ids"] for row in drawn], [json.loads(row["sampling"]) for row in drawn])
        )
        found: list[dict[str, Any]] = []
        for row in asked:
            if row["start"] is None:
                found.append({"text": next(texts)})
            else:
                tail = next(tails)
                found.append({"log_prob": tail.log_prob, "greedy": tail.greedy})
        return found

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **_: Any) -> list[dict[str, Any]]:
        """Neither a log-prob nor a text."""
        return [{"fault": fault}] * len(table)

    def close(self) -> None:
        """Free the engine's memory; the stage cannot be used afterwards."""
        self.engine.close()
