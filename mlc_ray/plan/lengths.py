"""What the data weighs, in tokens: from prepared rows, else from a sample of its sources, else assumed and said so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from mlc_ray.config import TrainConfig
from mlc_ray.data.plan import Cutting, Lengths, StepPlan
from mlc_ray.data.ragged import Ints
from mlc_ray.data.tables import bundle_columns
from mlc_ray.errors import MlcRayError
from mlc_ray.plan.activations import Row
from mlc_ray.plan.cutting import cutting_of, steps_of
from mlc_ray.plan.openings import assumed_opened, opened
from mlc_ray.storage import Place
from mlc_ray.types import Bundle, Scope, TokenRow

if TYPE_CHECKING:
    from mlc_ray.data.sources import SourceFile

SAMPLE, MOST_ROWS, PERIODS = 128, 4096, 1000
"""Bundles that are tokenised, rows that are read of an artefact, and steps that are asked what terms they have."""

LOOKED_AT, LEAST_LOOKED_AT = 20, 5
"""Steps that are cut, and at least of each kind."""

HASHED = 64 * 2**20
"""Bytes of sources that are read whole to find their prepared rows; of more, a sample is tokenised."""

BUNDLES, LANGUAGES, PROMPT, ANSWER, HEAD = 2835, 10, 43, 79, 25
"""The published training data: 10 languages, 427 prompt tokens and 208 of preferences a bundle; a template of 25."""


@dataclass(frozen=True)
class Weights:
    """Lengths of some bundles, which stand for all `bundles`.

    `head` is how many tokens all prompts begin with, `benign` the share of bundles that are (half, where that is not
    known), and `opened` the tokens of openings behind each prompt of a scope, for steps that read them.
    """

    lengths: Lengths
    head: int
    bundles: int
    said: str
    benign: float = 0.5
    opened: Mapping[Scope, int] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict, compare=False, repr=False)
    """Cuts that were made already, by all that they depend on."""

    def __len__(self) -> int:
        return self.bundles

    def take(self, rows: Sequence[int] | Ints) -> Lengths:
        """Those of some rows, which are repeated where there are not enough."""
        return self.lengths.take(np.asarray(rows) % len(self.lengths.prompts))


Weigh: TypeAlias = Callable[[TrainConfig], Weights]
"""What the bundles of a run weigh."""


class Weighing:
    """A `Weigh` that is asked once of all runs whose bundles are tokenised in the same way, with the same openings."""

    def __init__(self, weigh: Weigh) -> None:
        self._weigh = weigh
        self._found: dict[str, Weights] = {}

    def __call__(self, run: TrainConfig) -> Weights:
        """What those of a run weigh."""
        key = f"{same_tokens(run)} {run.openings.model_dump_json()}"
        if key not in self._found:
            self._found[key] = self._weigh(run)
        return self._found[key]

    @property
    def assumed(self) -> tuple[str, ...]:
        """What was assumed of any of them, each as a sentence."""
        said = dict.fromkeys(weights.said for weights in self._found.values())
        return tuple(f"data {each}" for each in said if each.startswith("assumed"))


def same_tokens(run: TrainConfig) -> str:
    """The same for all runs whose bundles are tokenised in the same way."""
    model = {"path": run.model.path, "trust_remote_code": run.model.trust_remote_code}
    return json.dumps([run.data.model_dump(mode="json"), model, run.chat.model_dump(mode="json")])


def weights_of(config: TrainConfig, cache: Place | None) -> Weights:
    """What the bundles of a run weigh; nothing is written and nothing downloaded."""
    from mlc_ray.data.prepare import prepared_tokens
    from mlc_ray.data.sources import is_here

    here = all(map(is_here, config.data.train))
    small = here and sum(_bytes(Path(source.path).expanduser()) for source in config.data.train) <= HASHED
    if not here or not Path(config.model.path).expanduser().is_dir():
        return assumed(config)
    try:
        made = (
            prepared_tokens(config.data, config.model, chat=config.chat, cache_dir=cache) if cache and small else None
        )
        if made is not None:
            return of_artifact(made, config)
        return _of_sample(config, count=small)
    except (MlcRayError, OSError) as error:  # a command that runs this will say what is wrong
        return assumed(config, because=f" ({error})")


def of_artifact(tokens: object, config: TrainConfig | None = None) -> Weights:
    """Those of prepared rows: all of them, or `MOST_ROWS` spread evenly; with openings, if there are settings."""
    from mlc_ray.data.store import TokenArtifact
    from mlc_ray.data.tokens import load_tokenizer

    assert isinstance(tokens, TokenArtifact)

    def spread(most: int) -> Ints:
        return np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), most)).astype(np.int64))

    rows, found = spread(MOST_ROWS), dict[Scope, int]()
    if config is not None:
        tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
        found |= opened(config.openings, tokenizer, config.chat, tokens.rows(spread(SAMPLE)))
    return Weights(
        tokens.lengths(rows),
        tokens.head,
        len(tokens),
        f"measured: {len(tokens):,} prepared bundles of {tokens.folder}",
        tokens.counts.kinds["benign"] / len(tokens),
        found,
    )


def assumed(config: TrainConfig, because: str = "") -> Weights:
    """As published, where neither data nor tokenizer is at hand."""
    languages = min(len(config.data.languages or ()) or LANGUAGES, 1 + (config.data.other_languages or LANGUAGES))
    prompts = languages * (HEAD + PROMPT)
    one = [languages, prompts, HEAD + PROMPT, ANSWER, ANSWER, *[(languages - 1) * ANSWER] * 2, languages - 1]
    bundles, lacking = _count(config)
    said = (
        f"assumed{because}: {languages} languages of {PROMPT} tokens behind a template of {HEAD}, answers of {ANSWER} "
        f"(the published means), {bundles:,} bundles"
    )
    if lacking:
        said += f", of them {', '.join(lacking)}, which cannot be counted here"
    lengths = Lengths(*(np.array([value]) for value in one))
    return Weights(lengths, HEAD, bundles, said, opened=assumed_opened(config.openings))


def least() -> Weights:
    """The lightest data there can be: what does not fit with it fits with none."""
    one = [1, 2, 2, 1, 1, 0, 0, 0]
    return Weights(Lengths(*(np.array([value]) for value in one)), 1, 1000, "assumed: next to nothing", 0.0)


def _count(config: TrainConfig) -> tuple[int, list[str]]:
    """Bundles of the sources, and what is assumed of those that cannot be counted here: as many as are published."""
    from mlc_ray.data.sources import is_here, resolve_source

    found, lacking = 0, []
    for source in config.data.train:
        try:
            own = sum(map(_bundles_in, resolve_source(source))) if is_here(source) else 0
        except MlcRayError:  # the command that reads them will say what is wrong
            own = 0
        if not own:
            own = round(BUNDLES * source.share)
            lacking.append(f"{own:,} for {source.path}")
        found += own
    return found, lacking


def _bundles_in(file: SourceFile) -> int:
    """Bundles of a file; of a large one about."""
    from mlc_ray.data.sources import Reading

    reading = Reading(file)
    rows = reading.rows()
    if _bytes(Path(file.path)) <= HASHED:
        return sum(isinstance(row.parsed, Bundle) for row in rows)
    some = [row.parsed for row in islice(rows, SAMPLE) if isinstance(row.parsed, Bundle)]
    return _about(Path(file.path), some, of=reading.seen.records) if some else 0


def _bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _of_sample(config: TrainConfig, *, count: bool) -> Weights:
    from mlc_ray.data.sources import Reading, resolve_source
    from mlc_ray.data.tokens import ChatTemplate, load_tokenizer, tokenize_bundle

    data = config.data
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    template = ChatTemplate(tokenizer, config.chat)
    rows: list[TokenRow] = []
    bundles = 0
    files = [file for source in data.train for file in resolve_source(source)]
    each = max(1, SAMPLE // len(files))
    for file in files:
        reading = Reading(file)
        found = reading.rows()
        some = [row.parsed for row in islice(found, each) if isinstance(row.parsed, Bundle)]
        rows += [
            tokenize_bundle(
                bundle, template, languages=data.languages, others=data.other_languages,
                max_prompt_tokens=data.max_prompt_tokens, max_response_tokens=data.max_response_tokens,
            )
            for bundle in some
        ]  # fmt: skip
        bundles += len(some)
        if count:
            bundles += sum(isinstance(row.parsed, Bundle) for row in found)
        elif some:
            bundles += max(0, _about(Path(file.path), some, of=reading.seen.records) - len(some))
    if not rows:
        return assumed(config)
    how = "of" if count else "of about"
    said = f"measured: {len(rows):,} {how} {bundles:,} bundles, tokenised"
    behind = opened(config.openings, tokenizer, config.chat, rows)
    return replace(of_rows(rows), bundles=bundles, said=said, opened=behind)


def _about(path: Path, some: Sequence[Bundle], *, of: int) -> int:
    """Bundles that a run takes of a large file or folder, of whose first `of` records it takes `some`.

    The file has as many records as Parquet says, else its bytes by those of some as JSON.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        records = float(pyarrow.parquet.read_metadata(path).num_rows)
    else:
        each = sum(len(json.dumps(bundle_columns(bundle), ensure_ascii=False).encode()) for bundle in some) / len(some)
        records = _bytes(path) / each
    return round(records * len(some) / of)


