"""Checkpoints: any layout goes on from any other's, exactly; damage is recognised, files run no code, exports load."""

import ast
import json
import pickle
import re
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import mlc_ray
from mlc_ray.config.model import ModelSection
from mlc_ray.config.train import CheckpointSection
from mlc_ray.data.tokens import load_tokenizer
from mlc_ray.runs import resolve_model
from mlc_ray.storage import MANIFEST, Place, StorageFaultError
from mlc_ray.train import checkpoint as checkpoint_module
from mlc_ray.train import shards
from mlc_ray.train.checkpoint import (
    agree_on_checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    verified_manifest,
)
from mlc_ray.train.collectives import from_rank_zero
from mlc_ray.train.engines import base
from mlc_ray.train.engines.base import STATE_KINDS, StateShard, owned_ranges
from mlc_ray.train.engines.zero_state import Fragment, ZeroState
from mlc_ray.train.export import export, model_card
from mlc_ray.train.file_writer import write_file
from mlc_ray.train.model import load_policy, model_depth
from mlc_ray.train.run_folder import ended
from mlc_ray.train.saving import CheckpointSaver
from mlc_ray.train.shards import CheckpointError, ShardReader, index_of, state_files
from tests.train.tiny import (
    VOCABULARY,
    make_engine,
    on_workers,
    random_rows,
    run_engine,
    tiny_config,
    tiny_model,
    whole_weights,
    wrapped,
)

FINGERPRINTS = {"model": "m", "tokens": "t"}
ENGINES = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1, "extra": {"zero_optimization": {"round_robin_gradients": True}}},
    "stage2": {"stage": 2},
    "stage2_offload": {"stage": 2, "offload_optimizer": True},
    "stage3": {"stage": 3, "persistence_threshold": 0},
    "stage3_whole": {"stage": 3},  # every parameter of the tiny model is below the threshold: gathered once, and kept
    "stage3_hpz": {"stage": 3, "persistence_threshold": 0, "secondary_partition": 2},
    "stage3_offload": {"stage": 3, "persistence_threshold": 0, "offload_optimizer": True, "offload_parameters": True},
    "ddp": {"name": "examples.my_engine:TorchDdp", "stage": None},
}
MODELS = {
    "": {},
    "bf16": {"dtype": "bfloat16"},
    "lora": {"lora": {"rank": 4}},
    "dropout": {"lora": {"rank": 4, "dropout": 0.1}},
}
SAVED = {
    1: ["stage0"],
    2: [
        "stage0", "stage2", "stage2_offload", "stage3", "stage3_whole", "stage3_hpz", "ddp", "stage2 dropout",
        "stage3 lora", "stage0 bf16", "stage3 bf16",
    ],
    3: ["stage1", "stage3"],  # of three, DDP adds up in another order once it has rebuilt its buckets
}  # fmt: skip
SAME = [(workers, layout) for workers, layouts in SAVED.items() for layout in layouts]
CROSSED = [
    ((1, "stage0"), (2, "stage3_offload")),
    ((1, "stage0"), (3, "stage3")),
    ((2, "stage0"), (3, "stage1")),
    ((2, "stage2_offload"), (3, "stage3_whole")),
    ((2, "stage3_whole"), (3, "ddp")),
    ((2, "stage3"), (2, "stage2")),
    ((2, "stage2"), (2, "stage3_hpz")),
    ((2, "stage3_hpz"), (1, "stage0")),
    ((2, "stage2"), (1, "stage0")),
    ((3, "stage1"), (1, "stage3")),
    ((3, "stage3"), (1, "stage2_offload")),
    ((2, "ddp"), (1, "stage2")),
    ((2, "stage3 lora"), (1, "stage0 lora")),
    ((2, "stage3 bf16"), (3, "stage1 bf16")),
    ((2, "stage0 bf16"), (1, "stage2 bf16")),
    ((2, "stage3 bf16"), (1, "stage0 bf16")),
]
PAIRS = [(each, each) for each in SAME] + CROSSED
STOPPED = {((3, "stage1"), (1, "stage3")): 1, ((3, "stage3"), (1, "stage2_offload")): 3}
"""The step behind which a run goes on, where it is not the second of four."""
CUT_ANEW = [pair for pair in CROSSED if pair[1][0] == 1 and "bf16" not in pair[1][1]]
"""Pairs of which the second run has another token budget: forwards of two bundles and more, not of one."""


