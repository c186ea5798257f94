"""A scaling study of one real size on real Ray, DeepSpeed and vLLM: searched, confirmed by two seeds, gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray.config import parse_config
from mlc_ray.config.scale import ScaleConfig
from mlc_ray.report.study import load_study
from mlc_ray.report.write import write_report
from mlc_ray.show import show
from mlc_ray.study.folder import StudyError
from mlc_ray.study.scale import resume_scale, scale

pytestmark = [pytest.mark.slow, pytest.mark.soak]


def settings(folder: Path, model: Path, address: str) -> dict[str, Any]:
    run = {
        "name": "run",
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [{"path": "sample:train"}], "languages": ["en", "es"]},
        "mlc": {"extractor_dim": 16},
        "optimizer": {"learning_rate": 1e-5},
        "train": {"max_steps": 1, "batch_bundles": 2},
        "engine": {"stage": 0},
        "cluster": {"address": address, "workers": 1, "cpus_per_worker": 0.5},
        "logging": {"json_lines": True},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return {
        "name": "small",
        "output_dir": str(folder),
        "resume": "auto",
        "sizes": {"smollm2-135m": {}},
        "train": str(folder / "run.yaml"),
        "search": {
            "space": {"mlc.layer": {"choice": [0.5, "last"]}, "mlc.weight": {"choice": [0.8]}},
            "sampler": "grid",
            "probe": {"limit": 4, "criterion": "silhouette"},
            "objective": {"name": "average", "min_benign_compliance": 0.0},
            "scoring": {
                "benchmarks": [{"path": "sample:select"}], "languages": ["en", "fr"], "limit": 2,
                "max_new_tokens": 4, "max_unparsed": 1.0,
                "engine": {"cpus_per_replica": 0.5, "max_model_len": 256, "cpu_kv_cache_gib": 1},
            },
            "confirm": {"benchmarks": [{"path": "sample:test"}], "limit": 2, "keep": 1, "seeds": [7]},
            "keep_models": 1,
        },
    }  # fmt: skip


def test_a_size_is_searched_and_nothing_is_done_twice(ray_local: Any, smollm2: Path, tmp_path: Path) -> None:
    raw = settings(tmp_path, smollm2, ray_local.get_runtime_context().gcs_address)
    result = scale(parse_config(ScaleConfig, raw))
    folder = tmp_path / "small"
    assert load_study(folder) == result and result.scaling is not None
    assert "searching smollm2-135m" in (folder / "logs/driver.jsonl").read_text()
    assert list((folder / "cells/smollm2-135m/logs").glob("scorer-*.jsonl"))
    (budget,) = result.scaling.budget
    assert (budget.parameters, budget.runs, budget.steps) == (134_515_008, 3, 1) and budget.tokens > 0
    (point,) = result.scaling.points
    assert point.layer.value in (0.5, 1.0) and point.probed is not None and point.seeds == 2 and point.trials == 2
    assert point.transfer is not None and point.over_refusal is not None
    assert [each.direction for each in result.scaling.trends] == ["cannot tell"] * 4
    assert result.bundles == {"harmful": 2, "benign": 2} and result.trained == ("en", "es")
    assert all(row.rates is not None for row in result.rows)
    assert "1 of 1 searches have ended" in show(folder)
    write_report([folder], tmp_path / "scaling.html")

    trials = folder / "cells/smollm2-135m/trials.json"
    written = trials.stat().st_mtime_ns
    assert resume_scale(folder).rows == result.rows
    assert scale(parse_config(ScaleConfig, raw)).rows == result.rows
    assert trials.stat().st_mtime_ns == written, "a search that is over is not begun again"
    with pytest.raises(StudyError, match=r"smollm2-135m: train.mlc.every was None, now 5"):
        scale(parse_config(ScaleConfig, {**raw, "set": ["mlc.every=5"]}))
