"""A run's name and its paths: what is settled before anything is trained, without Ray."""

import errno
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.train import WorkerGroupError
from ray.train.torch import TorchTrainer

import examples.my_storage  # noqa: F401 - registers vault://
from mlc_ray._registry import names, resolve
from mlc_ray.config import SourceSection, TrainConfig
from mlc_ray.config.component import ComponentSettings
from mlc_ray.runs import METRICS_FILE
from mlc_ray.storage import Place, StorageFaultError
from mlc_ray.train import file_writer, run
from mlc_ray.train.preemption import Notice, PreemptedError, ended_by
from mlc_ray.train.run import PreparedData, _with_absolute_paths, train
from mlc_ray.train.run_folder import (
    RunError,
    TrainResult,
    changed_settings,
    claimed,
    commits_of,
    find_run_folder,
    load_run_config,
    record_start,
    result_of,
    run_id,
    with_commits_of,
)
from mlc_ray.train.settings import KINDS, Kind, SettingsChangedError, kind_of_field
from tests.checkpoints import complete
from tests.test_schema_read import sections_in
from tests.train.tiny import tiny_config


def test_a_name_is_taken_before_data_are_prepared(tmp_path):
    config = tiny_config(output_dir=str(tmp_path))
    folder, is_new = find_run_folder(config, None)
    assert is_new
    with claimed(folder, config):
        assert load_run_config(folder) == config
        with pytest.raises(RunError, match=r"exists already: choose another name.*--resume"):
            find_run_folder(config, None)
        # another run that looked before this one took the name
        with pytest.raises(RunError, match=r"exists already"), claimed(folder, config):
            raise AssertionError("claimed twice")
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert load_run_config(folder) == config
    assert find_run_folder(config, folder) == (folder, False)  # --resume takes it, with or without a checkpoint


def test_a_name_that_looks_like_a_number_is_read_as_it_was_written(tmp_path):
    """Of eight hexadecimal digits, as trials are called by, 1.4 % look like a number with an exponent."""
    config = tiny_config(output_dir=str(tmp_path), name="201759e0")
    folder, _ = find_run_folder(config, None)
    with claimed(folder, config):
        assert load_run_config(folder) == config


def test_a_storage_that_is_away_when_the_run_has_ended_is_asked_again_and_then_said_to_be_away(tmp_path, monkeypatch):
    monkeypatch.setattr(file_writer, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    folder = Place("vault://team/run")
    checkpoint = folder / "train" / "checkpoint_000001"
    complete(checkpoint, 1)
    (folder / METRICS_FILE).write_text('{"step": 1}\n')
    tries = []

    def read(place, plain=Place.open):
        tries.append(place)
        if len(tries) == 1:
            raise StorageFaultError("away")
        return plain(place)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "open", read)
        assert result_of(folder) == TrainResult(folder, checkpoint, {"step": 1})
    (tmp_path / "no-folder").touch()
    monkeypatch.setenv("VAULT", str(tmp_path / "no-folder"))
    with pytest.raises(
        StorageFaultError, match=r"'vault://team/run' has ended after its last step.*train --resume vault"
    ):
        result_of(folder)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageFaultError, match=r"config.yaml' cannot be written: No space left on device; make room"):
        (Place(tmp_path) / "config.yaml").write_text("name: a")
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_free_again_when_preparing_fails(tmp_path):
    config = tiny_config(output_dir=str(tmp_path))
    folder, is_new = find_run_folder(config, None)
    assert is_new
    with pytest.raises(ValueError, match="bad row"), claimed(folder, config):
        raise ValueError("bad row")
    assert not folder.exists()
    with claimed(find_run_folder(config, None)[0], config):
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
    folder, is_new = find_run_folder(config, None)
    assert is_new
    with claimed(folder, config):
        with pytest.raises(RunError, match=r"exists already"), claimed(folder, config):
            raise AssertionError("claimed twice")
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_run_elsewhere_is_named_found_and_goes_on_as_one_on_a_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    config = tiny_config(output_dir="vault://team/runs", resume="auto")
    folder, is_new = find_run_folder(config, None)
    assert (folder, is_new) == (Place("vault://team/runs/tiny"), True)
    with pytest.raises(ValueError, match="bad row"), claimed(folder, config):
        raise ValueError("bad row")
    assert not folder.exists()
    with claimed(folder, config):
        with pytest.raises(RunError, match=r"'vault://team/runs/tiny' exists already"), claimed(folder, config):
            raise AssertionError("claimed twice")
        record_start(folder, config, CONTENT, Tokens("abc"), 8)
    assert find_run_folder(config, None) == find_run_folder(load_run_config(folder), folder) == (folder, False)
    record_start(folder, load_run_config(folder, ["checkpoint.keep=5"]), CONTENT, Tokens("abc"), 8)
    assert [change["field"] for change in (folder / "run.json").read_json()["changes"]] == ["checkpoint.keep"]
    with pytest.raises(SettingsChangedError, match="seed was 42, now 1"):
        changed_settings(folder, tiny_config(output_dir="vault://team/runs", seed=1))
    with pytest.raises(RunError, match=r"'vault://team/none' is not a run folder"):
        load_run_config(Place("vault://team/none"))
    assert not (tmp_path / "vault:").exists()


