"""Statistics of every layer before training: how consistent, how distinct, and how separable its states are.

All numbers are of the hidden states of the tapped tokens, before any extractor; docs/probe.md says what each can and
cannot tell. The states are read forward only, by a Ray Data actor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor

from mlc_ray.cluster import check_fits, connect, use_gpu, with_dtype
from mlc_ray.config import ChatSection, DataSection, ModelSection, OpeningsSection, SourceSection, TrainConfig
from mlc_ray.config.search import PROBE_LIMIT, Criterion
from mlc_ray.data.batches import collate_openings, collate_prompts
from mlc_ray.data.branches import Branches
from mlc_ray.data.prepare import prepare_token_rows
from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tokens import load_tokenizer
from mlc_ray.errors import MlcRayError
from mlc_ray.logs import keep_in
from mlc_ray.losses.base import refusal_log_odds
from mlc_ray.losses.logprobs import token_log_probs
from mlc_ray.losses.measures import MIN_PER_KIND
from mlc_ray.plan.openings import make_branches
from mlc_ray.progress import phase
from mlc_ray.report.decisions import LanguageDecision, decision_table
from mlc_ray.report.tables import Table, markdown, row, table
from mlc_ray.report.text import ABSENT
from mlc_ray.runs import PROBE_FILE, PROBE_TEXT, TRIALS_FOLDER, artifact_cache, chat_of
from mlc_ray.search.criteria import CRITERIA, LayerStatistics, layer_statistics
from mlc_ray.search.decisions import decisions
from mlc_ray.storage import Place, fingerprint_model, library_versions, local_side, pinned_model
from mlc_ray.train.forward import layer_states, opening_log_probs, read_tree
from mlc_ray.train.model import load_policy
from mlc_ray.types import move

logger = logging.getLogger(__name__)
BUNDLES_PER_FORWARD = 4
DEFAULT: Criterion = "headroom"
_PROBE_CPUS = 1.0


class ProbeError(MlcRayError):
    """The bundles cannot be probed; the message names what they lack."""


@dataclass(frozen=True)
class Probe:
    """Statistics of all layers 0..N, what they are of, and the criterion that ranks them."""

    layers: tuple[LayerStatistics, ...]
    languages: tuple[str, ...]
    bundles: int
    criterion: Criterion = DEFAULT
    decisions: tuple[LanguageDecision, ...] = ()
    left_out: tuple[str, ...] = ()
    """Languages in which decisions were read, of too few bundles to say anything of them."""

    @property
    def unknown(self) -> list[str]:
        """Languages in which the model refuses without telling harmful from benign: they do not count as safe."""
        return [each.language for each in self.decisions if each.is_unknown]

    @property
    def decision_table(self) -> Table:
        """Decisions by language."""
        return decision_table(self.decisions, self.left_out, few=MIN_PER_KIND)

    @property
    def depth(self) -> int:
        """N, the number of blocks."""
        return len(self.layers) - 1

    @property
    def note(self) -> str | None:
        """What `headroom` is where English states cannot be asked which kind they are of; None where they can."""
        if "en" in self.layers[0].separability:
            return None
        return f"headroom is 1 - share alone: English has fewer than {MIN_PER_KIND} harmful or benign bundles"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        rankings = {name: self.ranking(name) for name in CRITERIA}
        said = {"note": self.note, "ranking": self.ranking(), "rankings": rankings, "unknown": self.unknown}
        return {**asdict(self), **said}

    def ranking(self, criterion: Criterion | None = None) -> list[int]:
        """All layers, the one where the criterion is highest first; empty where these bundles cannot give it.

        The embeddings are last whatever their numbers: the last token of every prompt is the template's, so that they
        are the same state in all, of which a silhouette is 0, more than that of many a layer.
        """
        values = [layer.criteria[criterion or self.criterion] for layer in self.layers]
        there = {layer: value.value for layer, value in enumerate(values) if value is not None}
        return sorted(there, key=lambda layer: (layer == 0, -there[layer], -layer))

    def rank_of(self, layer: int | float | str, criterion: Criterion | None = None) -> int:
        """Rank of `mlc.layer` as a run writes it: an index, a fraction of the depth, or "last"; 0 is best."""
        index = self.depth if layer == "last" else round(layer * self.depth) if isinstance(layer, float) else int(layer)
        return self.ranking(criterion).index(index)

    def markdown(self) -> str:
        """All layers as Markdown tables, best ranked first."""
        title = f"# Probe of {self.depth + 1} layers on {self.bundles} bundles, ranked by {self.criterion}"
        tables = (probe_table(self, self.ranking()), statistics_table(self, self.ranking()))
        note = [] if self.note is None else [f"{self.note}.", ""]
        decided = ["", *markdown(self.decision_table)] if self.decisions or self.left_out else []
        return "\n".join([title, "", *note, *markdown(tables[0]), "", *markdown(tables[1]), *decided])


def choose_bundles(tokens: TokenArtifact, limit: int) -> list[int]:
    """Rows of at most `limit` bundles of each kind, in the order of the data: those whose keys are the smallest.

    Keys are hashes: so a larger limit adds bundles and takes none away, whatever the order of the data.
    """
    ordered = np.argsort(tokens.keys)
    kinds = tokens.kinds[ordered]
    return sorted(row for kind in np.unique(kinds) for row in ordered[kinds == kind][:limit].tolist())


def statistics(
    states: Tensor, present: Tensor, harmful: Tensor, languages: Sequence[str], criterion: Criterion = DEFAULT
) -> Probe:
    """Statistics of states [N, L, layers, H] of N bundles; `present` [N, L], `harmful` [N], `languages` the L codes.

    Raises:
        ProbeError: The bundles cannot give the criterion.
    """
    layers = tuple(
        layer_statistics(layer, states[:, :, layer], present, harmful, languages) for layer in range(states.shape[2])
    )
    if layers[0].criteria[criterion] is None:
        raise ProbeError(
            f"criterion={criterion!r} needs English and another language with at least {MIN_PER_KIND} bundles of each "
            f"kind; there are {int(harmful.sum())} harmful and {int((~harmful).sum())} benign bundles in "
            f"{', '.join(languages)}: add some, or rank by another one of {', '.join(CRITERIA)}"
        )
    probe = Probe(layers, tuple(languages), len(states), criterion)
    if probe.note is not None:
        logger.warning("%s; add bundles of the kind that lacks, or rank by another criterion", probe.note)
    return probe


# ----------------------------------------------------------------------------------------------------- reading states


def probe(
    model: ModelSection,
    sources: Sequence[SourceSection],
    folder: Path | Place,
    *,
    chat: ChatSection | None = None,
    languages: list[str] | None = None,
    limit: int | None = None,
    criterion: Criterion = DEFAULT,
    openings: OpeningsSection | None = None,
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
        limit: At most this many bundles of each kind; None for `PROBE_LIMIT`.
        criterion: What ranks the layers.
        openings: How refusals open; None for the defaults.
        address: Ray address.
        accelerator: "auto", "cpu" or "gpu".

    Raises:
        ProbeError: there is one bundle only, none has two languages, or they cannot give the criterion.
    """
    folder = Place(folder)
    keep_in(local_side(folder))
    connect(address)
    gpu = use_gpu(accelerator)
    check_fits("a probe", [(_PROBE_CPUS, 1.0 if gpu else 0.0)])
    data = DataSection(train=list(sources), languages=languages)
    chat = chat_of(chat, model.path)
    model = model.model_copy(update={"path": pinned_model(model.path)})
    tokens = prepare_token_rows(data, model, chat=chat, cache_dir=artifact_cache(folder.parent))
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    branches = make_branches(openings or OpeningsSection(), tokenizer, chat, tokens.languages)
    section = with_dtype(model, gpu=gpu)
    return probe_tokens(section, tokens, folder, limit=limit, criterion=criterion, branches=branches, gpu=gpu)


