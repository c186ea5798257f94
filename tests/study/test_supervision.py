"""Tokens of supervision, against counts by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.data.store import TokenArtifact, write_rows
from mlc_ray.data.tables import rows_to_table
from mlc_ray.study.supervision import supervision_of
from mlc_ray.train.planning import order_of
from tests.train.tiny import random_rows, tiny_config, translated

ROWS = translated(random_rows(10))


@pytest.fixture
def tokens(tmp_path: Path) -> TokenArtifact:
    write_rows(tmp_path, [rows_to_table(ROWS[:6]), rows_to_table(ROWS[6:])], fingerprint="f", rejected={})
    return TokenArtifact.open(tmp_path)


def prompts(rows: list[Any], *, every: bool) -> dict[str, int]:
    found = Counter[str]()
    for row in rows:
        for index, code in enumerate(row.languages):
            if every or index == row.response_prompt:
                found[code] += len(row.prompts[index])
    return dict(found)


def answers(rows: list[Any], names: tuple[str, ...], *, every: bool) -> dict[str, int]:
    found = Counter[str]()
    for row in rows:
        found["en"] += sum(len(getattr(row, name)) for name in names)
        for further in row.answers if every else ():
            found[row.languages[further["prompt"]]] += sum(len(further[name]) for name in names)
    return dict(found)


BOTH = ("chosen", "rejected")


@pytest.mark.parametrize(
    ("sections", "every_prompt", "names", "every_answer"),
    [
        ({"mlc": {"weight": 0}}, False, BOTH, False),
        ({}, True, BOTH, False),
        ({"objective": {"loss": "sft"}, "mlc": {"weight": 0}}, False, ("chosen",), False),
        ({"objective": {"loss": "dpo", "answers": "all"}, "mlc": {"weight": 0}}, True, BOTH, True),
        ({"objective": {"loss": "mpo"}, "mlc": {"weight": 0}}, True, BOTH, True),
        ({"objective": {"loss": "sdrrl"}, "mlc": {"weight": 0}}, True, ("chosen",), True),
    ],
)
def test_what_a_loss_reads_is_counted_once_a_bundle(
    tokens: TokenArtifact, sections: dict[str, Any], every_prompt: bool, names: tuple[str, ...], every_answer: bool
) -> None:
    found = supervision_of(tiny_config(**sections), tokens)  # two epochs
    assert found.languages == ["ar", "en", "sw"]
    assert found.prompts == prompts(ROWS, every=every_prompt)
    assert found.answers == answers(ROWS, names, every=every_answer)


def test_bundles_that_a_short_run_never_reaches_are_not_counted(tokens: TokenArtifact) -> None:
    config = tiny_config(mlc={"weight": 0}, train={"max_steps": 2, "batch_bundles": 3})
    order = order_of(config, tokens)
    used = [ROWS[index] for step in (0, 1) for index in order.batch(step)]
    assert len(used) == 6
    found = supervision_of(config, tokens)
    assert found.answers == answers(used, BOTH, every=False) and found.prompts == prompts(used, every=False)


def test_sdrrl_without_translated_answers_reads_english_ones_alone(tokens: TokenArtifact) -> None:
    shares = {"loss": "sdrrl", "english": 0.5, "english_answers": 0.5, "translated": 0, "english_prompts": 0}
    found = supervision_of(tiny_config(objective=shares, mlc={"weight": 0}), tokens)
    assert found.answers == answers(ROWS, ("chosen",), every=False)
    assert found.prompts == prompts(ROWS, every=True)
