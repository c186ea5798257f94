"""A phase's line: what it says, where it is drawn, and when it is logged."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest

from mlc_ray import progress
from mlc_ray.progress import Display, Phase, draw_on, phase


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_rate_and_time_left_leave_out_the_start(clock: list[float]) -> None:
    shown = Phase("training", 20, "steps")
    clock[0] += 30  # workers start
    assert shown.line() == "training: 0 of 20 steps, 0:30 so far"
    shown.advance()
    assert shown.line() == "training: 1 of 20 steps, 30.0 s each, 9:30 left"
    clock[0] += 10
    shown.update(6)
    assert shown.line() == "training: 6 of 20 steps, 2.0 s each, 0:28 left"
    clock[0] += 8  # it goes on while nothing is heard
    assert shown.line() == "training: 6 of 20 steps, 2.0 s each, 0:20 left"
    clock[0] += 3600
    shown.update(20)
    assert shown.end_line() == "training: 20 steps in 1:00:48"


def test_what_comes_in_blocks_has_the_rate_of_blocks(clock: list[float]) -> None:
    shown = Phase("probing", 60, "bundles")
    clock[0] += 8
    for _ in range(4):
        clock[0] += 1e-6
        shown.advance()
    assert shown.rate == pytest.approx(0.5, rel=1e-3)
    clock[0] += 8
    shown.advance(4)
    assert 0.5 < shown.rate < 1


def test_what_was_done_before_is_not_counted_into_the_rate(clock: list[float]) -> None:
    shown = Phase("training", 20, "steps", done=10)
    clock[0] += 5
    shown.update(15)
    assert shown.line() == "training: 15 of 20 steps, 1.0/s, 0:05 left"


def test_without_a_total_there_is_no_time_left_and_a_phase_cut_short_says_so(clock: list[float]) -> None:
    shown = Phase("reading", None, "bundles")
    clock[0] += 2
    shown.advance(300)
    assert shown.line(bar=True) == "reading: 300 bundles, 150.0/s"
    short = Phase("answering", 384, "prompts")
    clock[0] += 2
    short.advance(96)
    assert short.end_line() == "answering: 96 of 384 prompts in 0:02"


def screen(text: str, width: int) -> list[str]:
    """What a terminal shows of `text`; raises where a redrawn line would wrap."""
    lines = [""]
    for part in re.split("(\r|\n|\x1b\\[K)", text):
        if part == "\n":
            lines.append("")
        elif part in ("\r", "\x1b[K"):
            lines[-1] = ""
        else:
            lines[-1] += part
            assert len(lines[-1]) < width
    return lines


def test_a_terminal_shows_one_line_redrawn_below_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.01)
    stream = io.StringIO()
    display = Display(stream, width=60)
    draw_on(display)
    try:
        with phase("answering", total=4, unit="prompts of a benchmark with a name that does not fit") as shown:
            for _ in range(4):
                shown.advance()
                time.sleep(0.03)
                display.write("a row")
            assert screen(stream.getvalue(), 60)[-1].startswith("answering: ━━━━━━━━━━━━━━━━━━━━  4 of 4 prompts")
    finally:
        draw_on(None)
    assert screen(stream.getvalue(), 60) == ["a row"] * 4 + [""]
    assert "━╌" in stream.getvalue()  # it was half done once


def test_phases_at_the_same_time_share_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DRAW_SECONDS", 0.01)
    stream = io.StringIO()
    draw_on(Display(stream, width=200))
    try:
        with phase("answering", 8, "prompts") as first, phase("judging", 8, "responses") as second:
            first.advance(4)
            second.advance(2)
            time.sleep(0.1)
            drawn = stream.getvalue()
        time.sleep(0.05)
    finally:
        draw_on(None)
    last = [line for line in screen(drawn, 200) if line][-1]
    assert re.fullmatch(r"answering: .* 4 of 8 prompts, .* left; judging: 2 of 8 responses, .* left", last)
    assert not any(line.startswith("judging") for line in drawn.split("\r"))


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)
    with caplog.at_level(logging.INFO, "mlc_ray"), pytest.raises(KeyError), phase("reading", 3, "files") as shown:
        time.sleep(0.12)
        shown.advance(2)
        raise KeyError
    assert caplog.messages[0] == "reading: 0 of 3 files, 0:00 so far"
    assert 2 <= len(caplog.messages) <= 4
    assert caplog.messages[-1] == "reading: 2 of 3 files in 0:00"
