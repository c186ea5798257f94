"""`mlc-ray show`: every kind of folder, going on and ended, and that what it says to do next can be done."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlc_ray.cli import build_parser, main
from mlc_ray.data.batches import BatchError
from mlc_ray.report.search import SearchFileError
from mlc_ray.runs import checkpoint_folder
from mlc_ray.show import ShowError, show
from mlc_ray.storage import Place, write_json_atomic
from mlc_ray.train.divergence import DivergedError, forget_divergence, record_divergence
from mlc_ray.train.failures import failure_kept
from tests.checkpoints import complete
from tests.report.runs import grid, response, steps, utility_row, write_run, write_score, write_utility

ROWS = grid(["en", "sw"], lambda kind, code: {"harmful": 0.9, "benign": 0.1}[kind])


def said(folder: Path) -> dict[str, str]:
    """The lines by label; a second line of a label is joined to the first. Every command in them must parse."""
    lines: dict[str, str] = {}
    label = ""
    for line in show(folder).splitlines():
        first, _, text = line.partition("  ")
        label = first or label
        lines[label] = f"{lines[label]}\n{text.strip()}" if label in lines else text.strip()
    for command in lines.get("next", "").splitlines():
        words = shlex.split(command, comments=True)
        assert words[0] == "mlc-ray"
        build_parser().parse_args(words[1:])
    return lines


def checkpoint(run: Path, step: int) -> Path:
    folder = Path(checkpoint_folder(Place(run), step))
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    complete(folder, step)
    return folder


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", [{**row, "step_seconds": 10.0} for row in steps(12)])
    checkpoint(run, 10)
    (checkpoint(run, 12) / "weights").write_text("longer than the manifest says")
    (run / "train" / "checkpoint_manager_snapshot.json").write_text("{}")
    lines = said(run)
    assert lines["run"] == str(run)
    assert lines["state"].startswith("step 12 of 24 (50 %); last written ")
    assert lines["time left"] == "about 2 min 00 s, at 10.0 s a step"
    assert "loss/total 0.08333" in lines["last step"]
    assert lines["checkpoints"] == "at step 10"
    assert "too long" in lines["incomplete"]
    assert lines["next"] == f"mlc-ray train --resume '{run}'   # if it is not running any more"


def test_a_run_that_diverged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", steps(11))
    checkpoint(run, 10)
    error = DivergedError("step 12: the loss is not finite; start a new run", step=12, bundles=["a", "b"])
    record_divergence(run, error)
    assert json.loads((run / "diverged.json").read_text()) == {
        "step": 12, "bundles": ["a", "b"], "message": str(error),
    }  # fmt: skip
    lines = said(run)
    assert lines["state"].startswith("diverged at step 12 of 24; last written ")
    assert lines["diverged"] == str(error)
    new, report = lines["next"].splitlines()
    assert new.partition("   #")[0] == (
        f"mlc-ray train --config '{run}/config.yaml' --set name=NAME --set optimizer.learning_rate=LOWER"
    )
    assert new.endswith("--set model.dtype=float32")
    assert report == f"mlc-ray report '{run}'"
    facts = json.loads((run / "run.json").read_text())
    write_json_atomic(run / "run.json", {**facts, "resolved_config": {"model": {"dtype": "float32"}}})
    assert "dtype=float32" not in said(run)["next"]
    forget_divergence(run, 11)  # resumed: not there yet
    assert said(run)["state"].startswith("diverged at step 12")
    forget_divergence(run, 12)
    forget_divergence(run, 13)
    lines = said(run)
    assert "diverged" not in lines
    assert lines["state"].startswith("step 11 of 24")
    assert lines["next"].startswith("mlc-ray train --resume")


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps(12))
    with pytest.raises(BatchError), failure_kept(Place(run)):
        raise BatchError("bundle 'b7' is longer than 64 tokens: raise train.tokens_per_forward")
    lines = said(run)
    assert lines["state"].startswith("ended early, after step 12 of 24; last written ")
    assert lines["because"] == "bundle 'b7' is longer than 64 tokens: raise train.tokens_per_forward"
    assert lines["next"] == f"mlc-ray train --resume {run}"
    with failure_kept(Place(run)):
        assert "because" not in said(run), "a run that goes on"
    assert "because" not in said(run)


def test_a_run_that_ended_with_its_scores(tmp_path: Path) -> None:
    rows = steps(24)
    rows[6]["warnings"] = ["bundles of different meanings become one"]
    rows[23]["gradient_norm"] = None
    run = write_run(tmp_path / "r", rows)
    checkpoint(run, 24)
    facts = json.loads((run / "run.json").read_text())
    config = {
        "model": {"path": "/m", "dtype": "float32"}, "objective": {"loss": "dpo"}, "mlc": {"weight": 0.8, "layer": 20},
        "terms": {"contrast": {"weight": 0.1}},
    }  # fmt: skip
    write_json_atomic(run / "run.json", {**facts, "resolved_config": config})
    assert "next" in said(run)
    write_score(run / "scores" / "after", ROWS)
    (run / "scores" / "later").mkdir()
    lines = said(run)
    assert lines["model"] == "/m in float32"
    assert lines["loss"] == "dpo + 0.8 x mlc at layer 20 + 0.1 x contrast"
    assert lines["data"] == "48 bundles in 2 languages"
    assert lines["state"] == "ended, 24 of 24 steps"
    assert "gradient_norm not finite" in lines["last step"]
    assert lines["warning"] == "step 7: bundles of different meanings become one"
    assert re.fullmatch(r"harmful refused [\d.]+ %, benign complied [\d.]+ %", lines["score after"])
    assert lines["score later"] == "not ended"
    assert lines["next"].splitlines() == [
        f"mlc-ray report {run}", f"mlc-ray score {run} --benchmark sample:test", f"mlc-ray export {run} OUT",
    ]  # fmt: skip


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "config.yaml").write_text("name: r\n")
    assert said(run)["state"].startswith("preparing its data; last written ")
    write_json_atomic(run / "run.json", {"total_steps": 24})
    assert said(run)["state"].startswith("prepared, 0 of 24 steps are done; last written ")


# --------------------------------------------------------------------------------------------------------------- scores


def test_a_score_says_both_sides_with_intervals(tmp_path: Path) -> None:
    folder = write_score(tmp_path / "s", [*ROWS, response(99, "harmful", "sw", behaviour="unparsed")])
    write_utility(folder, utility_row("mmlu"))
    lines = said(folder)
    assert lines["state"] == "ended, 33 prompts are answered and judged"
    harmful, benign = lines["mine"].splitlines()
    assert re.match(r"harmful refused [\d.]+ % \([\d.]+ to [\d.]+\), mean of 2 languages, 9 bundles; worst", harmful)
    assert re.match(r"benign complied [\d.]+ % \([\d.]+ to [\d.]+\), mean of 2 languages, 8 bundles; worst", benign)
    assert lines["no verdict"] == "1 unparsed, 0 degenerate responses"
    assert lines["utility"] == "mmlu acc 0.2500"
    assert f"mlc-ray report {folder}" in lines["next"]


def test_a_score_with_one_side_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_score(tmp_path / "s", [row for row in ROWS if row["kind"] == "harmful"])
    assert "no benign prompts were asked" in said(folder)["mine"]


def test_a_score_that_has_not_ended(tmp_path: Path) -> None:
    folder = write_score(tmp_path / "s", ROWS)
    (folder / "scores.json").unlink()
    write_json_atomic(folder / "request.json", {"resolved": "/m", "config": {"judge": {"name": "qwen3guard"}}})
    lines = said(folder)
    assert (lines["model"], lines["judge"]) == ("/m", "qwen3guard")
    assert lines["state"].startswith("all 32 prompts are answered, not judged; last written ")
    (folder / "responses.parquet").unlink()
    assert said(folder)["state"].startswith("answering, nothing is saved yet")


# ------------------------------------------------------------------------------------------------- searches and probes


def search_folder(folder: Path) -> Path:
    """A search of four trials: one ended, one stopped, one begun."""
    folder.mkdir()
    (folder / "base.yaml").write_text("model: {path: m}\n")
    space = {"mlc.layer": {"choice": [20, 30]}, "mlc.weight": {"uniform": [0.1, 1.0]}}
    write_json_atomic(folder / "config.json", {"name": "s", "trials": 4, "sampler": "tpe", "space": space})
    write_score(folder / "baseline", ROWS)
    for name, layer in (("a", 20), ("b", 30), ("c", 30)):
        trial = write_run(folder / "trials" / name, steps(6))
        write_json_atomic(trial / "values.json", {"mlc.layer": layer, "mlc.weight": 0.123456})
    write_score(folder / "trials" / "a" / "scores" / "step-000006", ROWS)
    (folder / "trials" / "a" / "model").mkdir()
    write_json_atomic(folder / "trials" / "a" / "model" / "mlc_ray.json", {})
    (folder / "trials" / "a" / "finished").touch()
    (folder / "trials" / "b" / "stopped").touch()
    return folder


def test_a_search_that_goes_on(tmp_path: Path) -> None:
    folder = search_folder(tmp_path / "s")
    lines = said(folder)
    assert lines["space"] == "mlc.layer: choice [20, 30]; mlc.weight: uniform [0.1, 1.0]"
    assert lines["state"] == "2 of 4 trials have ended; begun and not ended: c"
    assert lines["baseline"].startswith("harmful refused ")
    assert re.match(r"mlc.layer=20, mlc.weight=0.123: step 6, harmful refused .*, benign complied", lines["trial a"])
    assert lines["trial b"].endswith("step 6, stopped, not scored")
    record_divergence(folder / "trials" / "c", DivergedError("step 7: not finite", step=7))
    assert said(folder)["trial c"].endswith("step 6, diverged at step 7, not scored")
    assert said(folder)["state"] == "3 of 4 trials have ended"  # a diverged one is not gone on with
    assert lines["next"] == f"mlc-ray search --resume {folder}   # if it is not running any more"
    write_json_atomic(folder / "trials.json", {"progress": {"ended": 3, "total": 4, "seconds_left": 7500.0}})
    assert said(folder)["time left"].startswith("about 2 h 05 min")
    assert "too good" in lines["note"]
    trial = said(folder / "trials" / "a")
    assert trial["trial"] == "of a search, with mlc.layer=20, mlc.weight=0.123"
    assert trial["state"] == "ended, 6 of 24 steps"


def test_a_trial_that_failed_is_shown_with_its_reason(tmp_path: Path) -> None:
    folder = search_folder(tmp_path / "s")
    trial = folder / "trials" / "c"
    for name in ("run.json", "metrics.jsonl"):
        (trial / name).unlink()
    assert said(folder)["trial c"].endswith("step 0, not scored yet")
    write_json_atomic(trial / "failed.json", {"message": "OSError: disk full\nand more"})
    lines = said(folder)
    assert lines["state"] == "2 of 4 trials have ended; failed: c"
    assert lines["trial c"].endswith("step 0, failed: OSError: disk full, not scored")
    lines = said(trial)
    assert lines["state"].startswith("ended early, before its first step; last written ")
    assert lines["because"].startswith("OSError: disk full")
    assert lines["next"] == f"mlc-ray search --resume {folder}"


def test_a_search_that_ended_shows_what_was_confirmed(tmp_path: Path) -> None:
    folder = search_folder(tmp_path / "s")
    config = json.loads((folder / "config.json").read_text())
    write_json_atomic(folder / "config.json", {**config, "trials": 2})
    assert "ended, " not in said(folder)["state"]  # nothing is confirmed
    rate = {"value": 50.0, "low": 40.0, "high": 60.0}
    point = {"trial": "a", "runs": ["a", "a-seed-7"], "score": {"measure": "refused", "harmful": rate, "benign": rate}}
    confirmation = {"points": [point], "trials": 2}
    progress = {"ended": 2, "total": 2}
    write_json_atomic(folder / "trials.json", {"confirmation": {**confirmation, "trials": 1}, "progress": progress})
    assert "ended, " not in said(folder)["state"] and "(before 1 more trials" in said(folder)["confirmed a"]
    write_json_atomic(folder / "trials.json", {"confirmation": confirmation, "progress": progress})
    write_json_atomic(folder / "config.json", {**config, "trials": 9})  # of a space with two points
    lines = said(folder)
    assert lines["state"].startswith("ended, 2 of 2 trials have ended")
    assert lines["confirmed a"] == (
        "harmful refused 50.0 % (40.0 to 60.0)   benign complied 50.0 % (40.0 to 60.0)   means over 2 models   <- best"
    )
    assert lines["next"].splitlines()[-1] == f"mlc-ray train --config {folder}/best.yaml"
    write_json_atomic(folder / "trials.json", {"confirmation": {"points": [{}], "trials": 2}, "progress": progress})
    with pytest.raises(SearchFileError, match=r"damaged: confirmation\.points\.0\.trial: .*search --resume"):
        said(folder)


def test_a_grid_counts_its_points(tmp_path: Path) -> None:
    folder = search_folder(tmp_path / "s")
    space = {"mlc.layer": {"choice": [20, 30]}, "mlc.every": {"integers": [1, 3]}}
    write_json_atomic(folder / "config.json", {"name": "s", "sampler": "grid", "space": space})
    assert said(folder)["state"].startswith("2 of 6 trials have ended")


def test_a_probe(tmp_path: Path) -> None:
    write_json_atomic(
        tmp_path / "probe.json",
        {"model": "m", "bundles": 64, "probe": {"ranking": [3, 1, 2, 0], "languages": ["en", "sw"]}},
    )
    lines = said(tmp_path)
    assert lines["layers"] == "ranked 3, 1, 2, 0 first, of 4"
    assert lines["next"].endswith("--set mlc.layer=3")


# ----------------------------------------------------------------------------------------------------------- the others


def test_a_folder_of_folders_has_a_line_for_each(tmp_path: Path) -> None:
    write_run(tmp_path / "one", steps(12))
    search_folder(tmp_path / "two")
    (tmp_path / "cache").mkdir()
    lines = said(tmp_path)
    assert lines["one"].startswith("run: step 12 of 24")
    assert lines["two"].startswith("search: 2 of 4 trials")
    assert "cache" not in lines


def test_what_cannot_be_shown_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShowError, match=r"holds no run, score, search, study, probe or translation"):
        show(tmp_path)
    with pytest.raises(ShowError, match=r"none' is not a folder"):
        show(tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")  # a model's, not a search's
    with pytest.raises(ShowError):
        show(tmp_path)
    run = write_run(tmp_path / "r", steps(1))
    (run / "run.json").write_text("{")
    with pytest.raises(ShowError, match=r"run\.json' is damaged: not valid JSON"):
        show(run)
    (run / "run.json").write_text("[]")
    with pytest.raises(ShowError, match=r"expected an object, found list"):
        show(run)


def test_it_is_a_command_that_starts_no_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "r", steps(12))
    assert main(["show", str(run)]) == 0
    assert "step 12 of 24" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    heavy = "[name for name in ('ray', 'torch', 'vllm') if name in sys.modules]"
    code = f"import sys; from mlc_ray.cli import main; main(['show', {str(run)!r}]); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_it_reads_from_a_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples import my_storage

    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    run = write_run(tmp_path / "r", steps(24))
    checkpoint(run, 24)
    my_storage.VaultStorage().publish(run, "vault://runs/r")
    text = show(Place("vault://runs/r"))
    assert "ended, 24 of 24 steps" in text
    assert "mlc-ray export vault://runs/r OUT" in text