def of_rows(rows: Sequence[TokenRow]) -> Weights:
    """Those of token rows."""

    def further(row: TokenRow, name: Literal["chosen", "rejected"]) -> int:
        return sum(len(answer[name] or ()) for answer in row.answers)

    columns = [
        [
            len(row.languages), sum(map(len, row.prompts)),
            len(row.prompts[row.response_prompt]) if row.response_prompt >= 0 else 0,
            len(row.chosen or ()), len(row.rejected or ()),
            further(row, "chosen"), further(row, "rejected"), len(row.answers),
        ]
        for row in rows
    ]  # fmt: skip
    prompts = [prompt for row in rows for prompt in row.prompts]
    head = next((at for at, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1), min(map(len, prompts)))
    benign = sum(row.kind == "benign" for row in rows) / len(rows)
    return Weights(Lengths(*np.array(columns).T), head, len(rows), f"measured: {len(rows):,} bundles", benign)


@dataclass(frozen=True)
class Cut:
    """What a run's steps are like, from some of them: means over all, and the largest forward of each kind of step.

    Among these kinds is always the widest, with all terms. `forwards` are those of a worker, `working` those of all
    workers that have bundles: where there is nothing left for a worker it forwards a bundle at weight 0, which is in no
    other number.
    """

    tokens: float
    forwards: float
    largest: tuple[Row, ...]
    mean: Row
    taps: float
    working: float


