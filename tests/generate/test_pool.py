"""One pool for scores and searches: its blocks, and on real Ray what comes of them, of faults, and of other weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlc_ray.config import EngineSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Warm
from mlc_ray.generate.pool import Blocks, Part, Pool, block_rows, side_by_side
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
    assert part.places("gpu") == [(2, 4)] * 3
    assert part.places("cpu") == [(2, 0)] * 3
    assert part.options("cpu")["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"
    in_turn = Part("answering", Generator, {}, engine, in_turn=True)
    assert in_turn.places("gpu") == [(0.1, 0)] * 3
    assert in_turn.options("cpu")["runtime_env"] == part.options("cpu")["runtime_env"]  # as many threads all the same
    assert Part("judging", Generator, {}, actors=2).places("gpu") == [(0.1, 0)] * 2


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
    blocks = Blocks.put(table, part, "cpu")
    assert blocks.lengths == (50,) * 8
    with Pool.open(part, "cpu") as pool, phase("doubling", len(table), "numbers") as progress:
        doubled = pool.map(blocks, progress=progress)
        again = pool.map(blocks)
    assert "doubling: 400 numbers in" in caplog.text
    result = side_by_side(table, [doubled])
    assert result["number"].to_pylist() == list(range(400))
    assert result["double"].to_pylist() == list(range(0, 800, 2))
    assert again.table().select(["double"]).equals(doubled.table().select(["double"]))
    slow = result["by"][0].as_py()
    taken = [result["by"][50 * block].as_py() for block in range(8)]
    assert taken.count(slow) == 2  # the one it slept over and the one given to it beforehand

    # A fault arrives as itself: of a row, and of making the stage.
    broken = Part("doubling", Uneven, {"fault": 120}, actors=2)
    with pytest.raises(UnevenError, match="number 120") as caught, Pool.open(broken, "cpu") as pool:
        pool.map(blocks)
    assert type(caught.value) is UnevenError
    with pytest.raises(UnevenError, match="set it to False"):
        Pool.open(Part("doubling", Uneven, {"broken": True}), "cpu")
    with pytest.raises(ValueError, match="side by side"):
        pool.map(blocks, Blocks(blocks.references[:1], blocks.lengths[:1]))


@pytest.mark.slow
def test_two_engines_answer_as_one_before_and_after_a_swap(smollm2: Path, ray_local: Any, tmp_path: Path) -> None:
    """Order and completeness with two replicas; and a pool that was given other weights answers as a fresh engine."""
    other = noisy_copy(smollm2, tmp_path / "other")
    things = ["rice", "tea", "snow", "wolves", "bread", "silver", "violins", "maps", "rain", "chess", "clay", "honey"]
    asked = [f.format(thing) for thing in things for f in ("How is {} made?", "¿Qué es {}?", "Tell me about {}.")]
    rows = [{**dict.fromkeys(PROMPTS.names, "x"), "prompt": text} for text in asked]
    table = pa.Table.from_pylist(rows, schema=PROMPTS)

    def part(model: Path, replicas: int) -> Part:
        engine = EngineSection(
            replicas=replicas, cpus_per_replica=0.9, max_model_len=256, cpu_kv_cache_gib=1, dtype="float32"
        )
        settings = {"settings": engine, "max_new_tokens": 6, "device": "cpu", "warm": Warm()}
        return Part("answering", Generator, {"model": str(model), **settings}, engine)

    with Pool.open(part(smollm2, 2), "cpu") as pool:
        blocks = Blocks.put(table, pool.part, "cpu")
        assert len(blocks.lengths) == 3
        before = pool.map(blocks).table()
        seconds = pool.swap(str(other))
        assert (pool.weights, set(seconds)) == (str(other), {"transfer", "proof"})
        after = pool.map(blocks).table()
    with Pool.open(part(other, 1), "cpu") as pool:
        fresh = pool.map(Blocks.put(table, pool.part, "cpu")).table()
        pool.swap(str(smollm2))
        back = pool.map(Blocks.put(table, pool.part, "cpu")).table()
    assert len(before) == 36
    assert len(set(before["response"].to_pylist())) > 20  # one answer could be told from another
    # float32 leaves no ties: what shares a batch does not show.
    assert after.equals(fresh)
    assert before.equals(back)
    assert not after.equals(before)
