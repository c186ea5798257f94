"""How fast a device is: assumed from data sheets, until `mlc-ray plan --calibrate` has measured it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlc_ray.config import TrainConfig
from mlc_ray.errors import MlcRayError
from mlc_ray.plan.hardware import PCIE, Gpu, HardwareError, gpu_key, gpu_of
from mlc_ray.storage import user_cache, write_json_atomic

EFFICIENCY = 0.4
"""Share of a GPU's peak that large rows reach, assumed; others report 17 to 46 % of dense bfloat16 for 0.6B to 8B."""

LAUNCHES = 1e-3
"""Seconds that a forward and backward of a block take however few tokens there are, assumed: some hundred launches."""

ADAMW_BYTES = 28
"""Of a parameter that AdamW reads and writes: master weight and moments, and the gradient in float32."""

READS = 3
"""How often a forward and backward read the weights from memory: once forward and, for both gradients, twice back."""

CPU_FLOPS, CPU_ADAMW, CPU_EXCHANGE = 60e9, 2.5e8, 4e8
"""A worker on one CPU core, assumed: operations, parameters of AdamW, and bytes to other workers, a second."""

CPU_HEAP = {"bfloat16": (1.07, 0.29), "float32": (1.09, 0.03)}
"""`kept` and `grown` of CPUs, as calibrations found on an Intel Xeon: 1.05 to 1.08 and 0.27 to 0.31 in bfloat16, of
SmolLM2-135M and Qwen2.5-Coder-0.5B; in float32 of the first alone."""


class PlanCalibrationError(MlcRayError):
    """The file of calibrations is damaged; the message names it."""


@dataclass(frozen=True)
class Rates:
    """What one worker does in a second.

    Attributes:
        device: what was measured, or assumed of.
        dtype: of the model.
        flops: useful operations, of large rows.
        forward_seconds: of a forward and backward of one block, beside its tokens.
        adamw: parameters that AdamW steps.
        exchange: bytes to other workers; None where the cluster's links say it.
        kept: bytes that a token keeps in a block, as a share of what is counted.
        grown: bytes that a process on a CPU keeps beside after forwards of many shapes, as a share of what is counted
            of one without checkpointing.
        measured: when, as text; None where it is assumed.
        threads: of a worker on a CPU, as measured; None on GPUs.
        crowd, crowded: of so many workers at once on one CPU each has this share of `flops` and `adamw`.
        lora_flops, lora_forward_seconds: the same of adapters, whose base has no gradients; None where not measured.
    """

    device: str
    dtype: str
    flops: float
    forward_seconds: float
    adamw: float
    exchange: float | None
    kept: float = 1.0
    measured: str | None = None
    threads: int | None = None
    crowd: int = 1
    crowded: float = 1.0
    grown: float = 0.0
    lora_flops: float | None = None
    lora_forward_seconds: float | None = None

    def training(self, *, lora: bool) -> Rates:
        """Of runs with adapters, or of others."""
        if not lora or self.lora_flops is None or self.lora_forward_seconds is None:
            return self
        return replace(self, flops=self.lora_flops, forward_seconds=self.lora_forward_seconds)

    def among(self, workers: int) -> Rates:
        """Of each of so many workers on one node: as measured with a `crowd`, and in between by a straight line."""
        if self.crowd == 1 or workers == 1:
            return self
        share = 1 - (1 - self.crowded) * min(1.0, (workers - 1) / (self.crowd - 1))
        return replace(self, flops=share * self.flops, adamw=share * self.adamw)


def assumed_rates(gpu: Gpu | None, dtype: str) -> Rates:
    """By the data sheet; of a CPU as were measured."""
    if gpu is None:
        kept, grown = CPU_HEAP["float32" if dtype == "float32" else "bfloat16"]
        return Rates("cpu", dtype, CPU_FLOPS, 0.0, CPU_ADAMW, CPU_EXCHANGE, kept, grown=grown)
    peak = gpu.single if dtype == "float32" else gpu.peak
    return Rates(gpu.name, dtype, EFFICIENCY * peak, LAUNCHES, gpu.bandwidth / ADAMW_BYTES, None)


def calibration_file() -> Path:
    """Where calibrations of this machine are: `plan/calibration.json` in the user's cache (`$MLC_RAY_CACHE`)."""
    return user_cache() / "plan" / "calibration.json"


def read_calibrations(file: Path | None = None) -> list[Rates]:
    """All calibrations; none where there is no file.

    Raises:
        PlanCalibrationError: It is damaged.
    """
    file = calibration_file() if file is None else file
    if not file.is_file():
        return []
    try:
        return [Rates(**each) for each in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise PlanCalibrationError(
            f"{str(file)!r} is damaged ({error}); remove it, and run mlc-ray plan --calibrate"
        ) from None


def write_calibration(rates: Rates, file: Path | None = None) -> Path:
    """Keep it in the place of an earlier one of the same device, type and threads; returns the file."""
    file = calibration_file() if file is None else file
    own = (rates.device, rates.dtype, rates.threads)
    others = [each for each in read_calibrations(file) if (each.device, each.dtype, each.threads) != own]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, [asdict(each) for each in [*others, rates]])
    return file


def rates_of(gpu: Gpu | None, dtype: str, file: Path | None = None, *, threads: int | None = None) -> Rates:
    """The calibration of a device, or what is assumed of it.

    Of a CPU that with as many threads as workers have, else one with others, which a plan says.
    """
    name = "cpu" if gpu is None else gpu.name
    found = [each for each in read_calibrations(file) if (each.device, each.dtype) == (name, dtype)]
    found.sort(key=lambda each: each.threads == threads, reverse=True)
    return found[0] if found else assumed_rates(gpu, dtype)


def said_of(rates: Rates) -> str:
    """How fast a worker or an engine is taken to be, and of what calibration that is, if of any."""
    rate = f"{rates.flops / 1e12:.3g}e12 useful operations a second"
    if rates.measured is None:
        return f"{rate} ({rates.device}, not calibrated: mlc-ray plan --calibrate on such a machine)"
    return f"{rate}, as calibrated ({rates.measured})"


def threads_of(config: TrainConfig) -> int:
    """Threads that a worker of a run computes with on a CPU."""
    return max(1, int(config.cluster.cpus_per_worker))


def bandwidth_of(name: str, adamw: float) -> float:
    """Bytes that a GPU reads in a second: by its data sheet, else as AdamW did, 28 for each of `adamw` parameters."""
    try:
        return gpu_of(name).bandwidth
    except HardwareError:
        return ADAMW_BYTES * adamw


def gpu_here(name: str, memory: int, calibrations: Sequence[Rates]) -> Gpu:
    """A GPU of this machine: by its data sheet, or where there is none of it by what its calibrations measured.

    Args:
        name: PyTorch's.
        memory: bytes that CUDA offers.
        calibrations: of this machine.

    Raises:
        HardwareError: Neither is there.
    """
    try:
        return replace(gpu_of(name), memory=memory)
    except HardwareError as error:
        key = gpu_key(name)
        own = {each.dtype: each for each in calibrations if each.device == key}
        if not own:
            raise HardwareError(f"{error}; or measure it: mlc-ray plan --calibrate --config FILE") from None
    measured = next(iter(own.values()))
    single, peak = own.get("float32", measured).flops, own.get("bfloat16", measured).flops
    return Gpu(key, memory, ADAMW_BYTES * measured.adamw, PCIE, peak / EFFICIENCY, single / EFFICIENCY)
