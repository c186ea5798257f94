"""What the driver of a search says and keeps of trials that fail; without Ray's processes."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path

import pytest
import ray.tune
from ray.exceptions import RayTaskError
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial

from mlc_ray.search.record import Recorder
from mlc_ray.search.trial import run_trial
from mlc_ray.search.tune import FOLDER, VALUES, EndEarly
from mlc_ray.storage import StorageError
from mlc_ray.train.divergence import DivergedError, record_divergence

from .test_trial import Scorer, shared_of, trained


def raised(cause: Exception) -> RayTaskError:
    """What Ray raises of a task that raised `cause`, as after a cause of its own."""
    try:
        try:
            raise KeyError("first")
        except KeyError as first:
            raise cause from first
    except Exception as error:
        return RayTaskError("task", traceback.format_exc(), error, "proc", 1, "127.0.0.1")


def failed(folder: Path, name: str, error: Exception) -> Trial:
    """A trial of Tune's that has written its error, as it does before it calls back."""
    given = {FOLDER: name, VALUES: {"mlc.weight": 0.5}}
    storage = StorageContext(storage_path=str(folder), experiment_dir_name="tune", trial_dir_name=name)
    trial = Trial("trial", config=given, stub=True, storage=storage)
    trial.init_local_path()
    trial.handle_error(error)
    return trial


def test_a_trial_that_fails_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Tune's folder on this machine is one of Ray's session, and there is none.
    monkeypatch.setattr("ray.train._internal.storage._get_ray_train_session_dir", lambda: str(tmp_path / "session"))
    shared = shared_of(tmp_path, Scorer())
    monkeypatch.setattr(ray.tune, "report", lambda metrics: None)
    recorder = Recorder(shared, shared.baseline(), total=3, end=EndEarly(None))
    for name in ("a", "b", "c"):
        (shared.trial_folder(name) / "values.json").write_json({"mlc.weight": 0.5})
    record_divergence(shared.trial_folder("b"), DivergedError("step 7: not finite", step=7))
    reason = raised(StorageError("'/shared/x' cannot be read\nmore of it"))
    with caplog.at_level(logging.WARNING):
        recorder.on_trial_error(1, [], failed(tmp_path, "a", reason))
        recorder.on_trial_error(2, [], failed(tmp_path, "b", raised(DivergedError("step 7: not finite", step=7))))
        recorder.on_trial_error(3, [], failed(tmp_path, "c", OSError("disk full")))
    assert "trial a  mlc.weight=0.5  failed: '/shared/x' cannot be read" in caplog.messages
    expected = ["a: '/shared/x' cannot be read", "b: step 7: not finite", "c: disk full"]
    assert json.loads((tmp_path / "trials.json").read_text())["failed"] == expected
    assert "a trial failed: a: '/shared/x' cannot be read" in (tmp_path / "search.md").read_text()
    recorder.on_trial_error(4, [], failed(tmp_path, "d", raised(ValueError("no such layer"))))
    recorder.on_trial_error(5, [], failed(tmp_path, "e", OSError()))
    assert recorder.failed[-2:] == ["d: ValueError: no such layer", "e: Tune says no reason"]
    (shared.trial_folder("f") / "failed.json").write_json({"message": "its node ran out of memory"})
    recorder.on_trial_error(6, [], failed(tmp_path, "f", raised(RuntimeError("worker errors:"))))
    assert recorder.failed[-1] == "f: its node ran out of memory"
    kept = {name: shared.trial_folder(name) / "failed.json" for name in ("a", "b", "c")}
    assert kept["a"].read_json() == {"message": "'/shared/x' cannot be read\nmore of it"}
    assert kept["c"].is_file() and not kept["b"].is_file()  # which its own file says
    trained(shared, "a", 4, ends=True)
    run_trial({VALUES: {"mlc.weight": 0.5}, FOLDER: "a"}, shared=shared)
    assert not kept["a"].is_file()
