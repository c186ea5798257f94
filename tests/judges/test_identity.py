"""A judge's identity changes with its settings, its weights and its own rules, and with nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mlc_ray.config import ScoreConfig, parse_config
from mlc_ray.generate import translate
from mlc_ray.judges import degenerate, likelihood, phrase_lists
from mlc_ray.judges.base import make_judge

OWN = """
from mlc_ray.judges.base import Judge
from mlc_ray.types import Verdict

class Mine(Judge):
    name, measures, languages = "mine", ("refused",), None

    def judge(self, answers):
        return [Verdict("refused" if "{word}" in answer.response else "complied") for answer in answers]
"""


def identity(**judge: Any) -> str:
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "judge": judge}
    return make_judge(parse_config(ScoreConfig, raw).judge).identity


def test_the_code_of_a_judge_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "judge_of_ones_own.py"
    found = []
    for word in ("no", "no", "never"):
        file.write_text(OWN.replace("{word}", word))
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
        found.append(identity(name=f"{file.stem}:Mine"))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("name", "module"), [("refusal", degenerate), ("refusal", phrase_lists), ("likelihood", likelihood)]
)
def test_so_does_the_code_of_shipped_rules(
    name: str, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identity(name=name)
    changed = tmp_path / "changed.py"
    changed.write_text(Path(module.__file__).read_text(encoding="utf-8") + "\nMORE = 1\n", encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(changed))
    assert identity(name=name) != before


def test_a_translator_counts_by_its_weights_and_by_what_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def translated(**changes: Any) -> str:
        return identity(name="refusal", translate={"max_new_tokens": 512, **changes})

    for name, content in (("one", b"w"), ("two", b"w"), ("other", b"v")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(content)
    one, two, other = (translated(model=str(tmp_path / name)) for name in ("one", "two", "other"))
    assert one == two != other
    assert translated(model=str(tmp_path / "one"), max_new_tokens=600) != one
    endpoints = [{"base_url": f"http://{host}/v1", "model": "m"} for host in ("a", "b")]
    by_endpoint = [identity(name="refusal", translate={"endpoint": endpoint}) for endpoint in endpoints]
    assert by_endpoint[0] != by_endpoint[1]
    monkeypatch.setattr(translate, "translation_request", lambda text, language: f"In English, please: {text}")
    assert translated(model=str(tmp_path / "one")) != one
