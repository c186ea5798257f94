"""Token rows -> Batch: the prompts and answers of several bundles as one prefix tree, with every part named.

Ids go from Arrow's buffers to tensors by index arithmetic; none of them becomes a Python number on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mlc_ray.data.branches import Branches, Grown
from mlc_ray.data.ragged import Ints, common_start, ranges, starts_of
from mlc_ray.data.tables import rows_to_table
from mlc_ray.data.trees import make_tree
from mlc_ray.errors import MlcRayError
from mlc_ray.types import (
    AnswerRows,
    Answers,
    Batch,
    BenignPlaces,
    Kind,
    Openings,
    Pairing,
    Prompts,
    ReferenceRows,
    Scope,
    Sequences,
    TokenRow,
    Tree,
)

TokenRows: TypeAlias = pa.Table | Sequence[TokenRow]
"""A table of `mlc_ray.data.tables.TOKENS`, or (for small calls) token rows."""

_EVERY = {"own": "of its languages", "crossed": "of its languages", "given": "language that has a chosen one"}
"""Where answers are needed by the pairings that read those in further languages."""


class BatchError(MlcRayError, ValueError):
    """A bundle lacks what the batch needs; the message names the bundle."""


def collate(
    rows: TokenRows,
    *,
    languages: Sequence[str],
    weights: Sequence[float],
    needs_rejected: bool,
    reference: ReferenceRows | None,
    tap: bool,
    term_weights: Sequence[float] | None = None,
    groups: Sequence[int] | None = None,
    pairing: Pairing = "response",
    whole: bool = False,
    scope: Scope = "none",
    branches: Branches | None = None,
    keeps: bool = False,
) -> Batch:
    """B token rows as a `Batch` (shapes as documented there; ids int64, weights and log-probs float32, on CPU).

    Args:
        rows: a table of `TOKENS`, or token rows.
        languages: the L columns of the prompt grid.
        weights: the bundles' weights, [B].
        needs_rejected: whether the loss reads rejected answers.
        reference: what the frozen reference says of these bundles; None where the loss needs no reference.
        tap: whether the prompts in all languages are read, or only those that are answered.
        term_weights: the bundles' weights in terms on representations, [B]; None for `weights`.
        groups: the group of each bundle, [B]; None where no term needs any.
        pairing: which answers continue which prompts.
        whole: whether states of whole sequences are pooled.
        scope: behind which prompts openings of responses are read; `all` only with `tap`.
        branches: these openings, in all of `languages`; read unless `scope` is `none`.
        keeps: whether a batch that taps has `benign`, which four copies to a device bring there.

    Raises:
        BatchError: there are no rows, or a bundle lacks an answer or has a language outside `languages`.
    """
    table = _table(rows)
    if not len(table) or len(table) != len(weights):
        raise BatchError(
            f"a batch needs one weight per bundle and at least one bundle: {len(table)} bundles, {len(weights)} weights"
        )
    bundle_ids: list[str] = table["bundle_id"].to_pylist()
    kinds: list[Kind] = table["kind"].to_pylist()
    said = reference or ReferenceRows()
    grid = _Grid.of(table, languages)
    names = ("chosen", "rejected") if needs_rejected else ("chosen",)
    opened = None if scope == "none" else _Opened.of(table, grid, languages, scope, branches)
    planted = _plant(table, grid, names, tap=tap, pairing=pairing, whole=whole, opened=opened)
    return Batch(
        bundle_ids=tuple(bundle_ids),
        kinds=tuple(kinds),
        harmful=torch.tensor([kind == "harmful" for kind in kinds]),
        languages=tuple(languages),
        weight=torch.tensor(weights, dtype=torch.float32),
        term_weight=torch.tensor(weights if term_weights is None else term_weights, dtype=torch.float32),
        groups=tuple(groups) if groups is not None else None,
        tree=planted.tree,
        chosen=planted.answers[0],
        rejected=planted.answers[1] if needs_rejected else None,
        rows=planted.rows,
        prompts=planted.prompts if tap else None,
        sequences=planted.sequences,
        reference_chosen=_float32(_of_rows(said.chosen, planted.rows)),
        reference_rejected=_float32(_of_rows(said.rejected, planted.rows)) if needs_rejected else None,
        reference_state=_float32(said.state),
        reference_pooled=_float32(None if said.pooled is None else said.pooled.swapaxes(0, 1)),
        openings=planted.openings,
        benign=_benign(kinds, planted) if tap and keeps else None,
    )


def collate_prompts(rows: TokenRows, languages: Sequence[str]) -> tuple[Tree, Prompts]:
    """All prompts of the rows, without answers.

    Raises:
        BatchError: a bundle has a language outside `languages`, the grid's L.
    """
    table = _table(rows)
    planted = _plant(table, _Grid.of(table, languages), (), tap=True)
    return planted.tree, planted.prompts


def collate_openings(rows: TokenRows, languages: Sequence[str], branches: Branches) -> tuple[Tree, Prompts, Openings]:
    """The same, with openings of responses behind each prompt; raises as `collate_prompts`."""
    table = _table(rows)
    grid = _Grid.of(table, languages)
    planted = _plant(table, grid, (), tap=True, opened=_Opened.of(table, grid, languages, "all", branches))
    assert planted.openings is not None
    return planted.tree, planted.prompts, planted.openings


@dataclass(frozen=True)
class _Grid:
    """All P prompts of a table: ids one after another, each one's start, length, tapped token, bundle and column."""

    ids: Ints
    starts: Ints
    lengths: Ints
    tapped: Ints
    bundle: Ints
    column: Ints

    @classmethod
    def of(cls, table: pa.Table, languages: Sequence[str]) -> _Grid:
        prompts = table["prompts"].combine_chunks().flatten()
        lengths = _lengths(prompts)
        bundle = np.repeat(np.arange(len(table)), _lengths(table["languages"]))
        codes = table["languages"].combine_chunks().flatten()
        column = _integers(pc.fill_null(pc.index_in(codes, pa.array(languages, pa.string())), -1))
        if (column < 0).any():
            raise BatchError(_outside(languages, table, int(bundle[int(np.argmin(column))])))
        tapped = _integers(table["tapped"].combine_chunks().flatten())
        return cls(_integers(prompts.flatten()), starts_of(lengths), lengths, tapped, bundle, column)


