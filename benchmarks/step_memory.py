"""Peak memory: on CUDA what PyTorch allocated, on a CPU the peak resident set, reset where the system can (Linux)."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def reset_peak(device: str) -> int:
    """Reset the peak where that is possible; returns the peak after that."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # resets VmHWM
    return read_peak(device)


def read_peak(device: str) -> int:
    """Peak bytes of this process since the last reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
