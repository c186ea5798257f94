"""Whole runs on real Ray: both references agree, and a run survives its workers and its driver being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from mlc_ray.config import TrainConfig, load_config
from mlc_ray.runs import read_metrics
from mlc_ray.show import show
from mlc_ray.storage import Place
from mlc_ray.train.checkpoint import complete_checkpoints, list_checkpoints
from mlc_ray.train.divergence import DivergedError
from mlc_ray.train.forward import ModelError
from mlc_ray.train.run import train
from mlc_ray.train.run_folder import RunError, load_run_config
from tests.train.test_checkpoint import flip

pytestmark = pytest.mark.slow
STEPS = 8


@pytest.fixture(scope="module")
def run_place(smollm2, repository, tmp_path_factory):
    """A small random Llama with SmolLM2's tokenizer, twelve bundles of the sample, and a config file."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sample = (repository / "mlc_ray/data/sample/train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "bundles.jsonl").write_text("\n".join(sample[:12]) + "\n", encoding="utf-8")
    (folder / "held_out.jsonl").write_text("\n".join(sample[12:16]) + "\n", encoding="utf-8")
    settings = {
        "name": "undisturbed",
        "output_dir": str(folder),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": [{"path": str(folder / "bundles.jsonl")}],
            "validation": {"sources": [{"path": str(folder / "held_out.jsonl")}], "every": 3},
            "languages": ["en", "sw", "zh"],
        },
        "mlc": {"layer": 3, "every": 2, "extractor_dim": 32},
        "terms": {
            "anchor": {},
            "sign": {"name": "examples.my_term:SameSign", "weight": 0.5},  # one from outside
            "decision": {"weight": 0.2},
            "consistency": {"weight": 0.2, "start": 0.5},
        },
        "optimizer": {"learning_rate": 1e-3},
        "train": {"epochs": 4, "max_steps": STEPS, "batch_bundles": 4},
        "engine": {"stage": 2},
        "cluster": {"address": "local", "workers": 2, "cpus_per_worker": 0.5},
        "checkpoint": {"every": 2, "keep": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def configured(run_place, *overrides):
    return load_config(TrainConfig, run_place / "config.yaml", overrides)


def losses(run):
    """The loss of each step, and what held-out bundles measured at some, before the first one too."""
    return [
        (row["step"], row.get("loss/total"), {name: row[name] for name in row if name.startswith("validation/")})
        for row in read_metrics(Path(run))
    ]


def trained(run):
    """What was logged of each optimizer step."""
    return [row for row in read_metrics(Path(run)) if row["step"]]


@pytest.fixture(scope="module")
def undisturbed(ray_local, run_place):
    return train(configured(run_place))


def test_a_run_leaves_what_it_should(undisturbed, run_place):
    run = undisturbed.run_folder
    assert [(step, bool(held_out)) for step, _, held_out in losses(run)] == [
        (step, step in (0, 3, 4, 6, 8))
        for step in range(STEPS + 1)  # and 4, behind which consistency begins
    ]
    first, last = losses(run)[0][2], losses(run)[-1][2]
    assert {"validation/loss/total", "validation/harmful/reward/margin", "validation/mlc/leading_share"} <= first.keys()
    assert {
        "validation/benign/mlc/cosine/sw",
        "validation/sign/cosine",
        "validation/log_prob/chosen_change",
        "validation/refusal/auc",
        "validation/refusal/auc/zh",
    } <= last.keys()
    assert first["validation/log_prob/chosen_change"] == 0 != last["validation/log_prob/chosen_change"]
    assert [path.name for path in list_checkpoints(Place(run))] == ["checkpoint_000006", "checkpoint_000008"]
    assert undisturbed.checkpoint.name == "checkpoint_000008"
    assert undisturbed.metrics["step"] == STEPS
    rows = trained(run)
    assert [row["bundles_consumed"] for row in rows] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert rows[0]["loss/alignment"] == pytest.approx(0.693147, abs=1e-4)
    measures = {"collapse/between_bundle_cosine", "collapse/effective_rank", "collapse/effective_rank_share"}
    assert {"mlc/leading_share", "loss/mlc", "loss/anchor", "loss/sign", "sign/cosine"} | measures <= rows[0].keys()
    assert "loss/mlc" not in rows[1]
    assert [step for step, row in enumerate(rows, 1) if "loss/decision" in row] == [1, 3, 5, 7]
    assert [step for step, row in enumerate(rows, 1) if "loss/consistency" in row] == [5, 7]
    # Two held-out bundles of a kind are too few for an AUC: said once, where the first terms begin, and not at step 4.
    warned = {row["step"]: row["warnings"] for row in read_metrics(Path(run)) if "warnings" in row}
    assert list(warned) == [0]
    assert sum("2 bundles of its rarer kind, too few" in warning for warning in warned[0]) == 1
    assert any((run / "tensorboard").iterdir())
    assert load_run_config(run) == configured(run_place)
    described = json.loads((run / "run.json").read_text())
    assert described["total_steps"] == STEPS and described["bundles"] == 12


def test_an_existing_run_is_not_overwritten(undisturbed, run_place):
    with pytest.raises(RunError, match=r"exists already: choose another name.*--resume"):
        train(configured(run_place))


def test_cached_and_online_references_give_the_same_losses(undisturbed, run_place):
    online = train(configured(run_place, "name=online", "reference=online"))
    for cached, live in zip(trained(undisturbed.run_folder), trained(online.run_folder), strict=True):
        for name in ("loss/total", "loss/alignment"):
            assert live[name] == pytest.approx(cached[name], rel=1e-5)
        assert live.get("loss/anchor", 0) == pytest.approx(cached.get("loss/anchor", 0), rel=1e-5)
    for cached, live in zip(losses(undisturbed.run_folder), losses(online.run_folder), strict=True):
        assert live[2] == pytest.approx(cached[2], rel=1e-4, abs=1e-5)


def test_answers_in_every_language_go_from_a_file_through_a_cached_reference_into_steps(ray_local, run_place):
    for name in ("bundles", "held_out"):
        bundles = [json.loads(line) for line in (run_place / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for bundle in bundles:
            bundle.pop("bundle_id", None)
            bundle["answers"] = {
                code: {"chosen": f"{code}: {bundle['chosen']}", "rejected": f"{code}: {bundle['rejected']}"}
                for code in ("sw", "zh")
            }
        lines = "".join(json.dumps(bundle) + "\n" for bundle in bundles)
        (run_place / f"{name}_answered.jsonl").write_text(lines, encoding="utf-8")
    settings = [
        f"data.train=[{{path: {run_place / 'bundles_answered.jsonl'}}}]",
        f"data.validation={{sources: [{{path: {run_place / 'held_out_answered.jsonl'}}}], every: 3}}",
        "objective={loss: mpo}", "terms={}", "mlc.extractor_dim=null", "train.max_steps=2",
    ]  # fmt: skip
    cached = train(configured(run_place, "name=mpo", *settings)).run_folder
    online = train(configured(run_place, "name=mpo-online", "reference=online", *settings)).run_folder
    first, last = losses(cached)[0][2], losses(cached)[-1][2]
    assert first["validation/alignment/anchor"] < 1e-9 < last["validation/alignment/anchor"]
    assert last["validation/alignment/source_gap"] == first["validation/alignment/source_gap"]  # it is the reference's
    for stored, live in zip(losses(cached), losses(online), strict=True):
        assert (live[1] is None) == (stored[1] is None)  # there is no step before the first
        assert stored[1] is None or live[1] == pytest.approx(stored[1], rel=1e-5)
        assert live[2] == pytest.approx(stored[2], rel=1e-4, abs=1e-5)
    (checkpoint,) = list_checkpoints(Place(cached))
    assert not (checkpoint / "extractor.safetensors").is_file()


def test_an_error_of_a_reference_worker_arrives_as_it_is(ray_local, run_place):
    shutil.copytree(run_place / "model", run_place / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    model = f"model.path={run_place / 'no_weights'}"
    with pytest.raises(ModelError, match="no_weights' cannot be loaded") as caught:
        train(configured(run_place, "name=without", model, "cluster.workers=1", "cluster.max_failures=3"))
    assert type(caught.value) is ModelError
    assert not (run_place / "without").exists()  # the name is free again


def test_a_run_that_diverges_ends_without_a_checkpoint_and_is_not_tried_again(run_place):
    config = configured(
        run_place, "name=diverged", "optimizer.learning_rate=1e30", "optimizer.max_retries=1", "cluster.max_failures=3"
    )
    said = r"diverged' ended at step 2: .* after 2 tries .* with bundles \w+, \w+"
    with pytest.raises(DivergedError, match=said) as caught:
        train(config)
    assert "lower optimizer.learning_rate" in str(caught.value)
    assert [row["step"] for row in trained(run_place / "diverged")] == [1]
    assert list_checkpoints(Place(run_place / "diverged")) == []
    assert (caught.value.step, len(caught.value.bundles)) == (2, 4)
    kept = json.loads((run_place / "diverged" / "diverged.json").read_text())
    assert (kept["step"], kept["bundles"]) == (2, list(caught.value.bundles))
    assert "diverged at step 2 of 8" in show(run_place / "diverged")


def test_an_engine_and_a_term_from_outside_train_a_whole_run_as_deepspeed_does(undisturbed, run_place):
    own = train(configured(run_place, "name=own_engine", "engine={name: 'examples.my_engine:TorchDdp'}"))
    for row, want in zip(trained(own.run_folder), trained(undisturbed.run_folder), strict=True):
        assert row["loss/total"] == pytest.approx(want["loss/total"], rel=1e-5)
    manifest = json.loads((own.checkpoint / "manifest.json").read_text())
    assert manifest["resolved_config"]["engine"] == {"name": "examples.my_engine:TorchDdp", "bucket_mb": 25}
    assert {"state/00000-00000.safetensors", "state/00001-00000.safetensors"} <= manifest["files"].keys()


def test_a_run_that_ended_is_not_started_again(undisturbed, run_place, monkeypatch):
    monkeypatch.setattr("mlc_ray.train.run.run_workers", lambda *_, **__: pytest.fail("workers were started"))
    for again in (
        train(configured(run_place, "resume=auto")),
        train(load_run_config(undisturbed.run_folder), resume=undisturbed.run_folder),
    ):
        assert (again.run_folder, again.checkpoint) == (undisturbed.run_folder, undisturbed.checkpoint)
        assert again.metrics["loss/total"] == undisturbed.metrics["loss/total"]


def ray_train_workers():
    """Those of the Ray that this process or a command that it has started began."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_a_worker_after_step(run, step, killed):
    """SIGKILL one Ray Train worker of this test's own Ray once `step` is logged."""
    while not any(row["step"] >= step for row in read_metrics(run)):
        time.sleep(0.02)
    worker = ray_train_workers()[0]
    worker.kill()
    killed.append(worker.pid)


def test_a_killed_worker_is_recovered_from_exactly(undisturbed, run_place):
    killed = []
    watcher = threading.Thread(
        target=kill_a_worker_after_step, args=(run_place / "killed_worker", 5, killed), daemon=True
    )
    watcher.start()
    result = train(configured(run_place, "name=killed_worker", "cluster.max_failures=1"))
    watcher.join(timeout=5)
    assert killed
    assert losses(result.run_folder) == losses(undisturbed.run_folder)


def test_a_driver_that_gets_sigterm_saves_first_and_is_resumed_from_exactly(undisturbed, run_place):
    run = run_place / "preempted"
    command = [sys.executable, "-m", "mlc_ray", "train", "--config", str(run_place / "config.yaml")]
    settings = ["--set", "name=preempted", "--set", "checkpoint.every=null", "--set", "resume=auto"]
    driver = subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not any(row["step"] >= 2 for row in read_metrics(run)):
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.02)
    workers = ray_train_workers()
    for worker in workers:  # they stand still: a driver that a busy machine wakes late would find the last step done
        worker.suspend()
    driver.send_signal(signal.SIGTERM)
    while not (run / "stop").exists():
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.02)
    for worker in workers:
        worker.resume()
    said = driver.communicate()[0]
    assert len(workers) == 2
    assert driver.returncode == 128 + signal.SIGTERM, said
    (checkpoint,) = list_checkpoints(Place(run))
    step = int(checkpoint.name.removeprefix("checkpoint_"))
    assert 2 < step < STEPS and trained(run)[-1]["step"] == step
    assert f"got SIGTERM at step {step} of {STEPS}" in said and f"mlc-ray train --resume {run}" in said
    assert not (run / "lease.json").exists() and not (run / "stop").exists()
    train(load_run_config(run))
    assert losses(run) == losses(undisturbed.run_folder)


def test_a_killed_driver_is_resumed_from_exactly_though_a_checkpoint_is_gone_and_another_damaged(
    undisturbed, run_place
):
    run = run_place / "killed_driver"
    command = [sys.executable, "-m", "mlc_ray", "train", "--config", str(run_place / "config.yaml")]
    with (run_place / "driver.log").open("wb") as log:
        driver = subprocess.Popen(
            [*command, "--set", "name=killed_driver"], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        while len(complete_checkpoints(Place(run))[0]) < 2:  # they are written while training goes on
            assert driver.poll() is None, (run_place / "driver.log").read_text()
            time.sleep(0.02)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    half = run / "train/checkpoint_000099"  # damaged since it was written
    shutil.copytree(list_checkpoints(Place(run))[-1], half)
    (half / "manifest.json").unlink()
    shutil.rmtree(list_checkpoints(Place(run))[-1])  # by hand; Ray Train's own list names it
    free = ["cluster.max_failures=1", "logging.tensorboard=false", "optimizer.max_retries=7"]
    result = train(load_run_config(run, free), resume=run)
    assert losses(run) == losses(undisturbed.run_folder)
    history = json.loads((run / "run.json").read_text())["changes"]
    assert [f"{change['field']}={json.dumps(change['now'])}" for change in history] == free
    assert {change["step"] for change in history} <= {2, 4}  # workers may end their checkpoint before Ray kills them
    assert result.checkpoint.name == f"checkpoint_{STEPS:06d}"


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(undisturbed, run_place):
    rows = losses(undisturbed.run_folder)
    file = Path(undisturbed.checkpoint) / "model" / "model.safetensors"
    weights = file.read_bytes()
    flip(file)
    again = train(configured(run_place, "resume=auto"))
    assert (again.checkpoint, losses(again.run_folder)) == (undisturbed.checkpoint, rows)
    assert file.read_bytes() == weights