def tokenizer():
    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0")


def config_of(layout, model_folder, **sections):
    engine, _, model = layout.partition(" ")
    return tiny_config(
        engine=ENGINES[engine],
        model={**MODELS[model], "path": str(model_folder)},
        objective={"loss": "simpo"},
        optimizer={"weight_decay": 0.1, "learning_rate": 3e-3},
        **{"checkpoint": {"every": 2, "keep": 2}, **sections},
    )


def saving(run, config, engine):
    told = {"config": config, "fingerprints": FINGERPRINTS}
    saver = CheckpointSaver(Place(run), engine=engine, tokenizer=tokenizer(), **told)

    def save(progress, metrics):
        saver.save(progress)
        saver.finish()

    return save


def train_and_save(rank, folder, model_folder, layouts):
    """Four steps with a checkpoint after two; losses of all four and final weights by layout."""
    results = {}
    for workers, layout in layouts:
        often = {"checkpoint": {"every": 1, "keep": 1, "keep_every": 2}} if workers == 1 else {}
        if (workers, layout) in {before for before, _ in STOPPED}:
            often = {"checkpoint": {"every": 1, "keep": 4}}
        config = config_of(layout, model_folder, **often)
        engine = make_engine(config)
        torch.manual_seed(rank)
        save = saving(folder / f"{workers} {layout}", config, engine)
        _, history = run_engine(config, random_rows(7), 4, save=save, engine=engine)
        results[workers, layout] = [row["loss/total"] for row in history], whole_weights(engine)
    return results


def go_on(rank, folder, model_folder, pairs):
    """The last steps again, from a checkpoint of another model's run; saved again before that."""
    results = {}
    for before, now in pairs:
        config = config_of(now[1], model_folder, train={"tokens_per_forward": 120 if (before, now) in CUT_ANEW else 50})
        # With adapters, frozen weights are those of the model that both runs name; all others come from the checkpoint.
        engine = make_engine(config, wrapped(config, seed=0 if config.model.lora else 9))
        torch.manual_seed(77)
        name = f"checkpoint_{STOPPED.get((before, now), 2):06d}"
        checkpoint = find_checkpoint(Place(folder / f"{before[0]} {before[1]}"), name)
        progress = load_checkpoint(checkpoint, engine=engine, config=config, fingerprints=FINGERPRINTS)
        start = (progress.step, progress.bundles)
        saving(folder / f"{before} as {now}", config, engine)(progress, {})
        _, history = run_engine(config, random_rows(7), 4, engine=engine, progress=progress)
        results[before, now] = start, [row["loss/total"] for row in history], whole_weights(engine)
    return results


