"""A row of segments that share what they begin with, from their ids, lengths and parents; all by index arithmetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from mlc_ray.types import Tree

Ints = npt.NDArray[np.int64]


def make_tree(ids: Ints, lengths: Ints, parents: Ints, *, answers: int, prompt_only: int) -> Tree:
    """The `Tree` of S segments that lie one after another in `ids` [T] (see there for their order).

    Args:
        ids: the row's tokens.
        lengths: of the segments, each at least 1, [S].
        parents: the segment that each continues, which comes before it, or -1, [S].
        answers: the first segment that is an answer.
        prompt_only: the first segment that is a prompt which no answer continues; S where there is none.
    """
    starts = starts_of(lengths)
    # Each segment, its parent, the parent's parent, ... until nobody has one: [S, depth] once turned round.
    line = [np.arange(len(lengths))]
    while (above := np.where(line[-1] >= 0, parents[line[-1]], -1)).max() >= 0:
        line.append(above)
    path = np.stack(line[::-1], axis=1)
    inside = path >= 0
    key_lengths: Ints = np.where(inside, lengths[path], 0).sum(axis=1)
    keys = ranges(starts[path[inside]], lengths[path[inside]])
    return Tree(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(ranges(key_lengths - lengths, lengths))[None],
        starts=tuple(starts.tolist()),
        lengths=tuple(lengths.tolist()),
        parents=tuple(parents.tolist()),
        answers=answers,
        prompt_only=prompt_only,
        key_lengths=tuple(key_lengths.tolist()),
        keys=torch.from_numpy(keys),
        query_bounds=_bounds(lengths),
        key_bounds=_bounds(key_lengths),
    )


def starts_of(lengths: Ints) -> Ints:
    """Where each of several runs begins when they lie one after another."""
    starts: Ints = np.cumsum(lengths) - lengths
    return starts


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """start, start + 1, ... for each run, one after another."""
    whole: Ints = np.repeat(starts - starts_of(lengths), lengths) + np.arange(int(lengths.sum()))
    return whole


def common_start(ids: Ints, starts: Ints, lengths: Ints) -> int:
    """How many tokens all runs in `ids` begin with, at least one less than the shortest run has."""
    if len(starts) < 2:
        return 0
    most = int(lengths.min()) - 1
    columns = ids[starts[:, None] + np.arange(most)]
    differs = (columns != columns[0]).any(axis=0)
    return int(np.argmax(differs)) if differs.any() else most


def _bounds(lengths: Ints) -> torch.Tensor:
    """0 and the running sum [S + 1], in the type that kernels want."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
