"""What a score leaves behind: `ScoreResult`, and the `scores.json` that it is written to and read from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mlc_ray.artifacts import write_json_atomic
from mlc_ray.errors import MlcRayError
from mlc_ray.score.metrics import KindSummary, Summary
from mlc_ray.types import ScoreRow

SCORES_FILE = "scores.json"
RESPONSES_FILE = "responses.parquet"
HEATMAP_FILE = "heatmap.png"
FORMAT = 1


class ScoresFileError(MlcRayError):
    """A scores.json is missing, damaged, or of another format; the message names the path."""


@dataclass(frozen=True)
class ScoreResult:
    """One model's score.

    `model` is what was asked for, `resolved` the folder or hub name that was loaded, `fingerprint` names its content;
    `prompts` names the set of prompts: two scores with the same `prompts`, `judge` and length of answers can be
    compared. `rows` are of every benchmark and, if there are several, of all of them as one (benchmark `all`).
    `finish` counts responses by why they ended.
    """

    name: str
    model: str
    resolved: str
    fingerprint: str
    prompts: str
    judge: str
    rows: tuple[ScoreRow, ...]
    summaries: tuple[Summary, ...]
    responses: int
    unparsed: int
    finish: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    folder: Path = Path()

    @property
    def unparsed_share(self) -> float:
        """Share of responses without a verdict, as a fraction."""
        return self.unparsed / self.responses

    @property
    def heatmap(self) -> Path:
        """The heat map's file."""
        return self.folder / HEATMAP_FILE

    @property
    def responses_file(self) -> Path:
        """The Parquet file with every prompt, response and verdict."""
        return self.folder / RESPONSES_FILE

    def summary(self, benchmark: str | None = None) -> Summary:
        """The summary of a benchmark; without a name the last, which is over everything. Raises `KeyError`."""
        if benchmark is None:
            return self.summaries[-1]
        for summary in self.summaries:
            if summary.benchmark == benchmark:
                return summary
        raise KeyError(f"{benchmark!r} was not scored; there are {[s.benchmark for s in self.summaries]}")


def save_scores(result: ScoreResult) -> Path:
    """Write `result` as `scores.json` into its folder; returns the file."""
    path = result.folder / SCORES_FILE
    content = asdict(result)
    del content["folder"]  # a score may be moved; the reader knows where it found it
    write_json_atomic(path, {"format": FORMAT, **content})
    return path


def load_scores(path: str | Path) -> ScoreResult:
    """The result in a score folder, or in its `scores.json`. Raises `ScoresFileError`."""
    file = Path(path)
    file = file / SCORES_FILE if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScoresFileError(f"{str(file)!r} does not exist; give a folder that `mlc-ray score` wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ScoresFileError(f"{str(file)!r} is damaged: not valid JSON ({error})") from None
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise ScoresFileError(f"{str(file)!r} has format {found!r}, expected {FORMAT}; score again with this version")
    try:
        rows = tuple(ScoreRow(**row) for row in content.pop("rows"))
        summaries = tuple(_summary(item) for item in content.pop("summaries"))
        result = ScoreResult(rows=rows, summaries=summaries, **content)
    except (KeyError, TypeError) as error:
        raise ScoresFileError(f"{str(file)!r} is damaged: {error}") from None
    return replace(result, folder=file.resolve().parent)


def _summary(item: dict[str, Any]) -> Summary:
    sides = {kind: KindSummary(**item[kind]) if item[kind] else None for kind in ("harmful", "benign")}
    return Summary(**{**item, **sides, "not_scored": tuple(item["not_scored"])})