def flip(path):
    """Change a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def save_and_go_on(rank, folder, model_folder, saved, pairs, damaged=None):
    """Both of these, and what the workers take for the newest undamaged checkpoint where one of two has a fault."""
    first = train_and_save(rank, folder, model_folder, saved)
    again = go_on(rank, folder, model_folder, pairs)
    agreed = None
    if damaged is not None:
        if rank == 0:
            last = shutil.copytree(folder / "2 stage2", damaged) / "train/checkpoint_000004"
            flip(last / sorted(verified_manifest(Place(last))["files"])[1])  # of the second worker's share
        agreed = from_rank_zero(None) or agree_on_checkpoint(Place(damaged)).name
    return first, again, agreed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model_folder = folder / "model"
    tiny_model().save_pretrained(model_folder)
    tokenizer().save_pretrained(model_folder)
    first, again, agreed = {}, {}, []
    saved = []
    for workers in (1, 2, 3, 1):  # one worker again, for what two and three have written
        new = [each for each in SAME if each[0] == workers and each not in saved]
        saved += new
        pairs = [pair for pair in PAIRS if pair[1][0] == workers and pair[0] in saved and pair not in again]
        results = on_workers(
            workers,
            save_and_go_on,
            folder / f"workers-{len(saved)}-{workers}",
            *(folder, model_folder, new, pairs, folder / "damaged" if workers == 2 else None),
        )
        first |= results[0][0]
        again |= results[0][1]
        agreed += [name for _, _, name in results if name]
    assert again.keys() == set(PAIRS)
    return folder, first, again, model_folder, agreed


def whole_state(checkpoint):
    """All that a checkpoint holds of its trainable parameters, whoever wrote it."""
    index = json.loads((checkpoint / "state/index.json").read_text())
    with ShardReader(Place(checkpoint / "state"), index) as reader:
        return {name: reader(name, 0, entry["elements"]) for name, entry in index.items()}


@pytest.mark.parametrize(("before", "now"), PAIRS, ids=str)
def test_a_checkpoint_is_the_same_whatever_layout_reads_it(before, now, runs):
    step = STOPPED.get((before, now), 2)
    first, second = (
        runs[0] / name / f"train/checkpoint_{step:06d}" for name in (f"{before[0]} {before[1]}", f"{before} as {now}")
    )
    state, again = whole_state(first), whole_state(second)
    assert state.keys() == again.keys()
    for name, values in state.items():
        assert all(torch.equal(values[kind], again[name][kind]) for kind in STATE_KINDS), name
        assert values["exp_avg_sq"].any(), name
    for file in first.glob("*/*model.safetensors"):
        published, republished = load_file(file), load_file(second / file.relative_to(first))
        assert all(torch.equal(value, republished[name]) for name, value in published.items())


@pytest.mark.parametrize("layout", SAME, ids=str)
def test_resuming_gives_the_undisturbed_run(layout, runs):
    losses, weights = runs[1][layout]
    start, resumed_losses, resumed_weights = runs[2][layout, layout]
    assert start == (2, 7)
    assert resumed_losses == losses[2:]
    for key, value in weights.items():
        assert torch.equal(value, resumed_weights[key]), key


@pytest.mark.parametrize(("before", "now"), CROSSED, ids=str)
def test_resuming_at_another_layout_or_budget_gives_the_undisturbed_run(before, now, runs):
    losses, weights = runs[1][before]
    start, resumed_losses, resumed_weights = runs[2][before, now]
    bound = 2e-3 if "bf16" in now[1] else 1e-6  # seen: 7e-4 and 2e-7
    step = STOPPED.get((before, now), 2)
    assert start == (step, {1: 4, 2: 7, 3: 11}[step])
    assert resumed_losses == pytest.approx(losses[step:], rel=bound)
    assert weights.keys() == resumed_weights.keys()
    for key, value in weights.items():
        difference = resumed_weights[key].double() - value.double()
        assert float(difference.norm() / value.double().norm()) < bound, key


def test_checkpoint_folder_is_as_documented(runs):
    folder = runs[0] / "2 stage2/train/checkpoint_000004"
    manifest = verified_manifest(Place(folder))
    assert (manifest["step"], manifest["bundles_consumed"], manifest["world_size"]) == (4, 14, 2)
    assert manifest["fingerprints"] == FINGERPRINTS
    assert manifest["resolved_config"]["optimizer"]["schedule"] == "cosine"
    states = {"random_state_00000.safetensors", "random_state_00001.safetensors"}
    expected = {"model", "state", "extractor.safetensors", "manifest.json"} | states
    assert expected == {p.name for p in folder.iterdir()}
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert written == manifest["files"].keys() == manifest["checksums"].keys()
    assert {"state/00000-00000.safetensors", "state/00001-00000.safetensors", "state/index.json"} <= written
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint_000002", "checkpoint_000004"]
    assert load_file(folder / "extractor.safetensors").keys() == {"weight", "bias"}


@pytest.mark.parametrize("name", ["stage2", "stage3 bf16"])
def test_export_is_the_trained_model(name, runs, tmp_path):
    folder, first, *_ = runs
    out = export(folder / f"2 {name}", tmp_path / "out")
    state = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for key, value in first[2, name][1].items():
        if key.startswith("policy."):
            assert torch.equal(state[key.removeprefix("policy.")], value), key
    assert AutoTokenizer.from_pretrained(out).vocab_size == VOCABULARY
    card = (out / "README.md").read_text()
    assert "- simpo (answers=response, beta=" in card and "4 optimizer steps, 14 bundles" in card


@pytest.mark.parametrize("name", ["stage2 dropout", "stage3 lora"])
def test_export_of_adapters_merged_and_not(name, runs, tmp_path):
    folder, first, _, model_folder, _ = runs
    adapter = export(folder / f"2 {name}", tmp_path / "adapter")
    assert (adapter / "adapter_config.json").is_file() and not (adapter / "model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(export(folder / f"2 {name}", tmp_path / "merged", merge_lora=True))
    start = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    weights = first[2, name][1]
    prefix = "policy.base_model.model.model.layers.1.self_attn.q_proj."
    down, up = weights[prefix + "lora_A.default.weight"], weights[prefix + "lora_B.default.weight"]
    key = "model.layers.1.self_attn.q_proj.weight"
    assert up.abs().max() > 0
    assert torch.allclose(merged.state_dict()[key], start[key] + (32 / 4) * up @ down, atol=1e-5)


def test_export_refusals(runs, tmp_path):
    folder = runs[0]
    with pytest.raises(CheckpointError, match="no adapter to merge"):
        export(folder / "2 stage2", tmp_path / "a", merge_lora=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export(folder / "2 stage2", tmp_path / "there")
    with pytest.raises(CheckpointError, match="no checkpoint 'checkpoint_9'; complete ones: checkpoint_000002"):
        export(folder / "2 stage2", tmp_path / "b", checkpoint="checkpoint_9")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        export(tmp_path, tmp_path / "c")


def test_of_a_lora_run_nothing_frozen_is_written(runs):
    folder = runs[0] / "2 stage3 lora/train/checkpoint_000004"
    assert all("lora_" in name or name.startswith("extractor.") for name in whole_state(folder))
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"adapter", "state"}
    assert all("lora_" in name for name in load_file(folder / "adapter/adapter_model.safetensors"))


DAMAGES = {
    "short": ("model/model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:1000])),
    "missing": ("state/00001-00000.safetensors", Path.unlink),
    "half a manifest": ("manifest.json", lambda path: path.write_bytes(path.read_bytes()[:500])),
}


@pytest.fixture
def run(runs, tmp_path):
    return Place(shutil.copytree(runs[0] / "2 stage2", tmp_path / "run"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_half_written_checkpoint_is_passed_over(damage, run, caplog):
    file, spoil = DAMAGES[damage]
    last = run / "train/checkpoint_000004"
    spoil(Path(last / file))
    with pytest.raises(CheckpointError, match=f"checkpoint_000004.*{file}"):
        verified_manifest(last)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint_000002"]
    assert find_checkpoint(run).name == "checkpoint_000002"
    assert agree_on_checkpoint(run).name == "checkpoint_000002"
    assert "checkpoint_000004" in caplog.text and file in caplog.text


@pytest.mark.parametrize("file", ["model/model.safetensors", "state/00001-00000.safetensors", "state/index.json"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken(file, run, caplog):
    last = run / "train/checkpoint_000004"
    flip(Path(last / file))
    for _ in range(2):
        assert agree_on_checkpoint(run).name == "checkpoint_000002"
    assert caplog.text.count(f"'{last}' is damaged: '{file}' has checksum") == 1  # not computed again
    assert "damaged.txt in it says so from now on" in caplog.text
    assert f"'{file}' has checksum" in (last / "damaged.txt").read_text()
    assert [each.name for each in list_checkpoints(run)] == ["checkpoint_000002"]
    assert resolve_model(run) == str(run / "train/checkpoint_000002/model")
    for refused in (lambda: find_checkpoint(run, last.name), lambda: find_checkpoint(last)):
        with pytest.raises(CheckpointError, match=r"checkpoint_000004' was found damaged: damaged\.txt in it"):
            refused()
    flip(Path(run / "train/checkpoint_000002" / file))
    for _ in range(2):  # a run that lost all it had does not start over by itself
        with pytest.raises(
            CheckpointError, match=r"no usable checkpoint left: checkpoint_000002, checkpoint_000004 in"
        ):
            agree_on_checkpoint(run)


@pytest.mark.parametrize("file", ["model/model.safetensors", "state/00001-00000.safetensors", "manifest.json"])
def test_a_run_whose_last_checkpoint_is_damaged_has_not_ended(file, run):
    last = run / "train/checkpoint_000004"
    (run / "run.json").write_json({"total_steps": 4})
    assert ended(run).checkpoint == last
    flip(Path(last / file))
    assert ended(run) is None
    assert agree_on_checkpoint(run).name == "checkpoint_000002"
    assert ended(run) is None


def test_what_a_dead_run_was_writing_is_removed_at_the_next_start(run, caplog):
    half = run / "train/checkpoint_000006"
    (half / "state/00000-00000.safetensors").write_text("half of it")
    (half / "state/.00001-00000.safetensors.tmp-1-2").write_text("and less")
    assert [each.name for each in list_checkpoints(run)] == ["checkpoint_000002", "checkpoint_000004"]
    assert agree_on_checkpoint(run).name == "checkpoint_000004"
    assert f"removing {half}: it has no manifest.json, so its writing was cut off" in caplog.text
    assert not half.exists()


def test_what_one_worker_does_not_see_is_not_taken_for_damaged(run, monkeypatch):
    said = iter(["manifest.json is missing", None])  # here, and then to rank 0
    monkeypatch.setattr(checkpoint_module, "fault_in", lambda *_: next(said))
    with pytest.raises(CheckpointError, match=r"a worker on \S+ does not see .*checkpoint_000004' as rank 0 .*give"):
        agree_on_checkpoint(run)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint_000002", "checkpoint_000004"]


def test_damaged_weights_are_not_exported(run, tmp_path):
    flip(Path(run / "train/checkpoint_000004/model/model.safetensors"))
    with pytest.raises(CheckpointError, match=r"nothing is exported: .*'model/model.safetensors' has checksum"):
        export(Path(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_workers_agree_on_a_checkpoint_though_one_alone_sees_the_damage(runs):
    assert runs[4] == ["checkpoint_000002"] * 2
    assert (runs[0] / "damaged/train/checkpoint_000004/damaged.txt").is_file()


class Poison:
    """Unpickling this writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (Path(self.marker), "ran")


