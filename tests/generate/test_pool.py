"""One pool for scores and searches: its blocks, and on real Ray what comes of them, of faults, and of other weights."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlc_ray.capacity import Need
from mlc_ray.config import EngineSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.blocks import block_rows, joined
from mlc_ray.generate.engine import Warm
from mlc_ray.generate.pool import EnginePool
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import PROMPTS, Generator, Stage
from mlc_ray.progress import phase
from tests.generate.weights import noisy_copy


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("replicas", [1, 2, 16])
@pytest.mark.parametrize("rows", [1, 5, 40, 384, 10_000])
def test_no_replica_is_without_work_and_no_block_too_large(rows: int, replicas: int, device: Any) -> None:
    size = block_rows(rows, replicas, device)
    assert 1 <= size <= {"cpu": 64, "gpu": 512}[device]
    blocks = -(-rows // size)
    assert blocks >= min(replicas, rows)


def test_what_a_part_reserves() -> None:
    engine = EngineSection(replicas=3, cpus_per_replica=2, tensor_parallel=4)
    part = Part("answering", Generator, {}, engine)
    assert part.places("gpu") == [Need(2, 4)] * 3
    assert part.places("cpu") == [Need(2, 0)] * 3
    assert part.options("cpu")["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"
    in_turn = Part("answering", Generator, {}, engine, in_turn=True)
    assert in_turn.places("gpu") == [Need(0.1, 0)] * 3
    assert in_turn.options("cpu")["runtime_env"] == part.options("cpu")["runtime_env"]  # as many threads all the same
    assert Part("judging", Generator, {}, actors=2).places("gpu") == [Need(0.1, 0)] * 2


class UnevenError(MlcRayError):
    """Of `Uneven`."""


class Uneven(Stage):
    """Doubles numbers, slowly where they are small; knows of a fault."""

    columns = pa.schema({"double": pa.int64(), "by": pa.string()})

    def __init__(self, fault: int | None = None, broken: bool = False) -> None:
        import ray

        if broken:
            raise UnevenError("broken=True: set it to False")
        self.fault, self.me = fault, ray.get_runtime_context().get_actor_id()

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        numbers = table["number"].to_pylist()
        if self.fault in numbers:
            raise UnevenError(f"number {self.fault} cannot be doubled")
        time.sleep(0.5 if numbers[0] == 0 else 0.01)
        return [{"double": 2 * number, "by": self.me} for number in numbers]


@pytest.mark.slow
def test_a_slow_actor_delays_nobody_and_rows_stay_in_order(ray_local: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mlc_ray.progress")
    part = Part("doubling", Uneven, {}, actors=2)
    table = pa.table({"number": range(400)})
    with EnginePool.open(part, "cpu") as pool, phase("doubling", len(table), "numbers") as progress:
        doubled = pool.map(table, progress=progress)
        again = pool.map(table)
        nothing = pool.map(table.slice(0, 0))
    assert "doubling: 400 numbers in" in caplog.text
    result = joined(table, doubled)
    assert result["number"].to_pylist() == list(range(400))
    assert result["double"].to_pylist() == list(range(0, 800, 2))
    assert again.select(["double"]).equals(doubled.select(["double"]))
    assert (len(nothing), nothing.schema) == (0, Uneven.columns)
    slow = result["by"][0].as_py()
    taken = [result["by"][50 * block].as_py() for block in range(8)]
    assert taken.count(slow) == 1  # the one it slept over: the other did all the rest

    # A fault arrives as itself: of a row, and of making the stage.
    broken = Part("doubling", Uneven, {"fault": 120}, actors=2)
    with pytest.raises(UnevenError, match="number 120") as caught, EnginePool.open(broken, "cpu") as pool:
        pool.map(table)
    assert type(caught.value) is UnevenError
    with pytest.raises(UnevenError, match="set it to False"):
        EnginePool.open(Part("doubling", Uneven, {"broken": True}), "cpu")


@pytest.mark.slow
def test_two_engines_answer_as_one_before_and_after_a_swap(smollm2: Path, ray_local: Any, tmp_path: Path) -> None:
    """Order and completeness with two replicas; and a pool that was given other weights answers as a fresh engine.

    So does one whose engine is killed, and another stopped, while it answers: rows that were done before stay as they
    were, and whoever comes instead serves what was served. Steps are those of real engines.
    """
    other = noisy_copy(smollm2, tmp_path / "other")
    things = ["rice", "tea", "snow", "wolves", "bread", "silver", "violins", "maps", "rain", "chess", "clay", "honey"]
    asked = [f.format(thing) for thing in things for f in ("How is {} made?", "¿Qué es {}?", "Tell me about {}.")]
    rows = [{**dict.fromkeys(PROMPTS.names, "x"), "sample": 0, "prompt": text} for text in asked]
    table = pa.Table.from_pylist(rows, schema=PROMPTS)

    def part(model: Path, replicas: int) -> Part:
        engine = EngineSection(
            replicas=replicas,
            cpus_per_replica=0.9,
            max_model_len=256,
            cpu_kv_cache_gib=1,
            dtype="float32",
            block_rows=16,
            hang_seconds=15,
        )
        settings = {"settings": engine, "max_new_tokens": 6, "device": "cpu", "warm": Warm()}
        return Part("answering", Generator, {"model": str(model), **settings}, engine)

    landed: list[int] = []

    def strike(first: int, columns: pa.Table) -> None:
        if not landed:  # both are at work on the next block, or will be
            killed, stopped = (replica.where for replica in pool.replicas)
            assert killed is not None and stopped is not None
            os.kill(killed.pid, signal.SIGKILL)
            os.kill(stopped.pid, signal.SIGSTOP)
        landed.append(first)

    with EnginePool.open(part(smollm2, 2), "cpu") as pool:
        before = pool.map(table)
        seconds = pool.swap(str(other))
        assert (pool.weights, set(seconds)) == (str(other), {"transfer", "proof"})
        idle = [ray_local.get(replica._ask("beat")) for replica in pool.replicas]
        after = pool.map(table)
        steps = [ray_local.get(replica._ask("beat")) for replica in pool.replicas]
        struck = pool.map(table, landed=strike)
    # A hang is told by them: a block of answers is a step for each of their tokens.
    assert sum(steps) - sum(idle) >= 3 * 6
    with EnginePool.open(part(other, 1), "cpu") as pool:
        fresh = pool.map(table)
        pool.swap(str(smollm2))
        back = pool.map(table)
    assert len(before) == 36
    assert len(set(before["response"].to_pylist())) > 20  # one answer could be told from another
    # float32 leaves no ties: what shares a batch does not show.
    assert after.equals(fresh)
    assert struck.equals(after)
    assert sorted(landed) == [0, 16, 32]
    assert before.equals(back)
    assert not after.equals(before)
