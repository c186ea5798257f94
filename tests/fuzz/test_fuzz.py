"""Whatever is in a file or a reply that comes from outside, it is read, or refused by an error of ours.

`make test` draws 60 cases a test, the same every time; `make soak` 1,000, others every time (MLC_RAY_FUZZ).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from mlc_ray._registry import names, resolve
from mlc_ray.checkpoints import verify_weights
from mlc_ray.config import ScoreConfig, SearchConfig, TrainConfig, load_config
from mlc_ray.data.bundles import BundleFileError
from mlc_ray.data.sources import PARSED, Reading, SourceFile, parse
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.replies import EndpointError, ReplyCache
from mlc_ray.judges.endpoint import read_verdict
from mlc_ray.judges.guards.base import Guard
from mlc_ray.runs import (
    DAMAGED_FILE,
    MetricsFileError,
    checkpoint_folder,
    complete_checkpoints,
    read_metrics,
    resolve_model,
)
from mlc_ray.storage import MANIFEST, ArtifactError, Place, sealed
from mlc_ray.train.checkpoint import agree_on_checkpoint
from mlc_ray.train.engines.base import STATE_KINDS, StateShard
from mlc_ray.train.export import export
from mlc_ray.train.file_writer import write_file
from mlc_ray.train.shards import CheckpointError, ShardReader, index_of, read_index, state_files
from tests.checkpoints import complete
from tests.data.files import write_rows
from tests.train.tiny import random_rows

_ASKED = os.environ.get("MLC_RAY_FUZZ")
fuzz = settings(
    max_examples=int(_ASKED or 60),
    derandomize=_ASKED is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TEXT = st.text(max_size=30) | st.sampled_from(["auto", "last", "en", "mlc", "yes", "1e9", "{", "\ud800", "\x00", "-"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@st.composite
def changed(draw: DrawFn, whole: Any, others: SearchStrategy[Any] = VALUES) -> Any:
    """`whole`, JSON, with up to three of its parts put away, doubled under another name, or made something else."""
    whole = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        part = whole
        while part:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            key = draw(st.sampled_from(keys))
            if isinstance(part[key], dict | list) and part[key] and draw(st.integers(0, 3)):
                part = part[key]
                continue
            match draw(st.sampled_from(["put away", "another name", "something else"])):
                case "put away":
                    del part[key]
                case "another name" if isinstance(part, dict):
                    part[draw(TEXT)] = part[key]
                case _:
                    part[key] = draw(others)
            break
    return whole


def as_text(value: Any) -> bytes:
    """JSON with lone surrogates as escapes, as it comes from programs that do not look."""
    return json.dumps(value).encode()


# ------------------------------------------------------------------------------------------------------------ settings

RUN: dict[str, Any] = {
    "name": "run",
    "output_dir": "runs",
    "seed": 1,
    "model": {"path": "some/model", "dtype": "float32", "attention": "auto", "lora": {"rank": 4}},
    "data": {
        "train": [{"path": "bundles.jsonl", "kind": "harmful"}],
        "languages": ["en", "sw"],
        "validation": {"sources": [{"path": "held_out.jsonl"}], "every": 10},
    },
    "objective": {"loss": "dpo", "beta": 0.1},
    "mlc": {"layer": 0.5, "weight": 0.1, "every": 2},
    "terms": {"contrast": {"weight": 0.1}},
    "optimizer": {"learning_rate": 1e-6, "betas": [0.9, 0.999]},
    "train": {"epochs": 1, "batch_bundles": 8},
    "engine": {"stage": 3, "offload_optimizer": True, "extra": {"aio": {}}},
    "cluster": {"workers": 2, "accelerator": "cpu"},
    "checkpoint": {"every": 10, "keep": 2},
    "logging": {"wandb": "project"},
}
SCORE: dict[str, Any] = {
    "name": "score",
    "model": "some/model",
    "benchmarks": [{"path": "sample:test"}],
    "languages": ["en"],
    "judge": {"name": "endpoint", "endpoint": {"base_url": "http://localhost:1/v1", "model": "m"}},
    "engine": {"replicas": 2, "max_model_len": 512},
}
SEARCH: dict[str, Any] = {
    "name": "search",
    "train": "run.yaml",
    "space": {"mlc.layer": {"choice": [1, "last"]}, "mlc.weight": {"uniform": [0.01, 1]}},
    "sampler": "tpe",
    "trials": 4,
    "objective": {"name": "average"},
    "scoring": {"benchmarks": [{"path": "sample:select"}], "languages": ["en"]},
}


@pytest.mark.parametrize(
    ("schema", "whole"),
    [(TrainConfig, RUN), (ScoreConfig, SCORE), (SearchConfig, SEARCH)],
    ids=["run", "score", "search"],
)
def test_settings(schema: type[Any], whole: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(whole))
    load_config(schema, file)  # what is changed is right before

    @fuzz
    @given(changed(whole), st.lists(st.tuples(TEXT, TEXT).map("=".join), max_size=1))
    def read(settings: Any, overrides: list[str]) -> None:
        file.write_bytes(as_text(settings))  # JSON is YAML
        try:
            load_config(schema, file, overrides)
        except MlcRayError as error:
            assert str(error)

    read()


@fuzz
@given(st.binary(max_size=80) | st.text(alphabet="{}[]:-&*!|>'\"#%@`,? \n\tab01.", max_size=60).map(str.encode))
def test_a_settings_file_of_anything(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "anything.yaml"
    file.write_bytes(content)
    with pytest.raises(MlcRayError):
        load_config(TrainConfig, file)


# ------------------------------------------------------------------------------------------------------------- bundles

RECORDS: dict[str, dict[str, Any]] = {
    "mlc": {
        "id": "b1",
        "kind": "harmful",
        "prompts": {"en": "How do I?", "sw": "Je, ninafanyaje?"},
        "chosen": "No.",
        "rejected": "Yes.",
    },
    "preference": {"prompt": "How do I?", "chosen": "No.", "rejected": "Yes."},
    "sft": {"instruction": "How do I?", "input": "", "output": "So."},
    "aya": {"prompt": "How?", "language": "English", "harm_category": "['x']", "global_or_local": "global"},
    "multijail": {"id": 0, "source": "s", "tags": "t", "en": "How?", "sw": "Je?"},
    "rtp-lx": {"Prompt": "How?", "Index": 1, "Locale": "en-US"},
    "polyguard": {"prompt": "How?", "prompt_harm_label": "harmful", "language": "English", "id": "1"},
}


def parsed(file: Path, format: str, languages: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a file; where it is refused as a whole, one that says so."""
    try:
        tables = list(parse(Reading(SourceFile(str(file), format)), languages))
    except BundleFileError as error:
        return [{"fault": str(error)}]
    assert all(table.schema == PARSED for table in tables)
    rows: list[dict[str, Any]] = pa.concat_tables(tables).to_pylist() if tables else []
    return rows