def shards_of(sizes, rank, workers):
    """Shards of parameters whose elements are numbered."""
    for name, start, stop in owned_ranges(sizes, rank, workers):
        yield StateShard(
            name, start, stop, {kind: torch.arange(start, stop) + 1e4 * i for i, kind in enumerate(STATE_KINDS)}
        )


def write_state(folder, rank, shards_of_rank):
    """Write them, and return their ranges by parameter."""
    ranges = {}
    for file in state_files(rank, shards_of_rank):
        write_file(Place(folder / file.name), file.parts)
        for name, found in file.ranges:
            ranges.setdefault(name, []).append(found)
    return ranges


@pytest.fixture
def written(tmp_path, monkeypatch):
    """State of two parameters by three workers, in files of 100 bytes or a range; and the reader of it."""
    monkeypatch.setattr(shards, "FILE_BYTES", 100)
    sizes = {"a": 50, "b": 7}
    parts = [write_state(tmp_path, rank, shards_of(sizes, rank, 3)) for rank in range(3)]
    return ShardReader(Place(tmp_path), json.loads(json.dumps(index_of(parts, sizes))))


def test_any_range_is_read_from_the_files_that_hold_it(written):
    assert len(written.folder.iterdir()) > 3
    for start, stop in [(0, 50), (0, 1), (18, 20), (19, 38), (37, 50), (5, 45)]:
        for i, values in enumerate(written("a", start, stop).values()):
            assert values.tolist() == [number + 1e4 * i for number in range(start, stop)]
    written.files.clear()
    written("b", 0, 7)
    assert len(written.files) == 1


