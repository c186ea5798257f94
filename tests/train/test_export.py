"""What an export publishes, and what it refuses of a checkpoint that somebody else made."""

import json
import logging
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mlc_ray.config import ConfigError
from mlc_ray.storage import library_versions, sealed
from mlc_ray.train.export import _public_name, export
from mlc_ray.train.shards import CheckpointError
from tests.checkpoints import complete
from tests.train.test_checkpoint import tokenizer
from tests.train.tiny import tiny_config, tiny_model


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a run with one checkpoint, by hand, of `sections` of a config; returns the run's folder."""

    def make(lora=False, **sections):
        base = tmp_path / "secret-home" / "tiny-base"
        tiny_model().save_pretrained(base)
        tokenizer().save_pretrained(base)
        model = {"path": str(base), "dtype": "float32", **sections.pop("model", {})}
        if lora:
            model["lora"] = {"rank": 4}
        sections["output_dir"] = str(tmp_path / "secret-out")
        config = tiny_config(model=model, objective={"loss": "simpo"}, **sections)
        folder = tmp_path / "run/train/checkpoint_000002"
        (folder / "state").mkdir(parents=True)
        trained = folder / ("adapter" if lora else "model")
        policy = AutoModelForCausalLM.from_pretrained(base)
        if lora:
            policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        policy.save_pretrained(trained)
        tokenizer().save_pretrained(trained)
        settings = config.model_dump(mode="json", exclude_unset=True)
        complete(folder, 2, config=settings, fingerprints={"tokens": "0123"}, versions=library_versions())
        return tmp_path / "run"

    return make


@pytest.mark.parametrize("lora", [False, True])
def test_no_path_address_or_user_is_published(lora, checkpoint, tmp_path):
    run = checkpoint(
        lora,
        logging={"mlflow": "https://tracking.intern:5000/team", "wandb": "secret-project"},
        data={"train": [{"path": "/data/secret-customer/bundles.jsonl"}, {"path": "someone/bundles"}]},
    )
    out = export(run, tmp_path / "out")
    text = "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in Path(out).iterdir() if p.is_file())
    assert "secret" not in text and "tracking.intern" not in text and str(tmp_path) not in text
    published = json.loads((out / "mlc_ray.json").read_text())
    assert published["settings"].keys() >= {"objective", "mlc", "optimizer", "train", "model", "data", "seed"}
    assert published["settings"]["model"]["name"] == "tiny-base"
    assert [source["name"] for source in published["settings"]["data"]["train"]] == ["bundles.jsonl", "someone/bundles"]
    assert published["fingerprints"] == {"tokens": "0123"}
    assert not published["settings"].keys() & {"logging", "output_dir", "cluster", "checkpoint", "engine"}
    assert "- bundles.jsonl\n- someone/bundles\n" in (out / "README.md").read_text()


def test_the_card_names_the_commit_of_its_base(checkpoint, tmp_path):
    commit = "c" * 40
    run = checkpoint(model={"path": f"owner/base#{commit}"})
    out = export(run, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "base_model: owner/base\n" in card and f"`owner/base#{commit}` aligned by" in card
    assert json.loads((out / "mlc_ray.json").read_text())["settings"]["model"]["name"] == f"owner/base#{commit}"


OWN_LOSS = """
from pathlib import Path
from mlc_ray.config import LossSettings, TermSettings
from mlc_ray.losses.base import Alignment, Term

class Loss(Alignment):
    class Settings(LossSettings):
        margin: float = 1.5
        strict: bool = True
        table: Path = Path("/home/secret/table.csv")
        people: list[str] = ["secret"]

    def __call__(self, chosen):
        raise NotImplementedError

class OwnTerm(Term):
    class Settings(TermSettings):
        note: str = "secret"

    def __call__(self, tapped):
        raise NotImplementedError
"""


def test_texts_of_a_loss_of_ones_own_are_not_published(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "own_loss_of_export.py").write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    run = checkpoint()
    manifest = run / "train/checkpoint_000002/manifest.json"
    content = json.loads(manifest.read_text())
    content["config"]["objective"] = {"loss": "own_loss_of_export:Loss"}
    content["config"]["terms"] = {"mine": {"name": "own_loss_of_export:OwnTerm", "weight": 0.25}}
    manifest.write_text(json.dumps(sealed(content)))
    out = export(run, tmp_path / "out", trust_remote_code=True)
    settings = json.loads((out / "mlc_ray.json").read_text())["settings"]
    published = {"loss": "own_loss_of_export:Loss", "sft_weight": 0.0, "margin": 1.5, "strict": True}
    assert settings["objective"] == published
    own = {"name": "own_loss_of_export:OwnTerm", "weight": 0.25, "start": 0.0, "ramp": 0.0}
    assert settings["terms"] == {"mine": own}
    card = (out / "README.md").read_text()
    assert "- own_loss_of_export:Loss (margin=1.5, strict=True)\n" in card
    assert "secret" not in card + json.dumps(settings)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("gpt2", "gpt2"),
        ("sample:train", "sample:train"),
        ("/home/u/models/mine", "mine"),
        ("./mine", "mine"),
        ("~/mine", "mine"),
        ("a/b/c.jsonl", "c.jsonl"),
    ],
)
def test_public_names(path, name):
    assert _public_name(path) == name