def test_auto_starts_or_goes_on(tmp_path):
    def config(**sections):
        return tiny_config(output_dir=str(tmp_path), resume="auto", **sections)

    folder, is_new = find_run_folder(config(), None)
    assert is_new
    with claimed(folder, config()):
        pass
    assert find_run_folder(config(), None) == (folder, False)


class Tokens(list):
    languages = ("en", "sw")


CONTENT = {"model": "m", "tokens": "t"}
MAY_CHANGE = {
    "model.attention": "flex",
    "model.gradient_checkpointing": "selective",
    "model.kernels": "liger",
    "model.path": "moved",
    "data.train": [{"path": "moved.jsonl"}],
    "data.validation": {"sources": [{"path": "held"}], "every": 7},
    "optimizer.max_retries": 9,
    "train.tokens_per_forward": 4096,
    "engine": {"stage": 3, "persistence_threshold": 0, "offload_optimizer": True, "reduce_dtype": "bfloat16"},
    "cluster": {"workers": 4, "max_failures": 5},
    "checkpoint": {"every": 7, "keep": 5},
    "collapse": {"window": 0},
    "logging": {"tensorboard": False},
}
MUST_NOT = {
    "seed": 1, "reference": "online", "model.dtype": "bfloat16", "model.lora": {"rank": 2}, "objective.beta": 0.2,
    "objective": {"loss": "simpo"}, "mlc.layer": 1, "terms": {"anchor": {}}, "optimizer.eps": 0.1,
    "optimizer.betas": [0.9, 0.99], "train.batch_bundles": 5, "train.max_steps": 3,
}  # fmt: skip


def changed_config(tmp_path, name, value):
    overrides = {}
    *sections, last = name.split(".")
    node = overrides
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    return tiny_config(output_dir=str(tmp_path), resume="auto", **overrides)


@pytest.fixture
def started(tmp_path):
    """The folder of a run that was started."""
    config = tiny_config(output_dir=str(tmp_path), resume="auto")
    folder, _ = find_run_folder(config, None)
    with claimed(folder, config):
        record_start(folder, config, CONTENT, Tokens("abc"), 8)
    return folder


def test_a_run_goes_on_with_the_commits_that_it_was_started_with(tmp_path):
    def at(held_out, *names):
        sections = {"sources": [{"path": held_out}], "every": 2}
        return tiny_config(
            output_dir=str(tmp_path), data={"train": [{"path": name} for name in names], "validation": sections}
        )

    first, second, other = ("#" + digit * 40 for digit in "abc")
    with claimed(
        find_run_folder(at("x", "y"), None)[0], started := at(f"held/out{second}", f"owner/name{first}", "p/q")
    ):
        known = with_commits_of(tmp_path / "tiny", at("held/out", "owner/name", "p/q"))
        assert known == started
        moved = at(f"held/out{other}", "owner/name#v1", "owner/new")
        assert with_commits_of(tmp_path / "tiny", moved) == moved


def test_each_source_keeps_the_commit_of_its_own_place(tmp_path):
    def at(*names):
        return tiny_config(output_dir=str(tmp_path), data={"train": [{"path": name} for name in names]})

    first, second = ("owner/name#" + digit * 40 for digit in "ab")
    with claimed(find_run_folder(at("x"), None)[0], at(first, second, "data/rows#1")):
        known = with_commits_of(tmp_path / "tiny", at("owner/name", "owner/name#v1", "data/rows"))
        assert known == at(first, "owner/name#v1", "data/rows")


