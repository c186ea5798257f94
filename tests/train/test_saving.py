"""Checkpoints are written while training goes on, and are what they were when it stopped for the copy."""

import logging
import os
import shutil
import signal
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from examples.my_storage import VaultStorage
from mlc_ray import register
from mlc_ray.config.train import CheckpointSection
from mlc_ray.device import HostMemory
from mlc_ray.errors import MlcRayError
from mlc_ray.lease import Holder, LeaseError, LeaseGuard
from mlc_ray.runs import LEASE_FILE, checkpoint_folder, checkpoint_folders
from mlc_ray.storage import MANIFEST, Place, StorageFaultError
from mlc_ray.train import file_writer, published, saving
from mlc_ray.train.checkpoint import agree_on_checkpoint, list_checkpoints, load_checkpoint, prune_checkpoints
from mlc_ray.train.collectives import from_rank_zero, gather_objects
from mlc_ray.train.engines.base import STATE_KINDS
from mlc_ray.train.entry import WorkerSpec
from mlc_ray.train.file_writer import FileWriter
from mlc_ray.train.loop import Progress
from mlc_ray.train.model import PolicyWithExtractor
from mlc_ray.train.published import published_files, small_files
from mlc_ray.train.rows import RowFileError
from mlc_ray.train.saving import CheckpointSaver, CheckpointWriterError
from mlc_ray.train.shards import CheckpointError
from mlc_ray.train.tensor_files import parts_of
from mlc_ray.train.tracking import Tracker
from mlc_ray.train.watchdog import Watchdog
from mlc_ray.train.worker import WatchedSaves, record, watched
from tests.checkpoints import complete
from tests.train.test_checkpoint import FINGERPRINTS, config_of, tokenizer, whole_state
from tests.train.tiny import VOCABULARY, make_engine, on_workers, random_rows, run_engine, whole_weights

LAYOUTS = ["stage0 bf16", "stage2", "stage3", "stage2_offload", "stage2 dropout", "ddp"]
STEPS = 4


@register("storage", "held")
class HeldStorage(VaultStorage):
    """Writes once it may; a file whose name has `refused` in it is refused so many times, or kills the process."""

    gate = threading.Event()
    refused, times, deadly, immovable = "none", 0, False, "none"
    fault = OSError(28, "No space left on device")
    taken = None  # a lease file, and what another driver writes into it as soon as rows are sent

    def publish(self, local, url, **more):
        super().publish(local, url, **more)
        if self.taken is not None:
            self.taken[0].write_json(self.taken[1])

    def write_parts(self, url, parts):
        self.gate.wait()
        if self.refused in url and self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.refused in url and type(self).times:
            type(self).times -= 1
            raise self.fault
        super().write_parts(url, parts)

    def remove(self, url):
        if url.endswith(self.immovable):
            raise OSError(13, "Permission denied")
        super().remove(url)


@register("storage", "lingering")
class LingeringStorage(VaultStorage):
    """Lists a checkpoint's folder whose files are gone, as SeaweedFS does for a while."""

    def list(self, url):
        return [*super().list(url), *(["checkpoint_000009"] if url.endswith("/train") else [])]


class InLoop:
    """A saver as the loop asks for it, without what a run on Ray adds."""

    at_the_end = True

    def __init__(self, saver):
        self.saver, self.writes, self.settle, self.finish = saver, saver.writes, saver.settle, saver.finish

    def save(self, progress, metrics, *, wait, needed):
        self.saver.save(progress)
        if wait or not self.saver.in_background:
            self.saver.finish()
        return self.saver.fault is None

    def score(self, progress, *, last):
        pass


class Rows(list):
    """What is logged; storage may write once a step later than the first checkpoint's is."""

    def __init__(self, saver):
        super().__init__()
        self.saver, self.went_on = saver, []

    def append(self, row):
        super().append(row)
        if row["step"] == 3:
            self.went_on = [self.saver.going, self.saver.writes()]
            HeldStorage.gate.set()


def saver_of(run, config, engine):
    told = {"config": config, "fingerprints": FINGERPRINTS}
    return CheckpointSaver(Place(run), engine=engine, tokenizer=tokenizer(), **told)


