"""What a score keeps of the blocks that are done, and what counts as the same question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import examples.my_storage  # noqa: F401 - registers vault://
from mlc_ray.generate.stage import PROMPTS
from mlc_ray.score.kept import Kept
from mlc_ray.storage import Place

COLUMNS = pa.schema({"response": pa.string(), "tokens": pa.int32()})
TABLE = pa.table({"prompt": [f"prompt {number % 9}" for number in range(10)], "language": ["en"] * 10})


def kept(place: Place, table: pa.Table = TABLE, made_by: Any = ("model", 1), columns: pa.Schema = COLUMNS) -> Kept:
    return Kept(place, "answering", made_by, table, ["prompt", "language", "not there"], columns)


def answers(rows: pa.Table) -> pa.Table:
    texts = [f"to {prompt}" for prompt in rows["prompt"].to_pylist()]
    return pa.Table.from_pylist([{"response": text, "tokens": len(text)} for text in texts], schema=COLUMNS)


@pytest.mark.parametrize("remote", [False, True])
def test_blocks_that_landed_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    place = Place("vault://team/score" if remote else tmp_path / "score")
    first = kept(place)
    assert (first.done, first.missing) == (0, TABLE)
    whole = answers(TABLE)
    assert first.whole(whole).equals(whole)
    first.land(6, whole.slice(6, 2))
    first.land(2, whole.slice(2, 1))

    second = kept(place)
    assert second.missing["prompt"].to_pylist() == [f"prompt {number}" for number in (0, 1, 3, 4, 5, 8, 0)]
    second.land(5, answers(second.missing).slice(5, 2))  # prompts 8 and 0: the rows 8 and 9 of the table
    assert second.whole(answers(second.missing)).equals(whole)
    assert kept(place).missing["prompt"].to_pylist() == [f"prompt {number}" for number in (1, 3, 4, 5)]

    # Another model, another text, other columns: none of it is there.
    assert kept(place, made_by=("model", 2)).done == 0
    assert kept(place, table=TABLE.set_column(1, "language", pa.array(["de"] * 10))).done == 0
    assert kept(place, columns=pa.schema({"response": pa.string()})).done == 0

    # And all of them: a pass that ended before its columns were written anywhere else.
    third = kept(place)
    third.land(0, answers(third.missing))
    fourth = kept(place)
    assert (fourth.done, len(fourth.missing), fourth.missing.schema) == (10, 0, TABLE.schema)
    assert fourth.whole(COLUMNS.empty_table()).equals(whole)


def test_answers_to_one_prompt_are_kept_apart(tmp_path: Path) -> None:
    prompts = pa.Table.from_pylist([{"prompt": "?", "sample": sample} for sample in range(3)], schema=PROMPTS)

    def begun() -> Kept:
        return Kept(Place(tmp_path), "answering", "model", prompts, PROMPTS.names, COLUMNS)

    begun().land(1, answers(prompts.slice(1, 1)))
    assert begun().missing["sample"].to_pylist() == [0, 2]
