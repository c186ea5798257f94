"""Several nodes for real: two `ray start` on this machine, with workers, engines and trials on both."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mlc_ray.runs import read_metrics
from mlc_ray.score.results import load_scores
from mlc_ray.storage import MANIFEST

pytestmark = pytest.mark.slow

SCORING = {
    "benchmarks": [{"path": "sample:select"}],
    "languages": ["en", "sw"],
    "limit": 4,
    "max_new_tokens": 4,
    "max_unparsed": 1.0,
}
ENGINE = {"max_model_len": 256, "cpu_kv_cache_gib": 1}


@pytest.fixture
def scene(tmp_path: Path, smollm2: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two nodes of one CPU each, and the settings of a run over both."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    from survival_scene import Scene

    scene = Scene(tmp_path / "scene", seed=1)
    scene.prepare(smollm2)
    try:
        scene.start_head()
        scene.start_worker_node()
        joined = {**scene.environment, "RAY_ADDRESS": scene.address}
        subprocess.run([sys.executable, "-m", "mlc_ray.nodes", "2", "120"], env=joined, check=True)
        yield scene
    finally:
        scene.close()


def nodes_with(scene: Any, title: str) -> int:
    """How many of the nodes have a process of this title now."""
    found = 0
    for node in scene.nodes:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(node.pid).children(recursive=True)
            found += any(" ".join(child.cmdline()).startswith(title) for child in children)
    return found


def command(scene: Any, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    with (scene.folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mlc_ray", *arguments], env=scene.environment, stdout=log, stderr=log
        )


def test_a_run_and_a_score_are_on_both_nodes(scene: Any, small_llama: Path) -> None:
    from survival_scene import Run, wait

    # Nodes without a label are those that `!` takes, by Ray as by `capacity.fit`.
    labels = "label_selector={pool: '!other'}"
    train = [
        f"cluster.{labels}",
        "engine.stage=3",
        f"model.path={small_llama}",
        "train.max_steps=2",
        "objective.pause=0",
        "mlc.every=1",
    ]
    run = Run(scene, "sharded", scene.folder / "runs", train)
    wait(lambda: nodes_with(scene, "ray::RayTrainWorker") == 2 or run.ended(), "a worker on each node")
    assert not run.ended(), run.log()
    run.end()
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2]
    assert (run.checkpoints(whole=True)[-1] / MANIFEST).read_json()["world_size"] == 2

    engine = {**ENGINE, "replicas": 2, "cpus_per_replica": 0.6, "label_selector": {"pool": "!other"}}
    settings = {**SCORING, "name": "both", "output_dir": str(scene.folder), "engine": engine}
    (scene.folder / "score.yaml").write_text(yaml.safe_dump(settings))
    score = command(
        scene, "score", "score", "--config", str(scene.folder / "score.yaml"), "--set", f"model={run.folder}"
    )
    wait(lambda: nodes_with(scene, "ray::Worker") == 2 or score.poll() is not None, "an engine on each node")
    said = (scene.folder / "score.log").read_text()
    assert score.poll() is None, said
    assert score.wait(400) == 0, (scene.folder / "score.log").read_text()
    scores = load_scores(scene.folder / "both")
    assert scores.responses_file.is_file()


@pytest.mark.soak
def test_what_lost_a_node_says_what_it_waits_for_and_goes_on_with_less(scene: Any) -> None:
    from survival_scene import STEPS, Run

    run = Run(scene, "lost", scene.folder / "runs", ["cluster.wait_seconds=5"])
    assert run.until(STEPS // 2), run.log()
    scene.kill_node()
    run.end(status=2)
    assert "2 x (0.6 CPUs), found no place in" in run.log() and "cluster.wait_seconds=5" in run.log()
    done = len(read_metrics(run.folder))
    assert 0 < done < STEPS
    run.settings = ["cluster.workers=1"]
    run.start_again()
    run.end()
    assert [row["step"] for row in read_metrics(run.folder)] == list(range(1, STEPS + 1))
    assert (run.checkpoints(whole=True)[-1] / MANIFEST).read_json()["world_size"] == 1


@pytest.mark.soak
def test_a_search_has_trials_on_both_nodes(scene: Any, small_llama: Path) -> None:
    from survival_scene import wait

    search = {
        "name": "found",
        "output_dir": str(scene.folder),
        "train": str(scene.folder / "run.yaml"),
        # A trial of two workers, each of which takes more than half a node, and an engine beside one of them.
        "set": [f"model.path={small_llama}", "train.max_steps=2", "resume=never"],
        "space": {"mlc.layer": {"choice": [1, "last"]}},
        "sampler": "grid",
        "objective": {"name": "average", "min_benign_compliance": 0.0},
        "scoring": {**SCORING, "engine": {**ENGINE, "cpus_per_replica": 0.2}},
    }
    (scene.folder / "search.yaml").write_text(yaml.safe_dump(search))
    driver = command(scene, "search", "search", "--config", str(scene.folder / "search.yaml"))
    wait(lambda: nodes_with(scene, "ray::RayTrainWorker") == 2 or driver.poll() is not None, "trials on both nodes")
    assert driver.poll() is None, (scene.folder / "search.log").read_text()
    assert driver.wait(400) == 0, (scene.folder / "search.log").read_text()
    assert (scene.folder / "found" / "best.yaml").is_file()
