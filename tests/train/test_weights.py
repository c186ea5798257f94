"""What a trial of a search publishes to be scored: weights alone, beside the checkpoints that a run goes on from."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlc_ray.lease import Holder, LeaseGuard
from mlc_ray.runs import LEASE_FILE, checkpoint_folders, training_languages, weights_folders
from mlc_ray.storage import Place
from mlc_ray.train import worker
from mlc_ray.train.checkpoint import agree_on_checkpoint, last_weights, list_checkpoints, load_checkpoint
from mlc_ray.train.collectives import from_rank_zero
from mlc_ray.train.entry import WorkerSpec
from mlc_ray.train.export import export
from mlc_ray.train.saving import CheckpointSaver
from mlc_ray.train.watchdog import Watchdog
from mlc_ray.train.worker import WatchedSaves
from tests.train.test_checkpoint import FINGERPRINTS, config_of, tokenizer
from tests.train.tiny import make_engine, on_workers, random_rows, run_engine, whole_weights

STEPS = 5
LAYOUTS = ["stage2", "stage3 lora"]
KEPT = "stage2 kept"  # whose trials end with a checkpoint


class Noted:
    """What scores weights: notes what is there when it is called, as it is on rank 0 alone."""

    every = 2

    def __init__(self, *, keep_state):
        self.keep_state, self.seen = keep_state, []

    def __call__(self, run_folder, weights, step):
        found = last_weights(run_folder)
        sizes = weights.sizes()
        self.seen.append(
            {
                "step": step,
                "files": sorted(sizes),
                "bytes": sum(sizes.values()),
                "there": [folder.name for folder in weights_folders(run_folder)],
                "states": [folder.name for _, folder in checkpoint_folders(run_folder)],
                "ends": found and (found[0].name, found[1]),
            }
        )
        return {"step": float(step)}


class Saves(WatchedSaves):
    """A worker's saves, which also keep the weights that the engine has at each score."""

    def score(self, progress, *, last):
        before = len(REPORTED)
        super().score(progress, last=last)
        if len(REPORTED) > before:
            self.engine_weights.append(whole_weights(self.saver.engine))


REPORTED = []


def trial(rank, folder, model_folder):
    """Of each layout what was scored at each step, and what a worker that resumes has scored."""
    # What is Ray's of it: the broadcast, and the report to a controller.
    worker._on_first_worker = lambda function: from_rank_zero(function() if rank == 0 else None)
    worker.ray.train.report = REPORTED.append
    outcomes = {}
    for layout in [*LAYOUTS, KEPT]:
        config = config_of(layout.removesuffix(" kept"), model_folder, checkpoint={"every": 3, "background": True})
        run, holder = Place(folder / layout), from_rank_zero(Holder.here())
        if rank == 0:
            (run / LEASE_FILE).write_json(asdict(holder))
        runs = []
        for _ in range(2):
            engine, noted = make_engine(config), Noted(keep_state=layout == KEPT)
            told = {"config": config, "fingerprints": FINGERPRINTS}
            spec = WorkerSpec({}, run, run, None, FINGERPRINTS, STEPS, holder.id, score=noted)
            watchdog, guard = Watchdog(0, run, lease=holder.id, rank=rank, step=0), LeaseGuard(run, holder.id)
            saves = Saves(spec, CheckpointSaver(run, engine=engine, tokenizer=tokenizer(), **told), watchdog, guard)
            saves.engine_weights, progress = [], None
            if (newest := agree_on_checkpoint(run)) is not None:
                progress = load_checkpoint(newest, engine=engine, **told)
            REPORTED.clear()
            run_engine(config, random_rows(10), STEPS, saves=saves, engine=engine, progress=progress)
            for seen, weights in zip(noted.seen, saves.engine_weights, strict=False):  # the second rank has neither
                seen["weights"] = weights
            runs.append((noted.seen, [each["step"] for each in REPORTED]))
        outcomes[layout] = runs
    return outcomes


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return folder, on_workers(2, trial, folder / "workers", folder, folder / "model")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_alone_are_published_and_states_are_written_at_their_own_interval(layout, trials):
    folder, (outcomes, others) = trials
    (first, reported), (resumed, reported_again) = outcomes[layout]
    assert reported == [2, 4, 5] and reported_again == [4, 5]
    assert others[layout] == [([], [2, 4, 5]), ([], [4, 5])]  # the second rank waits, and is told the same
    assert [each["step"] for each in first] == [2, 4, 5]
    assert [each["states"] for each in first] == [[], ["checkpoint_000003"], ["checkpoint_000003"]]
    assert [each["there"] for each in first] == [[f"weights_{n:06d}"] for n in (2, 4, 5)]  # those before are gone
    assert [each["ends"] for each in first] == [None, None, ("weights_000005", 5)]
    part = "adapter" if "lora" in layout else "model"
    for each in first:
        assert {name.split("/")[0] for name in each["files"]} == {part, "extractor.safetensors", "manifest.json"}
    # Another process goes on from the state of step 3, not from the weights of step 5, and comes to the same.
    assert [each["step"] for each in resumed] == [4, 5]
    for one, other in zip(first[1:], resumed, strict=True):
        assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    assert len(list_checkpoints(Place(folder / layout))) == 1


def test_a_trial_that_keeps_its_checkpoints_goes_on_from_the_last_step(trials):
    _, (outcomes, _) = trials
    (first, reported), (resumed, reported_again) = outcomes[KEPT]
    assert (reported, reported_again) == ([2, 4, 5], [5])
    assert [each["states"] for each in first][1:] == [["checkpoint_000003"], ["checkpoint_000003", "checkpoint_000005"]]
    (again,) = resumed
    assert again["there"] == ["weights_000005"] and again["states"] == first[-1]["states"]
    assert all(torch.equal(value, again["weights"][name]) for name, value in first[-1]["weights"].items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_published_is_what_was_trained_and_is_exported_as_it_is(layout, trials, tmp_path):
    folder, (outcomes, _) = trials
    (weights, step) = last_weights(Place(folder / layout))
    last = outcomes[layout][1][0][-1]
    assert step == last["step"] == STEPS
    out = export(weights, tmp_path / "out")
    file = "adapter_model.safetensors" if "lora" in layout else "model.safetensors"
    exported = load_file(Path(out) / file)
    published = load_file(Path(weights) / ("adapter" if "lora" in layout else "model") / file)
    assert exported.keys() == published.keys()
    assert all(torch.equal(value, published[name]) for name, value in exported.items())
    if "lora" not in layout:
        for name, value in exported.items():
            assert torch.equal(value, last["weights"][f"policy.{name}"]), name
    assert (Path(out) / "README.md").is_file()


def test_weights_are_a_third_of_a_checkpoint_or_less(trials):
    folder, (outcomes, _) = trials
    run = Place(folder / "stage2")
    whole = sum(list_checkpoints(run)[0].sizes().values())
    assert outcomes["stage2"][0][0][0]["bytes"] < whole / 3


def test_the_languages_of_a_trial_are_known_by_its_weights(tmp_path):
    run = tmp_path / "run"
    (run / "train" / "weights_000002").mkdir(parents=True)
    Place(run / "run.json").write_json({"languages": ["en", "sw"]})
    assert training_languages(run / "train" / "weights_000002") == ["en", "sw"]
