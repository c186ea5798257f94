"""A row of segments that share what they begin with, from their ids, lengths and parents; all by index arithmetic."""

from __future__ import annotations

import numpy as np
import torch

from mlc_ray.data.ragged import Ints, ranges, starts_of
from mlc_ray.types import Tree


def make_tree(
    ids: Ints, lengths: Ints, parents: Ints, *, answers: int, prompt_only: int, openings: int | None = None
) -> Tree:
    """The `Tree` of S segments that lie one after another in `ids` [T] (see there for their order).

    Args:
        ids: the row's tokens.
        lengths: of the segments, each at least 1, [S].
        parents: the segment that each continues, which comes before it, or -1, [S].
        answers: the first segment that is an answer.
        prompt_only: the first segment that is a prompt which no answer continues; S where there is none.
        openings: the first segment of openings of responses; None where there is none.
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
        openings=len(lengths) if openings is None else openings,
        key_lengths=tuple(key_lengths.tolist()),
        keys=torch.from_numpy(keys),
        query_bounds=_bounds(lengths),
        key_bounds=_bounds(key_lengths),
    )


def _bounds(lengths: Ints) -> torch.Tensor:
    """0 and the running sum [S + 1], in the type that kernels want."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
