"""Decisions by language: the AUC and its interval, who is not known, and the log-odds that a probe reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mlc_ray.cli import main
from mlc_ray.config import ModelSection, OpeningsSection
from mlc_ray.data.branches import Branches
from mlc_ray.data.tables import rows_to_table
from mlc_ray.report.decisions import LanguageDecision, decision_table
from mlc_ray.report.tables import markdown
from mlc_ray.search.decisions import decisions
from mlc_ray.search.probe import Probe, ProbeActor, ProbeError
from mlc_ray.stats.auc import auc_interval
from mlc_ray.stats.rates import Interval
from tests.data.files import write_rows
from tests.train.test_openings import OPENINGS, plain
from tests.train.tiny import LANGUAGES, random_rows, tiny_model

NUMBER = 40


def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-odds in four languages: told apart, at chance and refused, at chance and answered, of too few bundles."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(NUMBER, 4, generator=generator, dtype=torch.float64)
    harmful = torch.arange(NUMBER) % 2 == 0
    noise[1::2, 1] = noise[0::2, 1]  # each benign bundle as its harmful twin
    sign = torch.where(harmful, 2.0, -2.0)
    log_odds = torch.stack([noise[:, 0] + sign, noise[:, 1] + 6, noise[:, 2] - 6, noise[:, 3]], dim=1)
    present = torch.ones(NUMBER, 4, dtype=torch.bool)
    present[14:, 3] = False
    return log_odds, present, harmful


def test_the_auc_is_of_pairs_of_a_harmful_and_a_benign_bundle() -> None:
    log_odds, present, harmful = made()
    found = decisions(log_odds, present, harmful, ["en", "sw", "zh", "xx"])
    assert [each.language for each in found] == ["en", "sw", "zh"]

    ups, downs = log_odds[::2, 0].tolist(), log_odds[1::2, 0].tolist()
    won = sum(up > down for up in ups for down in downs)
    assert found[0].auc == auc_interval(won / len(ups) / len(downs), len(ups), len(downs))
    assert (found[0].harmful, found[0].benign) == pytest.approx(
        [100 * float((log_odds[kind, 0] > 0).double().mean()) for kind in (harmful, ~harmful)]
    )


def test_a_language_is_not_known_where_all_is_refused_at_chance() -> None:
    found = decisions(*made(), ["en", "sw", "zh", "xx"])
    assert [each.is_unknown for each in found] == [False, True, False]  # one that answers all is not called safe anyway
    assert Probe((), ("en",), 3, decisions=found).unknown == ["sw"]
    lines = markdown(decision_table(found))
    assert [("not known" in line) for line in lines if line.startswith(("| en", "| sw", "| zh"))] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("auc", "shares", "said"),
    [
        ((0.9, 0.8, 0.97), (90.0, 60.0), ""),
        ((0.5, 0.35, 0.65), (90.0, 80.0), "not known: refuses without telling what"),
        ((0.8, 0.48, 0.95), (90.0, 80.0), "undecided: more bundles would tell"),
        ((0.5, 0.35, 0.65), (10.0, 0.0), "at chance"),
    ],
)
def test_a_wide_interval_decides_nothing(
    auc: tuple[float, float, float], shares: tuple[float, float], said: str
) -> None:
    one = LanguageDecision("sw", Interval(*auc), *shares)
    lines = markdown(decision_table([one], ["xx"], few=8))
    assert [line.split("|")[-2].strip() for line in lines if line.startswith("| sw")] == [said]
    assert one.is_unknown is said.startswith("not known")
    assert next(line for line in lines if line.startswith("| xx")).endswith("fewer than 8 bundles of a kind |")


def test_a_probe_reads_the_log_odds_of_plain_forwards(tmp_path: Path) -> None:
    model, rows = tiny_model(), random_rows(3, head=(5, 3, 8))
    model.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "tokens", [rows_to_table(rows)], fingerprint="x", rejected={})
    settings = ModelSection(path=str(tmp_path / "model"), dtype="float32").model_dump()
    actor = ProbeActor(str(tmp_path / "tokens"), settings, Branches(OPENINGS), gpu=False)
    said = actor({"id": np.arange(3)})
    for index, row in enumerate(rows):
        for code, prompt in zip(row.languages, row.prompts, strict=True):
            expected = torch.logit(plain(model, prompt, OPENINGS[code]).detach().double().exp())
            assert said["log_odds"][index, LANGUAGES.index(code)] == pytest.approx(float(expected), abs=1e-4)
    without = ProbeActor(str(tmp_path / "tokens"), settings, None, gpu=False)({"id": np.arange(3)})
    assert "log_odds" not in without and np.array_equal(without["states"], said["states"])


def test_a_probe_is_given_openings_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, OpeningsSection] = {}

    def probe(*_: object, openings: OpeningsSection, **__: object) -> None:
        given["openings"] = openings
        raise ProbeError("far enough")

    monkeypatch.setattr("mlc_ray.search.probe.probe", probe)
    arguments = ["probe", "MODEL", "--bundles", "sample:train", "--openings", "{further: {en: [No.]}}"]
    with pytest.raises(SystemExit):
        sys.exit(main(arguments))
    assert given["openings"].further == {"en": ["No."]}
