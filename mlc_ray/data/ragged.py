"""Runs of different lengths that lie one after another in a flat array of tokens: index arithmetic, numpy alone."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Token = TypeVar("Token", np.int32, np.int64)


def starts_of(lengths: Ints) -> Ints:
    """Where each of several runs begins when they lie one after another."""
    starts: Ints = np.cumsum(lengths) - lengths
    return starts


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """start, start + 1, ... for each run, one after another."""
    whole: Ints = np.repeat(starts - starts_of(lengths), lengths) + np.arange(int(lengths.sum()))
    return whole


def common_start(ids: Ints, starts: Ints, lengths: Ints) -> int:
    """How many tokens all runs in `ids` begin with; there is at least one run."""
    most = int(lengths.min())
    columns = ids[starts[:, None] + np.arange(most)]
    differs = (columns != columns[0]).any(axis=0)
    return int(np.argmax(differs)) if differs.any() else most


def shared_start(one: npt.NDArray[Token], other: npt.NDArray[Token]) -> npt.NDArray[Token]:
    """The tokens that two runs begin with."""
    lengths = np.array([len(one), len(other)])
    return one[: common_start(np.concatenate([one, other]), starts_of(lengths), lengths)]