def trained(rank, run, config, progress=None, engine=None):
    """History, final weights, and whether the first checkpoint was still to be written a step later."""
    engine = engine or make_engine(config)
    torch.manual_seed(rank)
    saver = saver_of(run, config, engine)
    if progress is not None:
        progress = load_checkpoint(progress, engine=engine, config=config, fingerprints=FINGERPRINTS)
    rows = Rows(saver)
    run_engine(config, random_rows(7), STEPS, saves=InLoop(saver), engine=engine, progress=progress, history=rows)
    return [row["loss/total"] for row in rows], whole_weights(engine), rows.went_on


def in_background_and_not(rank, model_folder, layout):
    results = []
    for background in (True, False):
        settings = {"checkpoint": {"every": 2, "background": background}}
        config = config_of(layout, model_folder, **settings)
        HeldStorage.gate.clear() if background else HeldStorage.gate.set()
        run = f"held://{layout}/{background}"
        results.append(trained(rank, run, config))
    config = config_of(layout, model_folder, checkpoint={"background": True})
    first = list_checkpoints(Place(f"held://{layout}/True"))[0]
    results.append(trained(rank, f"held://{layout}/resumed", config, progress=first))
    return results


def with_faults(rank, model_folder, caplog_file):
    """What came of checkpoints of which rank 1's state is refused twice, and then always."""
    logging.basicConfig(filename=f"{caplog_file}-{rank}", level=logging.WARNING, force=True)
    file_writer.PAUSES = (0.0, 0.0)
    HeldStorage.gate.set()
    config = config_of("stage2", model_folder, checkpoint={"background": True})
    engine, _ = run_engine(config, random_rows(7), 1)
    saver = saver_of("held://faults/run", config, engine)
    outcomes = []
    for step, times in enumerate((2, 3, 0), 1):
        HeldStorage.refused, HeldStorage.times = "/00001-00000", times
        saver.save(Progress(step=step))
        saver.finish()
        outcomes.append((saver.fault, saver.newest and saver.newest.name))
    names = [place.name for place in (Place("held://faults/run") / "train").iterdir()]
    ahead = left_ahead(model_folder, engine)
    told = as_a_worker(model_folder, engine)
    lost = taken_over(model_folder, engine, Path(f"{caplog_file}-cache"))
    return outcomes, names, pruned(model_folder, engine), ahead, lost, told, in_little_memory(model_folder, engine)


def as_a_worker(model_folder, engine):
    """What a worker of a run raises at a checkpoint that cannot be written and after its lease is lost."""
    run, config = Place("held://lease/run"), config_of("stage2", model_folder, checkpoint={"background": True})
    holder = from_rank_zero(Holder.here())
    if engine.rank == 0:
        (run / LEASE_FILE).write_json(asdict(holder))
    spec = WorkerSpec({}, run, run, None, FINGERPRINTS, STEPS, holder.id, score=None)
    watchdog, guard = Watchdog(0, run, lease=holder.id, rank=engine.rank, step=0), LeaseGuard(run, holder.id)
    told = {"config": config, "fingerprints": FINGERPRINTS, "engine": engine, "tokenizer": tokenizer()}
    logged = []

    def record():
        logged.append(saver.newest)
        if len(logged) <= 3:
            raise OSError(28, "No space left on device")

    completing = partial(watched, "completing a checkpoint", run, watchdog, guard)
    saver = CheckpointSaver(run, **told, completing=completing, record=record)
    saves, raised = WatchedSaves(spec, saver, watchdog, guard), []
    HeldStorage.immovable = "checkpoint_000001"
    assert not saves.save(Progress(step=1), {}, wait=True, needed=False)
    assert "Permission denied" in saver.fault and logged == []
    HeldStorage.immovable = "none"
    assert not saves.save(Progress(step=1), {}, wait=True, needed=False)
    assert len(logged) == (3 if engine.rank == 0 else 0) and saver.newest is None
    for step, needed, fault in ((1, False, HeldStorage.fault), (2, True, HeldStorage.fault), (2, False, KeyError("x"))):
        HeldStorage.refused, HeldStorage.times, HeldStorage.fault = "/00001-00000", 3, fault
        try:
            assert not saves.save(Progress(step=step), {}, wait=True, needed=needed)
        except MlcRayError as error:
            raised.append((step, error))
    HeldStorage.times, HeldStorage.fault = 0, OSError(28, "No space left on device")
    assert saves.save(Progress(step=3), {}, wait=False, needed=False)
    if engine.rank == 0:
        (run / LEASE_FILE).write_json(asdict(replace(holder, id="another")))
    gather_objects(None)
    try:
        saver.save(Progress(step=4))  # waits for the third
    except MlcRayError as error:
        raised.append((4, error))
    return raised


