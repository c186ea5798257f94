"""The result of a score: `ScoreResult`, and the `scores.json` that it is written to and read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from mlc_ray.errors import MlcRayError
from mlc_ray.result_files import RESULT_FILE, ResultFileError, read_result
from mlc_ray.runs import HEATMAP_FILE, RESPONSES_FILE, SCORES_FILE
from mlc_ray.stats.calibration import CorrectedRate
from mlc_ray.stats.rates import Judged, Summary, score_rows
from mlc_ray.stats.response_languages import InLanguage, in_language
from mlc_ray.stats.summaries import summarise
from mlc_ray.storage import Place
from mlc_ray.types import ENGINE_FAULT, UNFINISHED_THOUGHTS, Measure, ScoreRow

FORMAT = 5
CUT_BOUND = 0.1
"""Share of responses cut off at max_new_tokens above which a rate of safe ones is warned of."""
LANGUAGE_COLUMN = "response_language"
"""The column of responses.parquet with the language of each response, in scores whose `told_by` says how."""


class ScoresFileError(MlcRayError):
    """A scores.json is missing, damaged, or of another format; the message names the path."""


@dataclass(frozen=True)
class ScoreResult:
    """One model's score.

    `model` is what was asked for, `resolved` the folder or hub name that was loaded, `fingerprint` names its content;
    `prompts` names the set of prompts: two scores with the same `prompts`, `judge` and length of answers can be
    compared; `versions` are of the libraries that answered. `measured_by` names who is behind each measure;
    `seen_languages` are those that training saw, None where that is not known. `rows` are of every benchmark;
    `summaries` too and, if there are several, of all of them (benchmark `all`).
    `finish` counts responses by why they ended, `judge_faults` those that a judge or its translator
    was out for; `usage` is what endpoints did and cost, by what they were asked for (`judge`, `translate`). `corrected`
    has a rate corrected for the judge's errors beside each row, by the calibration whose content `calibration` names;
    empty without one.
    `told_by` names what told which language each response is in; empty where that was not measured.
    """

    __pydantic_config__ = RESULT_FILE

    name: str
    model: str
    resolved: str
    fingerprint: str
    prompts: str
    judge: str
    measured_by: Mapping[Measure, str]
    seen_languages: tuple[str, ...] | None
    rows: tuple[ScoreRow, ...]
    summaries: tuple[Summary, ...]
    responses: int
    unparsed: int
    degenerate: int
    finish: Mapping[str, int] = field(default_factory=dict)
    judge_faults: int = 0
    usage: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    calibration: str = ""
    corrected: tuple[CorrectedRate, ...] = ()
    told_by: str = ""
    folder: Place = field(default_factory=lambda: Place("."))

    @property
    def unparsed_share(self) -> float:
        """Share of responses without a verdict, as a fraction."""
        return self.unparsed / self.responses

    @property
    def faults(self) -> int:
        """How many prompts engines failed on, which have no answer, and `judge_faults`."""
        return self.finish.get(ENGINE_FAULT, 0) + self.judge_faults

    @property
    def heatmap(self) -> Place:
        """Where the command line draws the heat map."""
        return self.folder / HEATMAP_FILE

    @property
    def responses_file(self) -> Place:
        """The Parquet file with every prompt, response and verdict."""
        return self.folder / RESPONSES_FILE

    def summary(self, benchmark: str | None = None) -> Summary:
        """The summary of a benchmark; without a name the last, which is over everything.

        Raises:
            KeyError: No benchmark has that name.
        """
        if benchmark is None:
            return self.summaries[-1]
        for summary in self.summaries:
            if summary.benchmark == benchmark:
                return summary
        raise KeyError(f"{benchmark!r} was not scored; there are {[s.benchmark for s in self.summaries]}")


_SCORES = TypeAdapter(ScoreResult)


def count(
    records: Sequence[Judged], *, folder: Path | Place, seen_languages: Sequence[str] | None, **facts: Any
) -> ScoreResult:
    """The result of a score's verdicts: `facts` are the fields of `ScoreResult` that do not follow from them."""
    rows = score_rows(records)
    return ScoreResult(
        name=folder.name,
        folder=Place(folder),
        seen_languages=None if seen_languages is None else tuple(seen_languages),
        rows=tuple(rows),
        summaries=tuple(summarise(records, seen_languages, rows)),
        responses=len(records),
        unparsed=sum("unparsed" in (record.behaviour, record.safety) for record in records),
        degenerate=sum("degenerate" in (record.behaviour, record.safety) for record in records),
        **facts,
    )


