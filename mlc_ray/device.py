"""The number type a machine computes in natively: bfloat16 where its GPU or CPU has instructions for it, else float32.

A CPU without them computes bfloat16 several times slower than float32 (8 times on an AMD EPYC with AVX2 alone: a linear
map of 576 x 1536 over 512 rows takes 60 ms against 7.4 ms), and so does a GPU from before Ampere. This module looks at
the machine it runs on; `cluster.native_dtype` asks every node that may compute, and takes the lowest common answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

Dtype = Literal["bfloat16", "float32"]

CPU_FLAGS = ("avx512_bf16", "amx_bf16")
"""Flags of /proc/cpuinfo, one of which says that an x86 CPU multiplies bfloat16 matrices."""
GPU_CAPABILITY = (8, 0)
"""The first CUDA capability with bfloat16 in its tensor cores: Ampere."""


class Native(NamedTuple):
    """The type a machine computes in natively, and what that was told from."""

    dtype: Dtype
    reason: str


def native_dtype(*, gpu: bool) -> Native:
    """What this machine computes in natively, on all the GPUs that the process sees or else on its CPU."""
    return of_gpus(gpu_capabilities()) if gpu else of_cpu(cpu_flags())


def resolved(dtype: str, *, gpu: bool) -> str:
    """`dtype`, with "auto" replaced by what this machine computes in natively."""
    return native_dtype(gpu=gpu).dtype if dtype == "auto" else dtype


def of_cpu(flags: Iterable[str]) -> Native:
    """What a CPU with these flags computes in natively."""
    found = [name for name in CPU_FLAGS if name in set(flags)]
    if found:
        return Native("bfloat16", f"the CPU has {found[0]}")
    return Native("float32", f"the CPU has neither {' nor '.join(CPU_FLAGS)}")


def of_gpus(capabilities: Sequence[tuple[int, int]]) -> Native:
    """What GPUs of these CUDA capabilities compute in natively, all of them; float32 where there is none."""
    if not capabilities:
        return Native("float32", "no GPU is visible")
    major, minor = min(capabilities)
    if (major, minor) >= GPU_CAPABILITY:
        return Native("bfloat16", f"every GPU has capability {major}.{minor} or more")
    return Native("float32", f"a GPU has capability {major}.{minor}, below {'.'.join(map(str, GPU_CAPABILITY))}")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets that every core of this machine has, by the kernel's names; none where there is no such file."""
    if not cpuinfo.is_file():
        return frozenset()
    lines = re.findall(r"^flags\s*:(.*)$", cpuinfo.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return frozenset.intersection(*(frozenset(line.split()) for line in lines)) if lines else frozenset()


def gpu_capabilities() -> list[tuple[int, int]]:
    """CUDA capability of each GPU that this process sees."""
    import torch

    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
}
"""What NVIDIA's data sheets give for dense bfloat16, in 1e12 operations a second, by how PyTorch's names begin."""


def peak_tflops(name: str, dtype: str) -> float | None:
    """Peak of the GPU that PyTorch calls `name`, in 1e12 operations a second; None where it is not known."""
    known = [begin for begin in PEAK_TFLOPS if f"{name} ".startswith((f"{begin} ", f"{begin}-"))]
    return PEAK_TFLOPS[max(known, key=len)] if known and dtype == "bfloat16" else None


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that programs can still get here; 0 if not on Linux.

    That is the least of what is free of the machine, and within the limit of each control group (v2) that this process
    is in: its own, as of a container or a Slurm job, and those above it. File content that was not read lately counts
    as free, since the kernel drops it first.

    Args:
        root: where proc/ and sys/ are.
    """
    if not (told := root / "proc/meminfo").is_file():
        return 0
    free = _numbers(told)["MemAvailable:"] * 1024
    groups = root / "sys/fs/cgroup"
    for group in (groups / name for name in _own_groups(root / "proc/self/cgroup")):
        limit, used, statistics = group / "memory.max", group / "memory.current", group / "memory.stat"
        if limit.is_file() and used.is_file() and (most := limit.read_text(encoding="ascii").strip()) != "max":
            dropped = _numbers(statistics).get("inactive_file", 0) if statistics.is_file() else 0
            free = min(free, int(most) - int(used.read_text(encoding="ascii")) + dropped)
    return max(0, free)


def _own_groups(told: Path) -> list[str]:
    """Paths of this process' control group and of those above it, to the root."""
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    if own.startswith(".."):  # outside of what is mounted here
        own = ""
    parts = [part for part in own.split("/") if part]
    return ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _numbers(told: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    lines = [line.split() for line in told.read_text(encoding="ascii").splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
