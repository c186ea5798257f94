"""A run's name and its paths: what is settled before anything is trained, without Ray."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
from ray.train.torch import TorchTrainer

from mlc_ray.train import run
from mlc_ray.train.run import (
    PreparedData,
    RunError,
    _claimed,
    _run_folder,
    _what_must_not_change,
    _with_absolute_paths,
    load_run_config,
    train,
)
from tests.train.tiny import tiny_config


def test_a_name_is_taken_before_data_are_prepared(tmp_path):
    config = tiny_config(output_dir=str(tmp_path))
    folder, is_new = _run_folder(config, None)
    assert is_new
    with _claimed(folder, config):
        assert load_run_config(folder) == config
        with pytest.raises(RunError, match=r"exists already: choose another name.*--resume"):
            _run_folder(config, None)
        # another run that looked before this one took the name
        with pytest.raises(RunError, match=r"exists already"), _claimed(folder, config):
            raise AssertionError("claimed twice")
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert load_run_config(folder) == config
    assert _run_folder(config, folder) == (folder, False)  # --resume takes it, with or without a checkpoint


def test_a_name_is_free_again_when_preparing_fails(tmp_path):
    config = tiny_config(output_dir=str(tmp_path))
    folder, is_new = _run_folder(config, None)
    assert is_new
    with pytest.raises(ValueError, match="bad row"), _claimed(folder, config):
        raise ValueError("bad row")
    assert not folder.exists()
    with _claimed(_run_folder(config, None)[0], config):
        pass


def test_local_paths_are_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").write_text("")
    sources = [{"path": "a.jsonl", "kind": "benign"}, {"path": "sample:train"}, {"path": "someone/bundles"}]
    config = _with_absolute_paths(tiny_config(model={"path": "model"}, data={"train": sources}))
    assert config.model.path == str(tmp_path / "model")
    assert [source.path for source in config.data.train] == [
        str(tmp_path / "a.jsonl"), "sample:train", "someone/bundles",
    ]  # fmt: skip
    assert config.data.train[0].kind == "benign"
    assert _with_absolute_paths(tiny_config(model={"path": "not/here"})).model.path == "not/here"


def test_a_name_is_taken_without_hard_links_as_well(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", no_links)
    config = tiny_config(output_dir=str(tmp_path))
    folder, is_new = _run_folder(config, None)
    assert is_new
    with _claimed(folder, config):
        with pytest.raises(RunError, match=r"exists already"), _claimed(folder, config):
            raise AssertionError("claimed twice")
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_auto_starts_or_goes_on(tmp_path):
    def config(**sections):
        return tiny_config(output_dir=str(tmp_path), resume="auto", **sections)

    folder, is_new = _run_folder(config(), None)
    assert is_new
    with _claimed(folder, config()):
        pass
    assert _run_folder(config(), None) == (folder, False)
    # where it runs, what it logs and keeps, and how often it tries a step may differ
    other = config(cluster={"workers": 4}, checkpoint={"keep": 5}, collapse={"window": 0}, optimizer={"max_retries": 9})
    assert _run_folder(other, None)[1] is False
    assert _what_must_not_change(other) == _what_must_not_change(config())
    with pytest.raises(RunError, match=r"optimizer\.eps was 1e-08, now 0\.1"):
        _run_folder(config(optimizer={"eps": 0.1}), None)
    with pytest.raises(RunError, match=r"other settings \(mlc\.layer was 2, now 1\): give the run another name"):
        _run_folder(config(mlc={"layer": 1}), None)
    with pytest.raises(RunError, match=r"engine\.persistence_threshold was None, now 0, engine\.stage was 0, now 3"):
        _run_folder(config(engine={"stage": 3, "persistence_threshold": 0}), None)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    def fit(_):  # Ray Train's handler ends the workers, and then the program
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TorchTrainer, "fit", fit)
    prepared = PreparedData(SimpleNamespace(folder=tmp_path / "tokens"), None, {})
    for name, result in {"model_depth": 3, "use_gpu": False, "prepare_data": prepared, "_total_steps": 8}.items():
        monkeypatch.setattr(run, name, lambda *_, result=result, **__: result)
    for name in ("connect", "check_fits", "_announce", "_describe_run"):
        monkeypatch.setattr(run, name, lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt, match=rf"^to go on: mlc-ray train --resume {tmp_path}/tiny$"):
        train(tiny_config(output_dir=str(tmp_path)))
    assert load_run_config(tmp_path / "tiny").name == "tiny"
    assert signal.getsignal(signal.SIGINT) is handler
