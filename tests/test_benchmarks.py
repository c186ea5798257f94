"""The benchmark runs, and the step it compares ours with gives the same losses and gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def test_step_benchmark(tmp_path: Path, repository: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    out = tmp_path / "step.json"
    options = ["--model", tmp_path / "model", "--out", out]
    plain = ["--bundles", "2", "--repeats", "1", "--device", "cpu", "--dtype", "float32", "--threads", "1"]
    command = [sys.executable, repository / "benchmarks" / "step.py", *options, *plain]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

    result = json.loads(out.read_text())
    ours, theirs = result["ours"], result["theirs"]
    for side in (ours, theirs):
        assert len(side["seconds"]) == 1 and side["seconds_median"] > 0
        assert side["peak_bytes"] - side["before_bytes"] == side["step_bytes"] >= 0
        assert set(side["losses"]) == {"alignment", "mlc", "total"}
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert max(result["agreement"]["gradient_relative"].values()) < 1e-4
    assert result["agreement"]["equal"] is True
    assert len(result["ratio"]["seconds_pairs"]) == 1
    assert result["layer"] == 2
    # Every bundle has exactly the published numbers of tokens. Ours forwards the English prompt once instead of three
    # times, and no answer's last token; random tokens have no common head.
    assert ours["tokens_forwarded"] == 2 * (427 + 208 - 2 * 25 - 2)
    assert theirs["tokens_forwarded"] >= 2 * (2 * 12) * 104


@pytest.mark.slow
def test_warm_scoring_benchmark(tmp_path: Path, repository: Path, smollm2: Path) -> None:
    out = tmp_path / "warm.json"
    plain = ["--rounds", "2", "--limit", "1", "--max-new-tokens", "8"]
    command = [
        sys.executable,
        repository / "benchmarks" / "warm_scoring.py",
        "--model",
        smollm2,
        "--out",
        out,
        *plain,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr  # warm and fresh engines gave the same responses
    result = json.loads(out.read_text())
    assert (result["prompts"], len(result["start"]), len(result["warm"]), len(result["fresh"])) == (24, 3, 2, 2)
    assert all(row["total"] >= row["answer"] + row["transfer"] + row["proof"] > 0 for row in result["warm"])
    assert "of an engine start" in done.stdout
