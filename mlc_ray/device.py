"""What a machine has: the number type that it computes in natively, and the memory that a process may take.

The type is bfloat16 where its GPU or CPU has instructions for it, else float32. A CPU without them computes bfloat16
several times slower than float32 (8 times on an AMD EPYC with AVX2 alone: a linear map of 576 x 1536 over 512 rows
takes 60 ms against 7.4 ms), and so does a GPU from before Ampere. This module looks at the machine it runs on;
`cluster.native_dtype` asks every node that may compute, and takes the lowest common answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
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


class VisibleGpu(NamedTuple):
    """A GPU as PyTorch names it, and the bytes of its memory."""

    name: str
    memory: int


def visible_gpus() -> list[VisibleGpu]:
    """Each GPU that this process sees."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [VisibleGpu(str(each.name), int(each.total_memory)) for each in found]


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


class HostMemory(NamedTuple):
    """Bytes of this machine's memory that this process may have.

    Attributes:
        total: with what is in use: of the machine, or the least limit of a control group, as of a container or a job.
        available: what programs can still get, within all limits; 0 if not on Linux.
        group: the control group whose limit `total` is; None where none has less than the machine.
    """

    total: int
    available: int
    group: str | None


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The memory of this machine, within the limits of the control groups that this process is in, and of those above.

    Both versions of control groups are read, version 1 where its memory controller has a folder of its own. File
    content that was not read lately counts as available, since the kernel drops it first. Neither Ray's own function
    (2.60), which reads the topmost group alone, nor psutil's, which reads none, sees the limit of a Slurm job.

    Args:
        root: where proc/ and sys/ are.
    """
    if not (machine := _numbers(root / "proc/meminfo")):
        return HostMemory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0, None)
    total, available, group = machine["MemTotal:"] * 1024, machine["MemAvailable:"] * 1024, None
    for name, most, used in _limits(root):
        available = min(available, most - used)
        if most < total:
            total, group = most, name
    return HostMemory(total, max(0, available), group)


class _Files(NamedTuple):
    """Where one version of control groups says what: its folder, and files and a line of memory.stat in a group's."""

    folder: str
    limit: str
    used: str
    droppable: str


_V1 = _Files("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _limits(root: Path) -> Iterator[tuple[str, int, int]]:
    """Each group of this process that limits its memory, the topmost last: its name, its limit, and what it uses."""
    for files in (_V1, _V2):
        for name in _own_groups(root / "proc/self/cgroup", of_memory=files is _V1):
            folder = root / files.folder / name
            if not (folder / files.limit).is_file():  # the group lies outside of what is mounted here
                continue
            limit = (folder / files.limit).read_text(encoding="ascii").strip()
            if limit != "max":  # version 1 has a number above all memory
                dropped = _numbers(folder / "memory.stat").get(files.droppable, 0)
                used = int((folder / files.used).read_text(encoding="ascii"))
                yield f"/{name}", int(limit), used - dropped


def _own_groups(told: Path, *, of_memory: bool) -> list[str]:
    """Paths of this process' control group and of those above it, to the root.

    Of version 1's hierarchy of the memory controller, or of version 2's, which is number 0 and names no controller.
    """
    lines = [line.split(":", 2) for line in told.read_text(encoding="utf-8").splitlines()] if told.is_file() else []
    own = [path for number, names, path in lines if ("memory" in names.split(",") if of_memory else number == "0")]
    parts = [part for part in (own[0] if own else "").split("/") if part]
    if ".." in parts:  # outside of what is mounted here
        parts = []
    return ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _numbers(told: Path) -> dict[str, int]:
    """The first number of each line, by the word before it; none where there is no such file."""
    lines = [line.split() for line in told.read_text(encoding="ascii").splitlines()] if told.is_file() else []
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