def cut(
    config: TrainConfig,
    weights: Weights,
    *,
    tokens_per_forward: int,
    workers: int,
) -> Cut:
    """Cut some batches as a run would, with openings as many as `weights` says."""
    decides = config.model_dump_json(include={"objective", "mlc", "terms", "train", "seed"})
    busy = busy_workers(config, weights, workers)  # more of them change nothing
    key = f"{tokens_per_forward} {busy} {weights.opened} {decides}"
    if key not in weights.cuts:
        cutting = cutting_of(
            config, weights, tokens_per_forward=tokens_per_forward, world_size=busy, opened=weights.opened
        )
        weights.cuts[key] = _cut(config, weights, cutting)
    return weights.cuts[key]


def busy_workers(config: TrainConfig, weights: Weights, workers: int) -> int:
    """Workers that have a bundle in a step, at most: a term that compares bundles may need several of them together."""
    return min(workers, config.train.batch_bundles, len(weights))


@dataclass(frozen=True)
class _Kind:
    """Steps that are cut alike: their share of a run's; of each that was looked at, forwards and all workers' tokens;
    and what the forwards of all workers hold."""

    share: float
    forwards: tuple[int, ...]
    tokens: tuple[int, ...]
    rows: tuple[Row, ...]

    def of_step(self, total: float) -> float:
        """What this kind adds to the mean over a run's steps of a number whose sum over those looked at is this."""
        return self.share * total / len(self.tokens)


