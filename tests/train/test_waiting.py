"""Workers for which there is no place are told of, and not waited for without end."""

from __future__ import annotations

import os
from typing import Any

import pytest
from ray.train.v2._internal.execution.controller.state import InitializingState, ReschedulingState, RunningState

from mlc_ray.capacity import Need
from mlc_ray.cluster import ClusterError
from mlc_ray.config.train import ClusterSection
from mlc_ray.train.waiting import EndWithoutRoom, tries_of
from mlc_ray.train.workers import run_workers

HELD = "4 of 4 GPUs are in use"


class Rescheduling(ReschedulingState):
    def __init__(self) -> None:
        pass


class Running(RunningState):
    def __init__(self) -> None:
        pass


def test_the_time_counts_while_workers_have_no_place(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("mlc_ray.train.waiting.gpus_held", lambda: HELD)
    monkeypatch.setattr("mlc_ray.train.waiting.send_warnings", lambda: None)
    clock = [0.0]
    waits = EndWithoutRoom([Need(1, 1)] * 2, 150, now=lambda: clock[0])

    def at(seconds: float, state: Any) -> None:
        clock[0] = seconds
        waits.after_controller_state_update(None, state)

    at(0, InitializingState())
    at(59, Rescheduling())
    assert not caplog.records
    at(61, Rescheduling())
    at(70, Rescheduling())
    (record,) = caplog.records
    assert "2 x (1 CPUs, 1 GPUs), have waited for a place for 61 s of cluster.wait_seconds=150" in record.getMessage()
    assert HELD in record.getMessage()
    at(140, Running())
    at(160, Rescheduling())  # a node was lost: it waits anew
    at(300, Rescheduling())
    with pytest.raises(ClusterError, match=r"found no place in 151 s \(cluster.wait_seconds=150\): 4 of 4 GPUs are in"):
        at(311, Rescheduling())


def test_tries_take_no_longer_than_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    monkeypatch.delenv(name, raising=False)
    with tries_of(3600):
        assert os.environ[name] == "60.0"
    with tries_of(5):
        assert os.environ[name] == "5"
    assert name not in os.environ
    monkeypatch.setenv(name, "600")
    with tries_of(5):
        assert os.environ[name] == "600"


@pytest.mark.slow
def test_a_run_whose_cpus_others_hold_ends(ray_local: Any, tmp_path: Any) -> None:
    holder = ray_local.remote(num_cpus=1.5)(Holder).remote()
    ray_local.get(holder.ping.remote())
    section = ClusterSection(workers=1, cpus_per_worker=1.0, wait_seconds=2)
    try:
        with pytest.raises(ClusterError, match=r"1 x \(1 CPUs\), found no place .* 1.5 of 2 CPUs are in use"):
            run_workers(
                nothing, None, section, workers=1, gpu=False, name="t", storage=tmp_path, goes_on="", to_go_on=""
            )
    finally:
        ray_local.kill(holder)


class Holder:
    def ping(self) -> None:
        pass


def nothing(_: dict[str, Any]) -> None:
    raise AssertionError("there is no place for it")