def probe_run(config: TrainConfig, folder: Place, *, limit: int | None, criterion: Criterion, gpu: bool) -> Probe:
    """Probe a run's model on the run's own bundles, of both kinds where its sources hold both."""
    # These restrict what is trained on; a probe needs benign bundles to tell harmful ones from, in all languages.
    sources = [source.model_copy(update={"only": None}) for source in config.data.train]
    data = config.data.model_copy(update={"train": sources, "other_languages": None})
    cache = artifact_cache(folder.parent / TRIALS_FOLDER)
    tokens = prepare_token_rows(data, config.model, chat=config.chat, cache_dir=cache)
    return probe_tokens(config.model, tokens, folder, limit=limit, criterion=criterion, branches=None, gpu=gpu)


def probe_tokens(
    model: ModelSection,
    tokens: TokenArtifact,
    folder: Place,
    *,
    limit: int | None,
    criterion: Criterion,
    branches: Branches | None,
    gpu: bool,
) -> Probe:
    """Probe on token rows, and decisions where openings of refusals are given; raises as `probe`."""
    chosen = choose_bundles(tokens, limit or PROBE_LIMIT)
    logger.info("probing %s on %d bundles in %d languages", model.path, len(chosen), len(tokens.languages))
    rows = _forward(model, tokens, chosen, branches, gpu=gpu)
    states = torch.from_numpy(np.stack([item["states"] for item in rows]))  # [N, L, layers, H]
    present = torch.from_numpy(np.stack([item["present"] for item in rows]))
    if len(rows) < 2:
        raise ProbeError(f"{len(rows)} bundle cannot be told from others: probe on two at least, better on dozens")
    if not (present.sum(dim=1) > 1).any():
        raise ProbeError("no bundle has two languages: there is no consistency to probe")
    harmful = torch.tensor([item["kind"] == "harmful" for item in rows])
    result = statistics(states, present, harmful, tokens.languages, criterion)
    if branches is not None:
        log_odds = torch.from_numpy(np.stack([item["log_odds"] for item in rows]))
        found = decisions(log_odds, present, harmful, tokens.languages)
        there = {each.language for each in found}
        left_out = tuple(code for code in tokens.languages if code not in there)
        result = replace(result, decisions=found, left_out=left_out)
        if left_out:
            logger.warning(
                "decisions in %s are not judged: fewer than %d bundles of either kind",
                ", ".join(left_out),
                MIN_PER_KIND,
            )
        if result.unknown:
            logger.warning(
                "the model does not know %s: it refuses there without telling harmful from benign, which is no safety",
                ", ".join(result.unknown),
            )
    (folder / PROBE_TEXT).write_text(result.markdown())
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