def _outside(grid: Sequence[str], table: pa.Table, row: int) -> str:
    outside = sorted(set(table["languages"][row].as_py()) - set(grid))
    return f"bundle {table['bundle_id'][row].as_py()} has languages {outside!r} outside the grid {list(grid)!r}"


@dataclass(frozen=True)
class _Said:
    """All answers of a table, those in the response language first, [B + F]; and the A that continue a prompt.

    `prompt` [B + F] is the prompt of the grid in an answer's own language. `bundle`, `continued` and `which` [A] are
    the bundle, the prompt of the grid and the answer of each that is read; `response` [B] as in `AnswerRows`.
    """

    prompt: Ints
    bundle: Ints
    continued: Ints
    which: Ints
    response: Ints

    @classmethod
    def of(cls, table: pa.Table, grid: _Grid, pairing: Pairing) -> _Said:
        first = starts_of(_lengths(table["languages"]))
        own = first + _integers(table["response_prompt"])
        bundles = np.arange(len(table))
        answers = table["answers"].combine_chunks()
        of_bundle = np.repeat(bundles, _lengths(answers))
        prompt = first[of_bundle] + _integers(answers.flatten().field("prompt"))
        if pairing == "response":
            return cls(np.concatenate([own, prompt]), bundles, own, bundles, bundles)
        return cls._paired(grid, pairing, own, of_bundle, prompt)

    @classmethod
    def none(cls) -> _Said:
        """No answers."""
        return cls(*np.empty((5, 0), np.int64))

    @classmethod
    def _paired(cls, grid: _Grid, pairing: Pairing, own: Ints, of_bundle: Ints, prompt: Ints) -> _Said:
        """Where further answers (of the bundles `of_bundle`, to the prompts `prompt`) or prompts are read too."""
        bundles = np.arange(len(own))
        further = len(own) + np.arange(len(of_bundle))
        rows = [(bundles, own, bundles)]
        if pairing in _EVERY:
            rows.append((of_bundle, prompt, further))
        if pairing in ("shared", "crossed"):
            others = np.setdiff1d(np.arange(len(grid.starts)), own)
            rows.append((grid.bundle[others], others, grid.bundle[others]))
        if pairing == "crossed":
            rows.append((of_bundle, own[of_bundle], further))
        bundle, continued, which = np.concatenate([np.stack(each) for each in rows], axis=1)
        is_response = (continued == own[bundle]) & (which < len(own))
        order = np.lexsort((which, continued, ~is_response, bundle))
        return cls(
            np.concatenate([own, prompt]),
            bundle[order],
            continued[order],
            which[order],
            np.flatnonzero(is_response[order]),
        )

    def rows(self, grid: _Grid) -> AnswerRows:
        """As tensors."""
        own = grid.column[self.prompt[self.which]]
        parts = (self.bundle, grid.column[self.continued], own, self.response)
        return AnswerRows(*(torch.from_numpy(part) for part in parts))


