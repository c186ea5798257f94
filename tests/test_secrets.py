"""Credentials stay out of settings, messages and logs: each is planted, and looked for."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.config import ConfigError, ScoreConfig, SearchConfig, StudyConfig, TrainConfig, parse_config
from mlc_ray.config.base import apply_override
from mlc_ray.errors import MlcRayError
from mlc_ray.runs import OutputFolderError, output_place
from mlc_ray.search.space import make_space
from mlc_ray.secrets import credential_in, hide, is_secret_name, secret_fields
from mlc_ray.storage import Place, StorageFaultError

PLANTED = "pLaNtEd-0123456789"
URIS = (
    f"s3://AKIAEXAMPLE:{PLANTED}@bucket/runs",
    f"https://user:{PLANTED}@host.example/runs",
    f"s3://bucket/runs?X-Amz-Credential=AKIA&X-Amz-Signature={PLANTED}",
    f"https://host.example/runs?sig={PLANTED}",
    f"gs://{PLANTED}@bucket/runs",
    f"s3://AKIAEXAMPLE:a/{PLANTED}/b@bucket/runs",
)
TRAIN: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": [{"path": "d.jsonl"}]}}
SCORE: dict[str, Any] = {"model": "m", "judge": {"name": "refusal"}, "benchmarks": [{"path": "b.jsonl"}]}
ENDPOINT: dict[str, Any] = {"name": "endpoint", "endpoint": {"base_url": "https://host/v1", "model": "m"}}


def refusal(schema: Any, raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(schema, raw)
    return str(caught.value)


@pytest.mark.parametrize("uri", URIS)
def test_a_path_with_a_credential_is_refused_and_not_repeated(uri: str) -> None:
    at = [
        (TrainConfig, {**TRAIN, "output_dir": uri}),
        (TrainConfig, {**TRAIN, "model": {"path": uri}}),
        (TrainConfig, {**TRAIN, "data": {"train": [{"path": uri}]}}),
        (TrainConfig, {**TRAIN, "logging": {"mlflow": uri}}),
        (ScoreConfig, {**SCORE, "model": uri}),
        (ScoreConfig, {**SCORE, "output_dir": uri}),
        (SearchConfig, {"name": "a", "train": "base.yaml", "scoring": {}, "space": {}, "output_dir": uri}),
        (StudyConfig, {"name": "a", "output_dir": uri}),
    ]
    for schema, raw in at:
        said = refusal(schema, raw)
        assert PLANTED not in said, said
        assert "user name or password" in said or "in its query" in said, said
        assert "environment" in said or "MLFLOW" in said, said
    with pytest.raises(OutputFolderError) as caught:
        output_place(uri)
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "changes"),
    [
        (ScoreConfig, {"judge": {**ENDPOINT, "endpoint": {**ENDPOINT["endpoint"], "api_key": PLANTED}}}),
        (ScoreConfig, {"judge": {**ENDPOINT, "endpoint": {**ENDPOINT["endpoint"], "api_key_env": PLANTED}}}),
        (
            ScoreConfig,
            {"judge": {**ENDPOINT, "endpoint": {**ENDPOINT["endpoint"], "request": {
                "extra_headers": {"Authorization": f"Bearer {PLANTED}"}}}}},
        ),
        (ScoreConfig, {"engine": {"options": {"hf_token": PLANTED}}}),
        (TrainConfig, {"engine": {"extra": {"comet": {"api_key": PLANTED}}}}),
        (TrainConfig, {"engine": {"extra": {"flops_profiler": {"token": PLANTED}}}}),
        (TrainConfig, {"hf_token": PLANTED}),
        (TrainConfig, {"logging": {"wandb_api_key": PLANTED}}),
    ],
)  # fmt: skip
def test_a_key_in_the_settings_is_refused_and_not_repeated(schema: Any, changes: dict[str, Any]) -> None:
    said = refusal(schema, {**(TRAIN if schema is TrainConfig else SCORE), **changes})
    assert PLANTED not in said, said


def test_an_override_with_a_key_is_not_repeated() -> None:
    for override in (f"model.api_key={{{PLANTED}", f"model.path=s3://a:{PLANTED}@b/[", f"name.hf_token={PLANTED}"):
        with pytest.raises(ConfigError) as caught:
            raw = {**TRAIN, "model": dict(TRAIN["model"])}
            apply_override(raw, override)
            parse_config(TrainConfig, raw)
        assert PLANTED not in str(caught.value)


def test_a_search_neither_keeps_nor_repeats_them(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TRAIN))
    search = {
        "name": "a", "train": str(tmp_path / "base.yaml"), "output_dir": str(tmp_path), "trials": 1,
        "space": {"mlc.weight": {"choice": [0.1]}}, "scoring": {"benchmarks": [{"path": "sample:select"}]},
    }  # fmt: skip
    for changes in (
        {"set": [f"model.path=s3://a:{PLANTED}@bucket/m"]},
        {"set": [f"engine.extra.comet.api_key={PLANTED}"]},
        {"set": [f"logging.mlflow=https://host/?token={PLANTED}"]},
        {"space": {"engine.extra.comet.api_key": {"choice": [PLANTED]}}},
        {"space": {"data.train.0.path": {"choice": [f"s3://a:{PLANTED}@bucket/d.jsonl"]}}},
    ):
        with pytest.raises(ConfigError) as caught:
            make_space(parse_config(SearchConfig, {**search, **changes}))
        assert PLANTED not in str(caught.value)


def test_names_of_secrets_are_told_from_others() -> None:
    for name in ("api_key", "HF_TOKEN", "X-Api-Key", "Authorization", "password", "aws_secret_access_key", "a_token"):
        assert is_secret_name(name), name
    for name in ("max_tokens", "eos_token", "token_limit", "tokenizer", "key", "api_key_env", "secretary", "monkey"):
        assert not is_secret_name(name), name
    assert list(secret_fields({"a": [{"api_key": "x"}, {"api_key": None}], "token": True, "b": {"Cookie": "y"}})) == [
        "a.0.api_key", "b.Cookie",
    ]  # fmt: skip


def test_only_a_credential_is_one() -> None:
    for uri in URIS:
        assert credential_in(uri), uri
        assert PLANTED not in hide(f"before {uri} after"), uri
        assert hide(f"before {uri} after").startswith("before ") and hide(f"before '{uri}' after").endswith("' after")
    for path in (
        "s3://bucket/a@b/c",
        "/data/me@home/x",
        "owner/name@en:train#main",
        "https://h/v1?page=2",
        "a?b=c",
        "http://host:8080/a@b",
        "x" * 400_000,
    ):  # of one long word, in no more than a moment
        assert credential_in(path) is None
        assert hide(path) == path


def test_what_is_assigned_to_a_name_of_a_secret_is_hidden_and_prose_about_it_is_not() -> None:
    for text in (f"api_key={PLANTED}", f"'api_key': '{PLANTED}'", f'"hf_token": "{PLANTED}"', f"password: {PLANTED}"):
        assert PLANTED not in hide(text), text
    for text in (
        "api_key_env='OPENAI_API_KEY': the endpoint answers 401", "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
        "eos_token='<|endoftext|>'", "max_tokens=1000000000",
    ):  # fmt: skip
        assert hide(text) == text


def test_messages_are_without_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    monkeypatch.setenv("MY_PASSWORD", "short")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/.ray/auth_token")
    error = StorageFaultError(f"the hub answered: {PLANTED} is short of rights; /home/me/.ray/auth_token is fine")
    assert str(error) == "the hub answered: ... is short of rights; /home/me/.ray/auth_token is fine"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert isinstance(error, OSError) and isinstance(error, MlcRayError)


def test_what_is_logged_is_without_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mlc_ray.logs import command_line

    monkeypatch.setenv("WANDB_API_KEY", PLANTED)
    with command_line():
        logging.getLogger("mlc_ray").warning("%s, and Authorization: Bearer abcdefgh", PLANTED)
    # Standard error is a file of pytest's here, which has what the terminal would show.
    said = capsys.readouterr().err
    assert PLANTED not in said and "abcdefgh" not in said


def test_a_place_of_a_store_does_not_repeat_them() -> None:
    for uri in URIS[0], URIS[2]:
        with pytest.raises(MlcRayError) as caught:
            Place(uri).exists()
        assert PLANTED not in str(caught.value)
