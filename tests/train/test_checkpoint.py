"""Checkpoints: resuming is exact, damage is recognised, pickles run no code, exports load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mlc_ray.train.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    verified_manifest,
)
from mlc_ray.train.export import export, model_card
from tests.train.tiny import (
    VOCABULARY,
    make_engine,
    on_workers,
    random_rows,
    run_engine,
    tiny_config,
    tiny_model,
    wrapped,
)

FINGERPRINTS = {"model": "m", "tokens": "t"}
RUNS = {
    "stage2": {"engine": {"stage": 2}},
    "stage3_bf16": {"engine": {"stage": 3, "persistence_threshold": 0}, "model": {"dtype": "bfloat16"}},
    "stage0": {"engine": {"stage": 0}},
    "stage1": {"engine": {"stage": 1}},
    "stage3": {"engine": {"stage": 3, "persistence_threshold": 0}},
    "lora": {"engine": {"stage": 2}, "model": {"lora": {"rank": 4, "dropout": 0.1}}},
    "lora_stage3": {"engine": {"stage": 3, "persistence_threshold": 0}, "model": {"lora": {"rank": 4}}},
}


def tokenizer():
    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0")


def config_of(name, model_folder):
    sections = dict(RUNS[name])
    sections["model"] = {**sections.get("model", {}), "path": str(model_folder)}
    return tiny_config(objective={"loss": "simpo"}, checkpoint={"every": 2}, **sections)


def train_and_save(rank, folder, model_folder):
    """Four steps with a checkpoint after two; returns the losses of all four and the final weights."""
    results = {}
    for name in RUNS:
        config = config_of(name, model_folder)
        engine = make_engine(config)
        torch.manual_seed(rank)

        def save(progress, metrics, config=config, engine=engine, name=name):
            part = Path(folder) / f"part-{rank}" / name / "train" / f"checkpoint_{progress.step:06d}"
            part.mkdir(parents=True)
            save_checkpoint(
                part, engine=engine, tokenizer=tokenizer(), config=config, progress=progress, fingerprints=FINGERPRINTS
            )

        engine, history = run_engine(config, random_rows(7), 4, save=save, engine=engine)
        results[name] = ([row["loss/total"] for row in history], engine.full_weights())
    return results


def resume(rank, runs, model_folder):
    """The last two steps again, from the checkpoint after two."""
    results = {}
    for name in RUNS:
        config = config_of(name, model_folder)
        engine = make_engine(config, wrapped(config, seed=9))
        if config.model.lora is not None:
            # Adapters alone are saved: the frozen weights come from the model that both runs name.
            if config.engine.stage == 3:
                continue  # they are partitioned here, and cannot be put in by hand
            frozen = tiny_model(0).state_dict()
            for key, value in engine.module.policy.get_base_model().state_dict().items():
                if (plain := key.replace(".base_layer", "")) in frozen:
                    value.copy_(frozen[plain])
        torch.manual_seed(77)
        checkpoint = find_checkpoint(Path(runs) / name, "checkpoint_000002")
        progress = load_checkpoint(checkpoint, engine=engine, config=config, fingerprints=FINGERPRINTS)
        start = (progress.step, progress.bundles)
        engine, history = run_engine(config, random_rows(7), 4, engine=engine, progress=progress)
        results[name] = (start, [row["loss/total"] for row in history], engine.full_weights())
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model_folder = folder / "model"
    tiny_model().save_pretrained(model_folder)
    tokenizer().save_pretrained(model_folder)
    first = on_workers(2, train_and_save, folder / "first", folder, model_folder)
    for rank in range(2):  # what Ray Train does with the workers' folders
        shutil.copytree(folder / f"part-{rank}", folder / "runs", dirs_exist_ok=True)
    again = on_workers(2, resume, folder / "again", folder / "runs", model_folder)
    return folder / "runs", first, again, model_folder


@pytest.mark.parametrize("name", [name for name in RUNS if name != "lora_stage3"])
def test_resuming_gives_the_undisturbed_run(name, runs):
    _, first, again, _ = runs
    losses, weights = first[0][name]
    start, resumed_losses, resumed_weights = again[0][name]
    assert start == (2, 7)
    assert resumed_losses == losses[2:]
    for key, value in weights.items():
        assert torch.equal(value, resumed_weights[key]), key


def test_checkpoint_folder_is_as_documented(runs):
    folder = runs[0] / "stage2/train/checkpoint_000004"
    manifest = verified_manifest(folder)
    assert (manifest["step"], manifest["bundles_consumed"], manifest["world_size"]) == (4, 14, 2)
    assert manifest["fingerprints"] == FINGERPRINTS
    assert manifest["resolved_config"]["optimizer"]["schedule"] == "cosine"
    states = {"random_state_00000.safetensors", "random_state_00001.safetensors"}
    expected = {"model", "engine", "extractor.safetensors", "manifest.json"} | states
    assert expected == {p.name for p in folder.iterdir()}
    assert sum("_states.pt" in name for name in manifest["files"]) >= 3  # both workers' files are listed
    assert load_file(folder / "extractor.safetensors").keys() == {"weight", "bias"}


@pytest.mark.parametrize("name", ["stage2", "stage3_bf16"])
def test_export_is_the_trained_model(name, runs, tmp_path):
    folder, first, _, _ = runs
    out = export(folder / name, tmp_path / "out")
    state = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for key, value in first[0][name][1].items():
        if key.startswith("policy."):
            assert torch.equal(state[key.removeprefix("policy.")], value), key
    assert AutoTokenizer.from_pretrained(out).vocab_size == VOCABULARY
    card = (out / "README.md").read_text()
    assert "- simpo (beta=" in card and "4 optimizer steps, 14 bundles" in card


@pytest.mark.parametrize("name", ["lora", "lora_stage3"])
def test_export_of_adapters_merged_and_not(name, runs, tmp_path):
    folder, first, _, model_folder = runs
    adapter = export(folder / name, tmp_path / "adapter")
    assert (adapter / "adapter_config.json").is_file() and not (adapter / "model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(export(folder / name, tmp_path / "merged", merge_lora=True))
    start = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    weights = first[0][name][1]
    prefix = "policy.base_model.model.model.layers.1.self_attn.q_proj."
    down, up = weights[prefix + "lora_A.default.weight"], weights[prefix + "lora_B.default.weight"]
    key = "model.layers.1.self_attn.q_proj.weight"
    assert up.abs().max() > 0
    assert torch.allclose(merged.state_dict()[key], start[key] + (32 / 4) * up @ down, atol=1e-5)


def test_export_refusals(runs, tmp_path):
    folder = runs[0]
    with pytest.raises(CheckpointError, match="no adapter to merge"):
        export(folder / "stage2", tmp_path / "a", merge_lora=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export(folder / "stage2", tmp_path / "there")
    with pytest.raises(CheckpointError, match="no checkpoint 'checkpoint_9'; complete ones: checkpoint_000002"):
        export(folder / "stage2", tmp_path / "b", checkpoint="checkpoint_9")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        export(tmp_path, tmp_path / "c")


@pytest.mark.parametrize("damage", ["short", "missing", "no manifest", "half a manifest"])
def test_a_half_written_checkpoint_is_passed_over(damage, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0] / "stage2", run)
    last = run / "train/checkpoint_000004"
    if damage == "short":
        with (last / "model/model.safetensors").open("r+b") as file:
            file.truncate(1000)
    elif damage == "missing":
        next(last.glob("engine/state/*rank_1_*optim_states.pt")).unlink()
    elif damage == "no manifest":
        (last / "manifest.json").unlink()
    else:
        text = (last / "manifest.json").read_text()
        (last / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="checkpoint_000004"):
        verified_manifest(last)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint_000002"]
    assert find_checkpoint(run).name == "checkpoint_000002"


def load_refused(rank, checkpoint, model_folder, changes, marker):
    """What load_checkpoint says to each change, in two workers."""
    answers = {}
    for name, (sections, fingerprints) in changes.items():
        config = config_of("stage2", model_folder).model_copy(update=sections)
        engine = make_engine(config)
        folder = Path(checkpoint)
        if name == "pickle":
            folder = folder.with_name("poisoned")
        try:
            load_checkpoint(folder, engine=engine, config=config, fingerprints=fingerprints)
            answers[name] = "loaded"
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
    return answers


class Poison:
    """Unpickling this writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (Path(self.marker), "ran")


