"""A notice ends a run after a checkpoint, at the same step on all workers; resumed, it is the undisturbed run."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch

import examples.my_storage  # noqa: F401 - registers vault://
from mlc_ray.storage import Place
from mlc_ray.train import preemption
from mlc_ray.train.checkpoint import list_checkpoints, load_checkpoint
from mlc_ray.train.loop import Progress
from mlc_ray.train.preemption import Notice, PreemptedError, Sigterm, StopFile, WorkersPreemptedError, highest
from mlc_ray.train.saving import CheckpointSaver
from tests.train.test_checkpoint import tokenizer
from tests.train.tiny import make_engine, on_workers, random_rows, run_engine, tiny_config

STEPS = 6
CONTENT = {"model": "m", "tokens": "t"}


class Forwards:
    """Calls a function in the middle of a forward of the engine, once."""

    def __init__(self, engine, number, then):
        self.count, self.number, self.then, self.plain = 0, number, then, engine.forward
        engine.forward = self

    def __call__(self, batch):
        self.count += 1
        if self.count == self.number:
            self.then()
        return self.plain(batch)


def train(rank, folder, sources_of, disturb, seed):
    """Train until a notice, then go on as often as it takes; the losses, how each try ended, and the steps saved at."""
    config = tiny_config(objective={"loss": "simpo"}, engine={"stage": 2}, train={"epochs": 4, "batch_bundles": 4})
    losses, endings, saved, before = {}, [], [], signal.getsignal(signal.SIGTERM)
    for attempt in range(4):
        torch.manual_seed(rank)
        engine, progress, history = make_engine(config), Progress(), []
        if made := list_checkpoints(Place(folder)):
            progress = load_checkpoint(made[-1], engine=engine, config=config, fingerprints=CONTENT)

        told = {"config": config, "fingerprints": CONTENT}
        saver = CheckpointSaver(Place(folder), engine=engine, tokenizer=tokenizer(), **told)

        def save(at, _, saver=saver):
            saver.save(at)
            saver.finish()
            saved.append(at.step)

        noticed = highest(sources_of(folder))
        if attempt == 0 and rank == 1:  # the other worker learns of it by the step's reduction
            Forwards(engine, random.Random(seed).randint(1, 7), lambda: disturb(folder))  # the 8th is of the last step
        try:
            run_engine(
                config, random_rows(8), STEPS, save=save, engine=engine, progress=progress, noticed=noticed,
                history=history,
            )  # fmt: skip
            endings.append("end")
        except (PreemptedError, WorkersPreemptedError) as error:
            endings.append(type(error).__name__)
        finally:
            signal.signal(signal.SIGTERM, before)
        losses |= {row["step"]: row["loss/total"] for row in history}
        if endings[-1] == "end":
            break
    return losses, endings, saved


def nothing(_):
    return []


def sigterm(_):
    caught = Sigterm()
    caught.catch()
    return [caught]


def kill(_):
    os.kill(os.getpid(), signal.SIGTERM)


def drained(_):
    return [lambda: Notice.SAVE]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "run").mkdir()
    return on_workers(2, train, folder, folder / "run", nothing, kill_nobody, 0)[0]


def kill_nobody(_):
    pass


def test_a_worker_that_gets_sigterm_at_a_random_moment_loses_no_step(undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    seed = random.randrange(10**6)
    losses, endings, saved = on_workers(2, train, tmp_path, tmp_path / "run", sigterm, kill, seed)[0]
    assert endings == ["WorkersPreemptedError", "end"], seed
    assert losses == undisturbed[0], seed
    assert 1 <= saved[0] < STEPS == saved[-1]


def test_a_node_that_is_drained_costs_one_checkpoint_and_training_goes_on(undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    losses, endings, saved = on_workers(2, train, tmp_path, tmp_path / "run", drained, kill_nobody, 0)[0]
    assert (losses, endings, saved) == (undisturbed[0], ["end"], [1, STEPS])


def drained_while_nothing_can_be_saved(rank):
    tried = []

    def save(progress, _):
        tried.append(progress.step)
        return len(tried) > 2

    config = tiny_config(objective={"loss": "simpo"}, train={"batch_bundles": 4})
    run_engine(config, random_rows(8), 4, save=save, noticed=lambda: Notice.SAVE)
    return tried


def test_a_checkpoint_that_could_not_be_saved_for_a_draining_node_is_tried_after_the_next_step(tmp_path):
    assert on_workers(1, drained_while_nothing_can_be_saved, tmp_path) == [[1, 2, 3, 4]]  # the last is of the end


def test_the_drivers_sigterm_reaches_its_workers_and_a_second_one_is_what_it_was(tmp_path):
    stop = StopFile(tmp_path, "mine")
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("as before"))
    try:
        with stop.at_sigterm():
            assert stop() is Notice.NONE
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stop(), StopFile(tmp_path, "an earlier driver")()) == (Notice.END, Notice.NONE)
            assert got == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == ["as before"]
        assert not stop.path.exists()
        Path(stop.path).mkdir()  # what cannot be read asks for nothing, and ends no worker
        assert stop() is Notice.NONE
        assert highest([stop, lambda: Notice.SAVE, lambda: Notice.NONE])() is Notice.SAVE
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_drivers_wish_reaches_the_workers_of_a_run_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "_LOOKS_EVERY", 0.01)
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    run = Place("vault://team/run")
    stop = StopFile(run, "mine")
    assert stop() is Notice.NONE
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with StopFile(run, "mine").at_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            assert (run / "stop").read_text() == "mine"
            while stop() is not Notice.END:  # a thread looks
                pass
        assert run.iterdir() == []
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_store_that_is_away_at_sigterm_is_told_later_and_hides_no_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(preemption, "_ASKS_EVERY", 0.01)
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    (no_folder := tmp_path / "no-folder").touch()
    stop = Place("vault://team/run/stop")
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(ZeroDivisionError), StopFile(Place("vault://team/run"), "mine").at_sigterm():
            monkeypatch.setenv("VAULT", str(no_folder))
            os.kill(os.getpid(), signal.SIGTERM)
            assert "the workers could not be told of SIGTERM, and will be later" in caplog.text
            monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
            while not stop.is_file() or stop.read_text() != "mine":
                pass
            monkeypatch.setenv("VAULT", str(no_folder))
            raise ZeroDivisionError
        assert "vault://team/run/stop is left behind" in caplog.text
    finally:
        signal.signal(signal.SIGTERM, before)
