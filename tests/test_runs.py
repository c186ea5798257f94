from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.checkpoints import verify_weights
from mlc_ray.config import ChatSection
from mlc_ray.runs import (
    MetricsFileError,
    MetricsReader,
    ModelPathError,
    complete_checkpoints,
    longest_context,
    read_metrics,
    resolve_model,
    training_chat,
    training_languages,
)
from mlc_ray.storage import IncompleteArtifactError, Place, sealed
from tests.checkpoints import complete, manifest_of


def model_at(folder: Path, *, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 512}', encoding="utf-8")
    (folder / weights).write_bytes(b"weights")
    return folder


def checkpoint_at(run: Path, step: int) -> Path:
    folder = run / "train" / f"checkpoint_{step:06d}"
    model_at(folder / "model")
    complete(folder, step)
    return folder


def test_a_hugging_face_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = model_at(tmp_path / "m")
    assert resolve_model(folder) == str(folder)
    assert longest_context(str(folder)) == 512


def test_a_checkpoint_holds_its_model(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path, 3)
    assert resolve_model(folder) == str(folder / "model")


def test_a_run_gives_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    checkpoint_at(tmp_path, 2)
    good = checkpoint_at(tmp_path, 10)
    cut = checkpoint_at(tmp_path, 12)
    (cut / "model" / "model.safetensors").write_bytes(b"weig")
    (tmp_path / "train" / "checkpoint_000014" / "model").mkdir(parents=True)  # no manifest: died while it was written
    model_at(tmp_path / "export")
    assert resolve_model(tmp_path) == str(good / "model")


def test_a_run_without_a_complete_checkpoint_gives_its_export(tmp_path: Path) -> None:
    (tmp_path / "train" / "checkpoint_000001").mkdir(parents=True)
    export = model_at(tmp_path / "export")
    assert resolve_model(tmp_path) == str(export)


def test_a_checkpoint_that_was_set_aside_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path, 3)
    (folder / "damaged.txt").write_text("a flipped bit")
    with pytest.raises(ModelPathError, match=r"checkpoint_000003' was found damaged: damaged\.txt in it says where"):
        resolve_model(folder)


def test_a_checkpoint_that_is_still_being_written_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path, 3)
    (folder / "manifest.json").unlink()
    with pytest.raises(ModelPathError, match=r"checkpoint_000003' is not a complete artefact: manifest\.json is"):
        resolve_model(folder)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path, 3)
    (folder / "model" / "model.safetensors").write_bytes(b"weig")
    with pytest.raises(ModelPathError, match=r"model\.safetensors.*short"):
        resolve_model(folder)
    with pytest.raises(ModelPathError, match=r"holds no model.*model\.safetensors.*short"):
        resolve_model(tmp_path)


def test_weights_of_a_checkpoint_are_what_was_written_or_refused_before_they_are_used(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path, 3)
    verify_weights(resolve_model(tmp_path))
    (folder / "model" / "model.safetensors").write_bytes(b"weightr")
    fault = r"not used: .*checkpoint_000003' is damaged: 'model/model\.safetensors' has checksum .*train --resume"
    for path in (tmp_path, folder, folder / "model"):
        with pytest.raises(IncompleteArtifactError, match=rf"{fault} {tmp_path}"):
            verify_weights(resolve_model(path))
    (folder / "manifest.json").unlink()
    with pytest.raises(IncompleteArtifactError, match=r"manifest\.json is missing"):
        verify_weights(resolve_model(folder / "model"))


def test_weights_that_are_in_no_checkpoint_have_no_checksums(tmp_path: Path) -> None:
    for name in ("gpt2", "someone/model", str(model_at(tmp_path / "own" / "model"))):
        verify_weights(name)
    (tmp_path / "own" / "manifest.json").write_text('{"files": {}}', encoding="utf-8")  # of something else
    verify_weights(str(tmp_path / "own" / "model"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"step": None}, "step is None: input should be a valid integer"),
        ({"step": "x"}, "step is 'x': input should be a valid integer"),
        ({"step": 1.0}, "step is 1.0: input should be a valid integer"),
        ({"checksums": []}, r"checksums is \[\]: input should be an object"),
        ({"files": {"../x": -1}}, r"files\.\.\./x is -1: "),
        ({"more": 1}, "more is unknown"),
    ],
    ids=str,
)
def test_a_manifest_that_is_none_of_a_checkpoint_is_damage(tmp_path: Path, changed: Any, said: str) -> None:
    checkpoint_at(tmp_path, 2)
    folder = checkpoint_at(tmp_path, 3)
    (folder / "manifest.json").write_text(json.dumps(sealed({**manifest_of(folder, 3), **changed})), encoding="utf-8")
    complete_ones, faults = complete_checkpoints(Place(tmp_path))
    assert [each.step for each in complete_ones] == [2]
    assert re.search(rf"checkpoint_000003/manifest\.json' is damaged: {said}", faults[0])
    assert resolve_model(tmp_path).endswith("checkpoint_000002/model")
    with pytest.raises(ModelPathError, match=said):
        resolve_model(folder)


