"""Openings of responses as branches of a prefix tree: what several of them begin with is forwarded once.

The openings of a language are sequences of tokens, none the beginning of another, so that as beginnings of a response
they exclude each other and their probabilities add up. A last token predicts nothing and is not in the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlc_ray.data.ragged import Ints, starts_of
from mlc_ray.errors import MlcRayError
from mlc_ray.types import Openings


class OpeningsError(MlcRayError, ValueError):
    """Openings of responses cannot be read; the message names the language."""


def prefix_free(sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The different sequences that begin with none of the others, in their order: what they mean includes the rest."""
    found = dict.fromkeys(tuple(sequence) for sequence in sequences)
    return [one for one in found if not any(one[:length] in found for length in range(1, len(one)))]


@dataclass(frozen=True)
class Branch:
    """The openings behind a prompt in one language: N tokens in segments, which predict the openings' tokens.

    `segments` [2, S] are lengths and parents: an earlier segment, or -1 for the prompt. `targets` [1 + N, K] are what
    openings go on with behind the prompt and behind each token, -1 where there are less than K; `steps` [O, D] is each
    opening's targets in `targets` flattened, -1 behind its end.
    """

    ids: Ints
    segments: Ints
    targets: Ints
    steps: Ints

    @classmethod
    def of(cls, openings: Sequence[tuple[int, ...]], *, width: int, longest: int) -> Branch:
        """Of openings of which none begins with another; at most `width` go on differently, `longest` is of any."""
        following = _following(openings)
        rows, lengths, parents = dict[tuple[int, ...], int](), list[int](), list[int]()

        def walk(node: tuple[int, ...], segment: int) -> None:
            rows[node] = len(rows)
            inner = [child for token in following[node] if (child := (*node, token)) in following]
            for child in inner:
                if len(inner) == 1 and segment >= 0:  # a last token is not in the row
                    lengths[segment] += 1
                    walk(child, segment)
                else:
                    lengths.append(1)
                    parents.append(segment)
                    walk(child, len(lengths) - 1)

        walk((), -1)
        targets = np.full((len(rows), width), -1, dtype=np.int64)
        steps = np.full((len(openings), longest), -1, dtype=np.int64)
        for node, row in rows.items():
            targets[row, : len(following[node])] = following[node]
        for number, opening in enumerate(openings):
            for length, token in enumerate(opening):
                node = opening[:length]
                steps[number, length] = rows[node] * width + following[node].index(token)
        ids = np.array([node[-1] for node in rows if node], dtype=np.int64)
        return cls(ids, np.array([lengths, parents], dtype=np.int64).reshape(2, -1), targets, steps)


def _following(openings: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """What each beginning of openings goes on with."""
    found: dict[tuple[int, ...], dict[int, None]] = {}
    for opening in openings:
        for length, token in enumerate(opening):
            found.setdefault(opening[:length], {})[token] = None
    return {beginning: list(tokens) for beginning, tokens in found.items()}


class Branches:
    """The openings of several languages, of shapes that are the same for all.

    Args:
        openings: token ids of each language's openings; one that begins with another is left out.

    Raises:
        OpeningsError: A language has none, or one has no token.
    """

    def __init__(self, openings: Mapping[str, Sequence[Sequence[int]]]) -> None:
        kept = {code: prefix_free(sequences) for code, sequences in openings.items()}
        for code, sequences in kept.items():
            if not sequences or () in sequences:
                raise OpeningsError(
                    f"openings of responses in {code!r}: there is none, or one without a token ({sequences!r}); give "
                    "some by openings.further"
                )
        every = [one for sequences in kept.values() for one in sequences]
        self.longest = max(map(len, every))
        self.width = max(len(after) for sequences in kept.values() for after in _following(sequences).values())
        self.openings = kept
        self._of = {
            code: Branch.of(sequences, width=self.width, longest=self.longest) for code, sequences in kept.items()
        }

    def of(self, code: str) -> Branch:
        """Those of a language."""
        return self._of[code]

    @property
    def tokens(self) -> int:
        """The most tokens that a prompt's openings add to a row."""
        return max(len(branch.ids) for branch in self._of.values())


@dataclass(frozen=True)
class Grown:
    """Openings behind P prompts: the tokens and the segments [3, S] (start in `ids`, length, parent) of all of them.

    A parent is one of the row's segments; those of openings lie behind one another from segment `first` on.
    """

    ids: Ints
    segments: Ints
    branches: Sequence[Branch]

    @classmethod
    def behind(cls, branches: Branches, codes: Sequence[str], prompts: Ints, first: int) -> Grown:
        """Of prompts in the languages `codes`, which are the segments `prompts` [P] of the row."""
        found = [branches.of(code) for code in codes]
        segments, tokens = list[Ints](), 0
        for branch, prompt in zip(found, prompts.tolist(), strict=True):
            lengths, parents = branch.segments
            starts = tokens + starts_of(lengths)
            segments.append(np.stack([starts, lengths, np.where(parents < 0, prompt, first + parents)]))
            first, tokens = first + len(lengths), tokens + len(branch.ids)
        empty = np.empty((3, 0), dtype=np.int64)
        ids = np.concatenate([np.empty(0, dtype=np.int64), *(branch.ids for branch in found)])
        return cls(ids, np.concatenate([empty, *segments], axis=1), found)

    def read(self, ends: Ints, place: int, *, bundle: Ints, column: Ints) -> Openings:
        """Where they are read, in a row in which their tokens begin at `place`.

        Args:
            ends: places of the prompts' last tokens, [P].
            place: where the first token of the first opening lies.
            bundle: of each prompt, [P].
            column: of its language, [P].
        """
        predicting, steps, of_prompt = list[Ints](), list[Ints](), list[Ints]()
        width = self.branches[0].targets.shape[1]
        most = max(len(branch.steps) for branch in self.branches)
        rows = sum(len(branch.targets) for branch in self.branches)
        number = sum(len(branch.steps) for branch in self.branches)
        row = opening = 0
        for branch, end in zip(self.branches, ends.tolist(), strict=True):
            predicting.append(np.concatenate([[end], place + np.arange(len(branch.ids))]))
            steps.append(np.where(branch.steps < 0, rows * width, row * width + branch.steps))
            own = np.full(most, number, dtype=np.int64)
            own[: len(branch.steps)] = opening + np.arange(len(branch.steps))
            of_prompt.append(own)
            place, row = place + len(branch.ids), row + len(branch.targets)
            opening += len(branch.steps)
        parts = (
            np.concatenate(predicting),
            np.concatenate([branch.targets for branch in self.branches]),
            np.concatenate(steps),
            np.stack(of_prompt),
            bundle,
            column,
        )
        return Openings(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))
