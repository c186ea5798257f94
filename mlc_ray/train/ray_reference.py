"""Reference log-probs computed once, as a Ray Data stage, and kept as a fingerprinted artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from mlc_ray.artifacts import (
    atomic_folder,
    fingerprint,
    fingerprint_model,
    library_versions,
    read_manifest,
    verify_files,
    write_manifest,
)
from mlc_ray.config import ModelSection, TrainConfig
from mlc_ray.data.batches import collate
from mlc_ray.data.ray_data import TokenArtifact
from mlc_ray.train.model import load_policy
from mlc_ray.train.reference import ReferenceModel
from mlc_ray.types import move

TABLE = "log_probs.parquet"
BUNDLES_PER_FORWARD = 8


def prepare_reference(config: TrainConfig, tokens: TokenArtifact, *, cache_dir: Path, gpu: bool) -> tuple[Path, str]:
    """Folder and fingerprint of the reference's log-probs for every bundle of `tokens`; computed unless it is there.

    The key holds the token rows' fingerprint, the model's weights and the type they are computed in.
    """
    key = fingerprint(
        {
            "tokens": tokens.fingerprint,
            "model": fingerprint_model(config.model.path),
            "dtype": config.model.dtype,
            "attention": config.model.attention,
            "device": "gpu" if gpu else "cpu",
        }
    )
    folder = cache_dir / f"reference-{key}"
    if folder.exists():
        verify_files(folder, read_manifest(folder))
        return folder, key
    table = _compute(config, tokens, gpu=gpu)
    with atomic_folder(folder) as temporary:
        pq.write_table(table, temporary / TABLE)
        write_manifest(
            temporary, fingerprint=key, tokens=tokens.fingerprint, bundles=table.num_rows, versions=library_versions()
        )
    return folder, key


def load_reference(folder: Path) -> dict[str, tuple[float, float]]:
    """bundle_id -> summed log-probs in nats of (chosen, rejected)."""
    verify_files(folder, read_manifest(folder))
    columns = pq.read_table(folder / TABLE).to_pydict()
    pairs = zip(columns["chosen"], columns["rejected"], strict=True)
    return dict(zip(columns["bundle_id"], pairs, strict=True))


def _compute(config: TrainConfig, tokens: TokenArtifact, *, gpu: bool) -> pa.Table:
    scored = ray.data.range(len(tokens.bundle_ids)).map_batches(
        ReferenceScorer,
        fn_constructor_kwargs={
            "tokens_folder": str(tokens.folder),
            "settings": config.model.model_dump(),
            "gpu": gpu,
        },
        batch_size=BUNDLES_PER_FORWARD,
        compute=ray.data.ActorPoolStrategy(size=config.cluster.workers),
        num_cpus=config.cluster.cpus_per_worker,
        num_gpus=1 if gpu else 0,
    )
    return pa.Table.from_pylist(scored.take_all())


class ReferenceScorer:
    """A Ray Data actor that holds the reference model and scores bundles by row index."""

    def __init__(self, tokens_folder: str, settings: dict[str, Any], gpu: bool) -> None:
        self.tokens = TokenArtifact.open(Path(tokens_folder))
        self.device = torch.device("cuda" if gpu else "cpu")
        self.model = ReferenceModel(load_policy(ModelSection(**settings))).to(self.device).eval()

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows `id` -> bundle_id, chosen, rejected (nats, float64)."""
        rows = self.tokens.rows(batch["id"].tolist())
        collated = collate(
            rows, languages=self.tokens.languages, weights=[1.0] * len(rows), needs_rejected=True, reference=None
        )
        chosen, rejected = self.model(move(collated, self.device))
        return {
            "bundle_id": np.array([row.bundle_id for row in rows]),
            "chosen": chosen.double().cpu().numpy(),
            "rejected": rejected.double().cpu().numpy(),
        }
