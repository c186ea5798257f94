"""A scaling study's folder as it leaves it, without training: searches and scores written by the real functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mlc_ray.config import ScaleConfig, parse_config
from mlc_ray.report.scale import SizeBudget
from mlc_ray.report.search import Progress
from mlc_ray.runs import CONFIG_FILE, CONFIRMATION, FINISHED_FILE, SCORES_FOLDER, VALUES_FILE
from mlc_ray.score.results import load_records, load_scores
from mlc_ray.search.confirm import confirmation_of
from mlc_ray.search.folder import write_settings
from mlc_ray.search.objectives.base import make_objective
from mlc_ray.search.results import Confirmed, Trial, write_results
from mlc_ray.storage import NO_COMMITS, Place
from mlc_ray.study.searches import ScalePlan, SizeSearch, cell_folder, make_searches
from tests.report.runs import grid, write_score

LANGUAGES = ("en", "fr", "sw")
LAYERS, WEIGHTS = (0.5, "last"), (0.8, 2.4)


def raw_scale(folder: Path, *sizes: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": folder.name,
        "output_dir": str(folder.parent),
        "sizes": {size: {"set": [f"model.path=/models/{size}"]} for size in sizes},
        "train": "recipe:quickstart",
        "search": {
            "space": {"mlc.layer": {"choice": list(LAYERS)}, "mlc.weight": {"choice": list(WEIGHTS)}},
            "sampler": "grid",
            "objective": {"name": "average", "min_benign_compliance": 0.5},
            "scoring": {"benchmarks": [{"path": "sample:select"}]},
            "confirm": {"benchmarks": [{"path": "sample:test"}], "keep": 1, "seeds": [7]},
        },
        **changes,
    }


def planned(folder: Path, *sizes: str, **changes: Any) -> ScalePlan:
    config = parse_config(ScaleConfig, raw_scale(folder, *sizes, **changes))
    budget = [
        SizeBudget(size, 1e8 * 2**index, 5, 3, 60_000, 3.6e13 * 2**index, 7, 350, 1.5 + 0.75 * index, None)
        for index, size in enumerate(sizes)
    ]
    plan = ScalePlan(config, make_searches(config, Place(folder)), tuple(budget))
    plan.save(Place(folder))
    return plan


def write_search(search: SizeSearch, study: Path, *, best: Any = "last", gain: float = 0.6) -> None:
    """All four trials, of which `best` with lambda 2.4 refuses `gain` more; confirmed with two seeds."""
    place = cell_folder(Place(study), search.size)
    folder = Path(place)
    write_settings(search.config, search.space, place, NO_COMMITS)
    (folder / "probe").mkdir(parents=True)
    probe = {"ranking": [2, 3, 1, 0], "layers": [{}, {}, {}, {}]}
    (folder / "probe" / "probe.json").write_text(json.dumps({"probe": probe}))
    objective = make_objective(search.config.objective)
    score_into(folder / "baseline", 0.2, 0.05)
    trials, chosen = [], ""
    for number, (layer, weight) in enumerate((one, other) for one in LAYERS for other in WEIGHTS):
        values = {"mlc.layer": layer, "mlc.weight": weight}
        is_best = (layer, weight) == (best, 2.4)
        name = f"{number:08x}"
        run = write_run(search, folder / "trials" / name, values, seed=42)
        (run / VALUES_FILE).write_text(json.dumps(values))
        score = score_into(run / SCORES_FOLDER / "step-000003", 0.2 + gain if is_best else 0.3, 0.1)
        worth = objective.score(load_records(load_scores(score)))
        trials.append(Trial(name, values, worth, 3, "finished", 6.0))
        chosen = name if is_best else chosen
    again = write_run(search, folder / "trials" / f"{chosen}-seed-7", {"mlc.layer": best, "mlc.weight": 2.4}, seed=7)
    records = {}
    for seed, run in ((42, folder / "trials" / chosen), (7, again)):
        score = score_into(run / SCORES_FOLDER / CONFIRMATION, 0.2 + gain, 0.1, seed=seed)
        records[seed] = load_records(load_scores(score))
    before = load_records(load_scores(score_into(folder / CONFIRMATION, 0.2, 0.05)))
    names = (chosen, again.name)
    point = Confirmed(chosen, names, {"mlc.layer": best, "mlc.weight": 2.4}, objective.score(*records.values()))
    found = confirmation_of(objective, [(point, records)], (objective.score(before), before))
    from dataclasses import replace

    baseline = objective.score(load_records(load_scores(folder / "baseline")))
    write_results(
        place, search.config, baseline, trials, progress=Progress(4, 4), confirmation=replace(found, trials=4),
        earlier=True,
    )  # fmt: skip


def write_run(search: SizeSearch, folder: Path, values: dict[str, Any], *, seed: int) -> Path:
    """A run that ended after 3 steps of 2 seconds."""
    folder.mkdir(parents=True)
    run = search.space.run(values, name=folder.name, seed=seed)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_unset=True)))
    lines = [json.dumps({"step": step, "step_seconds": 2.0}) + "\n" for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / FINISHED_FILE).touch()
    return folder


def score_into(folder: Path, harmful: float, benign: float, *, seed: int = 1) -> Path:
    rows = grid(LANGUAGES, lambda kind, code: harmful if kind == "harmful" else benign, seed=seed, bundles=40)
    config = {"max_new_tokens": 64, "max_unparsed": 0.05, "seconds": {"total": 10.0}}
    return write_score(folder, rows, seen=["en", "fr"], config=config)