def test_a_manifest_without_a_checksum_of_its_own_is_damage(tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path, 3)
    manifest = manifest_of(folder, 3)
    del manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ModelPathError, match=r"manifest\.json' is damaged: it has no checksum"):
        resolve_model(folder)


def test_an_adapter_alone_cannot_be_scored(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    complete(tmp_path, 1)
    with pytest.raises(ModelPathError, match=r"LoRA adapter.*--merge-lora"):
        resolve_model(tmp_path)


def test_weights_must_be_safetensors_and_all_there(tmp_path: Path) -> None:
    pickled = model_at(tmp_path / "pickled", weights="pytorch_model.bin")
    with pytest.raises(ModelPathError, match=r"no \*\.safetensors.*pytorch_model\.bin"):
        resolve_model(pickled)
    sharded = model_at(tmp_path / "sharded", weights="model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelPathError, match=r"model-00002-of-00002\.safetensors"):
        resolve_model(sharded)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-7B-Instruct"])
def test_a_hub_name_passes(name: str) -> None:
    assert resolve_model(name) == name
    assert longest_context(name) is None


def test_other_paths_are_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(ModelPathError, match="does not exist"):
            resolve_model(path)
    file = tmp_path / "file.txt"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(ModelPathError, match="is a file"):
        resolve_model(file)
    with pytest.raises(ModelPathError, match="holds no model"):
        resolve_model(tmp_path)


def test_the_conversation_of_training_is_read_from_a_run_its_checkpoint_and_an_export(tmp_path: Path) -> None:
    checkpoint = checkpoint_at(tmp_path / "run", 3)
    chat = ChatSection(system="Be kind.", arguments={"thinking": False})
    (tmp_path / "run" / "run.json").write_text(json.dumps({"chat": chat.model_dump()}), encoding="utf-8")
    export = model_at(tmp_path / "export")
    assert training_chat(export) is None
    (export / "mlc_ray.json").write_text('{"chat": {"date": "2031-02-03"}}', encoding="utf-8")
    assert training_chat(tmp_path / "run") == training_chat(checkpoint) == chat
    assert training_chat(export) == ChatSection(date="2031-02-03")
    other = model_at(tmp_path / "run" / "notes" / "export")
    assert training_chat(other) is None  # two folders below the run, but no checkpoint of it
    (export / "mlc_ray.json").write_text('{"chat": {"date": "today"}}', encoding="utf-8")
    with pytest.raises(ModelPathError, match=r"mlc_ray\.json' is damaged: chat: (?s:.*)date='today' is no day"):
        training_chat(export)


def test_training_languages_are_read_from_a_run_its_checkpoint_and_an_export(tmp_path: Path) -> None:
    checkpoint = checkpoint_at(tmp_path / "run", 3)
    (tmp_path / "run" / "run.json").write_text('{"languages": ["en", "sw"]}', encoding="utf-8")
    export = model_at(tmp_path / "export")
    assert training_languages(export) is None
    (export / "mlc_ray.json").write_text('{"languages": ["ur"]}', encoding="utf-8")
    assert training_languages(tmp_path / "run") == training_languages(checkpoint) == ["en", "sw"]
    assert training_languages(export) == ["ur"]


@pytest.mark.parametrize("name", ["mlc_ray.json", "run.json"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"languages": ["en"', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "expected an object, found list"),
        (b'{"languages": "en"}', "languages is 'en', expected a list"),
    ],
)
def test_a_damaged_record_of_training_is_named(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelPathError, match=rf"{name}' is damaged: {fault}.*--set seen_languages="):
        training_languages(tmp_path)


def test_damaged_files_of_a_model_are_named(tmp_path: Path) -> None:
    folder = model_at(tmp_path / "m")
    (folder / "config.json").write_text('{"max_position', encoding="utf-8")
    with pytest.raises(ModelPathError, match=r"config\.json' is damaged: not valid JSON.*export the model again"):
        longest_context(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelPathError, match=r"index\.json' is damaged: it has no weight_map"):
        resolve_model(folder)


def test_metrics_leave_out_a_line_being_written_and_name_a_damaged_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path) == []
    file.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": null}\n{"step": 3, "a"')
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": None}]
    reader = MetricsReader(tmp_path)
    reader.read()
    file.write_text(file.read_text() + ": 1}\nnonsense\n")
    with pytest.raises(MetricsFileError, match=r"metrics\.jsonl', line 4 is damaged: not valid JSON"):
        reader.read()
    file.write_text('{"loss": 1}\n')
    with pytest.raises(MetricsFileError, match=r"line 1 is damaged: no optimizer step in \{'loss': 1\}"):
        read_metrics(tmp_path)
    file.write_bytes(b"\xff\n")
    with pytest.raises(MetricsFileError, match="line 1 is damaged: not valid JSON"):
        read_metrics(tmp_path)