@pytest.mark.parametrize("format", RECORDS)
def test_bundles(format: str, tmp_path: Path) -> None:
    """Every record is a bundle or a rejected row with its reason, or the file is refused as a whole."""
    file = tmp_path / "bundles.jsonl"

    @fuzz
    @given(st.lists(changed(RECORDS[format]) | VALUES, min_size=1, max_size=3), st.sampled_from(["auto", format]))
    def read(records: list[Any], as_format: str) -> None:
        file.write_bytes(b"\n".join([as_text(RECORDS[format]), *map(as_text, records)]) + b"\n")
        rows = parsed(file, as_format, ["en"])
        assert rows
        for row in rows:
            assert row.get("fault") or row["reason"] or row["bundle_id"]

    read()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_bundle_file_of_anything(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"bundles{suffix}"

    @fuzz
    @given(st.binary(max_size=120) | st.text(alphabet='{}[]",:\n\tpromts en01\\u', max_size=80).map(str.encode))
    def read(content: bytes) -> None:
        file.write_bytes(content)
        for row in parsed(file, "auto"):
            assert row.get("fault") or row["reason"] or row["bundle_id"]

    read()


# ------------------------------------------------------------------------------------------- manifests and metric files


def test_manifests_of_tokens(tmp_path: Path) -> None:
    write_rows(tmp_path, [rows_to_table(random_rows(3))], fingerprint="x", rejected={})
    manifest = json.loads((tmp_path / "manifest.json").read_text())

    @fuzz
    @given(changed(manifest) | changed(manifest).map(sealed) | VALUES)
    def read(content: Any) -> None:
        (tmp_path / "manifest.json").write_bytes(as_text(content))
        try:
            opened = TokenArtifact.open(tmp_path)
            assert [opened.languages, opened.counts, opened.rejected, opened.head, opened.fingerprint]
        except ArtifactError as error:
            assert str(tmp_path) in str(error)

    read()


@pytest.fixture
def checkpointed(tmp_path: Path) -> Place:
    """A run with checkpoints of two steps, whose state is of two parameters and whose model is a few bytes."""
    run = Place(tmp_path / "run")
    for step in (1, 2):
        folder = checkpoint_folder(run, step)
        shards = [
            StateShard(name, 0, 4, {kind: torch.arange(4.0) for kind in STATE_KINDS}) for name in ("weight", "bias")
        ]
        (file,) = state_files(0, shards)
        write_file(folder / "state" / file.name, file.parts)
        index = index_of([{name: [where] for name, where in file.ranges}], {"weight": 4, "bias": 4})
        (folder / "state" / "index.json").write_json(index)
        (folder / "model" / "config.json").write_text("{}")
        (folder / "model" / "model.safetensors").write_text("weights")
        told = {"fingerprints": {"model": "m"}, "versions": {"torch": "2"}, "validation_before": {"loss": 0.7}}
        complete(folder, step, config={**RUN, "model": {"path": "some/model"}}, **told)
    return run


def test_manifests_of_checkpoints(checkpointed: Place, tmp_path: Path) -> None:
    """One that is changed is passed over for the one before it, or is a whole one."""
    manifest, damaged = (checkpoint_folder(checkpointed, 2) / name for name in (MANIFEST, DAMAGED_FILE))
    whole = manifest.read_json()
    export(Path(checkpointed), tmp_path / "out")

    @fuzz
    @given(changed(whole) | changed(whole).map(sealed) | VALUES)
    def read(content: Any) -> None:
        manifest.write_bytes(as_text(content))
        assert complete_checkpoints(checkpointed)[0]
        for use in (
            lambda: export(Path(checkpointed), tmp_path / "out"),
            lambda: export(Path(manifest.parent), tmp_path / "out"),
            lambda: verify_weights(resolve_model(checkpointed)),
        ):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            try:
                use()
            except MlcRayError as error:
                assert str(error)
        taken = agree_on_checkpoint(checkpointed)
        assert taken in (manifest.parent, checkpoint_folder(checkpointed, 1))
        assert damaged.is_file() == (taken != manifest.parent)
        damaged.remove()

    read()


def test_indexes_of_checkpoints(checkpointed: Place) -> None:
    folder = checkpoint_folder(checkpointed, 2) / "state"
    whole = (folder / "index.json").read_json()

    @fuzz
    @given(changed(whole) | VALUES)
    def read(content: Any) -> None:
        (folder / "index.json").write_bytes(as_text(content))
        try:
            index = read_index(folder / "index.json")
            with ShardReader(folder, index) as reader:
                for name, entry in index.items():
                    values = reader(name, 0, entry["elements"])
                    assert all(len(each) == entry["elements"] for each in values.values())
                reader.check({"weight": 4, "bias": 4})
        except CheckpointError as error:
            assert str(folder) in str(error)

    read()


@fuzz
@given(st.lists(changed({"step": 1, "loss/total": 0.7, "warnings": ["w"]}) | VALUES, max_size=3), st.booleans())
def test_metrics(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], cut: bool) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = b"".join(as_text(row) + b"\n" for row in rows)
    (folder / "metrics.jsonl").write_bytes(content[: len(content) // 2] if cut else content)
    try:
        assert all(isinstance(row["step"], int) for row in read_metrics(folder))
    except MetricsFileError as error:
        assert "line" in str(error)


# ------------------------------------------------------------------------------------------------------------- replies

VERDICT = {"check": "12345678", "response": "refuses", "verdict": "safe"}


@fuzz
@given(changed(VERDICT).map(json.dumps) | VALUES.map(json.dumps) | st.text(max_size=80))
def test_replies_of_an_endpoint(reply: str) -> None:
    verdict = read_verdict(reply, "12345678", "safety")
    assert verdict.behaviour == "unparsed" or json.loads(reply)["check"] == "12345678"


GUARDS = sorted(
    name for name in names("judge") if isinstance(found := resolve("judge", name), type) and issubclass(found, Guard)
)
WORDS = ["Safety: Safe", "unsafe", "Categories: None", "Refusal: Yes", "no", "S1", "harmful", "label", ",", "\n"]


@pytest.mark.parametrize("name", GUARDS)
def test_replies_of_guards(name: str) -> None:
    guard_class = resolve("judge", name)
    guard = guard_class(guard_class.Settings(name=name, model="/none"))

    @fuzz
    @given(st.lists(st.sampled_from(WORDS) | TEXT, max_size=8).map(" ".join), st.sampled_from(["stop", "length"]))
    def read(reply: str, finish: str) -> None:
        verdict = guard.parse(reply, finish)
        assert verdict.reason or verdict.safety in ("safe", "unsafe")

    read()


@fuzz
@given(st.binary(max_size=120))
def test_cached_replies(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "replies"
    cache = ReplyCache(folder)
    published = Place(folder / "replies.parquet")
    published.write_bytes(content)
    with pytest.raises(EndpointError, match="cannot be read"):
        cache.restore(published)
    cache.close()
    cache.file.write_bytes(content)
    try:
        read = ReplyCache(folder).read("abcd")
    except EndpointError as error:
        assert str(cache.file) in str(error)
    else:
        assert read is None
    shutil.rmtree(folder)
