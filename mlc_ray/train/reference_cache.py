"""The frozen reference's outputs for each bundle, computed once as a Ray Data stage and kept as an artefact."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch

from mlc_ray.config import ModelSection, TrainConfig
from mlc_ray.data.artifacts import artifact_made_here, is_made, local_artifact
from mlc_ray.data.batches import BatchError, collate
from mlc_ray.data.store import TokenArtifact
from mlc_ray.losses.objective import Objective
from mlc_ray.progress import phase
from mlc_ray.storage import (
    Place,
    checksum,
    fingerprint,
    fingerprint_model,
    library_versions,
    read_manifest,
    write_manifest,
)
from mlc_ray.train.model import ModelError, load_policy
from mlc_ray.train.reference import ReferenceModel, asked_of_reference
from mlc_ray.types import ReferenceRows, move

_COLUMNS = ("chosen", "rejected", "state")
BUNDLES_PER_FORWARD = 8
_BLOCK_ROWS = 256
_FAULT, _KIND = "fault", "error"
_ERRORS = {error.__name__: error for error in (BatchError, ModelError)}
"""What scoring may raise of ours."""


def prepare_reference(
    config: TrainConfig, tokens: TokenArtifact, *, layer: int, cache_dir: Path | Place, gpu: bool
) -> Place:
    """The folder of what the objective needs of the reference, for every bundle; computed unless there.

    The key holds the token rows' fingerprint, the model's weights, the type and the kernels of the forward, and what is
    needed: log-probs, or tapped states at `layer`, or both. An incomplete folder is computed again; where another run
    that shares `cache_dir` is faster, its folder is used.
    """
    needed = asked_of_reference(Objective(config), layer)
    key = fingerprint(
        {
            "tokens": tokens.fingerprint,
            "model": fingerprint_model(config.model.path),
            "dtype": config.model.dtype,
            "attention": config.model.attention,
            "kernels": config.model.kernels,
            "device": "gpu" if gpu else "cpu",
            **needed,
        }
    )
    folder = Place(cache_dir) / f"reference-{key}"
    if is_made(folder):
        return folder
    with artifact_made_here(folder) as temporary:
        _compute(config, tokens, needed, temporary, gpu=gpu)
        write_manifest(
            temporary,
            fingerprint=key,
            tokens=tokens.fingerprint,
            bundles=len(tokens),
            versions=library_versions(),
            checksums={path.name: checksum(path) for path in temporary.iterdir()},
        )
    return folder


def load_reference(folder: Path | Place) -> ReferenceRows:
    """What the reference says of each row of the token artefact; mapped, so that all processes of a node share it."""
    here = local_artifact(Place(folder), read_manifest(folder))
    found = {name: here / column_file(name) for name in _COLUMNS}
    return ReferenceRows(**{name: np.load(path, mmap_mode="r") for name, path in found.items() if path.exists()})


def column_file(name: str) -> str:
    """The file of a column of `ReferenceRows`: an array with a value for each row of the token artefact."""
    return f"{name}.npy"


def _compute(config: TrainConfig, tokens: TokenArtifact, needed: dict[str, Any], folder: Path, *, gpu: bool) -> None:
    """Ask the reference for each row, and write its columns into `folder`, in whatever order rows come back."""
    ids = pa.table({"row": np.arange(len(tokens))})
    # Blocks of the driver's, not range: its read tasks ask for a whole CPU each, which waits without end where none is
    # free.
    blocks = [ids.slice(start, _BLOCK_ROWS) for start in range(0, ids.num_rows, _BLOCK_ROWS)]
    scored = ray.data.from_blocks(blocks).map_batches(
        ReferenceScorer,
        fn_constructor_kwargs={
            "tokens_folder": str(tokens.folder),
            "settings": config.model.model_dump(),
            "needed": needed,
            "gpu": gpu,
        },
        batch_size=BUNDLES_PER_FORWARD,
        compute=ray.data.ActorPoolStrategy(size=min(config.cluster.least_workers, len(blocks))),
        num_cpus=config.cluster.cpus_per_worker,
        num_gpus=1 if gpu else 0,
    )
    columns: dict[str, np.memmap[Any, Any]] = {}
    with phase("reference", total=len(tokens), unit="bundles") as progress:
        for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            if _FAULT in table.column_names:
                kind, message = (table[name].drop_null()[0].as_py() for name in (_KIND, _FAULT))
                raise _ERRORS[kind](message)
            rows = table["row"].to_numpy()
            for name in set(table.column_names) - {"row"}:
                values = _array(table[name].combine_chunks())
                if name not in columns:
                    columns[name] = _mapped(folder / column_file(name), values.dtype, (len(tokens), *values.shape[1:]))
                columns[name][rows] = values
            progress.advance(table.num_rows)
    if progress.done != len(tokens):
        raise RuntimeError(f"the reference was asked for {len(tokens)} bundles and said something of {progress.done}")
    for column in columns.values():
        column.flush()


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    created: np.memmap[Any, Any] = np.lib.format.open_memmap(path, "w+", dtype, shape)  # type: ignore[no-untyped-call]
    return created


def _array(column: pa.Array) -> np.ndarray:
    """Numbers as [N], lists of a fixed size as [N, size]."""
    values: np.ndarray = column.flatten().to_numpy() if pa.types.is_fixed_size_list(column.type) else column.to_numpy()
    return values.reshape(len(column), *([-1] if pa.types.is_fixed_size_list(column.type) else []))


class ReferenceScorer:
    """A Ray Data actor that holds the reference model and scores bundles by row index."""

    def __init__(self, tokens_folder: str, settings: dict[str, Any], needed: dict[str, Any], gpu: bool) -> None:
        self.tokens = TokenArtifact.open(tokens_folder)
        self.device = torch.device("cuda" if gpu else "cpu")
        self.settings = ModelSection(**settings)
        self.needed = needed

    @cached_property
    def model(self) -> ReferenceModel:
        """Loaded by the first batch: of an error while an actor is made, Ray keeps the text only."""
        return ReferenceModel(load_policy(self.settings), **self.needed).to(self.device).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """`_score`, or a row with an error of ours: raised here, Ray would wrap it and add to its message."""
        try:
            return self._score(batch)
        except tuple(_ERRORS.values()) as error:
            return pa.table({_FAULT: [str(error)], _KIND: [type(error).__name__]})

    @torch.no_grad()
    def _score(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """Those of `row`, and what is needed: chosen and rejected (nats, float64), state (list of float32)."""
        rows = self.tokens.table(batch["row"].tolist())
        collated = collate(
            rows,
            languages=self.tokens.languages,
            weights=[1.0] * len(rows),
            needs_rejected=self.model.log_probs,
            reference=None,
            tap=False,
        )
        said = self.model(move(collated, self.device), state=True)
        columns: dict[str, Any] = {"row": batch["row"]}
        if said.chosen is not None and said.rejected is not None:
            columns["chosen"] = said.chosen.double().cpu().numpy()
            columns["rejected"] = said.rejected.double().cpu().numpy()
        if said.state is not None:
            states = said.state.cpu().numpy()
            columns["state"] = pa.FixedSizeListArray.from_arrays(pa.array(states.ravel()), states.shape[1])
        return pa.table(columns)
