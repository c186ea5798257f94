"""Errors of ours that workers raise, in Ray's own errors as they arrive: they end as themselves, at once."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, UserCodeException
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.util import construct_user_exception_with_traceback

from mlc_ray.data.batches import BatchError
from mlc_ray.errors import MlcRayError
from mlc_ray.score.run import TooManyUnparsedError
from mlc_ray.storage import Place
from mlc_ray.train.divergence import DivergedError
from mlc_ray.train.failures import (
    EndAtOwnError,
    death_of,
    error_inside,
    failure_kept,
    keyboard_interrupt,
    own_error,
    own_errors,
)
from mlc_ray.train.forward import ModelError
from mlc_ray.train.preemption import Notice, WorkersPreemptedError, ended_by
from mlc_ray.train.shards import CheckpointError

CHECKPOINT = CheckpointError("checkpoint 'c' was made with other settings: start a new run")
DIVERGED = DivergedError("step 3: not finite", step=3, bundles=["a", "b"])


def of_a_task(cause: Exception) -> Exception:
    """What `ray.get` raises of a task that raised `cause`."""
    return pickle_round(RayTaskError("task", "Traceback ...", cause, "proc", 1, "127.0.0.1")).as_instanceof_cause()


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def pickle_round(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def polled(*errors: Exception | None) -> WorkerGroupPollStatus:
    """What Ray Train's controller finds when it asks workers that raised these."""
    statuses = {}
    for rank, error in enumerate(errors):
        try:
            if error is not None:
                raise error
        except Exception as raised:
            told = pickle_round(construct_user_exception_with_traceback(raised))
            statuses[rank] = WorkerStatus(running=False, error=told)
        else:
            statuses[rank] = WorkerStatus(running=True)
    return WorkerGroupPollStatus(worker_statuses=statuses)


@pytest.mark.parametrize(
    "error",
    [
        CHECKPOINT,
        WorkerGroupError("rank 1: ...", {0: RuntimeError("connection closed"), 1: CHECKPOINT}),
        ControllerError(CHECKPOINT),
        of_a_task(CHECKPOINT),
        WorkerGroupError("rank 0: ...", {0: of_a_task(CHECKPOINT)}),
        caused_by(UserCodeException("UDF failed to process a data block."), CHECKPOINT),
    ],
    ids=["itself", "of a worker", "of the controller", "of a task", "of a task of a worker", "of Ray Data"],
)
def test_an_error_of_ours_ends_as_itself(error: Exception) -> None:
    with pytest.raises(MlcRayError) as caught, own_errors():
        raise error
    assert type(caught.value) is CheckpointError
    assert str(caught.value) == str(CHECKPOINT)


@pytest.mark.parametrize("error", [KeyError("x"), WorkerGroupError("...", {0: KeyError("x")}), of_a_task(KeyError())])
def test_any_other_error_passes(error: Exception) -> None:
    assert own_error(error) is None
    with pytest.raises(type(error)) as caught, own_errors():
        raise error
    assert caught.value is error


MEMORY = """6 worker(s) were killed due to the node running low on memory. Memory on the node was 22.42GB / 23.54GB.
OOM kill reason: Memory usage 24068722688B exceeded threshold of 24012685312B (95.0% of 25276510208B limit)
Object store memory usage: [- objects spillable: 4"""


def test_the_death_of_a_worker_is_said_in_a_line() -> None:
    failure = WorkerHealthCheckFailedError("A worker health check failed.", OutOfMemoryError(MEMORY))
    said = death_of(pickle_round(WorkerGroupError("rank 1: ...", {1: failure})))
    assert said is not None and "\n" not in said
    assert "ran out of memory: all processes on it took 22.4 of 23.5 GiB; start fewer workers" in said
    said = death_of(ControllerError(WorkerGroupError("rank 0: ...", {0: ActorDiedError()})))
    assert said is not None and said.startswith("a worker died: The actor died unexpectedly before finishing this task")
    for other in (KeyError("x"), WorkerGroupError("...", {0: KeyError("x")}), of_a_task(KeyError())):
        assert death_of(other) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (of_a_task(CHECKPOINT), str(CHECKPOINT)),
        (KeyboardInterrupt("go on by --resume"), "interrupted by Ctrl-C"),
        (caused_by(RuntimeError("Traceback\nlong"), ActorDiedError()), "a worker died: "),
        (RuntimeError("out of paper\nand more lines"), "RuntimeError: out of paper"),
        (SystemExit(), "SystemExit"),
    ],
)
def test_a_runs_folder_says_what_it_failed_by(tmp_path: Path, error: BaseException, said: str) -> None:
    run, file = Place(tmp_path), tmp_path / "failed.json"
    with pytest.raises(type(error)), failure_kept(run):
        raise error
    message = json.loads(file.read_text())["message"]
    assert message.startswith(said) if said.endswith(" ") else message == said
    assert "\n" not in message
    with failure_kept(run):
        assert not file.exists()
    assert not file.exists()