@dataclass(frozen=True)
class _Opened:
    """The prompts of the grid behind which openings are read, [P], and the openings of each one's language."""

    prompts: Ints
    codes: Sequence[str]
    branches: Branches

    @classmethod
    def of(
        cls, table: pa.Table, grid: _Grid, languages: Sequence[str], scope: Scope, branches: Branches | None
    ) -> _Opened:
        assert branches is not None
        first = starts_of(_lengths(table["languages"]))
        every = np.lexsort((grid.column, grid.bundle))
        prompts = every if scope == "all" else first + _integers(table["response_prompt"])
        return cls(prompts, [languages[column] for column in grid.column[prompts]], branches)

    def grown(self, segment: Ints, first: int) -> Grown:
        """Behind their prompts, of which `segment` has the place of each of the grid; from segment `first` on."""
        return Grown.behind(self.branches, self.codes, segment[self.prompts], first)

    def read(self, grown: Grown, grid: _Grid, segment: Ints, places: Ints, lengths: Ints) -> Openings:
        """Where they are read in a row of segments with these places and lengths."""
        at = segment[self.prompts]
        return grown.read(
            places[at] + lengths[at] - 1,
            int(lengths.sum()) - len(grown.ids),
            bundle=grid.bundle[self.prompts],
            column=grid.column[self.prompts],
        )


@dataclass(frozen=True)
class _Planted:
    """What a forward reads, and where in the tree's row everything is."""

    tree: Tree
    answers: list[Answers]
    prompts: Prompts
    rows: AnswerRows
    sequences: Sequences | None
    openings: Openings | None