def test_code_of_a_base_model_runs_only_when_the_one_who_exports_says_so(checkpoint, tmp_path, caplog):
    on_a_gpu = {"attention": "flex", "kernels": "liger", "gradient_checkpointing": "selective"}  # where there is none
    run = checkpoint(lora=True, model={"trust_remote_code": True, **on_a_gpu})
    base = tmp_path / "secret-home" / "tiny-base"
    marker = tmp_path / "marker"
    settings = json.loads((base / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.TheirModel"}
    (base / "config.json").write_text(json.dumps(settings))
    (base / "theirs.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Theirs(LlamaConfig): pass\n"
        "class TheirModel(LlamaForCausalLM):\n    config_class = Theirs\n"
    )
    with pytest.raises(CheckpointError, match=rf"{base}.*add --trust-remote-code") as caught:
        export(run, tmp_path / "out", merge_lora=True)
    assert "trust that model" in str(caught.value)
    assert not marker.exists() and not (tmp_path / "out").exists()
    # a manifest that keeps quiet about it gets nothing run either
    manifest = run / "train/checkpoint_000002/manifest.json"
    quiet = manifest.read_text().replace('"trust_remote_code": true', '"trust_remote_code": false')
    manifest.write_text(json.dumps(sealed(json.loads(quiet))))
    with caplog.at_level(logging.WARNING):
        export(run, tmp_path / "quiet", merge_lora=True)
    assert not marker.exists()
    assert str(base) in caplog.text
    export(run, tmp_path / "trusted", merge_lora=True, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize(
    "section",
    [
        {"objective": {"loss": "their_code:Theirs"}},
        {"terms": {"theirs": {"name": "their_code:Theirs"}}},
        {"mlc": {"name": "their_code:Theirs"}},
        {"engine": {"name": "their_code:Theirs"}},
        {"data": {"train": [{"path": "none", "format": "their_code:Theirs"}]}},
    ],
)
def test_a_manifest_decides_nothing_that_is_imported(section, checkpoint, tmp_path, monkeypatch):
    run = checkpoint()
    marker = tmp_path / "marker"
    (tmp_path / "their_code.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Theirs: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_code", raising=False)
    manifest = run / "train/checkpoint_000002/manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(sealed({**content, "config": {**content["config"], **section}})))
    with pytest.raises(ConfigError, match=r"'their_code:Theirs' .* not imported; add --trust-remote-code"):
        export(run, tmp_path / "out")
    assert not marker.exists() and "their_code" not in sys.modules and not (tmp_path / "out").exists()


def test_an_installed_component_is_not_imported_for_a_manifest_either(checkpoint, tmp_path, monkeypatch):
    installed = tmp_path / "installed"
    (installed / "theirs-1.0.dist-info").mkdir(parents=True)
    (installed / "theirs-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (installed / "theirs-1.0.dist-info/entry_points.txt").write_text("[mlc_ray.loss]\ntheirs = this:Nope\n")
    monkeypatch.syspath_prepend(installed)
    run = checkpoint()
    manifest = run / "train/checkpoint_000002/manifest.json"
    content = json.loads(manifest.read_text())
    content["config"]["objective"] = {"loss": "theirs"}
    manifest.write_text(json.dumps(sealed(content)))
    with pytest.raises(ConfigError, match="'this:Nope' does not come with mlc_ray"):
        export(run, tmp_path / "out")
    assert "this" not in sys.modules


@pytest.mark.parametrize("what", ["file", "folder", "the model itself"])
def test_a_link_in_a_checkpoint_is_not_followed(what, checkpoint, tmp_path):
    run = checkpoint()
    model = run / "train/checkpoint_000002/model"
    secret = tmp_path / "private"
    secret.mkdir()
    (secret / "key").write_text("private key")
    if what == "file":
        (model / "notes.txt").symlink_to(secret / "key")
    elif what == "folder":
        (model / "more").symlink_to(secret)
    else:
        model.rename(tmp_path / "elsewhere")
        model.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link to .*; links are not followed: put the file itself there"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