def taken_over(model_folder, engine, cache):
    """What a worker of a killed driver raises where another driver takes its run, and the checkpoints that are there.

    First, the other has the lease once the rows are sent; then, rows are lost with the cache that they are kept in.
    """
    os.environ["MLC_RAY_CACHE"] = str(cache)
    run, raised = Place("held://taken/run"), []
    config = config_of("stage2", model_folder, checkpoint={"background": False}, logging={"tensorboard": False})
    holder = from_rank_zero(Holder.here())
    for step, is_taken in ((2, True), (4, False)):
        HeldStorage.taken = None
        if engine.rank == 0:
            (run / LEASE_FILE).write_json(asdict(holder))
        gather_objects(None)
        guard = LeaseGuard(run, holder.id)
        tracker = Tracker(config, run, 0, guard.check) if engine.rank == 0 else None
        told = {"config": config, "fingerprints": FINGERPRINTS, "engine": engine, "tokenizer": tokenizer()}
        saver = CheckpointSaver(run, **told, record=partial(record, tracker, guard) if tracker else lambda: None)
        if tracker is not None:
            tracker.log(step, {"loss/total": 1.0})
            tracker.sync()
            tracker.log(step + 1, {"loss/total": 1.0})
            if is_taken:
                HeldStorage.taken = (run / LEASE_FILE, asdict(replace(holder, id="another")))
            else:
                shutil.rmtree(cache)
        saver.save(Progress(step=step + 1))
        try:
            saver.finish()
        except MlcRayError as error:
            raised.append(error)
        gather_objects(None)
    return raised, list_checkpoints(run)


def left_ahead(model_folder, engine):
    """Whether this worker left `save` before rank 0, which has room for one file at a time and writes late."""
    saver = saver_of("held://room/run", config_of("stage2", model_folder, checkpoint={"background": True}), engine)
    saver._room = 1
    if engine.rank == 0:
        HeldStorage.gate.clear()
        threading.Timer(0.5, HeldStorage.gate.set).start()
    saver.save(Progress(step=1))
    written = (Place("held://room/run") / "train/checkpoint_000001/extractor.safetensors").is_file()
    saver.finish()
    return not written


def pruned(model_folder, engine):
    """With checkpoint.keep=1, what is there after each of three saves; at the second the first cannot be removed."""
    config = config_of("stage2", model_folder, checkpoint={"background": True, "keep": 1})
    saver = saver_of("held://prune/run", config, engine)
    outcomes = []
    for step, immovable in enumerate(("none", "checkpoint_000001", "none"), 1):
        HeldStorage.immovable = immovable
        saver.save(Progress(step=step))
        saver.finish()
        places = (Place("held://prune/run") / "train").iterdir() if engine.rank == 0 else []
        outcomes.append((saver.fault, saver.newest.name, [place.name for place in places]))
    return outcomes


def in_little_memory(model_folder, engine):
    saving.host_memory = lambda: HostMemory(1 << 20, 1 << 16, None)
    config = config_of("stage2", model_folder)
    saver = saver_of("held://memory/run", config, engine)
    saver.save(Progress(step=1))
    saver.finish()
    return saver.in_background, saver.fault


MODELS = {
    "tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "experts": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 3}),
}


def model_of(name):
    torch.manual_seed(0)
    kind, config, more = MODELS[name]
    return kind(
        config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **more,
        )
    )  # fmt: skip


def publish(rank, folder):
    """Write the published files of two models at stage 3, in files of 16 KiB."""
    published.FILE_BYTES = 16 << 10
    for name in MODELS:
        config = config_of("stage3", "none")
        engine = make_engine(config, PolicyWithExtractor(model_of(name), layer=2, extractor_dim=16, seed=0))
        beside = small_files(engine.module.policy, tokenizer(), lora=False)
        for file, parts in published_files(engine, beside, lora=False):
            (Place(folder / name) / file).write_parts(parts)
            assert rank == 0


