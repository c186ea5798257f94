"""A calibration: how often a judge errs, in a file by which scores show corrected rates beside those counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from mlc_ray.errors import MlcRayError
from mlc_ray.result_files import RESULT_FILE, ResultFileError, read_result
from mlc_ray.score.results import ScoreResult
from mlc_ray.stats.calibration import Errors, corrected_rates
from mlc_ray.storage import Place, fingerprint, write_json_atomic

FORMAT = 1


class CalibrationError(MlcRayError):
    """A judge cannot be calibrated so, or a file does not hold the calibration of the judge; the message says why."""


@dataclass(frozen=True)
class Calibration:
    """How often a judge errs, per measure and language; a panel, each of its judges.

    `judge` is the identity of the judge, as a score has it. `labels` names the labelled responses by their content,
    which came from `sources`. A language with fewer than `min_labels` labels of either class is not measured.
    """

    __pydantic_config__ = RESULT_FILE

    judge: str
    sources: tuple[str, ...]
    labels: str
    min_labels: int
    errors: tuple[Errors, ...]
    created: str = ""

    def measured(self, errors: Errors) -> bool:
        """Whether there are enough labels."""
        return errors.labels >= self.min_labels


_CALIBRATION = TypeAdapter(Calibration)


def save_calibration(calibration: Calibration, file: Path) -> None:
    """Write `calibration` as JSON."""
    write_json_atomic(file, {"format": FORMAT, **_CALIBRATION.dump_python(calibration, mode="json")})


def load_calibration(path: str | Place) -> Calibration:
    """What a file of `calibrate` holds.

    Raises:
        CalibrationError: it is missing, damaged, or of another format.
    """
    try:
        return read_result(Place(path), _CALIBRATION, FORMAT)
    except ResultFileError as error:
        raise CalibrationError(f"calibration={str(path)!r}: {error}; make it by `mlc-ray judge --calibrate`") from None


def check_calibration(path: str | None, judge: str) -> None:
    """Refuse a calibration of another judge than that of a score, by their identities.

    Raises:
        CalibrationError: it is another's, or the file cannot be read.
    """
    if path is None:
        return
    found = load_calibration(path)
    if found.judge != judge:
        raise CalibrationError(
            f"calibration={path!r} is of another judge than this score's: its errors are those of {found.judge!r}, and "
            f"the score is judged by {judge!r}; calibrate this judge, or set calibration=null"
        )


def with_corrected_rates(result: ScoreResult, path: str | None) -> ScoreResult:
    """The result with a corrected rate beside each of its rows, by the calibration at `path`."""
    if path is None:
        return result
    found = load_calibration(path)
    return replace(
        result,
        calibration=fingerprint([found.judge, found.labels, found.min_labels]),
        corrected=tuple(corrected_rates(result.rows, found.errors, found.min_labels)),
    )
