"""What every layer knows, before anything is trained: how consistent, how distinct, and how separable its states are.

Pure: tensors in, numbers out. All are of the hidden states of the tapped tokens, before any extractor. See
docs/search.md for what each number can and cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlc_ray.losses.measures import MIN_PER_KIND, RIDGE, probe_auc
from mlc_ray.losses.mlc import leading_share, singular_values, unit_rows
from mlc_ray.report.tables import Table, markdown, row, table
from mlc_ray.report.text import ABSENT
from mlc_ray.storage import fingerprint


@dataclass(frozen=True)
class LayerStatistics:
    """One layer, an index into Hugging Face's `hidden_states`.

    `share` is s1^2 / sum s^2 within bundles, mean over bundles: 1 when all languages are collinear already. `within`
    and `between` are mean cosines of rows of one bundle and of different bundles; `separation` is their difference:
    how far a bundle's languages are nearer to each other than to other bundles. `separability` is, by language, the AUC
    of a linear probe that tells harmful from benign (`losses.collapse.probe_auc`; empty with too few of either), and
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


def choose_bundles(kinds: Sequence[str], bundle_ids: Sequence[str], limit: int) -> list[int]:
    """Indices of at most `limit` bundles of each kind: those whose hashed id comes first, in the order of the data."""
    chosen: list[int] = []
    for kind in sorted(set(kinds)):
        mine = [index for index, each in enumerate(kinds) if each == kind]
        chosen += sorted(mine, key=lambda index: fingerprint(bundle_ids[index]))[:limit]
    return sorted(chosen)


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


def probe_plot(probe: Probe, path: Path) -> Path:
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
    return layers_png(panels, path)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
