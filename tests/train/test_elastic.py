"""A run whose number of workers follows the cluster takes the steps that it would have taken with a fixed one."""

from __future__ import annotations

import subprocess
import sys

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


@pytest.mark.slow
@pytest.mark.soak
def test_a_run_grows_with_the_cluster_and_goes_on_with_fewer_workers_when_it_loses_a_node(
    tmp_path, smollm2, repository, monkeypatch
):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    from survival_scene import STEPS, Run, Scene, wait

    def sizes(run):
        return {place.name: (place / MANIFEST).read_json()["world_size"] for place in run.checkpoints(whole=True)}

    scene, hold = Scene(tmp_path / "scene", seed=1), tmp_path / "scene" / "hold"
    scene.prepare(smollm2)
    try:
        scene.start_head()
        run = Run(scene, "elastic", tmp_path / "runs", ["cluster.workers=[1, 2]"])
        wait(lambda: bool(sizes(run)) or run.driver.poll() is not None, "a checkpoint of one worker")
        hold.touch()  # Ray looks for room 60 s after the workers' start
        assert run.driver.poll() is None and set(sizes(run).values()) == {1}, run.log()
        scene.start_worker_node()
        wait(lambda: len(scene.workers()) == 2 or run.driver.poll() is not None, "a second worker")
        hold.unlink()
        wait(lambda: 2 in sizes(run).values() or run.driver.poll() is not None, "a checkpoint of two workers")
        hold.touch()
        assert run.driver.poll() is None, run.log()
        scene.kill_node()
        hold.unlink()
        run.end()
        assert sizes(run)[f"checkpoint_{STEPS:06d}"] == 1
        scene.start_worker_node()
        subprocess.run([sys.executable, "-c", JOINED, scene.address], env=scene.environment, check=True, timeout=90)
        undisturbed = Run(scene, "undisturbed", tmp_path / "runs")
        undisturbed.end()
    finally:
        scene.close()
    rows, others = (read_metrics(each.folder) for each in (run, undisturbed))
    for row, other in zip(rows, others, strict=True):
        assert (row["step"], row["bundles_consumed"]) == (other["step"], other["bundles_consumed"])
        assert row["loss/total"] == pytest.approx(other["loss/total"], rel=1e-5)