def _cut(config: TrainConfig, weights: Weights, cutting: Cutting) -> Cut:
    steps, draw = steps_of(config, weights), np.random.default_rng(config.seed)
    shares = _shares(config, cutting, steps)
    kinds = [
        _looked_at(
            _always(cutting, taps, scope), config, weights, draw, share=share,
            steps=max(1, min(max(LEAST_LOOKED_AT, LOOKED_AT // len(shares)), round(share * steps))),
        )
        for (taps, scope), share in shares.items()
    ]  # fmt: skip
    of_all_workers = sum(kind.of_step(len(kind.rows)) for kind in kinds)
    sums = [
        sum(kind.of_step(sum(column)) for kind, column in zip(kinds, of_kinds, strict=True))
        for of_kinds in zip(*(zip(*map(astuple, kind.rows), strict=True) for kind in kinds), strict=True)
    ]
    return Cut(
        sum(kind.of_step(sum(kind.tokens)) for kind in kinds),
        sum(kind.of_step(sum(kind.forwards)) for kind in kinds),
        tuple(max(kind.rows, key=lambda row: (row.tokens, row.head)) for kind in kinds),
        Row(*(round(each / of_all_workers) for each in sums)),
        sum(share for (taps, _), share in shares.items() if taps),
        of_all_workers,
    )


def _always(cutting: Cutting, taps: bool, scope: Scope) -> Cutting:
    return replace(cutting, taps=lambda _: taps, scope=lambda _: scope)


def _looked_at(
    cutting: Cutting, config: TrainConfig, weights: Weights, draw: np.random.Generator, *, share: float, steps: int
) -> _Kind:
    """Cut so many steps that are alike; of a sample, batches are drawn from it."""
    size = min(config.train.batch_bundles, len(weights))
    rows, forwards, tokens = list[Row](), list[int](), list[int]()
    for _ in range(steps):
        bundles = draw.permutation(max(size, min(len(weights), len(weights.lengths.prompts))))[:size]
        lengths = weights.take(bundles)
        plan = cutting.plan(0, list(range(size)), lengths)
        forwards.append(len(plan.forwards))
        own = [
            row_of(lengths.take(list(forward.rows)), cutting, plan, said, weights.benign)
            for micro, of_micro in zip(plan.forwards, plan.tokens, strict=True)
            for forward, said in zip(micro, of_micro, strict=True)
            if not forward.idle
        ]
        tokens.append(sum(row.tokens for row in own))
        rows += own
    return _Kind(share, tuple(forwards), tuple(tokens), tuple(rows))


def _shares(config: TrainConfig, cutting: Cutting, steps: int) -> dict[tuple[bool, Scope], float]:
    """The kinds of a run's steps, whether they tap and their scope, each with its share; the widest is always one.

    Terms are computed in the first step of each `mlc.every`, from some of these on. Of many, `PERIODS` spread evenly
    over the run are looked at.
    """
    every = config.mlc.every
    periods = -(-steps // every)
    firsts = np.unique(np.linspace(0, periods - 1, min(periods, PERIODS)).astype(np.int64)) * every
    found = Counter((cutting.taps(int(step)), cutting.scope(int(step))) for step in firsts)
    shares: dict[tuple[bool, Scope], float] = {(cutting.ever_taps, cutting.widest): 0.0}
    for kind, number in found.items():
        shares[kind] = number / len(firsts) * periods / steps
    if between := steps - periods:
        shares[False, "none"] = shares.get((False, "none"), 0.0) + between / steps
    return shares


def row_of(lengths: Lengths, cutting: Cutting, plan: StepPlan, tokens: int, benign: float = 0.0) -> Row:
    """What a forward of these bundles holds, which has `tokens` by the step's plan; this share of them is benign.

    Where next tokens of benign bundles are kept, the head reads the ends of their prompts too, and there are three more
    rows of logits of each that is compared (a copy, the reference's, the gradient), and one more of all, into which
    PyTorch puts that gradient.
    """
    languages, head, pairing = lengths.languages, cutting.head, cutting.pairing
    all_prompts = plan.taps or pairing != "response"
    prompts = lengths.prompts if all_prompts else lengths.answered
    count = languages if all_prompts else np.ones_like(languages)
    each = prompts / np.maximum(1, count)
    # Rows of answers, and the sequences that they are in.
    own = lengths.own_tokens(head=0, taps=plan.taps, rejected=cutting.rejected, pairing=pairing, whole=True) - prompts
    further = lengths.further
    of_pairing = {
        "response": np.ones_like(further),
        "own": 1 + further,
        "given": 1 + further,
        "shared": languages,
        "crossed": languages + 2 * further,
    }
    number = np.maximum(1, of_pairing[pairing]) * (2 if cutting.rejected else 1)
    pairs = float((count * (each - head).clip(min=0) * each).sum() + (own * (lengths.answered + own / number)).sum())
    keys = head + float(prompts.sum() + (number * (lengths.answered - 1) + own).clip(min=0).sum())
    rows, ends, compared = int(own.sum()), 0, 0
    if openings := cutting.openings(plan.scope):  # of each prompt, which are read at once
        behind = lengths.prompts if plan.scope == "all" else lengths.answered
        asked = languages if plan.scope == "all" else np.ones_like(languages)
        seen = float((behind + asked * openings).sum())
        rows += int(asked.sum()) * (1 + openings)
        keys, pairs = keys + seen, pairs + openings * seen
    if cutting.keeps and plan.taps:
        ends = round(benign * int(languages.sum()))
        compared = rows + ends + 3 * (round(benign * int(own.sum())) + ends)
    tapped = int(languages.sum()) if plan.taps else 0
    return Row(tokens, round(keys), round(pairs) + head * head, rows + ends, tapped, compared)
