"""What a pool does about actors that die, hang or fail, on real Ray; their stage does so when it is told to."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray.exceptions

from mlc_ray.config import EngineSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate import engine
from mlc_ray.generate.blocks import Job, Piece
from mlc_ray.generate.pool import EnginePool
from mlc_ray.generate.replica import EngineDiedError, Part, Replica, Weights
from mlc_ray.generate.stage import Stage

LIMITS = {"cpus_per_replica": 0.2, "start_seconds": 60.0, "hang_seconds": 60.0, "retries": 1, "block_rows": 8}


class RefusedError(MlcRayError):
    """Of `Fragile`."""


class Fragile(Stage):
    """Adds 1 to numbers and tells by which process, in steps as an engine makes them.

    `trouble` says what a number does: `die`, `stop` (the process), `hang` (no step any more), `raise`, `refuse`. Unless
    it is `always`, it does so once: a file is the mark.
    """

    columns = pa.schema({"next": pa.int64(), "pid": pa.int64(), "weights": pa.string(), "fault": pa.string()})

    def __init__(self, marks: str, trouble: dict[int, str], always: bool = False, start: str = "") -> None:
        self.marks, self.trouble, self.always, self.weights = Path(marks), trouble, always, "first"
        if start and list(self.marks.iterdir()):  # once something has happened
            self._do(start)

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        found = []
        for number in table["number"].to_pylist():
            engine._steps += 1
            mark = self.marks / str(number)
            if (trouble := self.trouble.get(number)) and (self.always or not mark.exists()):
                mark.touch()
                self._do(trouble)
            found.append({"next": number + 1, "pid": os.getpid(), "weights": self.weights})
        time.sleep(0.05)
        return found

    def _do(self, trouble: str) -> None:
        if trouble == "refuse":
            raise RefusedError("number is refused")
        if trouble == "raise":
            raise ValueError("cannot be added to")
        if trouble == "hang":
            time.sleep(600)
        os.kill(os.getpid(), {"die": signal.SIGKILL, "stop": signal.SIGSTOP}[trouble])

    def swap(self, weights: str | None, *, lora: bool) -> dict[str, float]:
        if weights is not None and weights.startswith("/") and not Path(weights).is_dir():
            raise FileNotFoundError(weights)
        self.weights = str(weights)
        return {"transfer": 0.0, "proof": 0.0}

    @classmethod
    def given_up(cls, table: pa.Table, fault: str, **_: Any) -> list[dict[str, Any]]:
        return [{"fault": fault}] * len(table)


def part(marks: Path, trouble: dict[int, str], *, replicas: int = 2, limits: Any = (), **settings: Any) -> Part:
    section = EngineSection(replicas=replicas, **{**LIMITS, **dict(limits)})
    return Part("adding", Fragile, {"marks": str(marks), "trouble": trouble, **settings}, section)


NUMBERS = pa.table({"number": range(64)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("die", "died"),
        ("stop", "did not answer for engine.hang_seconds=5"),
        ("hang", "made no step for engine.hang_seconds=5"),
        ("raise", "failed by ValueError: cannot be added to"),
    ],
)
def test_who_fails_is_started_again_with_what_it_served(
    ray_local: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str, says: str
) -> None:
    landed: dict[int, int] = {}
    limits = {"hang_seconds": 5.0} if trouble in ("stop", "hang") else {}
    with EnginePool.open(part(tmp_path, {9: trouble, 40: trouble}, limits=limits), "cpu") as pool:
        pool.swap("second")
        found = pool.map(NUMBERS, landed=lambda first, columns: landed.update({first: len(columns)}))
        again = pool.map(NUMBERS)
        pids = {replica.where.pid for replica in pool.replicas if replica.where}
    assert found["next"].to_pylist() == list(range(1, 65))
    assert set(found["weights"].to_pylist()) == {"second"}
    assert found["fault"].null_count == 64
    assert landed == dict.fromkeys(range(0, 64, 8), 8)  # each block once
    assert caplog.text.count("is started again") == 2
    assert set(again["pid"].to_pylist()) <= pids
    assert says in caplog.text and "log " in caplog.text and "node " in caplog.text


@pytest.mark.slow
def test_rows_that_kill_whatever_asks_them_are_marked_and_no_others(ray_local: Any, tmp_path: Path) -> None:
    limits = {"retries": 0, "block_rows": 4}
    with EnginePool.open(part(tmp_path, {3: "die", 44: "raise"}, always=True, limits=limits), "cpu") as pool:
        landed: list[int] = []
        found = pool.map(NUMBERS, landed=lambda first, columns: landed.extend(range(first, first + len(columns))))
    assert [number for number, value in enumerate(found["next"].to_pylist(), 1) if value != number] == [4, 45]
    assert "died" in found["fault"][3].as_py() and "cannot be added to" in found["fault"][44].as_py()
    assert found["fault"].null_count == 62
    assert sorted(landed) == sorted(set(range(64)) - {3, 44})


@pytest.mark.slow
def test_what_cannot_go_on_stops(ray_local: Any, tmp_path: Path) -> None:
    limits = {"retries": 0, "block_rows": 2}
    everything = part(tmp_path, dict.fromkeys(range(64), "raise"), replicas=1, always=True, limits=limits)
    with (
        pytest.raises(EngineDiedError, match=r"failed 5 times in a row, with nothing done .*cannot be added"),
        EnginePool.open(everything, "cpu") as pool,
    ):
        pool.map(NUMBERS)
    # An engine that does not start again, beside one that lives; and none that lives.
    for replicas, fails in ((2, False), (1, True)):
        marks = tmp_path / f"of-{replicas}"
        marks.mkdir()
        with EnginePool.open(part(marks, {9: "die"}, replicas=replicas, start="raise"), "cpu") as pool:
            if not fails:
                assert pool.map(NUMBERS)["next"].to_pylist() == list(range(1, 65))
                continue
            with pytest.raises(EngineDiedError, match=r"1 actors for adding are gone.*in 2 tries"):
                pool.map(NUMBERS)
    # What the stage knows to be wrong is not tried again, and who raised it lives on.
    with EnginePool.open(part(tmp_path, {500: "refuse"}, replicas=1, always=True), "cpu") as pool:
        before = pool.map(NUMBERS)["pid"][0]
        with pytest.raises(RefusedError):
            pool.map(pa.table({"number": [500]}))
        assert pool.map(NUMBERS)["pid"][0] == before


@pytest.mark.slow
def test_a_start_that_takes_too_long_says_where_or_that_it_has_no_place(
    ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mlc_ray.generate.replica._SAY_SECONDS", 0.5)
    with pytest.raises(EngineDiedError, match=r"in engine.start_seconds=4; no node has it yet: it needs 64 CPUs"):
        limits = {"start_seconds": 4.0, "cpus_per_replica": 64.0, "retries": 0}
        EnginePool.open(part(tmp_path, {}, replicas=1, limits=limits), "cpu")
    said = r"waited for \d s of engine.start_seconds=4: no node has it yet: .* of 2 CPUs are in use"
    assert len(re.findall(said, caplog.text)) > 1  # long before it is given up
    (tmp_path / "mark").touch()
    with pytest.raises(EngineDiedError, match=r"did not start in engine.start_seconds=15 \(node .*, log /.*\)"):
        EnginePool.open(part(tmp_path, {}, replicas=1, start="hang", limits={"start_seconds": 15.0}), "cpu")


@pytest.mark.slow
def test_a_check_starts_the_dead_and_what_cannot_be_had_again_is_not_started(ray_local: Any, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    with EnginePool.open(part(tmp_path, {}, replicas=1), "cpu") as pool:
        pool.check()
        pool.swap(str(second))
        first = pool.map(NUMBERS)["pid"][0].as_py()
        second.rmdir()  # as a search removes the weights of a trial that has ended
        os.kill(first, signal.SIGKILL)
        pool.check()
        assert pool.weights is None
        with pytest.raises(RuntimeError, match="swap first"):
            pool.map(NUMBERS)
        pool.swap(str(tmp_path))
        after = pool.map(NUMBERS)
    assert first not in after["pid"].to_pylist()
    assert set(after["weights"].to_pylist()) == {str(tmp_path)}
    settings = {"marks": str(tmp_path), "trouble": {9: "die"}}
    asking = Part("asking", Fragile, settings, once=True)
    with EnginePool.open(asking, "cpu") as pool:
        for asked in (lambda: pool.map(NUMBERS), pool.check, lambda: pool.map(NUMBERS)):
            with pytest.raises(EngineDiedError, match="its endpoint has cost"):
                asked()


class Lost(Replica):
    """A replica without Ray, whose calls end at once; from `gone` on it neither answers nor starts."""

    gone = False
    asked: int = 0

    def begin(self, weights: Weights | None) -> None:
        self.actor = self
        self.ask("start", weights)

    def ask(self, method: str, *arguments: Any) -> None:
        self.method, self.doing = method, object()
        self.asked += 1

    def take(self) -> Any:
        self.doing = None
        if self.gone:
            raise ray.exceptions.ActorDiedError()
        self.failures = 0
        return {"transfer": 0.0, "proof": 0.0}

    def end(self, *, hung: bool = False) -> None:
        self.actor = self.doing = None


def test_others_go_on_without_an_engine_that_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wait(references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    monkeypatch.setattr("mlc_ray.generate.pool.ray", SimpleNamespace(wait=wait, exceptions=ray.exceptions))
    made = part(tmp_path, {})
    lost, other = replicas = [Lost(made, "cpu", number) for number in (0, 1)]
    pool = EnginePool(made, "cpu", "first", list(replicas))
    for replica in replicas:
        replica.begin(None)
    pool.check()
    lost.gone = True
    assert pool.swap("second") == {"transfer": 0.0, "proof": 0.0} and pool.weights == "second"
    assert caplog.text.count("is started again") == made.limits.retries
    assert (lost.state, other.state, caplog.text.count("it is given up")) == ("gone", "idle", 1)
    asked = lost.asked
    pool.check()
    pool.begin()
    pool.swap("third")
    assert lost.asked == asked  # nobody waits for it again
    other.gone = True
    with pytest.raises(EngineDiedError, match="engine 2 of 2 for adding died, for good"):
        pool.check()
    assert lost.asked == asked
    lost.gone = other.gone = False
    pool.swap("third")  # where none is left, all are tried again
    assert (lost.state, other.state) == ("idle", "idle")


def test_what_others_have_done_is_not_lost_with_an_error_of_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Lost):
        def take(self) -> Any:
            started = self.method == "start"
            self.doing = None
            if started:
                return {}
            if self.number == 0:
                raise RefusedError("number is refused")
            return pa.Table.from_pylist([{"next": number} for number in range(8)], schema=Fragile.columns)

    def wait(references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    stub = SimpleNamespace(wait=wait, put=lambda rows: rows, exceptions=ray.exceptions)
    monkeypatch.setattr("mlc_ray.generate.pool.ray", stub)
    made, landed = part(tmp_path, {}), list[int]()
    pool = EnginePool(made, "cpu", "first", [Refusing(made, "cpu", number) for number in (0, 1)])
    for replica in pool.replicas:
        replica.begin(None)
    with pytest.raises(RefusedError):
        pool.map(NUMBERS.slice(0, 16), landed=lambda first, columns: landed.append(first))
    assert landed == [8]  # what the second engine had done by then


def test_a_piece_is_tried_halved_and_given_up() -> None:
    def tries(piece: Piece) -> list[tuple[int, int]]:
        """All tries of a piece whose row 5 always fails, the last ones of that row."""
        found = [(piece.first, piece.stop)]
        if piece.first <= 5 < piece.stop:
            for rest in piece.again(1):
                found += tries(rest)
        return found

    block: Any = None
    whole, halves, alone = [(0, 8)] * 2, [(0, 4), (4, 8), (4, 6), (4, 5)], [(5, 6)] * 2
    assert tries(Piece(block, 0, 0, 8)) == [*whole, *halves, *alone, (6, 8)]
    assert [each.offset for each in Piece(block, 10, 20, 24, 1).again(1)] == [10, 12]


class Asked:
    """A job, and a pool that answers it but for `bad` rows, which fail whenever they are tried."""

    def __init__(
        self, marks: Path, rows: int, bad: Sequence[int], replicas: int = 1, block: int = 64, *, closed: bool = True
    ) -> None:
        made = part(marks, {}, replicas=replicas, limits={"retries": 2})
        self.bad, self.tries = set(bad), 0
        self.columns: dict[int, dict[str, Any]] = {}
        self.job = Job(made, block, self.took)
        self.job.add(pa.table({"number": range(rows)}))
        if closed:
            self.job.close()

    def took(self, piece: Piece, columns: pa.Table, marked: bool) -> None:
        assert marked == (piece.first in self.bad and len(piece) == 1)
        for row, values in enumerate(columns.to_pylist(), piece.first):
            assert row not in self.columns
            self.columns[row] = values

    def work(self) -> None:
        """Do what may be asked now."""
        while self.job.queue:
            piece = self.job.queue.popleft()
            numbers = piece.rows["number"].to_pylist()
            if self.bad & set(numbers):
                self.tries += 1
                self.job.failed(piece, "it died", ", far away")
            else:
                rows = [{"next": number + 1} for number in numbers]
                self.job.take(piece, pa.Table.from_pylist(rows, schema=Fragile.columns))

    def marked(self) -> list[int]:
        """The rows that are marked in the end; all others have their columns."""
        self.work()
        assert self.job.is_over
        found = [self.columns[row] for row in range(self.job.added)]
        assert all((row["fault"] is None) == (row["next"] == number) for number, row in enumerate(found, 1))
        return [number for number, row in enumerate(found) if row["fault"] is not None]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(
    ("rows", "bad"),
    [(192, [0]), (192, [0, 1]), (192, [101, 102]), (192, range(100)), (2000, range(1000, 1100)), (64, range(63))],
)
def test_bad_rows_next_to_each_other_stop_nothing(tmp_path: Path, rows: int, bad: Sequence[int], replicas: int) -> None:
    """Nothing of them is done between their tries."""
    assert Asked(tmp_path, rows, bad, replicas).marked() == list(bad)


def test_what_a_score_that_goes_on_has_left_may_be_bad_rows_alone(tmp_path: Path) -> None:
    left = Asked(tmp_path, 40, range(40))
    left.job.known(pa.table({"number": [1000]}))  # one that was done before
    assert left.marked() == list(range(40))
    assert not left.job.queue  # no probe is left to be asked


@pytest.mark.parametrize("later", [1, 16, 200])
def test_bad_rows_that_come_first_wait_for_those_behind_them(tmp_path: Path, later: int) -> None:
    asked = Asked(tmp_path, 64, range(64), closed=False)
    asked.work()
    assert asked.tries == 6 + 1 and not asked.job.is_over
    asked.job.add(pa.table({"number": range(64, 64 + later)}))
    asked.work()
    assert len(asked.columns) == 64 + later  # before it is closed
    asked.job.close()
    assert asked.marked() == list(range(64))


def test_engines_that_fail_on_everything_that_comes_stop_when_nothing_more_comes(tmp_path: Path) -> None:
    asked = Asked(tmp_path, 64, range(1000), closed=False)
    for number in range(64, 364, 100):
        asked.work()
        asked.job.add(pa.table({"number": range(number, number + 100)}))
    asked.work()
    assert asked.tries == 6 + 1 + 3 and not asked.job.is_over  # one for each time that rows came
    asked.job.close()
    with pytest.raises(EngineDiedError, match="13 times in a row"):
        asked.work()
    assert asked.tries == 10 + 3


def test_engines_that_fail_on_everything_stop_a_pool_soon(tmp_path: Path) -> None:
    for rows, replicas, tries in ((192, 1, 6 + 3), (192, 2, 9 + 3), (2, 1, 6 + 3), (100_000, 1, 6 + 3)):
        everything = Asked(tmp_path, rows, range(rows), replicas)
        with pytest.raises(EngineDiedError, match=f"failed {tries} times in a row.*: it died, far away; remove"):
            everything.marked()
        assert everything.tries == tries and not set(everything.columns) - {0}
    # What worked earlier, and does no longer.
    broken = Asked(tmp_path, 192, [*range(192), 1000])
    broken.job.known(pa.table({"number": [1000]}))
    with pytest.raises(EngineDiedError, match="failed 9 times in a row"):
        broken.marked()
