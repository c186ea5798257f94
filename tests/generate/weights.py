"""Another model of the same shape."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def noisy_copy(model: Path, folder: Path) -> Path:
    """The same model with 5 % of noise, by standard deviation, on every matrix."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = load_file(file)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator)
            weights[name] = (tensor.float() + 0.05 * tensor.float().std() * noise).to(tensor.dtype)
    save_file(weights, file, {"format": "pt"})
    return folder
