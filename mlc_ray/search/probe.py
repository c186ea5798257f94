"""Statistics of every layer before training: how consistent, how distinct, and how separable its states are.

All numbers are of the hidden states of the tapped tokens, before any extractor; docs/search.md says what each can and
cannot tell. The states are read forward only, by a Ray Data actor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor

from mlc_ray.cluster import check_fits, connect, use_gpu, with_dtype
from mlc_ray.config import ChatSection, DataSection, ModelSection, SourceSection, TrainConfig
from mlc_ray.data.batches import collate_prompts
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.store import TokenArtifact
from mlc_ray.errors import MlcRayError
from mlc_ray.logs import keep_in
from mlc_ray.losses.measures import MIN_PER_KIND, RIDGE, probe_auc
from mlc_ray.losses.mlc import leading_share, singular_values, unit_rows
from mlc_ray.progress import phase
from mlc_ray.report.tables import Table, markdown, row, table
from mlc_ray.report.text import ABSENT
from mlc_ray.runs import PROBE_FILE, TRIALS_FOLDER, artifact_cache, training_chat
from mlc_ray.storage import Place, fingerprint_model, library_versions, local_side, pinned_model
from mlc_ray.train.model import layer_states, load_policy
from mlc_ray.types import move

logger = logging.getLogger(__name__)
BUNDLES_PER_FORWARD = 4
DEFAULT_LIMIT = 64
"""Bundles of each kind: enough for a probe's AUC to have a standard error near 0.05, few enough to hold all layers."""
_PROBE_CPUS = 1.0


class ProbeError(MlcRayError):
    """The bundles cannot be probed; the message names what they lack."""


@dataclass(frozen=True)
class LayerStatistics:
    """One layer, an index into Hugging Face's `hidden_states`.

    `share` is s1^2 / sum s^2 within bundles, mean over bundles: 1 when all languages are collinear already. `within`
    and `between` are mean cosines of rows of one bundle and of different bundles; `separation` is their difference: how
    far a bundle's languages are nearer to each other than to other bundles. `separability` is, by language, the AUC of
    a linear probe that tells harmful from benign (`losses.measures.probe_auc`; empty with too few of either), and
    `transfer` by language that of a probe trained on English states and asked in the other language.
    """

    layer: int
    share: float
    within: float
    between: float
    separability: Mapping[str, float]
    transfer: Mapping[str, float]

    @property
    def separation(self) -> float:
        """`within` - `between`."""
        return self.within - self.between

    @property
    def mean_separability(self) -> float | None:
        """Mean over languages, None where there is none."""
        return _mean(self.separability.values())

    @property
    def mean_transfer(self) -> float | None:
        """Mean over languages other than English, None where there is none."""
        return _mean(self.transfer.values())


@dataclass(frozen=True)
class Probe:
    """Statistics of all layers 0..N, and of what they are."""

    layers: tuple[LayerStatistics, ...]
    languages: tuple[str, ...]
    bundles: int

    @property
    def depth(self) -> int:
        """N, the number of blocks."""
        return len(self.layers) - 1

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ranking": self.ranking()}

    def ranking(self) -> list[int]:
        """All layers, the one where the term is most likely to help first (`layer_score`)."""
        return sorted(range(len(self.layers)), key=lambda layer: (-self.layer_score(layer), -layer))

    def rank_of(self, layer: int | float | str) -> int:
        """Rank of `mlc.layer` as a run writes it: an index, a fraction of the depth, or "last"; 0 is best."""
        index = self.depth if layer == "last" else round(layer * self.depth) if isinstance(layer, float) else int(layer)
        return self.ranking().index(index)

    def layer_score(self, layer: int) -> float:
        """How likely the consistency term helps at `layer`: scope times knowledge, from 0 to 1; see docs/search.md.

        Scope is 1 - `share`: where the languages are collinear already, the term has nothing to do. Knowledge is how
        much better than chance English states tell harmful from benign, 2 AUC - 1 (1 where there is no such probe):
        consistency spreads what the English states hold, and cannot spread what they do not.
        """
        statistics = self.layers[layer]
        auc = statistics.separability.get("en")
        knowledge = 1.0 if auc is None else max(0.0, 2 * auc - 1)
        return (1.0 - statistics.share) * knowledge

    def markdown(self) -> str:
        """All layers as a Markdown table, best ranked first."""
        title = f"# Probe of {self.depth + 1} layers on {self.bundles} bundles"
        return "\n".join([title, "", *markdown(probe_table(self, self.ranking()))])


def choose_bundles(tokens: TokenArtifact, limit: int) -> list[int]:
    """Rows of at most `limit` bundles of each kind, in the order of the data: those whose keys are the smallest.

    Keys are hashes: so a larger limit adds bundles and takes none away, whatever the order of the data.
    """
    ordered = np.argsort(tokens.keys)
    kinds = tokens.kinds[ordered]
    return sorted(row for kind in np.unique(kinds) for row in ordered[kinds == kind][:limit].tolist())


