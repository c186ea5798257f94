"""What a score folder that is there already means for a new score; nothing is answered here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_ray.config import ConfigError, ScoreConfig, parse_config
from mlc_ray.score.request import Request, ScoreError
from mlc_ray.score.run import judge_again, score
from mlc_ray.score.stages import RESPONSES
from tests.score.test_pipeline import config_for, write_bundles

ROW = {
    "benchmark": "own", "bundle_id": "a", "kind": "benign", "category": "", "language": "en", "prompt": "Why?",
    "response": "So.", "finish": "stop", "prompt_tokens": 9, "response_tokens": 2,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Enough of a model for what is checked before one is loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 512}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def unfinished(config: ScoreConfig, *, answered: bool) -> Path:
    """A score that ended before its answers were judged, or before there were any."""
    folder = Path(config.output_dir) / str(config.name)
    folder.mkdir(parents=True)
    Request(config, config.model, "0123456789abcdef", "prompts", ["en"]).save(folder)
    if answered:
        pq.write_table(pa.Table.from_pylist([ROW], schema=RESPONSES), folder / "responses.parquet")
    return folder


@pytest.mark.parametrize("answered", [True, False])
def test_an_unfinished_score_is_not_written_over(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    def no_cluster(*_: Any) -> None:
        raise AssertionError("a cluster was asked")

    monkeypatch.setattr("mlc_ray.score.run.connect", no_cluster)
    config = config_for(model, write_bundles(tmp_path / "own.jsonl"), tmp_path / "scores")
    folder = unfinished(config, answered=answered)
    before = (folder / "request.json").read_bytes()
    with pytest.raises(ScoreError, match=f"unfinished score.*mlc-ray score --resume {folder}` or by resume=auto"):
        score(config)
    assert (folder / "request.json").read_bytes() == before
    finished = unfinished(config.model_copy(update={"name": "other"}), answered=True)
    with pytest.raises(ScoreError, match="unfinished score"):
        judge_again(finished, out=folder)


def test_what_goes_on_has_a_name() -> None:
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "resume": "auto"}
    with pytest.raises(ConfigError, match="resume='auto' needs a name"):
        parse_config(ScoreConfig, raw)
    assert parse_config(ScoreConfig, {**raw, "name": "s"}).resume == "auto"