def unread_rows(result: ScoreResult, bound: float) -> list[ScoreRow]:
    """The rows of which more than `bound` (a fraction) is `unparsed`: one language may hide in the share of all."""
    return [row for row in result.rows if is_unread(row, bound)]


def is_unread(row: ScoreRow, bound: float) -> bool:
    """Whether more than `bound` of a row's responses are `unparsed`."""
    return row.unparsed > bound * row.n


def cut_share(result: ScoreResult) -> float:
    """Share of the generated responses that were cut off at `max_new_tokens`, as a fraction."""
    cut = result.finish.get("length", 0) + result.finish.get(UNFINISHED_THOUGHTS, 0)
    made = result.finish.get("stop", 0) + cut
    return cut / made if made else 0.0


def hides_harm(result: ScoreResult) -> bool:
    """Whether `safe` was judged on responses of which over `CUT_BOUND` are cut off: the harm may lie behind the cut."""
    return "safe" in result.measured_by and cut_share(result) > CUT_BOUND


def write_responses(table: pa.Table, folder: Path) -> None:
    """Have the `responses.parquet` of a folder of this machine hold `table`."""
    partial = folder / f".{RESPONSES_FILE}.part"
    pq.write_table(table, partial)
    partial.replace(folder / RESPONSES_FILE)


def save_scores(result: ScoreResult) -> Place:
    """Write `result` as `scores.json` into its folder; returns the file."""
    path = Place(result.folder) / SCORES_FILE
    content = asdict(result)
    del content["folder"]  # a score may be moved; the reader knows where it found it
    path.write_json({"format": FORMAT, **content})
    return path


def load_scores(path: str | Path | Place) -> ScoreResult:
    """The result in a score folder, or in its `scores.json`.

    Raises:
        ScoresFileError: It is missing, damaged, or of another format.
    """
    file = Place(path)
    file = file / SCORES_FILE if file.is_dir() else file
    try:
        result = read_result(file, _SCORES, FORMAT)
    except ResultFileError as error:
        raise ScoresFileError(f"{error}; score again with `mlc-ray score`") from None
    return replace(result, folder=file.absolute().parent)


# --------------------------------------------------------------------------------------------- records and dataclasses


def records_of(table: pa.Table) -> list[Judged]:
    """The verdicts of a table with a response in each row, as responses.parquet has them.

    `response_language` may be missing: where no language was told, none is known.

    Raises:
        ScoresFileError: Another column is missing.
    """
    names = [f.name for f in fields(Judged) if f.name != LANGUAGE_COLUMN or f.name in table.column_names]
    if missing := [name for name in names if name not in table.column_names]:
        lacking = f"a table of responses lacks the column {', '.join(map(repr, missing))}"
        raise ScoresFileError(f"{lacking} (it has {', '.join(table.column_names)}); score again with this version")
    columns = [table[name].to_pylist() for name in names]
    return [Judged(*values) for values in zip(*columns, strict=True)]  # that field is the last one


def load_records(result: ScoreResult) -> list[Judged]:
    """The verdicts of a saved score, for `paired.compare`.

    Raises:
        ScoresFileError: There is no readable responses.parquet.
    """
    file = result.responses_file
    try:
        with file.open() as opened:
            return records_of(pq.read_table(opened))
    except FileNotFoundError:
        raise ScoresFileError(
            f"{str(file)!r} does not exist: scores are compared response by response, so keep it beside {SCORES_FILE}"
        ) from None
    except pa.ArrowInvalid as error:
        raise ScoresFileError(f"{str(file)!r} is damaged: not a Parquet file ({error})") from None


def load_in_language(result: ScoreResult) -> InLanguage:
    """How often a saved score's responses are in their prompt's language; empty where that was not measured.

    It is empty, too, where responses.parquet is gone.
    """
    there = result.told_by and result.responses_file.is_file()
    return in_language(load_records(result)) if there else InLanguage()
