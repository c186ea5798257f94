"""Which weights does an engine serve? Samples of them, read from the engine and from the file, must be equal.

An engine that takes new weights without restarting could go on serving the old ones, and every score after that would
be of the wrong model. So after a swap a sample is compared, bit for bit: `ROWS` rows of the token embedding, spread
over the vocabulary, and every norm. They are what keeps its name and layout in any engine, on CPU and GPU, sharded or
not; kernels repack the other matrices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mlc_ray.errors import MlcRayError

ROWS = 64
_INDEX = "model.safetensors.index.json"
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "language_model.model.embed_tokens.weight")


@dataclass(frozen=True)
class WeightSample:
    """Part of a folder's weights: whole tensors by parameter name, of an embedding its rows `rows` [ROWS, H]."""

    tensors: Mapping[str, Tensor]
    rows: tuple[int, ...]


class StaleWeightsError(MlcRayError):
    """An engine was given new weights and does not serve them, or it cannot be proved that it does."""


def sampled_rows(vocabulary: int) -> tuple[int, ...]:
    """The rows of the embedding that are compared, ascending, from the first to the last."""
    return tuple(sorted({round(index * (vocabulary - 1) / (ROWS - 1)) for index in range(ROWS)}))


def file_sample(folder: str | Path, dtype: torch.dtype) -> WeightSample:
    """The sample of the weights in a Hugging Face folder, as `dtype`.

    Reads only the sampled rows. Raises `StaleWeightsError` for a model whose embedding has no known name.
    """
    folder = Path(folder)
    samples: dict[str, Tensor] = {}
    rows: tuple[int, ...] = ()
    for file, names in _tensors(folder).items():
        with safe_open(folder / file, framework="pt") as weights:
            for name in names:
                part = weights.get_slice(name)
                shape = part.get_shape()
                if name in _EMBEDDINGS:
                    rows = sampled_rows(shape[0])
                    samples[name] = torch.stack([part[row] for row in rows]).to(dtype)
                elif len(shape) == 1 and name.endswith("norm.weight"):
                    samples[name] = part[:].to(dtype)
    if not rows:
        raise StaleWeightsError(f"{str(folder)!r} has no token embedding named any of {_EMBEDDINGS}; cannot be checked")
    return WeightSample(samples, rows)


def _tensors(folder: Path) -> dict[str, list[str]]:
    index = folder / _INDEX
    if index.is_file():
        files: dict[str, list[str]] = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(file, []).append(name)
        return files
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return {"model.safetensors": list(weights.keys())}


class WeightSampler:
    """Mixed into the engine's workers (`worker_extension_cls`): what each of them holds of a sample."""

    def held_samples(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Any]:
        """By name: a norm as bytes, of an embedding the sampled rows that this worker holds, {row: bytes}."""
        model: nn.Module = self.model_runner.get_model()  # type: ignore[attr-defined]
        found: dict[str, Any] = {}
        for name in names:
            module, parameter = _parameter(model, name)
            if parameter is None:
                continue
            if name in _EMBEDDINGS:
                start, end = _held(module, parameter)
                found[name] = {row: _bytes(parameter[row - start]) for row in rows if start <= row < end}
            else:
                found[name] = _bytes(parameter)
        return found


def _parameter(model: nn.Module, name: str) -> tuple[nn.Module, Tensor | None]:
    path, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return model, None
    module = getattr(module, "base_layer", module)  # wrapped where the engine serves LoRA adapters
    return module, getattr(module, last, None)


def _held(module: nn.Module, parameter: Tensor) -> tuple[int, int]:
    """The rows of the vocabulary that this worker's shard of the embedding holds."""
    shard = getattr(module, "shard_indices", None)
    if shard is None:
        return 0, parameter.shape[0]
    return shard.org_vocab_start_index, shard.org_vocab_end_index


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def compare_samples(expected: WeightSample, held: Sequence[Mapping[str, Any]], folder: str) -> None:
    """Raise `StaleWeightsError` unless the workers of an engine hold exactly `expected` (`file_sample`).

    Every embedding row must be held by a worker, and a norm by every worker that has one of its name.
    """
    for name, sample in expected.tensors.items():
        parts = [worker[name] for worker in held if name in worker]
        if name in _EMBEDDINGS:
            merged = {row: data for part in parts for row, data in part.items()}
            wanted = [_bytes(row) for row in sample]
            # ascending, as they were sampled; a row that no worker holds is missing here
            same = [merged[row] for row in sorted(merged)] == wanted
        else:
            same = all(part == _bytes(sample) for part in parts)
        if not same:
            raise StaleWeightsError(
                f"after a swap to {folder!r} the engine does not serve its weights: {name} differs; nothing was scored"
            )
