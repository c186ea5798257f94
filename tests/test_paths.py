"""URLs are no folders: `ftp://...` in a setting or on the command line is refused, and so is a lost `output_dir`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.cli import main
from mlc_ray.config import ConfigError, ScoreConfig, SearchConfig, TrainConfig, UtilityConfig, parse_config
from mlc_ray.config.paths import config_path, real_path, scheme_of, source_path
from mlc_ray.report.write import write_report
from mlc_ray.runs import ModelPathError, OutputFolderError, output_folder, output_place, resolve_model
from mlc_ray.score.run import score
from mlc_ray.storage import CacheError, user_cache
from mlc_ray.train.export import export
from mlc_ray.train.run import train

URL = "ftp://bucket/runs"
TRAIN = {"name": "r", "model": {"path": "m"}, "data": {"train": [{"path": "d.jsonl"}]}}
SCORE = {"model": "m", "benchmarks": [{"path": "b.csv"}]}
SEARCH = {
    "name": "s", "train": "t.yaml", "trials": 1, "space": {"mlc.layer": {"choice": [1]}},
    "scoring": {"benchmarks": [{"path": "b.csv"}]},
}  # fmt: skip
ENDPOINT = {"base_url": "https://api.openai.com/v1", "model": "m"}


@pytest.mark.parametrize(
    ("schema", "raw", "field"),
    [
        (TrainConfig, {**TRAIN, "output_dir": URL}, "output_dir"),
        (TrainConfig, {**TRAIN, "model": {"path": URL}}, "model.path"),
        (TrainConfig, {**TRAIN, "data": {"train": [{"path": URL}]}}, "data.train.0.path"),
        (ScoreConfig, {**SCORE, "output_dir": URL}, "output_dir"),
        (ScoreConfig, {**SCORE, "model": URL}, "model"),
        (ScoreConfig, {**SCORE, "benchmarks": [{"path": URL}]}, "benchmarks.0.path"),
        (ScoreConfig, {**SCORE, "judge": {"name": "qwen3guard", "model": URL}}, "judge.model"),
        (ScoreConfig, {**SCORE, "judge": {"translate": {"model": URL}}}, "judge.translate.model"),
        (
            ScoreConfig,
            {**SCORE, "judge": {"name": "endpoint", "endpoint": {**ENDPOINT, "cache_dir": URL}}},
            "judge.endpoint.cache_dir",
        ),
        (SearchConfig, {**SEARCH, "output_dir": URL}, "output_dir"),
        (SearchConfig, {**SEARCH, "train": URL}, "train"),
        (UtilityConfig, {"model": "m", "tasks": ["mmlu"], "output_dir": URL}, "output_dir"),
        (UtilityConfig, {"model": "m", "tasks": ["mmlu"], "scores": URL}, "scores"),
        (UtilityConfig, {"model": "m", "tasks": ["mmlu"], "include_path": URL}, "include_path"),
    ],
)
def test_a_url_in_a_setting_is_refused(schema: type[Any], raw: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}='ftp://bucket/runs': ftp:// .*all nodes share"):
        parse_config(schema, raw)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--resume", URL],
        ["train", "--config", URL],
        ["export", URL, "out"],
        ["export", "run", URL],
        ["report", URL],
        ["report", "runs", "--out", URL],
        ["report", "runs", "--paper", URL],
        ["judge", URL],
        ["score", "m", "--benchmark", "sample:test", "--out", URL],
        ["show", URL],
        ["search", "--resume", URL],
        ["probe", "m", "--bundles", "sample:train", "--out", URL],
    ],
    ids=" ".join,
)
def test_a_url_on_the_command_line_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"{URL!r}: ftp://" in said
    assert "all nodes share" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", URL, "--benchmark", "sample:test"],
        ["score", "m", "--benchmark", f"{URL},kind=benign"],
        ["utility", "m", "--tasks", "mmlu", "--scores", URL],
        ["probe", URL, "--bundles", "sample:train"],
        ["probe", "m", "--bundles", URL],
    ],
    ids=" ".join,
)
def test_a_url_that_is_a_setting_is_refused_on_the_command_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"{URL!r}: ftp://" in said


@pytest.mark.parametrize(
    "path",
    ["runs", "/abs/runs", "~/runs", "owner/name", "owner/name@config:split", "csv,kind=benign", "a: b", "./s3:b"],
)
def test_paths_and_hub_names_are_no_urls(path: str) -> None:
    assert scheme_of(path) is None
    assert real_path(path) == path
    assert source_path(path) == path
    assert config_path(path) == path


@pytest.mark.parametrize(
    ("accepts", "path"),
    [
        (source_path, "sample:train"),
        (source_path, "name:split"),
        (source_path, "name@config:split"),
        (config_path, "recipe:score/quickstart"),
    ],
)
def test_samples_splits_and_recipes_are_taken_where_they_are_meant_alone(
    accepts: Callable[[str], str], path: str
) -> None:
    assert scheme_of(path) is None
    assert accepts(path) == path
    if ":" in path.partition("@")[0]:
        with pytest.raises(ValueError, match=r"begins with \w+: as a URL does"):
            real_path(path)
    if accepts is source_path and path != "sample:train":
        parse_config(TrainConfig, {**TRAIN, "data": {"train": [{"path": path}]}})


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        (" ftp://bucket/runs", "begins or ends with white space"),
        ("runs ", "begins or ends with white space"),
        ("s3:bucket/runs", "begins with s3: as a URL does.*all nodes share"),
        ("sample:train", "begins with sample: as a URL does"),
    ],
)
def test_what_is_nearly_a_url_is_refused(path: str, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    for schema, raw in ((TrainConfig, TRAIN), (ScoreConfig, SCORE), (SearchConfig, SEARCH)):
        with pytest.raises(ConfigError, match=f"output_dir={path!r}: .*{fault}"):
            parse_config(schema, {**raw, "output_dir": path})
    with pytest.raises(OutputFolderError, match=f"output_dir={path!r}: .*{fault}"):
        output_folder(path)
    for arguments in (["export", "run", path], ["report", "runs", "--out", path], ["judge", "a", "--out", path]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert re.search(f"{path!r}: .*{fault}", capsys.readouterr().err)


@pytest.mark.parametrize("url", ["s3:/bucket/runs", "s3:///bucket/runs"])
def test_a_store_has_two_slashes(url: str) -> None:
    with pytest.raises(ConfigError, match=f"output_dir={url!r}: write s3://bucket/runs, with two slashes"):
        parse_config(TrainConfig, {**TRAIN, "output_dir": url})
    with pytest.raises(OutputFolderError, match="write s3://bucket/runs, with two slashes"):
        output_place(url)


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("s3:/bucket", "all nodes share"),  # what pathlib makes of it
        ("gs://b", "all nodes share"),
        ("file:///tmp/x", "without file://"),
        ("hf://owner/name", "owner/name"),
        ("https://huggingface.co/owner/name", "hub alone"),
    ],
)
def test_each_url_is_told_what_to_use(url: str, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        real_path(url)


def test_functions_refuse_urls_as_settings_do() -> None:
    with pytest.raises(OutputFolderError, match=r"output_dir='ftp:/bucket'.*all nodes share"):
        output_folder(Path("ftp://bucket"))
    with pytest.raises(ModelPathError, match=r"model='ftp://bucket/runs': ftp://.*all nodes share"):
        resolve_model(URL)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: export("run", URL), "out"),
        (lambda: write_report(["run"], out=f"{URL}.html"), "out"),
        (lambda: write_report(["run"], paper=URL), "paper"),
        (user_cache, "MLC_RAY_CACHE"),
    ],
    ids=["export", "report", "paper", "cache"],
)
def test_functions_that_write_refuse_urls(
    call: Callable[[], Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLC_RAY_CACHE", URL)
    with pytest.raises(
        (OutputFolderError, CacheError), match=rf"{name}='ftp://bucket/runs.*': ftp:// .*all nodes share"
    ):
        call()
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_is_refused_inside_a_ray_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_llama: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_folder("runs") == tmp_path / "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert output_folder(tmp_path / "runs") == tmp_path / "runs"
    assert output_folder("~/runs") == Path.home() / "runs"
    refused = r"output_dir='runs.*' is relative, but this is a Ray job.*/shared/runs"
    with pytest.raises(OutputFolderError, match=refused):
        output_folder("runs")
    with pytest.raises(OutputFolderError, match=refused):
        train(parse_config(TrainConfig, {**TRAIN, "model": {"path": str(small_llama)}}))
    with pytest.raises(OutputFolderError, match=refused):
        score(parse_config(ScoreConfig, {**SCORE, "model": str(small_llama), "engine": {"max_model_len": 512}}))
    assert list(tmp_path.iterdir()) == []