def test_what_does_not_fit_is_refused_and_pickles_run_no_code(runs, tmp_path):
    folder, _, _, model_folder = runs
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folder / "stage2/train/checkpoint_000004", checkpoint)
    poisoned, marker = tmp_path / "poisoned", tmp_path / "marker"
    shutil.copytree(checkpoint, poisoned)
    for path in poisoned.glob("engine/state/*.pt"):
        torch.save({"module": Poison(str(marker))}, path)
    manifest = json.loads((poisoned / "manifest.json").read_text())
    manifest["files"] = {name: (poisoned / name).stat().st_size for name in manifest["files"]}
    (poisoned / "manifest.json").write_text(json.dumps(manifest))

    stage1 = config_of("stage1", model_folder).engine
    changes = {
        "data": ({}, {**FINGERPRINTS, "tokens": "other"}),
        "stage": ({"engine": stage1}, FINGERPRINTS),
        "pickle": ({}, FINGERPRINTS),
    }
    answers = on_workers(2, load_refused, tmp_path / "w", checkpoint, model_folder, changes, str(marker))[0]
    assert "tokens='t', now it is 'other'" in answers["data"]
    assert "set engine.stage=2" in answers["stage"]
    assert answers["pickle"] != "loaded" and "weights_only" in answers["pickle"].lower().replace(" ", "_")
    assert not marker.exists()

    alone = on_workers(1, load_refused, tmp_path / "w1", checkpoint, model_folder, {"world": ({}, FINGERPRINTS)}, "")
    assert "written by 2 workers, this run has 1: set cluster.workers=2" in alone[0]["world"]


def test_the_card_names_every_part_of_the_loss():
    manifest = {"step": 1, "bundles_consumed": 2, "fingerprints": {}, "versions": {}}
    with_term = tiny_config(terms={"anchor": {"weight": 0.25}})
    card = model_card(with_term, manifest)
    assert "- dpo (beta=0.1, label_smoothing=0.0)\n- 0.8 x mlc (layer=2, every=2, extractor_dim=16, temp" in card
    assert "- 0.25 x anchor\n" in card
    assert "anchor" not in model_card(tiny_config(), manifest)
