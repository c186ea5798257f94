"""Calibrations: kept by device and type, used by later plans."""

from dataclasses import replace

import pytest

from mlc_ray.plan.hardware import gpu_of
from mlc_ray.plan.rates import PlanCalibrationError, assumed_rates, rates_of, read_calibrations, write_calibration


def test_a_calibration_takes_the_place_of_what_is_assumed(tmp_path):
    file = tmp_path / "plan" / "calibration.json"
    assert rates_of(None, "bfloat16", file) == assumed_rates(None, "bfloat16")
    measured = replace(assumed_rates(None, "bfloat16"), flops=7e10, kept=1.1, measured="today")
    write_calibration(measured, file)
    write_calibration(replace(measured, dtype="float32"), file)
    again = replace(measured, flops=8e10)
    write_calibration(again, file)
    assert rates_of(None, "bfloat16", file) == again
    assert len(read_calibrations(file)) == 2
    assert rates_of(gpu_of("h100"), "bfloat16", file).measured is None


def test_float32_is_planned_without_tensor_cores():
    h100 = gpu_of("h100")
    assert assumed_rates(h100, "bfloat16").flops == assumed_rates(h100, "float16").flops == 0.4 * 989e12
    assert assumed_rates(h100, "float32").flops == 0.4 * 67e12


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text('[{"device": 1}]')
    with pytest.raises(PlanCalibrationError, match=r"calibration\.json"):
        read_calibrations(file)