def layer_statistics(states: Tensor, present: Tensor, harmful: Tensor, languages: Sequence[str]) -> Probe:
    """Statistics of states [N, L, layers, H] of N bundles; `present` [N, L], `harmful` [N], `languages` the L codes."""
    layers = tuple(
        _one_layer(layer, states[:, :, layer], present, harmful, languages) for layer in range(states.shape[2])
    )
    return Probe(layers, tuple(languages), len(states))


def _one_layer(
    layer: int, states: Tensor, present: Tensor, harmful: Tensor, languages: Sequence[str]
) -> LayerStatistics:
    several = present.sum(dim=1) > 1
    share = leading_share(singular_values(unit_rows(states[several], present[several]))).mean()
    within, between = _cosines(states, present)
    separability = {}
    for index, code in enumerate(languages):
        here = present[:, index]
        if min(int(harmful[here].sum()), int((~harmful[here]).sum())) >= MIN_PER_KIND:
            separability[code] = float(probe_auc(states[here, index], harmful[here]))
    transfer = {}
    if "en" in separability:
        english = list(languages).index("en")
        transfer = {
            code: float(_transfer_auc(states, present, harmful, english, languages.index(code)))
            for code in separability
            if code != "en"
        }
    return LayerStatistics(layer, float(share), float(within), float(between), separability, transfer)


