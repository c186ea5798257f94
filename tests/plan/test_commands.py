"""Plans where commands use them: a real run is refused, and a real probe measures."""

import pytest

from mlc_ray.api import train
from mlc_ray.plan.rates import rates_of, write_calibration
from mlc_ray.plan.runs import PlanError
from mlc_ray.plan.shapes import published_config
from mlc_ray.train.calibrate import calibrate
from tests.plan.test_memory import run


@pytest.mark.slow
def test_a_run_that_no_machine_here_holds_is_refused_before_anything_is_read(ray_local, tmp_path):
    published_config("72b").save_pretrained(tmp_path / "model")  # without weights, which nobody asks for
    config = run(
        model={"path": str(tmp_path / "model")}, data={"train": [{"path": "sample:train"}]},
        cluster={"accelerator": "cpu", "cpus_per_worker": 0.5},
    )  # fmt: skip
    config = config.model_copy(update={"output_dir": str(tmp_path / "runs")})
    with pytest.raises(PlanError, match=r"model with engine\.stage=2 on 1 x cpu needs") as said:
        train(config)
    assert "the largest part is AdamW's moments" in str(said.value)
    assert not (tmp_path / "runs" / config.name / "config.yaml").exists()


@pytest.mark.slow
def test_a_calibration_measures_this_machine(small_llama, tmp_path):
    config = run(
        model={"path": str(small_llama), "dtype": "float32", "lora": {"rank": 4}},
        data={"train": [{"path": "sample:train"}]}, cluster={"accelerator": "cpu"},
    )  # fmt: skip
    rates = calibrate(config)
    assert rates.measured is not None
    assert rates.flops > 1e8
    assert rates.adamw > 1e6
    assert rates.exchange > 1e6
    assert 0.7 < rates.kept < 4
    assert rates.crowd >= 1 and 0 < rates.crowded <= 1 and rates.grown >= 0
    write_calibration(rates, tmp_path / "calibration.json")
    assert rates.threads == 1
    assert rates_of(None, "float32", tmp_path / "calibration.json", threads=1) == rates