def test_a_large_parameter_is_written_in_files_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "PIECE_ELEMENTS", 16)
    monkeypatch.setattr(shards, "FILE_BYTES", 500)
    module = torch.nn.Linear(100, 3)
    adamw = torch.optim.AdamW(module.parameters())
    module(torch.rand(4, 100)).sum().backward()
    adamw.step()
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    states = [ZeroState(module, adamw, 0, rank, 2) for rank in range(2)]
    parts = [write_state(tmp_path, rank, state.owned()) for rank, state in enumerate(states)]
    weights = torch.cat([torch.cat(list(load_file(file).values())) for file in tmp_path.iterdir()])
    assert len(weights) == 3 * sum(sizes.values())
    written = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in tmp_path.iterdir()]
    assert len(written) > 6 and max(written) < 500 + 3 * 4 * 16
    read = ShardReader(Place(tmp_path), index_of(parts, sizes))
    for name, parameter in module.named_parameters():
        values = read(name, 0, parameter.numel())
        assert torch.equal(values["master"], parameter.detach().flatten())
        assert torch.equal(values["exp_avg"], adamw.state[parameter]["exp_avg"].flatten())


def test_pieces_of_a_fragment_are_its_elements(monkeypatch):
    monkeypatch.setattr(base, "PIECE_ELEMENTS", 4)
    flat = torch.arange(20.0)
    fragment = Fragment("a", torch.nn.Parameter(flat), 3, 13, flat, 5)
    found = list(fragment.pieces())
    assert [(piece.start, piece.stop) for piece in found] == [(3, 7), (7, 11), (11, 13)]
    assert torch.cat([piece.of(flat) for piece in found]).tolist() == fragment.of(flat).tolist()