def _plant(
    table: pa.Table,
    grid: _Grid,
    names: Sequence[str],
    *,
    tap: bool,
    pairing: Pairing = "response",
    whole: bool = False,
    opened: _Opened | None = None,
) -> _Planted:
    """The tree of B bundles, where their answers called `names` are in it, and (if `tap`) where their prompts are.

    The row: the head that all its prompts begin with (where there is one), the prompts that are answered, the answers
    of each name, the other prompts, openings of responses.
    """
    found = [_answers(table, name, pairing) for name in names]
    said = _Said.of(table, grid, pairing) if names else _Said.none()
    answered = np.unique(said.continued)
    order = np.lexsort((grid.column, grid.bundle)) if tap else answered
    others = order[~np.isin(order, answered)]
    prompts = np.concatenate([answered, others])
    # Short of the tapped token, which is of its prompt alone. A single prompt shares its beginning with none.
    head = common_start(grid.ids, grid.starts[prompts], grid.tapped[prompts]) if len(prompts) > 1 else 0
    heads = 1 if head else 0
    continued = heads + np.searchsorted(answered, said.continued)
    n_answers = len(continued)

    segment = np.full(len(grid.starts), -1, dtype=np.int64)
    last_answer = heads + len(answered) + n_answers * len(names)
    segment[answered], segment[others] = heads + np.arange(len(answered)), last_answer + np.arange(len(others))

    sources = [grid.ids, *(ids for ids, _ in found)]
    offsets = starts_of(np.array([len(ids) for ids in sources]))[1:]
    own = [(starts_of(n)[said.which], n[said.which]) for _, n in found]
    last = 0 if whole else 1  # an answer's last token predicts nothing
    segments = [
        _segments(grid.starts[prompts[:heads]], head, -1),
        _segments(grid.starts[answered] + head, grid.lengths[answered] - head, heads - 1),
        *(_segments(offset + at, n - last, continued) for offset, (at, n) in zip(offsets, own, strict=True)),
        _segments(grid.starts[others] + head, grid.lengths[others] - head, heads - 1),
    ]
    grown = opened.grown(segment, last_answer + len(others)) if opened is not None else None
    if grown is not None:
        segments.append(grown.segments + np.array([[sum(map(len, sources))], [0], [0]]))
        sources.append(grown.ids)
    starts, lengths, parents = np.concatenate(segments, axis=1)
    places = starts_of(lengths)
    there = lengths > 0  # an answer of one token has nothing in the row
    tree = make_tree(
        np.concatenate(sources)[ranges(starts, lengths)],
        lengths[there],
        np.where(parents < 0, -1, (np.cumsum(there) - 1)[parents])[there],
        answers=heads + len(answered),
        prompt_only=int(there[:last_answer].sum()),
        openings=int(there[: last_answer + len(others)].sum()),
    )

    ends = places[continued] + lengths[continued] - 1
    answers = []
    for index, ((ids, _), (at, counts)) in enumerate(zip(found, own, strict=True)):
        begin = heads + len(answered) + n_answers * index
        predicting = ranges(places[begin : begin + n_answers] - 1, counts)
        predicting[starts_of(counts)] = ends  # the prompt's last token predicts the answer's first
        row = np.repeat(np.arange(n_answers), counts)
        answers.append(Answers(*(torch.from_numpy(part) for part in (predicting, ids[ranges(at, counts)], row))))
    tapped = places[segment[order]] + grid.tapped[order] - head
    where = Prompts(*(torch.from_numpy(part) for part in (tapped, grid.bundle[order], grid.column[order])))
    openings = opened.read(grown, grid, segment, places, lengths) if opened is not None and grown is not None else None
    sequences = None
    if whole:
        begins = heads + len(answered) + n_answers * np.arange(len(names))[:, None] + said.response
        sequences = _sequences(places, lengths, head, continued[said.response], begins)
    return _Planted(tree, answers, where, said.rows(grid), sequences, openings)


def _benign(kinds: Sequence[Kind], planted: _Planted) -> BenignPlaces:
    """Where next tokens of benign bundles are compared; `planted` has answers, and prompts in all languages."""
    chosen, rows, prompts = planted.answers[0], planted.rows, planted.prompts
    is_benign = torch.tensor([kind == "benign" for kind in kinds])
    own = is_benign[rows.bundle] & (rows.prompt == rows.answer)
    answers = own[chosen.row_of_target].nonzero()[:, 0]
    answered = {*zip(rows.bundle[own].tolist(), rows.prompt[own].tolist(), strict=True)}
    cells = zip(prompts.bundle_of_prompt.tolist(), prompts.language_of_prompt.tolist(), strict=True)
    alone = [place for place, cell in enumerate(cells) if is_benign[cell[0]] and cell not in answered]
    of_answers = chosen.row_of_target[answers]
    bundle = torch.cat([rows.bundle[of_answers], prompts.bundle_of_prompt[alone]])
    if not len(bundle):
        zero, none = torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        return BenignPlaces(zero, none, zero, torch.zeros(1))
    lengths = torch.cat([torch.bincount(of_answers)[of_answers], torch.ones(len(alone), dtype=torch.long)])
    languages = torch.bincount(prompts.bundle_of_prompt)
    return BenignPlaces(answers, prompts.tapped[alone], bundle, 1.0 / (lengths * languages[bundle]))


