"""Errors of ours that workers raise, in Ray's own errors as they arrive: they end as themselves, at once."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError, UserCodeException
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.util import construct_user_exception_with_traceback

from mlc_ray.data.batches import BatchError
from mlc_ray.errors import MlcRayError
from mlc_ray.score.run import TooManyUnparsedError
from mlc_ray.train.checkpoint import CheckpointError
from mlc_ray.train.failures import EndAtOwnError, own_error, own_errors
from mlc_ray.train.loop import DivergedError
from mlc_ray.train.model import ModelError

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


def test_errors_that_name_each_other_as_causes_are_each_looked_at_once() -> None:
    first, second = KeyError("first"), KeyError("second")
    assert own_error(caused_by(first, caused_by(second, first))) is None


@pytest.mark.parametrize("own", [CHECKPOINT, ModelError("m"), BatchError("b"), TooManyUnparsedError("u"), DIVERGED])
def test_an_error_of_ours_is_not_tried_again(own: MlcRayError) -> None:
    """The very calls of Ray Train's controller, up to its decision and to what `fit` raises."""
    handler = UserCallbackHandler([EndAtOwnError()], train_run_context=SimpleNamespace())
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