def test_files_of_state_run_no_code_and_damage_names_the_file(written, tmp_path):
    marker = tmp_path / "marker"
    file = written.folder / "00001-00000.safetensors"
    with file.open() as opened:
        whole = opened.read()
    other = whole.replace(b'"F32"', b'"I32"')
    for content in (pickle.dumps(Poison(str(marker))), b"", b"\xff" * 100, whole[:-4], other, b"\2\0\0\0\0\0\0\0{}"):
        file.write_bytes(content)
        written.files.clear()
        with pytest.raises(CheckpointError, match=r"00001-00000\.safetensors' is damaged: .*remove its checkpoint"):
            written("a", 20, 25)
    assert not marker.exists()


def test_a_store_that_does_not_answer_is_neither_damage_nor_a_bad_model(written, s3, monkeypatch):
    place = Place(s3) / "state"
    place.storage.publish(Path(written.folder), str(place))
    reader = ShardReader(place, written.index)
    assert reader("a", 20, 25)["master"].tolist() == [20, 21, 22, 23, 24]
    (place / "00001-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"00001-00000\.safetensors' is damaged: it ends after 0 bytes"):
        ShardReader(place, written.index)("a", 20, 25)
    (place / "00001-00000.safetensors").remove()
    with pytest.raises(CheckpointError, match=r"00001-00000\.safetensors' is damaged: "):
        ShardReader(place, written.index)("a", 20, 25)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    for read in (
        lambda: ShardReader(place, written.index)("a", 20, 25),
        lambda: load_policy(ModelSection(path=str(place))),
        lambda: model_depth(str(place), trust_remote_code=False),
        lambda: load_tokenizer(str(place)),
    ):
        with pytest.raises(StorageFaultError, match=r"ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH"):
            read()


def test_state_is_of_every_element_once_and_of_this_model(written):
    sizes = {"a": 50, "b": 7}
    for ranges in ([(0, 50, "f"), (0, 50, "g")], [(0, 20, "f")], [(0, 20, "f"), (19, 50, "g")], []):
        with pytest.raises(CheckpointError, match=r"owned_state gives 'a' as the ranges .* not its 50 elements"):
            index_of([{"a": ranges}, {"b": [(0, 7, "f")]}], sizes)
    with pytest.raises(CheckpointError, match="'a' has 50 elements there and 51 here"):
        written.check({"a": 51, "b": 7})
    with pytest.raises(CheckpointError, match="'b' has 7 elements there and no here"):
        written.check({"a": 50})


def test_the_latest_checkpoints_and_those_for_good_are_kept(runs, tmp_path):
    steps = [path.name for path in list_checkpoints(Place(runs[0] / "1 stage0"))]
    assert steps == ["checkpoint_000002", "checkpoint_000004"]
    train = Place(tmp_path / "train")
    for name in ["checkpoint_000003_best", *(f"checkpoint_{step:06d}" for step in range(1, 9))]:
        (train / name / MANIFEST).write_text("{}")
    for step in (5, 7):  # one of the two latest is damaged
        (train / f"checkpoint_{step:06d}" / "damaged.txt").write_text("a flipped bit")
    prune_checkpoints(Place(tmp_path), CheckpointSection(every=1, keep=2, keep_every=3), 8)
    assert [place.name for place in train.iterdir()] == [
        "checkpoint_000003", "checkpoint_000003_best", "checkpoint_000006", "checkpoint_000007", "checkpoint_000008"
    ]  # fmt: skip


def test_checkpoints_for_good_are_ones_that_are_written():
    assert CheckpointSection(every=2, keep_every=6).keep_every == 6
    for every in (None, 4):
        with pytest.raises(ValueError, match=rf"keep_every=6 must be a multiple of checkpoint.every, which is {every}"):
            CheckpointSection(every=every, keep_every=6)


def test_a_checkpoint_of_other_data_is_refused(run):
    with pytest.raises(CheckpointError, match=r"trained with tokens='t', now it is 'other': .*start a new run"):
        load_checkpoint(
            run / "train/checkpoint_000004", engine=None, config=None, fingerprints={**FINGERPRINTS, "tokens": "other"}
        )


PICKLES = re.compile(
    r"_?pickle|cPickle|pickletools|cloudpickle|dill|joblib|jsonpickle|shelve|marshal"
    r"|torch\.(serialization\.)?(load|save)|torch\.(jit|hub|package|export)\..*load.*|torch\.distributed\.checkpoint"
    r"|.*\.(read|to)_pickle|multiprocessing\.(connection|reduction)|ray\.(cloud)?pickle"
)
"""Modules and functions that pickle or unpickle, whole or by what is in them."""


def pickles_in(source):
    """Every use of what reads or writes pickles, by its full name, whatever name it was imported by."""
    tree = ast.parse(source)
    called, found = {}, []  # what a name in the file stands for

    def full(node):
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return called.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
            called |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            called |= imported
            found += imported.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.append(full(node))
        elif isinstance(node, ast.Call) and full(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            found += [each.value for each in node.args if isinstance(each, ast.Constant)]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is False else ["pickle"]
    parents = [name for each in found for name in accumulate(str(each).split("."), "{}.{}".format)]
    return [name for name in parents if PICKLES.fullmatch(name)]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle as p",
        "from pickle import loads",
        "from cloudpickle.cloudpickle import dumps",
        "import cloudpickle.cloudpickle",
        "import torch\ntorch.load('f')",
        "import torch as t\nread = t.load",
        "from torch import load as read",
        "from torch import serialization\nserialization.load('f')",
        "from torch.serialization import save",
        "import torch\ntorch.jit.load('f')",
        "import numpy as np\nnp.load('f', allow_pickle=True)",
        "np.save(f, a, allow_pickle=flag)",
        "import pandas as pd\npd.read_pickle('f')",
        "import importlib\nimportlib.import_module('dill')",
        "from ray import cloudpickle",
    ],
)
def test_a_pickle_is_seen_by_whatever_name(source):
    assert pickles_in(source)


def test_what_is_no_pickle_is_not_taken_for_one():
    whole = "from safetensors.torch import load, save\nimport numpy as np\nimport json\nimport torch as t\n"
    assert not pickles_in(f"{whole}np.load('f', allow_pickle=False)\njson.load(f)\nload(b'')\nt.loads\n")


def test_the_package_reads_and_writes_no_pickles():
    sources = {path: path.read_text(encoding="utf-8") for path in Path(mlc_ray.__file__).parent.rglob("*.py")}
    assert len(sources) > 100
    assert not {str(path): found for path, source in sources.items() if (found := pickles_in(source))}


def test_the_card_names_every_part_of_the_loss():
    manifest = {"step": 1, "bundles_consumed": 2, "fingerprints": {}, "versions": {}}
    with_term = tiny_config(terms={"anchor": {"weight": 0.25}})
    card = model_card(with_term, manifest)
    assert (
        "- dpo (answers=response, beta=0.1, label_smoothing=0.0)\n- 0.8 x mlc (layer=2, every=2, extractor_dim=16, "
        in card
    )
    assert "- 0.25 x anchor: ours\n" in card
    assert "anchor" not in model_card(tiny_config(), manifest)