def test_a_divergence_is_told_in_its_own_file_alone(tmp_path: Path) -> None:
    with pytest.raises(DivergedError), failure_kept(Place(tmp_path)):
        raise DIVERGED
    assert not list(tmp_path.iterdir())


def test_errors_that_name_each_other_as_causes_are_each_looked_at_once() -> None:
    first, second = KeyError("first"), KeyError("second")
    assert own_error(caused_by(first, caused_by(second, first))) is None


@pytest.mark.parametrize("own", [CHECKPOINT, ModelError("m"), BatchError("b"), TooManyUnparsedError("u"), DIVERGED])
def test_an_error_of_ours_is_not_tried_again(own: MlcRayError) -> None:
    """The very calls of Ray Train's controller, up to its decision and to what `fit` raises."""
    handler = UserCallbackHandler([EndAtOwnError(0, "from the last checkpoint")], train_run_context=SimpleNamespace())
    policy = create_failure_policy(FailureConfig(max_failures=3))
    handler.after_worker_group_poll_status(polled(None, None))
    handler.after_worker_group_poll_status(polled(RuntimeError("a worker died"), None))
    with pytest.raises(type(own)) as caught:
        handler.after_worker_group_poll_status(polled(None, own))
    raised = ControllerError(caught.value)
    assert policy.make_decision(raised) is FailureDecision.RAISE
    with pytest.raises(type(own)) as ended, own_errors():
        raise pickle_round(raised)
    assert (str(ended.value), vars(ended.value)) == (str(own), vars(own))
    others = polled(RuntimeError("a worker died"), None).get_worker_group_error()
    assert policy.make_decision(others) is FailureDecision.RETRY


def test_workers_that_got_sigterm_are_found_in_what_ray_raises() -> None:
    error = polled(RuntimeError("a worker died"), ended_by(Notice.RESTART, 7)).get_worker_group_error()
    found = error_inside(pickle_round(error), WorkersPreemptedError)
    assert found is not None and found.step == 7


def test_a_failure_that_is_tried_again_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mlc_ray.train.failures.send_warnings", lambda: None)  # it is for a process of Ray's own
    handler = UserCallbackHandler([EndAtOwnError(3, "from the last checkpoint")], train_run_context=SimpleNamespace())
    handler.after_worker_group_poll_status(polled(None, RuntimeError("first line\nthe device is lost")))
    assert "worker 1 failed (" in caplog.text and "the device is lost); where cluster.max_failures=3" in caplog.text


def exit_at(number: signal.Signals) -> None:
    """What Ray Train does at SIGINT and Ray at SIGTERM: handlers of their own, which end by `SystemExit`."""
    signal.signal(number, lambda *_: sys.exit(0))
    os.kill(os.getpid(), number)


@pytest.fixture
def handlers() -> Iterator[dict[signal.Signals, Any]]:
    """The handlers of signals as the caller has them; and after the test, whatever it did."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_is_a_keyboard_interrupt(handlers: dict[signal.Signals, Any]) -> None:
    with pytest.raises(KeyboardInterrupt, match="to go on: this"), keyboard_interrupt("to go on: this"):
        exit_at(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_before_ray_has_a_handler_says_the_same(handlers: dict[signal.Signals, Any]) -> None:
    with pytest.raises(KeyboardInterrupt, match="to go on: this"), keyboard_interrupt("to go on: this"):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_which_the_block_returns_is_one_all_the_same(handlers: dict[signal.Signals, Any]) -> None:
    with pytest.raises(KeyboardInterrupt, match="to go on: this"), keyboard_interrupt("to go on: this"):
        signal.signal(signal.SIGINT, lambda *_: None)  # as Ray Tune's, whose fit() then ends the trials and returns
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]


def test_another_signal_is_no_ctrl_c(handlers: dict[signal.Signals, Any]) -> None:
    with pytest.raises(SystemExit), keyboard_interrupt("to go on: this"):
        exit_at(signal.SIGTERM)


def test_a_block_that_ends_by_itself_restores_the_handler(handlers: dict[signal.Signals, Any]) -> None:
    with keyboard_interrupt("to go on: this"):
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    assert signal.getsignal(signal.SIGINT) is handlers[signal.SIGINT]


def test_signals_are_passed_on_to_who_was_told_of_them_before(handlers: dict[signal.Signals, Any]) -> None:
    came, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    try:
        with pytest.raises(SystemExit), keyboard_interrupt("to go on: this"):
            exit_at(signal.SIGTERM)
    finally:
        assert signal.set_wakeup_fd(-1) == wakeup
    assert os.read(came, 9) == bytes([signal.SIGTERM])
    os.close(came)
    os.close(wakeup)


def test_beside_the_main_thread_signals_are_left_alone() -> None:
    ended = []

    def block() -> None:
        with keyboard_interrupt("to go on: this"):
            ended.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert ended == [signal.getsignal(signal.SIGINT)]
