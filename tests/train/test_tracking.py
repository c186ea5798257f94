import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import examples.my_storage  # noqa: F401 - registers vault://
from mlc_ray.lease import LeaseError
from mlc_ray.runs import METRICS_FILE, MetricsReader, read_metrics
from mlc_ray.storage import Place, StorageFaultError, mirror
from mlc_ray.train.console import RunDisplay, columns, fitting, header, table_row
from mlc_ray.train.rows import EventFiles, RowFileError
from mlc_ray.train.tracking import Tracker, TrackingError, check_trackers
from tests.ray_head import free_ports
from tests.train.tiny import tiny_config


def test_steps_after_the_resumed_one_are_forgotten(tmp_path):
    config = tiny_config(logging={"tensorboard": False})
    first = Tracker(config, tmp_path, start_step=0)
    for step in (1, 2, 3):
        first.log(step, {"loss/total": float(step)})
    first.close()
    second = Tracker(config, tmp_path, start_step=2)
    second.log(3, {"loss/total": 30.0})
    second.close()
    assert [(row["step"], row["loss/total"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_numbers_that_are_not_finite_are_null_since_json_has_none(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    tracker = Tracker(tiny_config(logging={"tensorboard": False}), tmp_path, start_step=0)
    tracker.log(1, {"a": float("inf"), "b": float("-inf"), "c": float("nan"), "d": 0.5})
    tracker.close()
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": None, "d": 0.5}


def test_a_step_that_was_tried_again_is_warned_of(tmp_path):
    tracker = Tracker(tiny_config(logging={"tensorboard": False}), tmp_path, start_step=0)
    tracker.log(1, {"retries": 0.0})
    tracker.log(2, {"retries": 2.0})
    tracker.close()
    first, second = read_metrics(tmp_path)
    assert "warnings" not in first
    assert second["warnings"] == ["the loss or its gradients were not finite: tried again 2 times"]


def test_nan_is_written_as_null_and_a_half_written_line_is_left_for_later(tmp_path):
    tracker = Tracker(tiny_config(logging={"tensorboard": False}), tmp_path, start_step=0)
    tracker.log(1, {"collapse/between_bundle_cosine": float("nan")})
    tracker.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 2, "loss/to')
    assert list(read_metrics(tmp_path)) == [{"step": 1, "collapse/between_bundle_cosine": None}]


@contextmanager
def files_of_at_most(size):
    """What a full disk does, by a limit of this process: a write is short, and the next one is refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def events_of(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/total")]


@pytest.mark.filterwarnings("ignore:Exception in thread")  # TensorBoard's, which ends by what the disk refuses
def test_a_disk_that_is_full_for_a_while_costs_no_step(tmp_path, caplog):
    tracker = Tracker(tiny_config(), tmp_path, start_step=0)
    tracker.log(1, {"loss/total": 1.0})
    tracker.sync()
    with files_of_at_most((tmp_path / METRICS_FILE).stat().st_size + 10):
        for step in (2, 3):
            tracker.log(step, {"loss/total": float(step)})
        with pytest.raises(OSError, match="File too large"):
            tracker.sync()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert (tmp_path / METRICS_FILE).read_bytes().endswith(b'{"step": 2')
    assert caplog.text.count("is once the disk takes it") == 1
    tracker.log(4, {"loss/total": 4.0})
    tracker.sync()
    assert [row["loss/total"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 4.0]
    assert events_of(tmp_path) == [(step, float(step)) for step in (1, 2, 3, 4)]
    tracker.close()
    with files_of_at_most(1):  # steps are forgotten there too
        again = Tracker(tiny_config(), tmp_path, start_step=2)
        again.log(3, {"loss/total": 30.0})
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    again.close()
    assert [row["loss/total"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]
    assert events_of(tmp_path) == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.filterwarnings("ignore:Exception in thread")
def test_a_disk_that_stays_full_costs_one_warning_and_few_files_of_events(tmp_path, caplog):
    events, steps = EventFiles(tmp_path / "tensorboard", after=0), range(1, 301)
    with files_of_at_most(1):
        for step in steps:
            events.add(step, {"loss/total": float(step)})
            if step == 50:
                events.sync()
    assert caplog.text.count("are written later") == 1
    assert len(list((tmp_path / "tensorboard").iterdir())) <= 5  # the first, one at `sync`, one every 100 steps
    events.close()
    assert events_of(tmp_path) == [(step, float(step)) for step in steps]
    events.add(301, {"loss/total": 301.0})
    with files_of_at_most(1):
        events.close()
    assert caplog.text.count("are written later") == 2  # the disk was written to meanwhile


def test_a_reader_gives_each_row_once_and_starts_again_with_another_file(tmp_path):
    config = tiny_config(logging={"tensorboard": False})
    reader = MetricsReader(tmp_path)
    assert reader.read() == []
    tracker = Tracker(config, tmp_path, start_step=0)
    tracker.log(1, {"loss/total": 1.0})
    assert [row["step"] for row in reader.read()] == [1]
    tracker.log(2, {"loss/total": 2.0})
    tracker.log(3, {"loss/total": 3.0})
    assert [row["step"] for row in reader.read()] == [2, 3]
    assert reader.read() == []
    tracker.close()
    again = Tracker(config, tmp_path, start_step=1)
    again.log(2, {"loss/total": 20.0})
    again.log(3, {"loss/total": 30.0})
    again.log(4, {"loss/total": 40.0})
    again.close()
    assert [row["loss/total"] for row in reader.read()] == [1.0, 20.0, 30.0, 40.0]


def test_tensorboard_holds_the_numbers(tmp_path):
    tracker = Tracker(tiny_config(), tmp_path, start_step=0)
    tracker.log(1, {"loss/total": 0.5})
    tracker.close()
    assert events_of(tmp_path) == [(1, 0.5)]


def started(run_folder):
    (run_folder / "run.json").write_text(json.dumps({"id": "0123abcd"}))


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_config(logging={"tensorboard": False, "wandb": "project"})
    started(tmp_path)
    ids = []
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = Tracker(config, tmp_path, start_step=start)
        ids.append(tracker.wandb.id)
        for step in steps:
            tracker.log(step, {"loss/total": float(step)})
        assert tracker.wandb.step == steps[-1]
        tracker.close()
    assert ids == ["0123abcd", "0123abcd"]
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-0123abcd.wandb"))) == 2  # `wandb sync` joins them by the id


def log_to(tracker, steps):
    for step in steps:
        tracker.log(step, {"loss/total": float(step)})
    tracker.close()


def the_run_at(client):
    """The one run of the experiment, after steps 1 to 3 and, in another try, 3 and 4."""
    experiment = client.get_experiment_by_name("tiny")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert {(metric.step, metric.value) for metric in history} == {(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)}
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    return run


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    config = tiny_config(logging={"tensorboard": False, "mlflow": uri})
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log_to(Tracker(config, tmp_path, start_step=start), steps)
    client = mlflow.tracking.MlflowClient(uri)
    run = the_run_at(client)
    client.delete_run(run.info.run_id)
    (tmp_path / "mlflow.json").write_text(json.dumps({uri: "0" * 32}))
    with pytest.raises(TrackingError, match=r"has no run '0{32}'.*mlflow\.json.*remove the file"):
        Tracker(config, tmp_path, start_step=2)
    Tracker(config.model_copy(update={"logging": config.logging.model_copy(update={"mlflow_experiment": "mine"})}),
            fresh(tmp_path / "second"), start_step=0).close()  # fmt: skip
    assert len(client.search_runs([client.get_experiment_by_name("mine").experiment_id])) == 1


def fresh(folder):
    folder.mkdir()
    return folder


@contextmanager
def mlflow_server(folder, port):
    """MLflow's own server, on a database and artefacts in `folder`, until SIGKILL at the end."""
    stores = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        folder / "artifacts",
    ]
    command = [sys.executable, "-m", "mlflow", "server", *stores, "--host", "127.0.0.1", "--port", port, "--workers", 1]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # it needs one more package
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run_of_a_server_that_was_killed_meanwhile(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("flask_cors")
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    config = tiny_config(logging={"tensorboard": False, "mlflow": uri})
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with mlflow_server(tmp_path, port):
            log_to(Tracker(config, tmp_path, start_step=start), steps)
            client = mlflow.tracking.MlflowClient(uri)
            if start:
                run = the_run_at(client)
                assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.json"]


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_run(package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(tiny_config())
    with pytest.raises(TrackingError, match=rf"logging.{package}='here'.*pip install 'mlc_ray\[{package}\]'"):
        check_trackers(tiny_config(logging={package: "here"}))


def test_display_shows_each_step_once_in_aligned_columns(tmp_path, caplog):
    rows = [{"step": step, "loss/total": 0.5, "learning_rate": 1e-5, "loss/mlc": None} for step in (1, 2, 3, 4, 5)]
    parts = ["loss/alignment", "loss/mlc", "loss/a-long-name"]
    with caplog.at_level("INFO", "mlc_ray"), RunDisplay(tmp_path, 5, every=2, parts=parts):
        (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for line in caplog.messages if line.strip()[:1].isdigit()]
    assert [int(line.split()[0]) for line in lines] == [2, 4, 5]
    titles = columns(parts)
    assert list(titles)[:5] == ["loss", "alignment", "mlc", "a-long-name", "share"]
    assert len(header(titles)) == len(table_row(rows[0], titles)) == 6 + sum(1 + max(8, len(t)) for t in titles)
    assert table_row(rows[0], titles).split()[1:4] == ["0.5000", "-", "-"]
    row = table_row({"step": 1, "loss/a-long-name": 0.25}, titles)
    shown = dict(zip(header(titles).split(), row.split(), strict=True))
    assert shown["a-long-name"] == "0.2500" and shown["mlc"] == "-"


def test_metrics_that_cannot_be_read_end_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    (no_folder := tmp_path / "no-folder").touch()
    run = Place("vault://team/run")
    (run / METRICS_FILE).write_text("")
    display = RunDisplay(run, 5, every=1, parts=[])
    monkeypatch.setenv("VAULT", str(no_folder))
    with caplog.at_level("INFO", "mlc_ray"), display:
        for _ in range(2):
            display._update()
        assert caplog.text.count("steps are not shown until the metrics can be read") == 1
        monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
        (run / METRICS_FILE).write_text('{"step": 1, "loss/total": 0.5}\n')
        display._update()
        assert [line.split()[0] for line in caplog.messages if line.strip()[:1].isdigit()] == ["1"]
        (run / METRICS_FILE).write_text("no JSON\n")
    assert caplog.text.count("steps are not shown until the metrics can be read") == 2


def test_a_narrow_terminal_gets_the_columns_that_matter_most():
    titles = columns(["loss/alignment", "loss/mlc"])
    narrow = fitting(titles, 80)
    assert list(narrow) == ["loss", "alignment", "mlc", "share", "between", "margin", "acc", "tok/s"]
    assert len(header(narrow)) < 80
    assert fitting(titles, None) == fitting(titles, 200) == titles
    assert list(fitting(titles, 20)) == ["loss", "alignment", "mlc"]


def test_a_run_elsewhere_has_the_rows_and_events_that_it_goes_on_from(tmp_path, monkeypatch):
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    run = Place("vault://team/run")
    for node in ("one", "another"):  # the machine of rank 0 is another one when the run goes on
        monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / node))
        start = 2 if node == "another" else 0
        tracker = Tracker(tiny_config(), run, start_step=start)
        for step in range(start + 1, start + 4):
            tracker.log(step, {"loss/total": float(step)})
        tracker.sync()
        assert [row["step"] for row in read_metrics(run)] == list(range(1, start + 4))
        tracker.log(start + 4, {"loss/total": 0.0})
        tracker.close()
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert len((run / "tensorboard").iterdir()) == 2
    assert not (tmp_path / "vault:").exists()


def test_who_has_lost_the_run_sends_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))

    def lost():
        raise LeaseError("lost")

    tracker = Tracker(tiny_config(logging={"tensorboard": False}), "vault://team/run", 0, lost)
    tracker.log(1, {"loss/total": 1.0})
    with pytest.raises(LeaseError):
        tracker.sync()
    tracker.close()
    assert read_metrics(Place("vault://team/run")) == []


@pytest.mark.parametrize("place", ["vault://team/run", "run"])
def test_rows_of_a_driver_that_lost_the_run_are_not_among_those_of_the_next(place, tmp_path, monkeypatch):
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    run, config = Place(place if "://" in place else tmp_path / place), tiny_config(logging={"tensorboard": False})
    if run.is_local:
        Path(run).mkdir()
    first = Tracker(config, run, 0)
    for step in (1, 2):
        first.log(step, {"loss/total": float(step)})
    first.sync()
    second = Tracker(config, run, 2)  # its driver was killed, and its workers live on for a moment
    for step in (3, 4):
        first.log(step, {"loss/total": 0.0})
    with pytest.raises(RowFileError, match=r"metrics\.jsonl' was removed or replaced .* by another driver"):
        first.sync()
    first.close()
    second.log(3, {"loss/total": 3.0})
    second.sync()
    assert [(row["step"], row["loss/total"]) for row in read_metrics(run)] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    if run.is_local:
        (run / METRICS_FILE).remove()
    else:
        shutil.rmtree(tmp_path / "cache")
    second.log(4, {"loss/total": 4.0})
    with pytest.raises(RowFileError):
        second.sync()
    second.close()


def test_an_outage_of_the_store_loses_no_row(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mirror, "_PAUSE", 0.0)
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    run = Place("vault://team/run")
    tracker = Tracker(tiny_config(logging={"tensorboard": False}), run, 0)
    tracker.log(1, {"loss/total": 1.0})
    (tmp_path / "vault").rename(tmp_path / "away")
    (tmp_path / "vault").write_text("no folder")
    with caplog.at_level(logging.WARNING), pytest.raises(StorageFaultError, match="'vault://team/run'"):
        tracker.sync()
    assert "metrics could not be sent to vault://team/run" in caplog.text
    (tmp_path / "vault").unlink()
    (tmp_path / "away").rename(tmp_path / "vault")
    tracker.close()
    assert [row["step"] for row in read_metrics(run)] == [1]


def test_what_could_not_be_sent_at_the_end_of_a_try_is_sent_by_the_next_one(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mirror, "_PAUSE", 0.0)
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    (no_folder := tmp_path / "no-folder").touch()
    run, config = Place("vault://team/run"), tiny_config()
    tracker = Tracker(config, run, 0)
    tracker.log(1, {"loss/total": 1.0})
    tracker.sync()
    tracker.log(2, {"loss/total": 2.0})
    tracker.log(3, {"loss/total": 3.0})
    monkeypatch.setenv("VAULT", str(no_folder))
    tracker.close()
    assert "the last metrics of vault://team/run are in" in caplog.text
    with pytest.raises(OSError, match="no-folder"):  # it is still away: what is here stays
        Tracker(config, run, 2)
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    assert [row["step"] for row in read_metrics(run)] == [1]
    again = Tracker(config, run, 2)
    again.log(3, {"loss/total": 30.0})
    again.close()
    assert [row["loss/total"] for row in read_metrics(run)] == [1.0, 2.0, 30.0]
    assert len((run / "tensorboard").iterdir()) == 2
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "another"))
    Tracker(config, run, 2).close()  # on another machine
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    anew = Tracker(config, run, 0)
    anew.log(1, {"loss/total": 10.0})
    anew.close()
    assert [row["loss/total"] for row in read_metrics(run)] == [10.0]
