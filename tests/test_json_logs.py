"""Logs as JSON lines: who said what of which run, in files; and none where they are not asked for."""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import examples.my_storage  # noqa: F401 - registers vault://
from mlc_ray.config import LogSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.replica import Worker
from mlc_ray.generate.stage import Stage
from mlc_ray.json_logs import json_lines
from mlc_ray.log_files import log_file, own_log
from mlc_ray.runs import LOGS_FOLDER
from mlc_ray.storage import Place

PLANTED = "pLaNtEd-0123456789"
KEPT = LogSection(json_lines=True)


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


def test_standard_error_has_a_warning_once_and_as_without_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python writes those there that no handler takes, and a program may have handlers on any logger."""
    ours, library = logging.getLogger("mlc_ray"), logging.getLogger("some.library")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(ours, "handlers", [logging.StreamHandler()])
    said = []
    for file in (None, tmp_path / "a.jsonl"):
        with nullcontext() if file is None else json_lines(file, run="mine"):
            logging.getLogger("mlc_ray.train").warning("taken")
            library.warning("taken by none")
            library.info("too little")
        said.append(capsys.readouterr().err.splitlines())
    assert said == [["taken", "taken by none"]] * 2
    assert [each["message"] for each in lines_of(tmp_path / "a.jsonl")] == ["taken", "taken by none"]


class Heard(logging.Handler):
    """A program's own handler."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def test_a_programs_own_handlers_get_what_they_get_without_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, ours, child = logging.getLogger(), logging.getLogger("mlc_ray"), logging.getLogger("mlc_ray.of_a_test")
    chatty = logging.getLogger("mlc_ray.of_a_test.asked_for_more")
    chatty.setLevel(logging.DEBUG)
    heard = []
    for file in (None, tmp_path / "a.jsonl"):
        handlers = [Heard(), Heard(), Heard()]
        for logger, handler in zip((root, ours, child), handlers, strict=True):
            monkeypatch.setattr(logger, "handlers", [handler])
        with nullcontext() if file is None else json_lines(file, run="mine"):
            assert root.level == logging.WARNING
            child.info("for the file alone")
            child.warning("for all")
            chatty.debug("wanted by the program")
            logging.getLogger("some.library").info("told to nobody")
        heard.append([handler.said for handler in handlers])
        assert not any(handler.filters for handler in handlers)
    assert heard == [[["for all", "wanted by the program"]] * 3] * 2
    said = [each["message"] for each in lines_of(tmp_path / "a.jsonl")]
    assert said == ["for the file alone", "for all", "wanted by the program"]


def test_a_run_has_them_only_where_it_asks(tmp_path: Path) -> None:
    with log_file(LogSection(), Place(tmp_path / "run"), 0) as lines:
        assert lines is None and own_log("answering", 0) is None
    assert not (tmp_path / "run").exists()
    with log_file(KEPT, Place(tmp_path / "s" / "trials" / "0001"), 2):
        logging.getLogger("mlc_ray").info("here")
    (line,) = lines_of(tmp_path / "s" / "trials" / "0001" / LOGS_FOLDER / "worker-00002.jsonl")
    assert (line["run"], line["trial"], line["worker"]) == ("s", "0001", 2)


def test_of_a_run_at_a_url_they_are_sent_there_and_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    run = Place("vault://runs/mine")
    for said in ("first try", "second try"):
        with log_file(KEPT, run):
            logging.getLogger("mlc_ray").info(said)
    assert [each["message"] for each in lines_of(run / LOGS_FOLDER / "driver.jsonl")] == ["first try", "second try"]


class Says(Stage):
    """A stage that says what it was asked."""

    columns = pa.schema({"said": pa.string()})

    def rows(self, table: pa.Table) -> list[dict[str, Any]]:
        logging.getLogger("mlc_ray.generate.engine").info("asked %d rows", len(table))
        logging.getLogger("mlc_ray").warning("a warning")
        return [{"said": ""} for _ in range(len(table))]


def test_what_a_driver_starts_keeps_a_log_beside_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here in one process: what the actor of a pool does, given what its pool gives it."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in an actor
    folder = Place(tmp_path / "search")
    with log_file(KEPT, folder):
        with log_file(KEPT, folder / "trials" / "0001"):  # a run that a search trains in its own process
            inner = own_log("answering", 1)
        log = own_log("answering", 3)
    assert inner is not None and inner.folder == folder / "trials" / "0001"
    assert own_log("answering", 3) is None
    worker = Worker(Says, {}, log)
    for method, arguments in (("start", (None,)), ("run", (pa.table({"a": [1, 2]}), 0, 2)), ("close", ())):
        assert worker.call(method, *arguments)[1] is None
    logging.getLogger("mlc_ray").warning("after the end")
    (file,) = (tmp_path / "search" / LOGS_FOLDER).glob("answering-00003-*.jsonl")
    lines = lines_of(file)
    assert [each["message"] for each in lines] == ["answering 3 begins", "asked 2 rows", "a warning"]
    assert {(each["run"], each["trial"], each["worker"]) for each in lines} == {("search", "", 3)}
    assert file.name == f"answering-00003-{lines[0]['pid']}.jsonl"
    assert capsys.readouterr().err.splitlines()[:1] == ["a warning"]  # as without the file


@pytest.mark.parametrize("there", ["nothing", "a file", "what cannot be opened"])
def test_an_actor_whose_node_has_not_the_folder_works_without_a_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, there: str
) -> None:
    folder = tmp_path / "score"
    with log_file(KEPT, Place(folder)):
        log = own_log("answering", 3)
    shutil.rmtree(folder)  # as it is on another node
    if there == "a file":
        folder.write_text("")
    elif there == "what cannot be opened":
        (folder / LOGS_FOLDER / f"answering-00003-{os.getpid()}.jsonl").mkdir(parents=True)
    worker = Worker(Says, {}, log)
    assert own_log("answering", 3) is None
    for method, arguments in (("start", (None,)), ("run", (pa.table({"a": [1, 2]}), 0, 2)), ("close", ())):
        assert worker.call(method, *arguments)[1] is None
    (said,) = [each.getMessage() for each in caplog.records if "keeps no log" in each.getMessage()]
    assert said.startswith("answering 3 keeps no log: ") and str(folder) in said and "share" in said
    assert there == "what cannot be opened" or not folder.is_dir()