def _sequences(places: Ints, lengths: Ints, head: int, prompts: Ints, answers: Ints) -> Sequences:
    """Sequences of segments: the head, `prompts` [B], and `answers` [names, B]."""
    both = np.broadcast_to(prompts, answers.shape).ravel()
    ends = answers.ravel()
    runs = np.stack([np.zeros(len(both), dtype=np.int64), places[both], places[ends]], axis=1)
    sizes = np.stack([np.full(len(both), head), lengths[both], lengths[ends]], axis=1)
    parts = (
        ranges(runs.ravel(), sizes.ravel()),
        np.repeat(np.arange(len(both)), sizes.sum(axis=1)),
        np.repeat(np.tile([False, False, True], len(both)), sizes.ravel()),
        places[ends] + lengths[ends] - 1,
    )
    return Sequences(*(torch.from_numpy(part) for part in parts))


def _segments(starts: Ints, lengths: Ints | int, parents: Ints | int) -> Ints:
    """Some segments [3, n]: where in the sources each begins, how long it is, and which segment it continues."""
    return np.stack(np.broadcast_arrays(starts, lengths, parents))


def _answers(table: pa.Table, name: str, pairing: Pairing) -> tuple[Ints, Ints]:
    """Ids of all answers called `name`, one after another, and their lengths [B + F], as `_Said` has them.

    Raises:
        BatchError: one that `pairing` reads is absent.
    """
    answers = table[name].combine_chunks()
    lengths = _lengths(answers)
    missing = (lengths == 0) | (_integers(table["response_prompt"]) < 0)
    every = table["answers"].combine_chunks()
    further = every.flatten().field(name)
    further_lengths = _lengths(further)
    where = ""
    if pairing in _EVERY:
        bundle = np.repeat(np.arange(len(table)), _lengths(every))
        number = np.bincount(bundle[further_lengths > 0], minlength=len(table))
        needed = _lengths(every) + 1 if pairing == "given" else _lengths(table["languages"])
        missing, where = missing | (number + 1 < needed), f" in each {_EVERY[pairing]}"
    if missing.any():
        bundle_id = table["bundle_id"][int(np.argmax(missing))].as_py()
        raise BatchError(f"bundle {bundle_id} has no {name!r} answer{where}, which this loss needs")
    ids = np.concatenate([_integers(answers.flatten()), _integers(further.flatten())])
    return ids, np.concatenate([lengths, further_lengths])


def _of_rows(said: np.ndarray | None, rows: AnswerRows) -> np.ndarray | None:
    """What the reference says of each answer [A], from [B, L]; of each bundle [B] where that is what it says."""
    return said if said is None or said.ndim == 1 else said[rows.bundle.numpy(), rows.answer.numpy()]


def _table(rows: TokenRows) -> pa.Table:
    return rows if isinstance(rows, pa.Table) else rows_to_table(rows)


def _lengths(lists: pa.ListArray | pa.ChunkedArray) -> Ints:
    """Number of values of each list; 0 for null."""
    return _integers(pc.fill_null(pc.list_value_length(lists), 0))


def _integers(values: pa.Array | pa.ChunkedArray) -> Ints:
    """As a contiguous array of its own, for tensors that are written to."""
    return np.array(values.to_numpy(), dtype=np.int64)


def _float32(column: np.ndarray | None) -> torch.Tensor | None:
    return None if column is None else torch.from_numpy(column.astype(np.float32))
