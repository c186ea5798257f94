"""Verifying which weights an engine serves: samples read from the engine and from the file must be equal.

An engine that loads new weights without restarting could keep serving some or all of the old ones, and every later
score would be of the wrong model. So after a swap a sample is compared, value for value:

- rows of the token embedding, spread over the vocabulary, and every norm, as the engine's parameters hold them;
- a few elements of every matrix, *through the kernel that serves it*: a linear map of unit vectors gives back the
  columns of its matrix, exactly in any floating-point type, however a kernel repacks or shards it. Parameters alone
  would not do: vLLM's CPU kernels keep packed copies, and a reload does not update one of them (`renew_heads`).

Weights that are not found by name (experts of a mixture, biases) are not sampled. For those, and for graphs captured
before the swap, there is a second check: where samples differ from those before, so must the log-probs of a fixed text
(`Engine.swap`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mlc_ray.errors import MlcRayError
from mlc_ray.storage import local_model, pinned_model

EMBEDDING_ROWS = 64
BLOCK_ROWS, BLOCK_COLUMNS = 4, 32
_INDEX = "model.safetensors.index.json"
_EMBEDDINGS = ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight")
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Block:
    """Elements of a matrix: `values` [R, C] at `rows` x `columns`, both ascending."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class WeightSample:
    """Part of a folder's weights, by the names of its tensors, in the engine's type.

    `embedding` holds whole rows, `norms` whole vectors as one row, `matrices` a few elements of every matrix that is
    multiplied with, the LM head among them also where it shares the embedding's weights. No name is in two of them.
    """

    embedding: Mapping[str, Block]
    norms: Mapping[str, Block]
    matrices: Mapping[str, Block]

    @property
    def blocks(self) -> dict[str, Block]:
        """All of it."""
        return {**self.norms, **self.embedding, **self.matrices}

    @property
    def wanted(self) -> dict[str, Any]:
        """What a `WeightSampler` is asked for: `held_samples(**wanted)`."""
        return {
            "embedding": {name: block.rows for name, block in self.embedding.items()},
            "norms": list(self.norms),
            "matrices": {name: (block.rows, block.columns) for name, block in self.matrices.items()},
        }

    def equals(self, other: WeightSample) -> bool:
        """Whether the other sample has the same names and values."""
        mine, theirs = self.blocks, other.blocks
        return mine.keys() == theirs.keys() and all(torch.equal(mine[n].values, theirs[n].values) for n in mine)


class StaleWeightsError(MlcRayError):
    """An engine was given new weights and does not serve them, or it cannot be proved that it does."""


def spread(length: int, number: int) -> tuple[int, ...]:
    """`number` indices below `length`, or all if there are fewer: ascending, evenly from the first to the last."""
    return tuple(sorted({round(index * (length - 1) / (number - 1)) for index in range(number)}))


def weights_folder(model: str | Path) -> Path:
    """The folder on this machine with a model's safetensors weights; a URL's or hub name's are fetched if need be."""
    return Path(local_model(pinned_model(str(model))))


def adapter_reach(folder: str | Path) -> float:
    """A bound on what a LoRA adapter (peft folder) adds to any element of a matrix, by Cauchy and Schwarz.

    |scale x (B A)_ij| <= scale x max_i |B_i| x max_j |A_j|, over rows of B [out, r] and columns of A [r, in].
    """
    folder = Path(folder)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    longest: dict[str, float] = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a dict
            axis = 0 if ".lora_A." in name else 1
            longest[name] = float(weights.get_tensor(name).float().norm(dim=axis).max())
    reaches = (longest[a] * longest[a.replace(".lora_A.", ".lora_B.")] for a in longest if ".lora_A." in a)
    return float(scale * max(reaches))