def test_a_branch_keeps_the_commit_that_it_had_when_the_run_began(tmp_path):
    def at(name, model="owner/model#main"):
        return tiny_config(output_dir=str(tmp_path), data={"train": [{"path": name}]}, model={"path": model})

    model = "owner/model#" + "c" * 40
    given, started = at("owner/name#main"), at("owner/name#" + "a" * 40, model)
    assert commits_of(given, started) == {
        "model": {"owner/model#main": model},
        "data set": {"owner/name#main": "owner/name#" + "a" * 40},
    }
    with claimed(find_run_folder(started, None)[0], started):
        record_start(Place(tmp_path / "tiny"), started, CONTENT, Tokens("abc"), 8, commits_of(given, started))
        record_start(Place(tmp_path / "tiny"), started, CONTENT, Tokens("abc"), 8)  # it went on
        assert with_commits_of(tmp_path / "tiny", given) == started
        assert with_commits_of(tmp_path / "tiny", at("owner/name#v1")) == at("owner/name#v1", model)
        unknown = at("owner/name#v1", "owner/model#v2")
        assert with_commits_of(tmp_path / "tiny", unknown) == unknown
        assert with_commits_of(tmp_path / "tiny", at("owner/name#v1", "owner/model")).model.path == model


def test_a_model_and_a_data_set_of_one_name_keep_a_commit_each(tmp_path):
    def at(model, data):
        return tiny_config(output_dir=str(tmp_path), data={"train": [{"path": data}]}, model={"path": model})

    given = at("owner/name#main", "owner/name#main")
    started = at("owner/name#" + "a" * 40, "owner/name#" + "b" * 40)
    with claimed(find_run_folder(started, None)[0], started):
        record_start(Place(tmp_path / "tiny"), started, CONTENT, Tokens("abc"), 8, commits_of(given, started))
        assert with_commits_of(tmp_path / "tiny", given) == started


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_decides_no_step_may_change_and_the_folder_says_so(name, started, tmp_path):
    before, known = load_run_config(started), run_id(started)
    config = changed_config(tmp_path, name, MAY_CHANGE[name])
    assert find_run_folder(config, None) == (started, False)
    record_start(started, config, CONTENT, Tokens("abc"), 8)
    assert load_run_config(started) == config != before
    history = json.loads((started / "run.json").read_text())["changes"]
    assert history and all(change["field"].startswith(name) and change["step"] == 0 for change in history)
    assert run_id(started) == known
    record_start(started, before, CONTENT, Tokens("abc"), 8)
    assert len(json.loads((started / "run.json").read_text())["changes"]) == 2 * len(history)


@pytest.mark.parametrize("name", MUST_NOT)
def test_what_decides_a_step_is_refused_by_name_with_both_values(name, started, tmp_path):
    kept = (started / "config.yaml").read_text(), (started / "run.json").read_text()
    config = changed_config(tmp_path, name, MUST_NOT[name])
    with pytest.raises(SettingsChangedError, match=rf"{name}[\w.]* was .*, now .*a run of another name"):
        changed_settings(started, config)
    with pytest.raises(SettingsChangedError):
        record_start(started, config, CONTENT, Tokens("abc"), 8)
    assert ((started / "config.yaml").read_text(), (started / "run.json").read_text()) == kept


def test_a_hand_edited_config_does_not_slip_through(started):
    edited = (started / "config.yaml").read_text() + "seed: 7\n"
    (started / "config.yaml").write_text(edited)
    with pytest.raises(SettingsChangedError, match="seed was 42, now 7"):
        changed_settings(started, load_run_config(started))


@pytest.mark.parametrize("name", [*CONTENT, "validation"])
def test_another_content_is_refused_wherever_it_is(name, started, tmp_path):
    config = changed_config(tmp_path, "model.path", "moved")
    with pytest.raises(SettingsChangedError, match=rf"{name} had the fingerprint .*, now 'x'; model\.path was 'tiny'"):
        record_start(started, config, {**CONTENT, name: "x"}, Tokens("abc"), 8)