def _forward(
    model: ModelSection, tokens: TokenArtifact, rows: Sequence[int], branches: Branches | None, *, gpu: bool
) -> list[dict[str, Any]]:
    told = {"tokens_folder": str(tokens.folder), "settings": model.model_dump(), "branches": branches, "gpu": gpu}
    streamed = ray.data.from_items([{"id": row} for row in rows]).map_batches(
        ProbeActor,
        fn_constructor_kwargs=told,
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

    def __init__(self, tokens_folder: str, settings: dict[str, Any], branches: Branches | None, gpu: bool) -> None:
        self.tokens, self.branches = TokenArtifact.open(tokens_folder), branches
        self.device = torch.device("cuda" if gpu else "cpu")
        self.model = load_policy(ModelSection(**settings))
        torch.nn.Module.eval(self.model)
        torch.nn.Module.to(self.model, self.device)  # in place; transformers' own `to` has no types

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows `id` -> kind, states [L, layers, H] float32 (zero where absent), present [L]; log_odds [L] float64, of
        openings, where they are read."""
        rows = self.tokens.table(batch["id"].tolist())
        tree, prompts = move(collate_prompts(rows, self.tokens.languages), self.device)
        states = layer_states(self.model, tree, prompts).float().cpu()  # [P, layers, H]
        grid = states.new_zeros(len(rows), len(self.tokens.languages), *states.shape[1:])
        present = torch.zeros(grid.shape[:2], dtype=torch.bool)
        index = (prompts.bundle_of_prompt.cpu(), prompts.language_of_prompt.cpu())
        grid[index] = states
        present[index] = True
        said = {
            "kind": np.array(rows["kind"].to_pylist()),
            "states": grid.numpy(),
            "present": present.numpy(),
        }
        if self.branches is not None:
            tree, prompts, openings = move(collate_openings(rows, self.tokens.languages, self.branches), self.device)
            # By the model's own head, which layers' states do not pass.
            logits, _, _ = read_tree(self.model, tree, openings.predicting, None, 0)
            assert logits is not None
            log_probs = opening_log_probs(token_log_probs(logits, openings.targets), openings)
            log_odds = torch.zeros(grid.shape[:2], dtype=torch.float64)
            log_odds[index] = refusal_log_odds(log_probs).cpu()
            said["log_odds"] = log_odds.numpy()
        return said


# -------------------------------------------------------------------------------------------------------- what is shown


def probe_table(probe: Probe, layers: Iterable[int]) -> Table:
    """The rank of each of `layers`, in their order, and every criterion with its 95 % interval over bundles."""
    rows = []
    for layer in layers:
        found = [probe.layers[layer].criteria[name] for name in CRITERIA]
        shown = [ABSENT if x is None else f"{x.value:.3f} ({x.low:.3f} to {x.high:.3f})" for x in found]
        rows.append(row(str(layer), [str(probe.rank_of(layer) + 1), *shown]))
    return table("", ("layer", "rank", *CRITERIA), rows)


def statistics_table(probe: Probe, layers: Iterable[int]) -> Table:
    """What the criteria are made of, a row for each of `layers`, in their order."""
    rows = []
    for layer in layers:
        s = probe.layers[layer]
        numbers = (s.share, s.within, s.between, s.separability.get("en"), s.mean_separability)
        rows.append(row(str(layer), [ABSENT if number is None else f"{number:.3f}" for number in numbers]))
    return table("", ("layer", "share", "within", "between", "AUC en", "AUC mean"), rows)


def probe_plot(probe: Probe, place: Place) -> None:
    """Three panels over the layers: how collinear, how separable (a line per language), and the criteria."""
    from mlc_ray.report.figures import Panel, layers_png  # matplotlib takes a second to import

    collinear = {name: [getattr(layer, name) for layer in probe.layers] for name in ("share", "within", "between")}
    separable: dict[str, list[float]] = {}
    for code in probe.languages:
        values = [layer.separability[code] for layer in probe.layers if code in layer.separability]
        if len(values) == len(probe.layers):
            separable[code] = values
    criteria: dict[str, list[float]] = {}
    for name in CRITERIA:
        found = [layer.criteria[name] for layer in probe.layers]
        if values := [each.value for each in found if each is not None]:
            criteria[name] = values
    panels = [
        Panel("collinearity", collinear),
        Panel("harmful / benign AUC", separable, strong="en", level=0.5),
        Panel("criteria", criteria, strong=probe.criterion),
    ]
    layers_png(panels, place)
