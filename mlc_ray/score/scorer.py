"""A scorer that stays warm: every pool that scoring a checkpoint needs, kept open between checkpoints.

`start_scorer` puts it into a Ray actor on the driver's node, and what it returns is a handle that can be sent to any
process of the cluster. The actor owns the pools and takes one call after the other, so that two trials never ask for
different weights at once; a call that it has begun is finished even if the calling process has died, and engines sleep
again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mlc_ray.config import ScoringSection
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, Warm
from mlc_ray.generate.pool import EnginePool, expected_errors, work
from mlc_ray.generate.replica import EngineDiedError, Part
from mlc_ray.generate.stage import PROMPTS
from mlc_ray.judges.base import make_judge
from mlc_ray.log_files import OwnLog, kept, own_log
from mlc_ray.monitoring import told_of
from mlc_ray.progress import phase
from mlc_ray.runs import KEPT_FOLDER, REPLIES_FILE, SCORES_FILE, names_of
from mlc_ray.score.chain import Pass, chain
from mlc_ray.score.kept import Kept
from mlc_ray.score.passes import judged_by, keep, made_by, read_by, warn_of_faults
from mlc_ray.score.plan import Judging, answering, plan_judging, reading
from mlc_ray.score.request import Request, load_request
from mlc_ray.score.results import ScoreResult, write_responses
from mlc_ray.score.run import read_responses, write_score
from mlc_ray.score.stages import JUDGED
from mlc_ray.storage import Place, working_folder

logger = logging.getLogger(__name__)
_PASS = "pass-"
_CLOSE_SECONDS = 120.0  # of three pools one after another, of which each may take 30


class ScorerDiedError(MlcRayError):
    """A warm scorer, or an engine of it for good, has died: it scores nothing more. The message says of what."""


@dataclass(frozen=True)
class WarmScore:
    """One checkpoint's responses with their verdicts (`score.stages.JUDGED`), and the seconds each part took."""

    judged: pa.Table
    seconds: Mapping[str, float]


class Scorer:
    """The pools of a score, open, and the prompts; `run` is what metrics call it."""

    def __init__(
        self, parts: list[Part], prompts: pa.Table, device: Device, run: str = "", log: OwnLog | None = None
    ) -> None:
        self._made = parts, prompts, device
        self._log = ExitStack()
        self._lines = self._log.enter_context(kept(log))
        told_of(run=run)

    def start(self) -> None:
        """Start all actors; raises what a stage raises."""
        parts, self._table, device = self._made
        self._answering, *self._reading = EnginePool.open_all(parts, device)

    def check(self) -> None:
        """Start what has died again; raises as `EnginePool.check` does."""
        for pool in (self._answering, *self._reading):
            pool.check()

    def score(
        self,
        weights: str | None,
        lora: bool,
        prompts: pa.Table | None,
        request: Request | None = None,
        place: Place | None = None,
    ) -> WarmScore:
        """Verdicts on the model in the folder `weights` (`lora`: on an adapter, None for no adapter).

        With `request`, which it is a score of, blocks that engines have done are kept in its folder `place`.
        """
        if self._lines is not None:
            self._lines.trial = "" if place is None else names_of(place)[1]
        logger.info("scoring %s", "the model without adapters" if weights is None else weights)
        table = self._table if prompts is None else prompts
        pools = (self._answering, *self._reading)
        answered = math.nan

        def note(_: pa.Table) -> None:
            nonlocal answered
            answered = time.perf_counter()

        found: Sequence[Kept | None] = [None for _ in pools]
        if request is not None and place is not None:
            found = self._kept(request, place, table)
        passes = [
            Pass(pool.part, pool.device, len(table), kept=there, keeps=pool.part.engine is not None)
            for pool, there in zip(pools, found, strict=True)
        ]
        passes[0].ended = note
        started = time.perf_counter()
        with self._answering.awake():
            woken = time.perf_counter()
            swap = self._answering.swap(weights, lora=lora)
            swapped = time.perf_counter()
            chain(passes, table)
            left = [(pool, one.job) for pool, one in zip(pools, passes, strict=True) if one.done < len(table)]
            for one in passes[: len(passes) - len(left)]:  # nothing is left of the first ones alone
                one.job.ended()
            work(left)
            judged = time.perf_counter()
        ended = time.perf_counter()
        seconds = {
            "wake": woken - started, **swap, "answer": answered - swapped, "judge": judged - answered,
            "sleep": ended - judged, "total": ended - started,
        }  # fmt: skip
        table = passes[-1].table
        return WarmScore(table.select(JUDGED.names), seconds)

    def _kept(self, request: Request, place: Place, table: pa.Table) -> list[Kept]:
        """What is there of each pass."""
        judging = plan_judging(make_judge(request.config.judge), table)
        parts = [pool.part for pool in self._reading]
        made: list[tuple[Any, Sequence[str], pa.Schema]]
        made = [(made_by(request, judging), PROMPTS.names, self._answering.part.columns)]
        made += [(judged_by(judging), read_by(part), part.columns) for part in parts]
        if (earlier := _answered_earlier(request, judging, place)) is not None:
            keep(Kept(place, f"{_PASS}0", *made[0]), earlier)  # those below read it
        return [Kept(place, f"{_PASS}{number}", *each) for number, each in enumerate(made)]

    def close(self) -> None:
        """End all actors."""
        for pool in (self._answering, *self._reading):
            pool.close()
        self._log.close()


