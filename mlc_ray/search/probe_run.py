"""Every layer's states of a set of bundles, forward only, by Ray Data actors; the numbers are `search.probe`'s."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch

from mlc_ray.cluster import check_capacity, connect, use_gpu, with_dtype
from mlc_ray.config import DataSection, ModelSection, SourceSection, TrainConfig
from mlc_ray.data.batches import pack_prompts
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.report.console import show
from mlc_ray.report.tables import console
from mlc_ray.runs import PROBE_FILE, TRIALS_FOLDER
from mlc_ray.search.probe import Probe, choose_bundles, layer_statistics, probe_plot, probe_table
from mlc_ray.storage import fingerprint_model, library_versions, write_json_atomic
from mlc_ray.train.model import layer_states, load_policy
from mlc_ray.types import move

BUNDLES_PER_FORWARD = 4
DEFAULT_LIMIT = 64
"""Bundles of each kind: enough for a probe's AUC to have a standard error near 0.05, few enough to hold all layers."""
_PROBE_CPUS = 1.0


class ProbeError(MlcRayError):
    """The bundles cannot be probed; the message names what they lack."""


def probe(
    model: ModelSection,
    sources: Sequence[SourceSection],
    folder: Path,
    *,
    languages: list[str] | None = None,
    limit: int | None = None,
    address: str = "auto",
    accelerator: str = "auto",
) -> Probe:
    """Probe a model on bundles, print the table, and write `probe.json`, `probe.md` and `probe.png` into `folder`."""
    connect(address)
    gpu = use_gpu(accelerator)
    check_capacity("probe", workers=1, cpus_each=_PROBE_CPUS, gpus_each=1 if gpu else 0)
    data = DataSection(train=list(sources), languages=languages)
    tokens = prepare_token_rows(data, model, cache_dir=folder.parent / "cache")
    return probe_tokens(with_dtype(model, gpu=gpu), tokens, folder, limit=limit, gpu=gpu)


def probe_run(config: TrainConfig, folder: Path, *, limit: int | None, gpu: bool) -> Probe:
    """Probe a run's model on the run's own bundles, of both kinds where its sources hold both."""
    # `only` restricts what is trained on; a probe needs benign bundles to tell harmful ones from.
    sources = [source.model_copy(update={"only": None}) for source in config.data.train]
    data = config.data.model_copy(update={"train": sources})
    tokens = prepare_token_rows(data, config.model, cache_dir=folder.parent / TRIALS_FOLDER / "cache")
    return probe_tokens(config.model, tokens, folder, limit=limit, gpu=gpu)


def probe_tokens(model: ModelSection, tokens: TokenArtifact, folder: Path, *, limit: int | None, gpu: bool) -> Probe:
    """Probe on token rows. Raises `ProbeError` where there is one bundle, or none has two languages."""
    chosen = choose_bundles(tokens.kinds, tokens.bundle_ids, limit or DEFAULT_LIMIT)
    print(f"probing {model.path} on {len(chosen)} bundles in {len(tokens.languages)} languages", file=sys.stderr)
    rows = _forward(model, tokens, chosen, gpu=gpu)
    states = torch.from_numpy(np.stack([row["states"] for row in rows]))  # [N, L, layers, H]
    present = torch.from_numpy(np.stack([row["present"] for row in rows]))
    if len(rows) < 2:
        raise ProbeError(f"{len(rows)} bundle cannot be told from others: probe on two at least, better on dozens")
    if not (present.sum(dim=1) > 1).any():
        raise ProbeError("no bundle has two languages: there is no consistency to probe")
    harmful = torch.tensor([row["kind"] == "harmful" for row in rows])
    result = layer_statistics(states, present, harmful, tokens.languages)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        folder / PROBE_FILE,
        {
            "model": model.path,
            "model_fingerprint": fingerprint_model(model.path),
            "dtype": model.dtype,
            "tokens": tokens.fingerprint,
            "bundles": len(rows),
            "probe": result.plain(),
            "versions": library_versions(),
        },
    )
    (folder / "probe.md").write_text(result.markdown(), encoding="utf-8")
    probe_plot(result, folder / "probe.png")
    show(console(probe_table(result, reversed(range(len(result.layers))))))
    print(f"probe in {folder}", file=sys.stderr)
    return result


def _forward(model: ModelSection, tokens: TokenArtifact, rows: Sequence[int], *, gpu: bool) -> list[dict[str, Any]]:
    streamed = ray.data.from_items([{"id": row} for row in rows]).map_batches(
        ProbeActor,
        fn_constructor_kwargs={"tokens_folder": str(tokens.folder), "settings": model.model_dump(), "gpu": gpu},
        batch_size=BUNDLES_PER_FORWARD,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=_PROBE_CPUS,
        num_gpus=1 if gpu else 0,
    )
    streamed.context.execution_options.preserve_order = True
    return streamed.take_all()


class ProbeActor:
    """A Ray Data actor that holds the model and reads every layer's states of bundles by row index."""

    def __init__(self, tokens_folder: str, settings: dict[str, Any], gpu: bool) -> None:
        self.tokens = TokenArtifact.open(Path(tokens_folder))
        self.device = torch.device("cuda" if gpu else "cpu")
        self.model = load_policy(ModelSection(**settings)).to(self.device).eval()

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows `id` -> kind, states [L, layers, H] float32 (zero where absent), present [L]."""
        rows = self.tokens.table(batch["id"].tolist())
        prompts = move(pack_prompts(rows, self.tokens.languages), self.device)
        states = layer_states(self.model, prompts).float().cpu()  # [P, layers, H]
        grid = states.new_zeros(len(rows), len(self.tokens.languages), *states.shape[1:])
        present = torch.zeros(grid.shape[:2], dtype=torch.bool)
        index = (prompts.bundle_of_prompt.cpu(), prompts.language_of_prompt.cpu())
        grid[index] = states
        present[index] = True
        return {
            "kind": np.array(rows["kind"].to_pylist()),
            "states": grid.numpy(),
            "present": present.numpy(),
        }
