"""What a cell's work raises becomes a line of its study; what stops all cells ends it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from mlc_ray.errors import MlcRayError
from mlc_ray.score.scorer import ScorerDiedError
from mlc_ray.train.preemption import PreemptedError

logger = logging.getLogger(__name__)


@contextmanager
def failing(
    failures: MutableMapping[str, str],
    name: str,
    *,
    again: str,
    ends: tuple[type[MlcRayError], ...] = (ScorerDiedError,),
) -> Iterator[None]:
    """Within, errors go into `failures` under the cell's name; SIGTERM, Ctrl-C and those of `ends` are raised.

    Ctrl-C names `again`, the command that goes on with the study; a run or a search in it names its own.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"to go on: {again}") from None
    except PreemptedError:
        raise
    except MlcRayError as error:
        if isinstance(error, ends):
            raise
        logger.warning("%s failed: %s", name, error)
        failures[name] = str(error)
    except Exception as error:  # of a worker, of Ray, or of code from outside: the other cells can be run all the same
        logger.warning("%s failed", name, exc_info=True)
        said = str(error).strip().splitlines() or [""]
        failures[name] = f"{type(error).__name__}: {said[-1]}"