def _answered_earlier(request: Request, judging: Judging, place: Place) -> pa.Table | None:
    """The responses of a complete score of the same, which is made again since engines failed on some of them."""
    if judging.judge.runs == "prompts" or not (place / SCORES_FILE).is_file():
        return None
    same = made_by(load_request(place), judging) == made_by(request, judging)
    return read_responses(place) if same else None


class WarmScorer:
    """A handle to a `Scorer` in an actor of its own; `close` it to free the memory of its engines."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def check(self) -> None:
        """Wait until the scorer has nothing else to do, and see to it that all its engines live.

        Raises:
            ScorerDiedError: it does not live, or one of them does not start again.
        """
        try:
            with expected_errors():
                ray.get(self._actor.check.remote())
        except EngineDiedError as error:
            raise ScorerDiedError(str(error)) from None
        except ray.exceptions.RayError as error:
            raise _died(error) from None

    def score(
        self,
        weights: str | None,
        *,
        lora: bool = False,
        prompts: pa.Table | None = None,
        request: Request | None = None,
        place: Place | None = None,
    ) -> WarmScore:
        """Verdicts on a model.

        Args:
            weights: a folder or hub name of weights of the same shape as those the scorer was started with; with
                `lora` a peft folder to be served over those, or None for no adapter.
            prompts: others than those that the scorer was started with; it was started with their kinds and languages.
            request: what it is a score of; what is kept of the same in the folder `place` is not asked for again.
            place: the score's folder, with `request`.

        Raises:
            StaleWeightsError: an engine does not serve the weights.
            ScorerDiedError: it does not live.
            MlcRayError: what an engine or a judge raises.
        """
        try:
            with expected_errors():
                score: WarmScore = ray.get(self._actor.score.remote(weights, lora, prompts, request, place))
        except ray.exceptions.RayTaskError:
            raise  # a mistake in its code, or that of a judge
        except ray.exceptions.RayError as error:
            raise _died(error) from None
        return score

    def close(self) -> None:
        """End the engines and free what they hold; a scorer that does not answer in two minutes is killed.

        Raises nothing where the scorer has died: what it died of is raised by the call that it was asked.
        """
        _, open_still = ray.wait([self._actor.close.remote()], timeout=_CLOSE_SECONDS)
        if open_still:
            logger.warning("the scorer did not end its engines in %.0f s and is killed", _CLOSE_SECONDS)
        ray.kill(self._actor)


def _died(error: ray.exceptions.RayError) -> ScorerDiedError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return ScorerDiedError(f"what scores, or an engine of it, has died ({said[0]})")


def write_warm_score(scored: WarmScore, request: Request, folder: Place) -> ScoreResult:
    """Count a checkpoint's verdicts, and write its score folder, `scores.json` last; what was kept of it goes.

    A warning says how many prompts or responses engines failed on.
    """
    warn_of_faults(scored.judged)
    (folder / SCORES_FILE).remove()  # of an earlier score, so that the folder is not whole until this one is
    judging = plan_judging(make_judge(request.config.judge), scored.judged)
    with working_folder(folder, last=(SCORES_FILE,)) as here:
        request.save(here)
        write_responses(scored.judged, here)
        result = write_score(request, judging, scored.judged, here, seconds=dict(scored.seconds))
    kept = folder / KEPT_FOLDER
    there = kept.iterdir()
    passes = [each for each in there if each.name.startswith(_PASS)]
    for each in passes if len(passes) < len(there) else [kept]:  # a measurement of utility keeps its own
        each.remove()
    if result.judge_faults:
        what = "%d of %d responses have no verdict: engines of a judge or translator fail on it, or an endpoint was out"
        logger.warning(what + "; the column `judge_fault` says how", result.judge_faults, result.responses)
    return result


def start_scorer(
    model: str,
    scoring: ScoringSection,
    prompts: pa.Table,
    *,
    device: Device,
    folder: Path,
    run: str = "",
    lora_rank: int | None = None,
    in_turn: bool = False,
    others: Sequence[pa.Table] = (),
) -> WarmScorer:
    """Start the engines of `scoring.engine` with `model`'s weights, and everything else, and wait until all are up.

    Args:
        model: Hugging Face folder or hub name.
        prompts: a table of `generate.stage.PROMPTS`.
        folder: for an endpoint's replies, and for what it did and cost.
        run: the search or study, as metrics call it.
        lora_rank: the rank of adapters that are to be served, None where whole models are.
        in_turn: engines give their GPU memory back between scores; they reserve no GPU of Ray, and use the first one
            of their machine.
        others: prompts that `WarmScorer.score` is given later: who judges which is planned for all of them.

    Raises:
        MlcRayError: what an engine or a judge raises.
    """
    judging = plan_judging(make_judge(scoring.judge), pa.concat_tables([prompts, *others]))
    warm = Warm(lora_rank, in_turn and device == "gpu")
    parts = [answering(model, scoring, judging, device, warm=warm, in_turn=in_turn)]
    replies = Place(folder / REPLIES_FILE)
    parts += reading(judging, device, rows=len(prompts), usage=folder, replies=replies).values()
    # It only waits, and lives where its driver does: on any other node it would be one more that must not die.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here}
    actor: Any = ray.remote(Scorer).options(**options).remote(parts, prompts, device, run, own_log("scorer"))
    try:
        # Shown here: what the actor's own process says of them is seen by nobody.
        engines = sum(part.replicas for part in parts if part.engine is not None)
        with phase("starting engines", engines, "engines") as progress, expected_errors():
            ray.get(actor.start.remote())
            progress.advance(engines)
    except BaseException:
        ray.kill(actor)  # and with it what it has started
        raise
    return WarmScorer(actor)
