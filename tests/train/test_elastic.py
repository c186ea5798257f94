"""A run whose number of workers follows the cluster takes the steps that it would have taken with a fixed one."""

from __future__ import annotations

import subprocess
import sys
from subprocess import PIPE

import pytest

from mlc_ray.config.train import ClusterSection
from mlc_ray.runs import read_metrics
from mlc_ray.storage import MANIFEST


def test_the_number_of_workers_is_one_or_the_least_and_the_most():
    fixed, elastic = ClusterSection(workers=3), ClusterSection(workers=[2, 4])
    assert (fixed.least_workers, fixed.most_workers) == (3, 3)
    assert (elastic.least_workers, elastic.most_workers) == (2, 4)
    with pytest.raises(ValueError, match=r"cluster.workers=\[4, 2\]: the first number is the least"):
        ClusterSection(workers=[4, 2])


JOINED = """
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.5)
"""

SECOND = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False)
print(next(node["NodeID"] for node in ray.nodes() if "node:__internal_head__" not in node["Resources"]))
"""


@pytest.fixture
def scene(tmp_path, smollm2, repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    from survival_scene import Scene

    scene = Scene(tmp_path / "scene", seed=1)
    scene.prepare(smollm2)
    try:
        scene.start_head()
        yield scene
    finally:
        scene.close()


def undisturbed(scene):
    """A run of two workers, on two nodes that are there."""
    from survival_scene import Run

    subprocess.run([sys.executable, "-c", JOINED, scene.address], env=scene.environment, check=True, timeout=90)
    run = Run(scene, "undisturbed", scene.folder / "runs")
    run.end()
    return run


def sizes(run):
    """How many workers wrote each checkpoint, by its name."""
    return {place.name: (place / MANIFEST).read_json()["world_size"] for place in run.checkpoints(whole=True)}


def assert_same_steps(run, other):
    for row, wanted in zip(read_metrics(run.folder), read_metrics(other.folder), strict=True):
        assert (row["step"], row["bundles_consumed"]) == (wanted["step"], wanted["bundles_consumed"])
        assert row["loss/total"] == pytest.approx(wanted["loss/total"], rel=1e-5)  # seen: 7e-7


@pytest.mark.slow
@pytest.mark.soak
def test_a_run_that_loses_a_node_goes_on_with_fewer_workers(scene):
    from survival_scene import STEPS, Run

    scene.start_worker_node()
    alone = undisturbed(scene)
    run = Run(scene, "shrunk", scene.folder / "runs", ["cluster.workers=[1, 2]"])
    assert run.until(STEPS // 2), run.log()
    scene.kill_node()
    run.end()
    assert sizes(run)[f"checkpoint_{STEPS:06d}"] == 1
    assert_same_steps(run, alone)


@pytest.mark.slow
@pytest.mark.soak
def test_a_run_goes_on_with_more_workers_when_a_node_joins(scene):
    from survival_scene import STEPS, Run, wait

    run, hold = Run(scene, "grown", scene.folder / "runs", ["cluster.workers=[1, 2]"]), scene.folder / "hold"
    wait(lambda: bool(sizes(run)) or run.driver.poll() is not None, "a checkpoint of one worker")
    hold.touch()  # Ray looks for room 60 s after the workers' start
    assert run.driver.poll() is None and set(sizes(run).values()) == {1}, run.log()
    scene.start_worker_node()
    wait(lambda: len(scene.workers()) == 2 or run.driver.poll() is not None, "a second worker")
    hold.unlink()
    run.end()
    assert sizes(run)[f"checkpoint_{STEPS:06d}"] == 2
    assert_same_steps(run, undisturbed(scene))


@pytest.mark.slow
@pytest.mark.soak
def test_a_run_saves_before_a_node_that_ray_drains_is_gone(scene):
    from survival_scene import RAY, STEPS, Run, wait

    scene.start_worker_node()
    alone = undisturbed(scene)
    scene.environment["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.5"  # instead of 5
    # No other checkpoint before the last step, and seconds for each step.
    settings = ["cluster.workers=[1, 2]", "checkpoint.every=100", "objective.pause=1.5"]
    run = Run(scene, "drained", scene.folder / "runs", settings)
    assert run.until(STEPS // 3), run.log()
    listed = subprocess.run(
        [sys.executable, "-c", SECOND, scene.address], env=scene.environment, stdout=PIPE, check=True
    )
    told = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=60"]
    node = f"--node-id={listed.stdout.decode().split()[-1]}"
    subprocess.run([RAY, "drain-node", f"--address={scene.address}", node, *told], env=scene.environment, check=True)
    wait(lambda: bool(sizes(run)) or run.driver.poll() is not None, "a checkpoint for the notice")
    (scene.folder / "hold").touch()  # else it might reach its last step before the node is gone
    saved = {name: size for name, size in sizes(run).items() if name != f"checkpoint_{STEPS:06d}"}
    assert list(saved.values()) == [2], run.log()
    scene.kill_node()
    (scene.folder / "hold").unlink()
    run.end()
    assert sizes(run)[f"checkpoint_{STEPS:06d}"] == 1
    assert_same_steps(run, alone)