def _cosines(states: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine between rows of one bundle (different languages), and between rows of different bundles."""
    rows = unit_rows(states, present)
    # Sums over pairs from sums over rows: |sum of rows|^2 counts every pair, and each row with itself once.
    total = rows.flatten(0, 1).sum(dim=0).square().sum()
    inside = rows.sum(dim=1).square().sum(dim=-1)  # [N]
    counts = present.sum(dim=1).double()
    n = counts.sum()
    within = (inside.sum() - n) / (counts.square().sum() - n)
    between = (total - inside.sum()) / (n.square() - counts.square().sum())
    return within, between


def _transfer_auc(states: Tensor, present: Tensor, harmful: Tensor, source: int, target: int) -> Tensor:
    """AUC in the language `target` of a ridge probe trained on the language `source`, each centred by itself.

    A bundle is never asked about by a probe that was trained on it in another language: the probe is trained on one
    half of the bundles and asked about the other, both ways, and the AUCs are averaged.
    """
    aucs = []
    half = torch.zeros(len(states), dtype=torch.bool)
    for kind in (harmful, ~harmful):
        half[kind.nonzero()[::2, 0]] = True
    for train in (half, ~half):
        fit, ask = train & present[:, source], ~train & present[:, target]
        x, y = _centred(states[fit, source]), torch.where(harmful[fit], 1.0, -1.0).double()
        kernel = x @ x.T
        scale = kernel.diagonal().mean()
        weights = x.T @ torch.linalg.solve(kernel / scale + RIDGE * torch.eye(len(x), dtype=x.dtype), y)
        scores = _centred(states[ask, target]) @ weights
        up, down = scores[harmful[ask]], scores[~harmful[ask]]
        difference = up.unsqueeze(1) - down.unsqueeze(0)
        aucs.append(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())
    return torch.stack(aucs).nanmean()


def _centred(states: Tensor) -> Tensor:
    return states.double() - states.double().mean(dim=0)


# ----------------------------------------------------------------------------------------------------- reading states


def probe(
    model: ModelSection,
    sources: Sequence[SourceSection],
    folder: Path | Place,
    *,
    chat: ChatSection | None = None,
    languages: list[str] | None = None,
    limit: int | None = None,
    address: str = "auto",
    accelerator: str = "auto",
) -> Probe:
    """Probe a model on bundles; writes `probe.json`, `probe.md` and `probe.png` into `folder`.

    Args:
        model: The model and its dtype.
        sources: The bundles, of both kinds.
        folder: Where to write.
        chat: The conversation that prompts stand in; None for the one that the model was trained in.
        languages: Look at only these; None for all.
        limit: At most this many bundles of each kind; None for `DEFAULT_LIMIT`.
        address: Ray address.
        accelerator: "auto", "cpu" or "gpu".

    Raises:
        ProbeError: there is one bundle only, or none has two languages.
    """
    folder = Place(folder)
    keep_in(local_side(folder))
    connect(address)
    gpu = use_gpu(accelerator)
    check_fits("a probe", [(_PROBE_CPUS, 1.0 if gpu else 0.0)])
    data = DataSection(train=list(sources), languages=languages)
    chat = chat or training_chat(model.path) or ChatSection()
    model = model.model_copy(update={"path": pinned_model(model.path)})
    tokens = prepare_token_rows(data, model, chat=chat, cache_dir=artifact_cache(folder.parent))
    return probe_tokens(with_dtype(model, gpu=gpu), tokens, folder, limit=limit, gpu=gpu)


def probe_run(config: TrainConfig, folder: Place, *, limit: int | None, gpu: bool) -> Probe:
    """Probe a run's model on the run's own bundles, of both kinds where its sources hold both."""
    # `only` restricts what is trained on; a probe needs benign bundles to tell harmful ones from.
    sources = [source.model_copy(update={"only": None}) for source in config.data.train]
    data = config.data.model_copy(update={"train": sources})
    cache = artifact_cache(folder.parent / TRIALS_FOLDER)
    tokens = prepare_token_rows(data, config.model, chat=config.chat, cache_dir=cache)
    return probe_tokens(config.model, tokens, folder, limit=limit, gpu=gpu)


def probe_tokens(model: ModelSection, tokens: TokenArtifact, folder: Place, *, limit: int | None, gpu: bool) -> Probe:
    """Probe on token rows; raises as `probe`."""
    chosen = choose_bundles(tokens, limit or DEFAULT_LIMIT)
    logger.info("probing %s on %d bundles in %d languages", model.path, len(chosen), len(tokens.languages))
    rows = _forward(model, tokens, chosen, gpu=gpu)
    states = torch.from_numpy(np.stack([item["states"] for item in rows]))  # [N, L, layers, H]
    present = torch.from_numpy(np.stack([item["present"] for item in rows]))
    if len(rows) < 2:
        raise ProbeError(f"{len(rows)} bundle cannot be told from others: probe on two at least, better on dozens")
    if not (present.sum(dim=1) > 1).any():
        raise ProbeError("no bundle has two languages: there is no consistency to probe")
    harmful = torch.tensor([item["kind"] == "harmful" for item in rows])
    result = layer_statistics(states, present, harmful, tokens.languages)
    (folder / "probe.md").write_text(result.markdown())
    probe_plot(result, folder / "probe.png")
    (folder / PROBE_FILE).write_json(
        {
            "model": model.path,
            "model_fingerprint": fingerprint_model(model.path),
            "dtype": model.dtype,
            "tokens": tokens.fingerprint,
            "bundles": len(rows),
            "probe": result.plain(),
            "versions": library_versions(),
        }
    )
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
    found = []
    with phase("probing", total=len(rows), unit="bundles") as progress:
        for item in streamed.iter_rows():
            found.append(item)
            progress.advance()
    return found


class ProbeActor:
    """A Ray Data actor that holds the model and reads every layer's states of bundles by row index."""

    def __init__(self, tokens_folder: str, settings: dict[str, Any], gpu: bool) -> None:
        self.tokens = TokenArtifact.open(tokens_folder)
        self.device = torch.device("cuda" if gpu else "cpu")
        self.model = load_policy(ModelSection(**settings))
        torch.nn.Module.eval(self.model)
        torch.nn.Module.to(self.model, self.device)  # in place; transformers' own `to` has no types

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows `id` -> kind, states [L, layers, H] float32 (zero where absent), present [L]."""
        rows = self.tokens.table(batch["id"].tolist())
        tree, prompts = move(collate_prompts(rows, self.tokens.languages), self.device)
        states = layer_states(self.model, tree, prompts).float().cpu()  # [P, layers, H]
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


# -------------------------------------------------------------------------------------------------------- what is shown

_COLUMNS = ("layer", "rank", "score", "share", "within", "between", "separation", "AUC en", "AUC mean", "transfer")


def probe_table(probe: Probe, layers: Iterable[int]) -> Table:
    """The numbers of `layers`, a row each, in their order."""
    rows = []
    for layer in layers:
        s = probe.layers[layer]
        numbers = (
            s.share, s.within, s.between, s.separation, s.separability.get("en"), s.mean_separability, s.mean_transfer,
        )  # fmt: skip
        shown = [ABSENT if number is None else f"{number:.3f}" for number in numbers]
        rows.append(row(str(layer), [str(probe.rank_of(layer) + 1), f"{probe.layer_score(layer):.4f}", *shown]))
    return table("", _COLUMNS, rows)


def probe_plot(probe: Probe, place: Place) -> None:
    """Three panels over the layers: how collinear, how separable (a line per language), and the score."""
    from mlc_ray.report.figures import Panel, layers_png  # matplotlib takes a second to import

    collinear = {name: [getattr(layer, name) for layer in probe.layers] for name in ("share", "within", "between")}
    separable: dict[str, list[float]] = {}
    for code in probe.languages:
        values = [layer.separability[code] for layer in probe.layers if code in layer.separability]
        if len(values) == len(probe.layers):
            separable[code] = values
    panels = [
        Panel("collinearity", collinear),
        Panel("harmful / benign AUC", separable, strong="en", level=0.5),
        Panel("score", {"": [probe.layer_score(layer) for layer in range(len(probe.layers))]}),
    ]
    layers_png(panels, place)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
