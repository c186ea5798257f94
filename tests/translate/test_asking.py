"""What engines did is kept block by block, and only the rest is asked for again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlc_ray.config import EngineSection
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import ANSWERS, PROMPTS, Generator
from mlc_ray.generate.translate import Translation
from mlc_ray.storage import Place
from mlc_ray.translate.asking import CostCapError, Work
from mlc_ray.translate.stages import REPLIES, AskStage
from tests.score.local_pool import LocalPool


def answers(table: pa.Table) -> pa.Table:
    return pa.Table.from_pylist([{"response": text.upper()} for text in table["prompt"].to_pylist()], schema=ANSWERS)


def prompts(*texts: str) -> pa.Table:
    rows = [{"bundle_id": str(at), "language": "en", "prompt": text} for at, text in enumerate(texts)]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def work_by(folder: Path, made_by: Any = "model", **pool: Any) -> Work:
    part = Part("answering", Generator, {}, EngineSection())
    return Work(part, LocalPool(part, **pool), Place(folder), made_by)  # type: ignore[arg-type]


def test_blocks_that_are_done_are_not_asked_for_again(tmp_path: Path) -> None:
    def ends(table: pa.Table) -> pa.Table:
        if "g" in table["prompt"].to_pylist():
            raise RuntimeError("the driver ends")
        return answers(table)

    table = prompts(*"abcdefghij")  # blocks of four
    with pytest.raises(RuntimeError, match="the driver ends"):
        work_by(tmp_path, work=ends).rows("texts-00000", table, "prompts")
    again = work_by(tmp_path, work=answers)
    done = again.rows("texts-00000", table, "prompts")
    assert again.pool.asked == list("efghij")  # type: ignore[attr-defined]
    assert done["response"].to_pylist() == list("ABCDEFGHIJ")
    for other in (work_by(tmp_path, work=answers, made_by="another"), work_by(tmp_path / "b", work=answers)):
        other.rows("texts-00000", table, "prompts")
        assert other.pool.asked == list("abcdefghij")  # type: ignore[attr-defined]


class Asked(LocalPool):
    """As `LocalPool`, of requests."""

    def map(self, table: pa.Table, **_: Any) -> pa.Table:
        self.asked += table["request"].to_pylist()
        return self.work(table)


def test_equal_requests_are_asked_once_and_a_cap_is_an_error(tmp_path: Path) -> None:
    def replies(table: pa.Table) -> pa.Table:
        found = []
        for text in table["request"].to_pylist():
            fault = {"b": "endpoint: 500: oops", "c": "endpoint: not asked: it could have exceeded"}.get(text)
            found.append({"reply": None if fault else text.upper(), "fault": fault})
        return pa.Table.from_pylist(found, schema=REPLIES)

    part = Part("translating", AskStage, {})
    work = Work(part, Asked(part, work=replies), Place(tmp_path), "model")  # type: ignore[arg-type]
    assert work.ask("texts", ["a", "b", "a"]) == [
        Translation("A"), Translation(None, "endpoint: 500: oops"), Translation("A")
    ]  # fmt: skip
    assert work.pool.asked == ["a", "b"] and work.ask("texts", []) == []  # type: ignore[attr-defined]
    with pytest.raises(CostCapError, match="1 of 2 requests were not sent"):
        work.ask("texts", ["a", "c", "c"])
    assert not (tmp_path / "kept").exists()
