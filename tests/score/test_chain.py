"""Passes that work on rows as those before them are done with them, in pools without Ray, and which of them do so."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlc_ray.capacity import Node
from mlc_ray.config import EngineSection
from mlc_ray.generate.blocks import joined
from mlc_ray.generate.pool import EnginePool, work
from mlc_ray.generate.replica import EngineDiedError, Part
from mlc_ray.generate.stage import Stage
from mlc_ray.score.chain import Pass, chain
from mlc_ray.score.kept import Kept
from mlc_ray.score.plan import side_by_side
from mlc_ray.storage import Place
from tests.generate.test_supervision import LIMITS, Fragile, RefusedError
from tests.score.local_pool import LocalPool

TABLE = pa.table({"prompt": [f"prompt {number}" for number in range(20)]})


class Adds(Stage):
    """Adds a column of what it was given in another one."""

    def __init__(self, reads: str, column: str) -> None:
        self.reads, self.columns = reads, self.adds(column=column)

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        return [{self.columns.names[0]: f"{text}, {self.columns.names[0]}"} for text in table[self.reads].to_pylist()]

    @classmethod
    def adds(cls, **settings: Any) -> pa.Schema:
        return pa.schema({settings["column"]: pa.string()})

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **settings: Any) -> list[dict[str, Any]]:
        return [{settings["column"]: f"no {settings['column']}"}] * len(table)


def part(reads: str, column: str, **limits: Any) -> Part:
    engine = EngineSection(**{"block_rows": 4, "retries": 0, **limits})
    return Part(column, Adds, {"reads": reads, "column": column}, engine)


PARTS = [part("prompt", "answered"), part("answered", "translated"), part("translated", "judged", block_rows=3)]


class OneByOne(LocalPool):
    """Gives up the processor after each block, as actors do; the newest block comes first."""

    log: list[tuple[str, int]]

    def advance(self, job: Any, *, patient: bool = False) -> None:
        if not job.queue:
            return
        piece = job.queue.pop()
        self.log.append((self.part.name, len(piece)))
        job.queue.appendleft(piece)
        later = [job.queue.pop() for _ in range(len(job.queue) - 1)]
        super().advance(job)
        job.queue.extend(reversed(later))


def together(
    folder: Path, log: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, fails: Sequence[Any] = (None, None, None)
) -> dict[str, pa.Table]:
    """The tables of the passes that ended; `log` is told which pass worked on how many rows."""
    monkeypatch.setattr("mlc_ray.generate.pool._wait", lambda pools: None)
    tables: dict[str, pa.Table] = {}
    passes, pools = [], []
    for each, failing in zip(PARTS, fails, strict=True):
        reads = [each.settings["reads"]]
        kept = Kept(Place(folder), each.name, "model", reads, each.columns)

        def ended(table: pa.Table, name: str = each.name) -> None:
            tables[name] = table

        passes.append(Pass(each, "cpu", len(TABLE), kept=kept, keeps=True, ended=ended))
        pools.append(OneByOne(each, **({} if failing is None else {"fails": failing})))
        pools[-1].log = log
    chain(passes, TABLE)
    error: Exception | None = None
    try:
        work([(pool, one.job) for pool, one in zip(pools, passes, strict=True)])
    except EngineDiedError as caught:
        error = caught
    return {**tables, **({} if error is None else {"error": pa.table({"text": [str(error)]})})}


def one_after_another() -> pa.Table:
    table = TABLE
    for each in PARTS:
        table = joined(table, LocalPool(each).map(table))
    return table


def test_rows_go_on_as_they_come_and_the_result_is_that_of_one_pass_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, int]] = []
    found = together(tmp_path, log, monkeypatch)
    assert found["judged"].equals(one_after_another())
    assert found["answered"].equals(found["judged"].select(["prompt", "answered"]))
    names = [name for name, _ in log]
    assert names.index("judged") < len(names) - 1 - names[::-1].index("answered")  # while answers still come
    blocks = [rows for name, rows in log if name == "judged"]
    assert sorted(blocks) == [1] * 5 + [3] * 5  # of each block of answers, in blocks of its own size


def test_a_chain_that_was_interrupted_asks_for_the_rest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(row: dict[str, Any]) -> bool:
        if row["prompt"] == "prompt 9":
            raise KeyboardInterrupt
        return False

    log: list[tuple[str, int]] = []
    with pytest.raises(KeyboardInterrupt):
        together(tmp_path, log, monkeypatch, (None, None, interrupted))
    before = {name: sum(rows for other, rows in log if other == name) for name in ("answered", "translated", "judged")}
    assert before["judged"] < before["translated"] <= before["answered"] <= 20
    again: list[tuple[str, int]] = []
    found = together(tmp_path, again, monkeypatch)
    assert found["judged"].equals(one_after_another())
    asked = {name: sum(rows for other, rows in again if other == name) for name in before}
    assert asked["answered"] == 20 - before["answered"]
    assert asked["judged"] <= 20 - before["judged"] + 3  # and the block that was worked on
    log.clear()
    assert together(tmp_path, log, monkeypatch)["judged"].equals(found["judged"]) and not log


def test_what_fails_later_does_not_end_what_comes_before_and_the_other_way_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(row: dict[str, Any]) -> bool:
        return True

    found = together(tmp_path / "judge", [], monkeypatch, (None, None, everything))
    assert found.keys() == {"answered", "translated", "error"}
    assert found["translated"].equals(one_after_another().drop_columns(["judged"]))
    assert "times in a row" in found["error"]["text"][0].as_py()
    assert together(tmp_path / "answers", [], monkeypatch, (everything, None, None)).keys() == {"error"}


def test_a_row_that_is_given_up_goes_on_and_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = together(tmp_path, [], monkeypatch, (lambda row: row["prompt"] == "prompt 5", None, None))
    texts = found["judged"]["judged"].to_pylist()
    assert [number for number, text in enumerate(texts) if "no answered" in text] == [5]
    log: list[tuple[str, int]] = []
    assert together(tmp_path, log, monkeypatch)["judged"].equals(one_after_another())
    assert log == [("answered", 1), ("translated", 1), ("judged", 1)]


class Later(Fragile):
    """Doubles what `Fragile` gives, with the same troubles."""

    columns = pa.schema({"double": pa.int64()})

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        super().rows(table)
        return [{"double": 2 * number} for number in table["next"].to_pylist()]


@pytest.mark.slow
def test_two_pools_work_at_once_and_each_is_supervised(
    ray_local: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = EngineSection(**LIMITS)
    parts = []
    for stage, trouble in ((Fragile, {40: "die"}), (Later, {20: "die", 130: "refuse"})):
        marks = tmp_path / stage.__name__
        marks.mkdir()
        parts.append(Part(stage.__name__, stage, {"marks": str(marks), "trouble": trouble}, engine))
    with EnginePool.open(parts[0], "cpu") as first, EnginePool.open(parts[1], "cpu") as later:

        def both(numbers: range) -> tuple[list[pa.Table], int]:
            """The tables of the passes that ended, and how many rows the later one had done when the first ended."""
            tables: list[pa.Table] = []
            done: list[int] = []

            def ended(table: pa.Table) -> None:
                tables.append(table)
                done.append(passes[1].job.added - passes[1].job.left)

            passes = [Pass(each, "cpu", len(numbers), ended=ended) for each in parts]
            chain(passes, pa.table({"number": numbers}))
            try:
                work([(first, passes[0].job), (later, passes[1].job)])
            except RefusedError:
                assert len(tables) == 1
            return tables, done[0]

        (_, table), before = both(range(64))
        assert table["number"].to_pylist() == list(range(64))
        assert table["double"].to_pylist() == list(range(2, 130, 2))
        assert table["fault"].null_count == 64
        assert before > 0  # while a first actor was started again
        assert caplog.text.count("is started again") == 2
        (table,), _ = both(range(100, 164))  # the later one raises: what the first has done is whole
        assert table["next"].to_pylist() == list(range(101, 165))
        assert "Later failed, and goes no further: number is refused; Fragile goes on" in caplog.text
        pids = {replica.where.pid for replica in first.replicas if replica.where}
        assert set(table["pid"].to_pylist()) == pids  # nobody was started again for it

        # An engine that has no place waits for as long as the engines before it are at work, and no longer.
        caplog.clear()
        unplaced = Part("unplaced", Later, parts[1].settings, EngineSection(cpus_per_replica=64, start_seconds=1))
        said: list[str] = []
        passes = [Pass(each, "cpu", 8, ended=lambda _: said.append(caplog.text)) for each in (parts[0], unplaced)]
        chain(passes, pa.table({"number": range(200, 208)}))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # so that it takes a while
        with (
            EnginePool.open(unplaced, "cpu", wait=False) as waits,
            pytest.raises(EngineDiedError, match="1 actors for unplaced are gone, and none starts again in 3 tries"),
        ):
            work([(first, passes[0].job), (waits, passes[1].job)])
        assert len(said) == 1 and "is started again" in said[0] and "unplaced" not in said[0]
        assert caplog.text.count("no node has it yet: it needs 64 CPUs") == 3


NODE = {"CPU": 16.0, "GPU": 8.0}


def policy(**settings: Any) -> Part:
    return Part("answering", Adds, {}, EngineSection(**settings))


GUARD = Part("judging", Adds, {}, EngineSection(tensor_parallel=4))
LIGHT = Part("judging", Adds, {})


@pytest.mark.parametrize(
    ("parts", "device", "is_open", "sizes"),
    [
        ([policy(tensor_parallel=4), GUARD], "gpu", False, [2]),
        ([policy(tensor_parallel=8), GUARD], "gpu", False, [1, 1]),
        ([policy(replicas=5), LIGHT, GUARD], "gpu", False, [2, 1]),
        ([policy(replicas=4), LIGHT, GUARD], "gpu", False, [3]),
        ([policy(tensor_parallel=8), GUARD, LIGHT], "gpu", False, [1, 2]),
        ([policy(), LIGHT], "cpu", False, [2]),
        ([policy(cpus_per_replica=16), LIGHT], "cpu", False, [1, 1]),
        ([policy(), GUARD], "cpu", False, [1, 1]),  # two engines and one memory
        ([policy(tensor_parallel=4), GUARD], "gpu", True, [2]),
        ([policy(tensor_parallel=4), GUARD, GUARD], "gpu", True, [2, 1]),
        ([Part("answering", Adds, {}, EngineSection(), in_turn=True), GUARD, LIGHT], "gpu", True, [1, 2]),
    ],
)
def test_what_has_devices_of_its_own_works_at_once(
    monkeypatch: pytest.MonkeyPatch, parts: list[Part], device: Any, is_open: bool, sizes: list[int]
) -> None:
    monkeypatch.setattr("mlc_ray.cluster.nodes_there", lambda: [Node(NODE)])
    groups = side_by_side(parts, device, is_open=is_open)
    assert [part for group in groups for part in group] == parts
    assert [len(group) for group in groups] == sizes
