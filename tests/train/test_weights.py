"""What a trial of a search publishes to be scored: weights alone, beside the checkpoints that a run goes on from."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlc_ray.runs import checkpoint_folders, training_languages, weights_folders
from mlc_ray.storage import Place
from mlc_ray.train.checkpoint import agree_on_checkpoint, last_weights, list_checkpoints, load_checkpoint
from mlc_ray.train.export import export
from mlc_ray.train.saving import CheckpointSaver
from tests.train.test_checkpoint import FINGERPRINTS, config_of, tokenizer
from tests.train.tiny import make_engine, on_workers, random_rows, run_engine, whole_weights

STEPS = 5
LAYOUTS = ["stage2", "stage3", "stage2 lora"]


class Scores:
    """A trial's saves as its worker has them, without Ray: weights every two steps, states every three."""

    at_the_end = False

    def __init__(self, saver, run, engine):
        self.saver, self.run, self.engine = saver, run, engine
        self.writes, self.settle, self.finish = saver.writes, saver.settle, saver.finish
        self.seen = []

    def save(self, progress, metrics, *, wait, needed):
        self.saver.save(progress)
        self.finish()
        return True

    def score(self, progress, *, last):
        if not (last or progress.step % 2 == 0):
            return
        self.saver.publish(progress, ends=last)
        self.finish()
        found = last_weights(self.run)
        self.seen.append(
            {
                "step": progress.step,
                "weights": whole_weights(self.engine),
                "files": sorted(self.saver.newest.sizes()),
                "there": [folder.name for folder in weights_folders(self.run)],
                "states": [folder.name for _, folder in checkpoint_folders(self.run)],
                "bytes": sum(self.saver.newest.sizes().values()),
                "ends": found and (found[0].name, found[1]),
            }
        )


def trial(rank, folder, model_folder):
    """Of each layout what was published at each step, and what a worker that resumes publishes."""
    outcomes = {}
    for layout in LAYOUTS:
        config = config_of(layout, model_folder, checkpoint={"every": 3, "background": False})
        run = Place(folder / layout)
        runs = []
        for _ in range(2):
            engine = make_engine(config)
            told = {"config": config, "fingerprints": FINGERPRINTS}
            saves = Scores(CheckpointSaver(run, engine=engine, tokenizer=tokenizer(), **told), run, engine)
            progress = None
            if (newest := agree_on_checkpoint(run)) is not None:
                progress = load_checkpoint(newest, engine=engine, **told)
            run_engine(config, random_rows(10), STEPS, saves=saves, engine=engine, progress=progress)
            runs.append(saves.seen)
        outcomes[layout] = runs
    return outcomes


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return folder, on_workers(2, trial, folder / "workers", folder, folder / "model")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_alone_are_published_and_states_are_written_at_their_own_interval(layout, trials):
    folder, outcomes = trials
    first, resumed = outcomes[layout]
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_published_is_what_was_trained_and_is_exported_as_it_is(layout, trials, tmp_path):
    folder, outcomes = trials
    (weights, step) = last_weights(Place(folder / layout))
    last = outcomes[layout][1][-1]
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
    assert os.path.exists(out / "README.md")


def test_weights_are_a_third_of_a_checkpoint_or_less(trials):
    folder, outcomes = trials
    run = Place(folder / "stage2")
    whole = sum(list_checkpoints(run)[0].sizes().values())
    assert outcomes["stage2"][0][0]["bytes"] < whole / 3


def test_the_languages_of_a_trial_are_known_by_its_weights(tmp_path):
    run = tmp_path / "run"
    (run / "train" / "weights_000002").mkdir(parents=True)
    Place(run / "run.json").write_json({"languages": ["en", "sw"]})
    assert training_languages(run / "train" / "weights_000002") == ["en", "sw"]