def everything(rank, folder):
    os.environ["VAULT"] = str(folder / "vault")
    by_layout = {layout: in_background_and_not(rank, folder / "model", layout) for layout in LAYOUTS}
    publish(rank, folder / "published")
    return by_layout, with_faults(rank, folder / "model", folder / "log")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    return folder, on_workers(2, everything, folder / "workers", folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_the_state_at_which_training_went_on(layout, done, monkeypatch):
    folder, results = done
    monkeypatch.setenv("VAULT", str(folder / "vault"))
    for by_layout, _ in results:
        behind, stopped, resumed = by_layout[layout]
        assert behind[2] == [True, True] and stopped[2] == [False, False]
        assert behind[0] == stopped[0] and resumed[0] == stopped[0][2:]
    _, wanted, _ = results[0][0][layout][1]
    for _, weights, _ in results[0][0][layout]:
        assert all(torch.equal(value, weights[name]) for name, value in wanted.items())
    for number in (0, 1):
        one, other = (list_checkpoints(Place(f"held://{layout}/{name}"))[number] for name in (True, False))
        assert one.name == other.name == f"checkpoint_{2 * number + 2:06d}"
        state, again = whole_state(one), whole_state(other)
        for name, values in state.items():
            assert all(torch.equal(values[kind], again[name][kind]) for kind in STATE_KINDS), name


def test_what_a_storage_refuses_is_tried_three_times_and_then_no_checkpoint_but_training_goes_on(done):
    folder, results = done
    for _, (outcomes, names, *_, in_memory) in results:
        assert [newest for _, newest in outcomes] == ["checkpoint_000001", "checkpoint_000001", "checkpoint_000003"]
        assert outcomes[0][0] is None and outcomes[2][0] is None
        assert "checkpoint_000002' could not be written: " in outcomes[1][0]
        assert "OSError: [Errno 28] No space left on device" in outcomes[1][0]
        assert names == ["checkpoint_000001", "checkpoint_000003"]
        assert in_memory == (False, None)
    lines = [Path(f"{folder}/log-{rank}").read_text().splitlines() for rank in (0, 1)]
    said = ["\n".join(line for line in each if "held://lease" not in line) for each in lines]
    assert said[1].count("is tried again in 0 s: [Errno 28]") == 4
    assert said[0].count("The checkpoints before it stay as they are") == 1
    assert "training stops while checkpoints are written" in said[0]
    assert "training stops while" not in said[1] and "stay as they are" not in said[1]


def test_all_workers_stay_in_a_save_until_rank_zero_had_room_for_its_files(done):
    assert [faults[3] for _, faults in done[1]] == [False, False]


def test_a_checkpoint_is_not_completed_by_workers_whose_run_or_rows_were_taken(done):
    for _, (*_, (raised, completed), _, _) in done[1]:
        assert [type(error) for error in raised] == [LeaseError, RowFileError] and completed == []


def test_what_ends_the_workers_is_a_needed_checkpoint_that_is_refused_a_bug_or_a_lost_lease(done):
    for _, (*_, raised, _) in done[1]:
        assert [step for step, _ in raised] == [2, 2, 4]
        refused, bug, lost = (error for _, error in raised)
        assert isinstance(refused, StorageFaultError) and isinstance(refused, OSError)  # which Ray Train tries again
        assert str(refused).endswith("To go on: mlc-ray train --resume held://lease/run")
        assert type(bug) is CheckpointWriterError and "KeyError: 'x'" in str(bug)  # which it does not
        assert type(lost) is LeaseError and "the lease on 'held://lease/run' was lost to " in str(lost)


def test_a_checkpoint_is_kept_though_an_older_one_cannot_be_removed(done):
    folder, results = done
    names = [f"checkpoint_{step:06d}" for step in (1, 2, 3)]
    outcomes = results[0][1][2]
    assert outcomes == [(None, names[0], names[:1]), (None, names[1], names[:2]), (None, names[2], names[2:])]
    assert Path(f"{folder}/log-0").read_text().count("checkpoint_000002 is saved, but older checkpoints could not") == 1


def test_what_has_no_manifest_does_not_count_as_a_kept_checkpoint(tmp_path):
    for step in (1, 2, 3, 4):
        (checkpoint_folder(Place(tmp_path), step) / ("state" if step == 3 else MANIFEST)).write_text("{}")
    prune_checkpoints(Place(tmp_path), CheckpointSection(keep=2), 4)
    assert [step for step, _ in checkpoint_folders(Place(tmp_path))] == [2, 3, 4]


def test_a_folder_without_files_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("VAULT", str(tmp_path))
    run = Place("lingering://run")
    complete(checkpoint_folder(run, 1), 1)
    assert agree_on_checkpoint(run) == checkpoint_folder(run, 1)


def test_a_checkpoint_whose_steps_were_not_logged_is_passed_over(tmp_path, caplog):
    run = Place(tmp_path)
    for step in (2, 4):
        complete(checkpoint_folder(run, step), step)
    assert agree_on_checkpoint(run, 4) == checkpoint_folder(run, 4)
    assert agree_on_checkpoint(run, 2) == checkpoint_folder(run, 2)
    said = (
        "metrics.jsonl' has no rows of steps 3 to 4: checkpoint_000004 is passed over, and checkpoint_000002 is taken"
    )
    assert said in caplog.text
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl' has no rows of steps 1 to 4, .*restore the file"):
            agree_on_checkpoint(run, 0)
    assert agree_on_checkpoint(run, 4) == checkpoint_folder(run, 4)  # once the rows are back
    complete(checkpoint_folder(run, 3), 3)
    prune_checkpoints(run, CheckpointSection(keep=1), 3)
    assert agree_on_checkpoint(run, 3) == checkpoint_folder(run, 3)  # though one of a later step is there


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_written_in_files_of_bounded_size_and_loads(name, done):
    folder = done[0] / "published" / name / "model"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    for weights in map(load_file, files):
        blocks = {key.partition(".layers.")[2].partition(".")[0] for key in weights}
        whole = len(weights) == 1 or (name == "experts" and len(blocks) == 1)
        assert whole or sum(weight.nbytes for weight in weights.values()) <= 16 << 10
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for key, value in model_of(name).state_dict().items():
        assert torch.equal(loaded[key], value), key
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= {path.name for path in folder.iterdir()}


def die_while_writing(rank, folder, model_folder):
    os.environ["VAULT"] = str(folder / "vault")
    HeldStorage.gate.set()
    config = config_of("stage0", model_folder, checkpoint={"every": 1, "background": True})
    saver = saver_of("held://dies/run", config, run_engine(config, random_rows(7), 1)[0])
    saver.save(Progress(step=1))
    saver.finish()
    HeldStorage.refused, HeldStorage.deadly = "model.safetensors", True  # state is written by then
    saver.save(Progress(step=2))
    saver.finish()


def test_a_death_during_the_writing_loses_only_that_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    HeldStorage.gate.set()
    run = Place("held://dies/run")
    with pytest.raises(ProcessExitedException):
        on_workers(1, die_while_writing, tmp_path / "worker", tmp_path, tmp_path / "model")
    assert agree_on_checkpoint(run).name == "checkpoint_000001"
    assert [place.name for place in (run / "train").iterdir()] == ["checkpoint_000001"]


def test_a_worker_whose_run_was_taken_replaces_no_further_file_of_a_checkpoint(tmp_path):
    holder, file = Holder.here(), Place(tmp_path) / LEASE_FILE
    file.write_json(asdict(holder))
    looks, guard = [], LeaseGuard(Place(tmp_path), holder.id)

    def may_write():
        looks.append(sorted(path.name for path in (tmp_path / "files").glob("*")))
        if len(looks) == 2:
            file.write_json(asdict(replace(holder, id="another")))
        guard.check(now=True)

    writer = FileWriter(Place(tmp_path / "files"), 1 << 20, may_write)
    for name in ("00001-00000", "00001-00001", "00001-00002"):
        writer.put(name, parts_of({"a": torch.arange(20.0)}))
    writer.end()
    assert isinstance(writer.wait(), LeaseError)
    assert looks == [[], ["00001-00000"]] and list(writer.written) == ["00001-00000"]


def test_no_more_waits_for_its_writing_than_there_is_room_for(tmp_path, monkeypatch):
    monkeypatch.setenv("VAULT", str(tmp_path))
    HeldStorage.gate.clear()
    writer, put = FileWriter(Place("held://room/files"), 300), threading.Semaphore(0)
    parts = parts_of({"a": torch.arange(20.0)})  # 80 bytes and a header of 80

    def put_all():
        for number in range(5):
            writer.put(str(number), parts)
            put.release()
        writer.end()

    thread = threading.Thread(target=put_all)
    thread.start()
    put.acquire()
    assert not put.acquire(timeout=0.2) and writer.writes
    HeldStorage.gate.set()
    thread.join()
    assert writer.wait() is None
    assert sorted(writer.written) == list("01234")
