"""Closing a warm scorer, whatever became of its actor; no Ray is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from mlc_ray.score import scorer
from mlc_ray.score.scorer import ScorerDiedError, WarmScorer


@pytest.mark.parametrize("answers", [True, False])
def test_a_scorer_that_died_or_is_stuck_hides_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answers: bool
) -> None:
    killed, waited = [], []

    def get(reference: Any, **_: Any) -> None:
        raise RuntimeError("the actor is dead")

    def wait(references: list[Any], *, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        waited.append(timeout)
        return (references, []) if answers else ([], references)

    monkeypatch.setattr(scorer, "ray", SimpleNamespace(get=get, wait=wait, kill=killed.append))
    actor = SimpleNamespace(close=SimpleNamespace(remote=object))
    with pytest.raises(ValueError, match="the first error"):
        try:
            raise ValueError("the first error")
        finally:
            WarmScorer(actor).close()
    assert killed == [actor]
    assert None not in waited
    assert ("is killed" in caplog.text) is not answers


def test_a_scorer_that_died_says_so_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(reference: Any) -> None:
        raise ray.exceptions.RayActorError(error_msg="The actor died: out of memory")

    monkeypatch.setattr(scorer, "ray", SimpleNamespace(get=get, exceptions=ray.exceptions))
    with pytest.raises(ScorerDiedError, match=r"has died \(.*out of memory"):
        WarmScorer(SimpleNamespace(check=SimpleNamespace(remote=object))).check()
