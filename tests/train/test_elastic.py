"""A run whose number of workers follows the cluster takes the steps that it would have taken with a fixed one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlc_ray.config.train import ClusterSection
from mlc_ray.runs import read_metrics
from mlc_ray.storage import Place
from mlc_ray.train.checkpoint import list_checkpoints


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
def test_a_run_that_loses_a_node_goes_on_with_fewer_workers(tmp_path, smollm2, repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import survival

    scene = survival.Scene(tmp_path, seed=1)
    scene.prepare(smollm2)
    try:
        scene.start_head()
        scene.start_worker_node()
        subprocess.run([sys.executable, "-c", JOINED, scene.address], env=scene.environment, check=True, timeout=90)
        undisturbed = survival.Run(scene, "undisturbed", tmp_path / "runs")
        undisturbed.end()
        settings = (tmp_path / "run.yaml").read_text().replace("workers: 2", "workers: [1, 2]")
        (tmp_path / "run.yaml").write_text(settings)
        run = survival.Run(scene, "shrunk", tmp_path / "runs")
        assert run.until(survival.STEPS // 2), run.log()
        scene.kill_node()
        run.end()
    finally:
        scene.close()
    losses = [
        [(row["step"], row["bundles_consumed"], row["loss/total"]) for row in read_metrics(each.folder)]
        for each in (run, undisturbed)
    ]
    for (step, bundles, loss), (wanted_step, wanted_bundles, wanted) in zip(*losses, strict=True):
        assert (step, bundles) == (wanted_step, wanted_bundles)
        assert loss == pytest.approx(wanted, rel=1e-5)  # seen: 7e-7
    sizes = [
        (checkpoint / "manifest.json").read_json()["world_size"] for checkpoint in list_checkpoints(Place(run.folder))
    ]
    assert sizes[-1] == 1
