"""Starting the actors of pools is shown and ends at the first fault; a stand-in for Ray says when each is up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlc_ray.config import EngineSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate import pool
from mlc_ray.generate.pool import Part, Pool
from mlc_ray.generate.stage import Generator


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Pool]:
    """A pool of two engines and one of a light actor; an actor's answer is its reference, the last is up first."""
    monkeypatch.setattr(
        pool, "ray", SimpleNamespace(wait=lambda found, num_returns: (found[-1:], found[:-1]), get=lambda found: found)
    )
    parts = [Part("answering", Generator, {}, EngineSection(replicas=2)), Part("judging", Generator, {})]
    return [Pool(part, "cpu", None, [up() for _ in range(part.replicas)]) for part in parts]


class Answer(tuple[Any, ...]):
    """What `Worker.call` gives; each is one of its own."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def up(error: MlcRayError | None = None) -> Any:
    return SimpleNamespace(call=SimpleNamespace(remote=lambda method: Answer((None, error))))


def test_engines_are_counted_while_they_start(pools: list[Pool], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mlc_ray.progress")
    pool._start(pools)
    assert "starting engines: 2 engines in" in caplog.text
    caplog.clear()
    pool._start(pools[1:])
    assert "starting engines" not in caplog.text


def test_the_first_fault_ends_the_start(pools: list[Pool], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mlc_ray.progress")
    pools[0].actors[0] = up(MlcRayError("the engine does not fit"))
    with pytest.raises(MlcRayError, match="does not fit"):
        pool._start(pools)
    assert "starting engines: 1 of 2 engines in" in caplog.text