def test_a_resumed_run_stays_in_its_folder(started, tmp_path):
    with pytest.raises(RunError, match=r"goes on in that folder, but output_dir='elsewhere'"):
        find_run_folder(load_run_config(started, ["output_dir=elsewhere"]), started)
    moved = Place(Path(started).rename(tmp_path / "moved"))
    assert find_run_folder(load_run_config(moved), moved) == (moved, False)


def test_every_setting_is_classified_and_nothing_else():
    found = set(dotted_leaves(TrainConfig))
    assert {"model.lora.rank", "data.validation.every", "objective.beta", "engine.stage", "mlc.temperature"} <= found
    unclassified = {name for name in found if not any(f"{name}.".startswith(f"{kind}.") for kind in KINDS)}
    assert not unclassified, f"say in KINDS whether these may change: {unclassified}"
    stale = {kind for kind in KINDS if not any(f"{name}.".startswith(f"{kind}.") for name in found)}
    assert not stale
    with pytest.raises(KeyError, match=r"optimizer\.momentum: say in"):
        kind_of_field("optimizer.momentum")
    assert (kind_of_field("engine.bucket_size"), kind_of_field("terms.a.weight")) == (Kind.FREE, Kind.FIXED)
    assert kind_of_field("engine.extra.bf16") is Kind.FIXED


def dotted_leaves(schema, prefix=""):
    """The dotted names of a schema's settings; those of components are what a run without any has, in all of them."""
    for name, field in schema.model_fields.items():
        nested = [schema for schema in sections_in(field.annotation) if schema is not SourceSection]
        for mark in (item for item in field.metadata if isinstance(item, ComponentSettings)):
            nested += [] if mark.by_key else [resolve(mark.kind, each).Settings for each in names(mark.kind)]
        if any(isinstance(item, ComponentSettings) and item.by_key for item in field.metadata) or not nested:
            yield f"{prefix}{name}"
        else:
            for section in nested:
                yield from dotted_leaves(section, f"{prefix}{name}.")


def prepared_run(tmp_path, monkeypatch):
    """Let `train` come as far as `fit`, with nothing prepared; Ray runs for the lease alone."""
    prepared = PreparedData(SimpleNamespace(folder=tmp_path / "tokens"), None, {})
    found = {"pinned_model": "tiny", "model_depth": 3, "use_gpu": False, "prepare_data": prepared, "steps_of": 8}
    for name, result in found.items():
        monkeypatch.setattr(run, name, lambda *_, result=result, **__: result)
    for name in ("connect", "check_fits", "check_run", "_announce", "record_start"):
        monkeypatch.setattr(run, name, lambda *_, **__: None)


def test_ctrl_c_says_how_to_go_on(ray_local, tmp_path, monkeypatch):
    def fit(_):  # Ray Train's handler ends the workers, and then the program
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TorchTrainer, "fit", fit)
    prepared_run(tmp_path, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=rf"^to go on: mlc-ray train --resume {tmp_path}/tiny$"):
        train(tiny_config(output_dir=str(tmp_path)))
    assert load_run_config(tmp_path / "tiny").name == "tiny"
    assert signal.getsignal(signal.SIGINT) is handler


def test_sigterm_to_a_worker_ends_a_run_without_restarts_as_a_preemption(ray_local, tmp_path, monkeypatch):
    def fit(_):
        raise WorkerGroupError("rank 1: ...", {1: ended_by(Notice.RESTART, 5)})

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    prepared_run(tmp_path, monkeypatch)
    said = rf"got SIGTERM at step 5 of 8.*max_failures=0.*mlc-ray train --resume {tmp_path}/tiny$"
    with pytest.raises(PreemptedError, match=said) as caught:
        train(tiny_config(output_dir=str(tmp_path)))
    assert (caught.value.step, caught.value.exit_status) == (5, 143)


def test_a_run_that_another_driver_ended_meanwhile_is_not_started(ray_local, started, tmp_path, monkeypatch):
    prepared_run(tmp_path, monkeypatch)
    answers = iter([None, TrainResult(started, started / "train/checkpoint_000008", {})])
    monkeypatch.setattr(run, "ended", lambda _: next(answers))  # before the lease, and once it is held
    monkeypatch.setattr(TorchTrainer, "fit", lambda _: pytest.fail("workers were started"))
    assert train(tiny_config(output_dir=str(tmp_path), resume="auto")).checkpoint.name == "checkpoint_000008"