def file_sample(model: str | Path, dtype: torch.dtype) -> WeightSample:
    """The sample of the weights of a model (a Hugging Face folder or hub name), as `dtype`.

    Reads only the sampled rows.

    Raises:
        StaleWeightsError: the model's embedding has no known name.
    """
    folder = weights_folder(model)
    embedding: dict[str, Block] = {}
    norms: dict[str, Block] = {}
    matrices: dict[str, Block] = {}
    for file, names in _tensors(folder).items():
        with safe_open(folder / file, framework="pt") as weights:
            for name in names:
                part = weights.get_slice(name)
                shape = part.get_shape()
                if name in _EMBEDDINGS:
                    embedding[name] = _block(part, spread(shape[0], EMBEDDING_ROWS), tuple(range(shape[1])), dtype)
                elif len(shape) == 1 and name.endswith("norm.weight"):
                    norms[name] = Block((0,), tuple(range(shape[0])), part[:].unsqueeze(0).to(dtype))
                elif len(shape) == 2 and name.endswith(".weight"):
                    rows, columns = spread(shape[0], BLOCK_ROWS), spread(shape[1], BLOCK_COLUMNS)
                    matrices[name] = _block(part, rows, columns, dtype)
    if not embedding:
        raise StaleWeightsError(f"{str(model)!r} has no token embedding named any of {_EMBEDDINGS}; cannot be checked")
    (tied, *_) = embedding.values()
    columns = spread(len(tied.columns), BLOCK_COLUMNS)
    matrices.setdefault(_HEAD, Block(tied.rows, columns, tied.values[:, list(columns)]))
    return WeightSample(embedding, norms, matrices)


def _block(part: Any, rows: tuple[int, ...], columns: tuple[int, ...], dtype: torch.dtype) -> Block:
    return Block(rows, columns, torch.stack([part[row][list(columns)] for row in rows]).to(dtype))


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

    def renew_heads(self) -> None:
        """Have the kernel of an LM head take up the weights it shares with the embedding.

        vLLM reloads the embedding and leaves out a head that is tied to it; on CPU, its kernel keeps a packed copy of
        the old ones.
        """
        for module in self._model().modules():
            if hasattr(module, "shard_indices") and _serves_plain_matrix(module):
                module.quant_method.process_weights_after_loading(module)  # type: ignore[operator, union-attr]

    @torch.no_grad()
    def held_samples(
        self,
        embedding: Mapping[str, Sequence[int]],
        norms: Sequence[str],
        matrices: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    ) -> dict[str, list[tuple[list[int], list[int], Any]]]:
        """What this worker holds of what `WeightSample.wanted` names: by name, rows, columns and values [R, C].

        Values are float32 arrays, which hold those of any engine exactly. A norm is one row.
        """
        model = self._model()
        found: dict[str, list[tuple[list[int], list[int], Any]]] = {}
        for path, module in model.named_modules():
            name, parameter = f"{path}.weight", getattr(module, "weight", None)
            if name in norms and parameter is not None:
                found[name] = [([0], list(range(len(parameter))), _array(parameter.unsqueeze(0)))]
            if name in embedding and parameter is not None:
                start, end = _vocabulary(module, len(parameter))
                rows = [row for row in embedding[name] if start <= row < end]
                found[name] = [
                    (rows, list(range(parameter.shape[1])), _array(parameter[[row - start for row in rows]]))
                ]
            for shard in _shards(model, path, module):
                if shard.name in matrices:
                    found.setdefault(shard.name, []).append(_served(module, shard, *matrices[shard.name]))
        return found

    def _model(self) -> nn.Module:
        model: nn.Module = self.model_runner.get_model()  # type: ignore[attr-defined]
        return model


@dataclass(frozen=True)
class _Shard:
    """Where a module holds a matrix of the file: its `rows` are outputs from `offset` on, its `columns` the inputs."""

    name: str
    offset: int
    rows: range
    columns: range


