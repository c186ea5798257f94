"""Which weights does an engine serve? Samples of them, read from the engine and from the file, must be equal.

An engine that takes new weights without restarting could go on serving the old ones, and every score after that would
be of the wrong model. So after a swap a sample is compared, bit for bit: `ROWS` rows of the token embedding, spread
over the vocabulary, and every norm. They are what keeps its name and layout in any engine, on CPU and GPU, sharded or
not; kernels repack the other matrices.

A short training in bfloat16 can leave just these as they were. So the sample has a `mark` of all tensors as well, and
where it says that the file holds other weights than the one before, the engine must give a fixed text other log-probs
(`Engine.swap`).
"""

from __future__ import annotations

import hashlib
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
MARK_ROWS = 4
_INDEX = "model.safetensors.index.json"
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "language_model.model.embed_tokens.weight")


@dataclass(frozen=True)
class WeightSample:
    """Part of a folder's weights: whole tensors by parameter name, of an embedding its rows `rows` [ROWS, H].

    `mark` is a digest of `MARK_ROWS` rows of every tensor, as values of the engine's type: how a file is laid out does
    not matter to it, and only a file whose every sampled row is the same has the same one.
    """

    tensors: Mapping[str, Tensor]
    rows: tuple[int, ...]
    mark: str


class StaleWeightsError(MlcRayError):
    """An engine was given new weights and does not serve them, or it cannot be proved that it does."""


def sampled_rows(height: int, number: int = ROWS) -> tuple[int, ...]:
    """`number` rows of a tensor, or all if it has fewer: ascending, spread evenly from the first to the last."""
    return tuple(sorted({round(index * (height - 1) / (number - 1)) for index in range(number)}))


def weights_folder(model: str | Path) -> Path:
    """The folder on this machine that holds a model's safetensors weights; a hub name's is fetched if need be."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download  # costs 0.3 s, and only hub names need it

    return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", _INDEX]))


def file_sample(model: str | Path, dtype: torch.dtype) -> WeightSample:
    """The sample of the weights of a model (a Hugging Face folder or hub name), as `dtype`.

    Reads only the sampled rows. Raises `StaleWeightsError` for a model whose embedding has no known name.
    """
    folder = weights_folder(model)
    samples: dict[str, Tensor] = {}
    marks: dict[str, str] = {}
    rows: tuple[int, ...] = ()
    for file, names in _tensors(folder).items():
        with safe_open(folder / file, framework="pt") as weights:
            for name in names:
                part = weights.get_slice(name)
                shape = part.get_shape()
                some = [part[row] for row in sampled_rows(shape[0], MARK_ROWS)] if shape else [weights.get_tensor(name)]
                marks[name] = hashlib.sha256(b"".join(_bytes(row.to(dtype)) for row in some)).hexdigest()
                if name in _EMBEDDINGS:
                    rows = sampled_rows(shape[0])
                    samples[name] = torch.stack([part[row] for row in rows]).to(dtype)
                elif len(shape) == 1 and name.endswith("norm.weight"):
                    samples[name] = part[:].to(dtype)
    if not rows:
        raise StaleWeightsError(f"{str(model)!r} has no token embedding named any of {_EMBEDDINGS}; cannot be checked")
    mark = hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()
    return WeightSample(samples, rows, mark)


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
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


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
