"""Logs as JSON lines: who said what of which run, in files; and none where they are not asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import examples.my_storage  # noqa: F401 - registers vault://
from mlc_ray.errors import MlcRayError
from mlc_ray.json_logs import json_lines
from mlc_ray.runs import LOGS_FOLDER
from mlc_ray.storage import Place
from mlc_ray.train.log_files import log_file
from tests.train.tiny import tiny_config

PLANTED = "pLaNtEd-0123456789"


def lines_of(file: Path | Place) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Place(file).read_text().splitlines()]


def test_a_line_says_who_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    file = tmp_path / "logs" / "worker-00003.jsonl"
    logger, step = logging.getLogger("mlc_ray.train.loop"), 0
    with json_lines(file, run="search", trial="0007", worker=3) as lines:
        logger.info("before any step")
        lines.step = lambda: step
        step = 12
        logger.warning("step %d: not finite\nin two lines, with %s", 13, PLANTED)
        logging.getLogger("some.library").info("not told")
        logging.getLogger("some.library").warning("told")
    logger.warning("after the end")
    first, second, third = lines_of(file)
    assert {"run": "search", "trial": "0007", "worker": 3, "step": None}.items() <= first.items()
    assert (first["level"], first["logger"], first["message"]) == ("INFO", "mlc_ray.train.loop", "before any step")
    assert first["time"].endswith("+00:00") and first["pid"] and first["host"]
    assert (second["step"], second["level"]) == (12, "WARNING")
    assert second["message"] == "step 13: not finite\nin two lines, with ..."
    assert third["logger"] == "some.library"
    assert set(first) == {
        "time", "level", "logger", "message", "run", "trial", "worker", "step", "host", "pid",
    }  # fmt: skip


def test_what_ends_the_block_is_the_last_line_and_a_second_try_adds_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "driver.jsonl"
    for _ in range(2):
        with pytest.raises(MlcRayError), json_lines(file, run="mine"):
            raise MlcRayError(f"s3://a:{PLANTED}@bucket: refused")
    first, second = lines_of(file)
    assert first["message"] == "ended by MlcRayError: s3://...@bucket: refused"
    assert "raise MlcRayError" in first["exception"] and PLANTED not in file.read_text().replace("{PLANTED}", "")
    assert second["worker"] is None and second["step"] is None


def test_a_message_that_cannot_be_made_ends_nothing_and_a_broken_character_is_written(tmp_path: Path) -> None:
    """As Python's own handlers have it: a library's faulty call of its logger is no fault of the run."""
    library = logging.getLogger("some.library")
    with json_lines(tmp_path / "a.jsonl", run="mine") as lines:  # told alone: a handler of the tests' raises
        for message, argument in (("%d of %d", 1), ("half of a pair: %s", "\ud83d")):
            lines.handle(library.makeRecord(library.name, logging.WARNING, __file__, 0, message, (argument,), None))
    (line,) = lines_of(tmp_path / "a.jsonl")
    assert line["message"] == "half of a pair: \ud83d"


def test_handlers_and_levels_are_as_they_were(tmp_path: Path) -> None:
    ours, root = logging.getLogger("mlc_ray"), logging.getLogger()
    before = ours.level, list(ours.handlers), list(root.handlers), ours.propagate
    with json_lines(tmp_path / "a.jsonl", run="mine"):
        pass
    ours.propagate = False
    with json_lines(tmp_path / "a.jsonl", run="mine"):
        ours.info("once")
    ours.propagate = before[3]
    assert (ours.level, list(ours.handlers), list(root.handlers), ours.propagate) == before
    assert [each["message"] for each in lines_of(tmp_path / "a.jsonl")] == ["once"]


def test_a_run_has_them_only_where_it_asks(tmp_path: Path) -> None:
    with log_file(tiny_config(), Place(tmp_path / "run"), 0) as lines:
        assert lines is None
    assert not (tmp_path / "run").exists()
    with log_file(tiny_config(logging={"json_lines": True}), Place(tmp_path / "s" / "trials" / "0001"), 2):
        logging.getLogger("mlc_ray").info("here")
    (line,) = lines_of(tmp_path / "s" / "trials" / "0001" / LOGS_FOLDER / "worker-00002.jsonl")
    assert (line["run"], line["trial"], line["worker"]) == ("s", "0001", 2)


def test_of_a_run_at_a_url_they_are_sent_there_and_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    run = Place("vault://runs/mine")
    config = tiny_config(logging={"json_lines": True})
    for said in ("first try", "second try"):
        with log_file(config, run):
            logging.getLogger("mlc_ray").info(said)
    assert [each["message"] for each in lines_of(run / LOGS_FOLDER / "driver.jsonl")] == ["first try", "second try"]
