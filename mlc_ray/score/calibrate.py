"""Calibrate a judge: judge labelled responses as a score would, and count the errors."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mlc_ray.cluster import check_fits, connect, use_gpu
from mlc_ray.config import CalibrationConfig
from mlc_ray.data.labelled import LabelledResponse, read_labelled
from mlc_ray.generate.blocks import joined
from mlc_ray.generate.engine import Device
from mlc_ray.generate.pool import EnginePool
from mlc_ray.generate.replica import Part
from mlc_ray.judges.base import make_reader
from mlc_ray.progress import phase
from mlc_ray.runs import REPLIES_FILE
from mlc_ray.score.calibration import Calibration, CalibrationError, save_calibration
from mlc_ray.score.plan import Judging, judge_at_commits, judge_with_dtypes, plan_judging, reading
from mlc_ray.score.stages import RESPONSES, answers_of
from mlc_ray.stats.calibration import LabelledVerdict, errors_of
from mlc_ray.storage import Place, fingerprint, user_cache
from mlc_ray.types import Measure

logger = logging.getLogger(__name__)


def calibrate(config: CalibrationConfig) -> tuple[Calibration, Path]:
    """Judge the labelled responses as a score would, count errors, and write the file; returns both.

    A judge without engines needs no Ray.

    Raises:
        CalibrationError: the file exists; or the judge says nothing of what is labelled.
        MlcRayError: what reading the labelled responses, and the judge, raise.
    """
    judge = make_reader(judge_at_commits(config.judge))  # as a score names it, whose identity must be the same
    out = Path(config.out or f"calibration-{judge.name}.json")
    if out.exists():
        raise CalibrationError(f"{str(out)!r} exists already; give another file by --out, or remove it")
    labelled = read_labelled(config.labelled)
    judge.check_ready(user_cache())
    table = _table(labelled)
    judging = plan_judging(make_reader(judge.fitted_to(answers_of(table))), table)
    _check_labels(judging, labelled)
    with tempfile.TemporaryDirectory() as folder:
        judging, judged = _judge(config, judging, table, Path(folder))
    faults = judged["judge_fault"]
    if failed := len(faults) - faults.null_count:
        what = "%d of %d responses are not counted: engines fail on each, or an endpoint was out; the first: %s"
        logger.warning(what, failed, len(faults), next(filter(None, faults.to_pylist())))
        labelled = [each for each, fault in zip(labelled, faults.to_pylist(), strict=True) if fault is None]
        judged = judged.filter(pc.is_null(faults))
    verdicts = _verdicts(labelled, judged)
    if not verdicts:
        raise CalibrationError(
            "engines fail on every response whose label counts, or the endpoint was out; the first fault is logged"
        )
    found = Calibration(
        judge=judging.identity,
        sources=tuple(config.labelled),
        labels=fingerprint([[vars(each)[name] for name in _CONTENT] for each in labelled]),
        min_labels=config.min_labels,
        errors=tuple(errors_of(verdicts)),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    save_calibration(found, out)
    return found, out


def _check_labels(judging: Judging, labelled: Sequence[LabelledResponse]) -> None:
    """Warn of labels of what the judge does not say of such a prompt; refuse if all are: judging may take hours.

    Raises:
        CalibrationError: no label is of what the judge says.
    """
    said = {(*cell, measure) for reader in judging.readers for cell, ways in reader.cells.items() for measure in ways}
    labels = [
        (each.kind, each.language, measure)
        for each in labelled
        for measure, label in (("refused", each.refused), ("safe", each.safe))
        if label is not None
    ]
    counted, measures = sum(label in said for label in labels), ", ".join(judging.measured_by)
    if not counted:
        raise CalibrationError(
            f"the judge {judging.judge.name!r} says what is {measures}, and none of the {len(labelled)} responses is "
            "labelled by that; label refusals as `label`, harm as `safety`"
        )
    if counted < len(labels):
        what = "%d of %d labels are not counted: of these prompts the judge says what is %s only"
        logger.warning(what, len(labels) - counted, len(labels), measures)


_CONTENT = ("prompt", "response", "language", "kind", "refused", "safe")


def _table(labelled: Sequence[LabelledResponse]) -> pa.Table:
    rows = [
        {"benchmark": each.file, "bundle_id": each.place, "kind": each.kind, "category": "", "language": each.language,
         "prompt": each.prompt, "sample": 0, "response": each.response, "finish": "stop"}
        for each in labelled
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=RESPONSES)


def _judge(config: CalibrationConfig, judging: Judging, table: pa.Table, folder: Path) -> tuple[Judging, pa.Table]:
    """Who judged, its number types decided; and the table with its verdicts, by the very stages of a score."""

    def parts(device: Device) -> list[Part]:
        replies = Place(folder / REPLIES_FILE)
        return list(reading(judging, device, rows=len(table), usage=folder, replies=replies).values())

    if all(part.engine is None for part in parts("cpu")):
        for part in parts("cpu"):
            stage = part.stage(**part.settings)
            with phase(part.name, len(table), "responses") as progress:
                added = stage(table)
                progress.advance(len(table))
            stage.close()
            table = joined(table, added)
        return judging, table
    connect(config.address, config.env)
    device: Device = "gpu" if use_gpu(config.accelerator) else "cpu"
    decided = judge_with_dtypes(judging.judge.settings, gpu=device == "gpu")
    judging = plan_judging(make_reader(decided), table)
    for part in parts(device):
        if part.engine is not None:
            check_fits(f"{part.name}, by engines of its own,", part.places(device))
    for part in parts(device):
        with EnginePool.open(part, device) as pool, phase(part.name, len(table), "responses") as progress:
            table = joined(table, pool.map(table, progress=progress))
    return judging, table


def _verdicts(labelled: Sequence[LabelledResponse], judged: pa.Table) -> list[LabelledVerdict]:
    found = []
    for each, row in zip(labelled, judged.to_pylist(), strict=True):
        said: list[tuple[Measure, bool | None, str | None]] = [
            ("refused", each.refused, row["behaviour"]), ("safe", each.safe, row["safety"])
        ]  # fmt: skip
        for measure, hit, verdict in said:
            if hit is not None and verdict is not None:
                judge, unparsed = row[f"judge_{measure}"], verdict == "unparsed"
                found.append(LabelledVerdict(measure, each.language, judge, hit, verdict == measure, unparsed))
    return found
