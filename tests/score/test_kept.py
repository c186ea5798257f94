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


def kept(place: Place, made_by: Any = ("model", 1), columns: pa.Schema = COLUMNS) -> Kept:
    return Kept(place, "answering", made_by, ["prompt", "language", "not there"], columns)


def missing(found: Kept, table: pa.Table = TABLE) -> list[int]:
    """The rows that are not there; those that are have the columns that `answers` gives them."""
    _, there = found.look(table)
    whole = answers(table).to_pylist()
    assert all(row is None or row == whole[at] for at, row in enumerate(there))
    return [at for at, row in enumerate(there) if row is None]


def answers(rows: pa.Table) -> pa.Table:
    texts = [f"to {prompt}" for prompt in rows["prompt"].to_pylist()]
    return pa.Table.from_pylist([{"response": text, "tokens": len(text)} for text in texts], schema=COLUMNS)


@pytest.mark.parametrize("remote", [False, True])
def test_blocks_that_landed_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    place = Place("vault://team/score" if remote else tmp_path / "score")
    first, whole = kept(place), answers(TABLE)
    keys, _ = first.look(TABLE)
    assert missing(first) == list(range(10))
    first.land(keys[6:8], whole.slice(6, 2))
    first.land(keys[2:3], whole.slice(2, 1))
    assert missing(kept(place)) == [0, 1, 3, 4, 5, 8, 9]
    kept(place).land(keys[8:10], whole.slice(8, 2))
    assert missing(kept(place)) == [1, 3, 4, 5]  # the row 9 asks as the row 0 does

    # Another model, another text, other columns: none of it is there.
    assert len(missing(kept(place, made_by=("model", 2)))) == 10
    assert len(missing(kept(place), TABLE.set_column(1, "language", pa.array(["de"] * 10)))) == 10
    assert len(missing(kept(place, columns=pa.schema({"response": pa.string()})))) == 10


def test_answers_to_one_prompt_are_kept_apart(tmp_path: Path) -> None:
    prompts = pa.Table.from_pylist([{"prompt": "?", "sample": sample} for sample in range(3)], schema=PROMPTS)

    def begun() -> Kept:
        return Kept(Place(tmp_path), "answering", "model", PROMPTS.names, COLUMNS)

    keys, _ = begun().look(prompts)
    begun().land(keys[1:2], answers(prompts.slice(1, 1)))
    assert missing(begun(), prompts) == [0, 2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_block_is_named_and_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    keys, _ = kept(Place(tmp_path)).look(TABLE)
    for first in (0, 5):
        kept(Place(tmp_path)).land(keys[first : first + 3], answers(TABLE).slice(first, 3))
    file = sorted((tmp_path / "kept" / "answering").iterdir())[0]
    content = bytearray(file.read_bytes())
    there = {(0, 1, 2): [0, 1, 2, 9], (5, 6, 7): [5, 6, 7]}
    lost = next(rows for rows in there if keys[rows[0]].encode() in content)
    content[content.index(b"to prompt") + 4] ^= 1
    file.write_bytes({"cut": content[:-9], "flipped": content, "empty": b""}[damage])
    left = [row for row in range(10) if row not in there[(5, 6, 7) if lost[0] == 0 else (0, 1, 2)]]
    assert missing(kept(Place(tmp_path))) == left
    assert f"{file} is damaged (" in caplog.text


def test_a_storage_that_is_full_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    found = kept(Place(tmp_path))
    keys, _ = found.look(TABLE)
    with monkeypatch.context() as patch:
        patch.setattr(Place, "write_parts", full)
        found.land(keys, answers(TABLE))
    assert "10 rows could not be kept: [Errno 28] No space left on device" in caplog.text
    assert len(missing(kept(Place(tmp_path)))) == 10
