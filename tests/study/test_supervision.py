"""Tokens of supervision, against counts by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.data.store import TokenArtifact
from mlc_ray.data.tables import rows_to_table
from mlc_ray.losses.objective import Objective
from mlc_ray.plan.cutting import order_of
from mlc_ray.study.supervision import supervision_of
from tests.data.files import write_rows
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
        ({"mlc": {"every": 1}}, True, BOTH, False),
        ({"objective": {"loss": "sft"}, "mlc": {"weight": 0}}, False, ("chosen",), False),
        ({"objective": {"loss": "dpo", "answers": "all"}, "mlc": {"weight": 0}}, True, BOTH, True),
        ({"objective": {"loss": "dpo", "answers": "given"}, "mlc": {"weight": 0}}, True, BOTH, True),
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


@pytest.mark.parametrize(("mlc", "tapping"), [({"every": 2}, (0, 2)), ({"every": 1, "start": 0.5}, (2, 3))])
def test_prompts_in_all_languages_are_those_of_the_steps_that_tap(
    tokens: TokenArtifact, mlc: dict[str, Any], tapping: tuple[int, ...]
) -> None:
    config = tiny_config(mlc=mlc, train={"max_steps": 4, "batch_bundles": 2})
    order = order_of(config, tokens)
    steps = {step: [ROWS[index] for index in order.batch(step)] for step in range(4)}
    tapped = Counter(prompts([row for step in tapping for row in steps[step]], every=True))
    others = Counter(prompts([row for step, rows in steps.items() if step not in tapping for row in rows], every=False))
    assert supervision_of(config, tokens).prompts == dict(tapped + others)


def test_a_term_that_reads_the_response_language_alone_taps_no_other_prompts(tokens: TokenArtifact) -> None:
    decision = {"terms": {"decision": {}}, "mlc": {"weight": 0}}
    config = tiny_config(**decision)
    assert not Objective(config).ever_taps and Objective(config).terms
    assert supervision_of(config, tokens).prompts == prompts(ROWS, every=False)


def test_sdrrl_without_translated_answers_reads_english_ones_alone(tokens: TokenArtifact) -> None:
    shares = {"loss": "sdrrl", "english": 0.5, "english_answers": 0.5, "translated": 0, "english_prompts": 0}
    found = supervision_of(tiny_config(objective=shares, mlc={"weight": 0}), tokens)
    assert found.answers == answers(ROWS, ("chosen",), every=False)
    assert found.prompts == prompts(ROWS, every=True)