def _shards(model: nn.Module, path: str, module: Any) -> Iterator[_Shard]:
    """The matrices of the file, or shards of them, that a module of vLLM multiplies with; none where it has no plain
    one, or the file's layout is not known.
    """
    if not _serves_plain_matrix(module):
        return
    if hasattr(module, "shard_indices"):  # over the vocabulary: a head, or the embedding where it is one too
        if path.endswith("lm_head") or not hasattr(model, "lm_head"):
            yield _Shard(_HEAD, 0, range(*_vocabulary(module, len(module.weight))), range(module.embedding_dim))
        return
    parent, _, last = path.rpartition(".")
    sizes = list(module.output_partition_sizes)
    parts = list(getattr(model, "packed_modules_mapping", {}).get(last, [last]))
    inputs = getattr(module, "input_size_per_partition", module.input_size)
    by_inputs = inputs != module.input_size
    # A module without `input_size_per_partition` is whole in every worker.
    rank, of = (module.tp_rank, module.tp_size) if hasattr(module, "input_size_per_partition") else (0, 1)
    if len(parts) != len(sizes):
        if len(parts) > 1 or of > 1:
            return
        sizes = [sum(sizes)]  # one matrix in the file as well
    columns = range(rank * inputs, (rank + 1) * inputs) if by_inputs else range(inputs)
    offset = 0
    for index, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        shard = 0 if by_inputs else rank // (getattr(module, "num_kv_head_replicas", 1) if index else 1)
        name = f"{parent}.{part}.weight" if parent else f"{part}.weight"
        yield _Shard(name, offset, range(shard * size, (shard + 1) * size), columns)
        offset += size


def _serves_plain_matrix(module: Any) -> bool:
    method = getattr(module, "quant_method", None)
    kind = hasattr(module, "shard_indices") or hasattr(module, "output_partition_sizes")
    return kind and type(method).__name__.startswith("Unquantized") and isinstance(module.weight, Tensor)


def _served(
    module: Any, shard: _Shard, rows: Sequence[int], columns: Sequence[int]
) -> tuple[list[int], list[int], Any]:
    """The elements of a matrix at those of the rows and columns that a shard has, by its module's own kernel."""
    rows = [row for row in rows if row in shard.rows]
    columns = [column for column in columns if column in shard.columns]
    units = torch.zeros(len(columns), len(shard.columns), dtype=module.weight.dtype, device=module.weight.device)
    units[range(len(columns)), [column - shard.columns.start for column in columns]] = 1
    outputs = module.quant_method.apply(module, units)  # [C, outputs]
    return rows, columns, _array(outputs[:, [shard.offset + row - shard.rows.start for row in rows]].T)


def _vocabulary(module: Any, rows: int) -> tuple[int, int]:
    """The rows of the vocabulary that this worker's shard of an embedding or a head holds."""
    shard = getattr(module, "shard_indices", None)
    return (0, rows) if shard is None else (shard.org_vocab_start_index, shard.org_vocab_end_index)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()


def compare_samples(expected: WeightSample, held: Sequence[Mapping[str, Any]], model: str) -> None:
    """Check that the workers of an engine hold exactly `expected` (`file_sample`).

    All of the embedding's rows must be held, a norm or matrix by every worker that has one of its name, and of the
    matrices one at least.

    Raises:
        StaleWeightsError: they do not.
    """
    for name, block in expected.blocks.items():
        parts = [part for worker in held for part in worker.get(name, [])]
        if not parts and name not in expected.embedding:
            continue
        row_at, column_at = ({index: at for at, index in enumerate(axis)} for axis in (block.rows, block.columns))
        wanted = block.values.float()
        whole = torch.full_like(wanted, torch.nan)
        same = True
        for rows, columns, values in parts:
            at_rows = torch.tensor([row_at[row] for row in rows], dtype=torch.long)
            at_columns = torch.tensor([column_at[column] for column in columns], dtype=torch.long)
            index = at_rows.unsqueeze(1), at_columns.unsqueeze(0)
            whole[index] = torch.from_numpy(values)
            same &= torch.equal(whole[index], wanted[index])
        if not same or not torch.equal(whole, wanted):
            raise StaleWeightsError(
                f"after a swap to {model!r} the engine does not serve its weights: {name} differs; nothing was scored"
            )
    if not any(name in worker for worker in held for name in expected.matrices):
        raise StaleWeightsError(
            f"after a swap to {model!r} no matrix of the engine was found by its name, so it cannot be proved what "
            "it serves; nothing was scored"
        )
