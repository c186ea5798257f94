"""Every shipped config parses; mistakes are refused with field, value and the nearest valid name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlc_ray._registry import resolve
from mlc_ray.config import (
    ConfigError,
    EndpointSection,
    LossSettings,
    ScaleConfig,
    ScoreConfig,
    SearchConfig,
    Section,
    SimulationConfig,
    StudyConfig,
    TermSettings,
    TrainConfig,
    TranslateConfig,
    apply_override,
    config_schema,
    dump_yaml,
    load_config,
    parse_config,
    parse_yaml,
    read_config_file,
)
from mlc_ray.errors import MlcRayError
from mlc_ray.search.space import make_space
from mlc_ray.storage import Place
from mlc_ray.study.cells import make_cells
from mlc_ray.study.searches import make_searches

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TRAIN_FILES = sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS / "scaling").glob("*.yaml")])
SCORE_FILES = sorted((CONFIGS / "score").glob("*.yaml"))
SEARCH_FILES = sorted((CONFIGS / "search").glob("*.yaml"))
TRANSLATE_FILES = sorted((CONFIGS / "translate").glob("*.yaml"))
SCALE_FILES = sorted((CONFIGS / "study").glob("scaling*.yaml"))
STUDY_FILES = sorted({*(CONFIGS / "study").glob("*.yaml")} - {*SCALE_FILES})
SIMULATION_FILES = sorted((CONFIGS / "simulation").glob("*.yaml"))
MINIMAL: dict[str, Any] = {"name": "r", "model": {"path": "m"}, "data": {"train": [{"path": "sample:train"}]}}


def minimal(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(MINIMAL)), **changes}


@pytest.mark.parametrize("file", TRAIN_FILES, ids=lambda p: p.name)
def test_train_files_parse(file: Path) -> None:
    load_config(TrainConfig, file)


@pytest.mark.parametrize("file", SCORE_FILES, ids=lambda p: p.name)
def test_score_files_parse(file: Path) -> None:
    load_config(ScoreConfig, file)


@pytest.mark.parametrize("file", SEARCH_FILES, ids=lambda p: p.name)
def test_search_files_parse_and_every_corner_is_a_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)  # as `mlc-ray search` is called from a checkout
    make_space(load_config(SearchConfig, file))


@pytest.mark.parametrize("file", TRANSLATE_FILES, ids=lambda p: p.name)
def test_translate_files_parse(file: Path) -> None:
    load_config(TranslateConfig, file)


@pytest.mark.parametrize("file", STUDY_FILES, ids=lambda p: p.name)
def test_study_files_parse_and_every_cell_is_a_run(file: Path) -> None:
    config = load_config(StudyConfig, file)
    assert len(make_cells(config)) == len(config.models) * len(config.methods) * len(config.seeds)


@pytest.mark.parametrize("file", SCALE_FILES, ids=lambda p: p.name)
def test_scale_files_parse_and_every_corner_is_a_run(file: Path, tmp_path: Path) -> None:
    config = load_config(ScaleConfig, file)
    assert [each.size for each in make_searches(config, Place(tmp_path))] == list(config.sizes)


@pytest.mark.parametrize("file", SIMULATION_FILES, ids=lambda p: p.name)
def test_simulation_files_parse(file: Path) -> None:
    load_config(SimulationConfig, file)


def test_the_papers_study_has_its_methods_with_the_published_values() -> None:
    config = load_config(StudyConfig, CONFIGS / "study/paper.yaml")
    cells = {(cell.model, cell.method): cell.config for cell in make_cells(config)}
    methods = {method for _, method in cells}
    assert methods >= {"sft", "dpo", "simpo", "orpo", "mpo", "sdrrl", "dpo-cosine", "dpo-no-extractor", "dco"}
    assert methods >= {"sft-mlc", "dpo-mlc", "simpo-mlc", "orpo-mlc"}
    for model, file in (("qwen2.5-7b", "qwen2.5-7b.yaml"), ("gemma-2-9b", "gemma-2-9b.yaml")):
        recipe, cell = load_config(TrainConfig, CONFIGS / file), cells[model, "dpo-mlc"]
        for section in ("objective", "mlc", "optimizer", "train", "engine", "data", "cluster"):
            assert getattr(cell, section) == getattr(recipe, section), section
        assert cell.model.path == recipe.model.path
        for name in ("sft", "simpo", "orpo"):
            assert (cells[model, name].objective.loss, cells[model, name].mlc.weight) == (name, 0)
            assert cells[model, f"{name}-mlc"].mlc == recipe.mlc
        assert (
            cells[model, "dpo-no-extractor"].mlc.centring and cells[model, "dpo-no-extractor"].mlc.extractor_dim is None
        )
    mpo = load_config(TrainConfig, CONFIGS / "qwen2.5-7b-mpo.yaml")
    for section in ("objective", "mlc", "optimizer", "train", "engine"):
        ours, theirs = (getattr(each, section).model_dump() for each in (cells["qwen2.5-7b", "mpo"], mpo))
        assert {**ours, "layer": 0, "every": 0} == {**theirs, "layer": 0, "every": 0}, section
    gemma = cells["gemma-2-9b", "mpo"]
    assert (gemma.objective.dominant, gemma.optimizer.learning_rate) == ("en", 4e-7)  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["qwen2.5-7b", "gemma-2-9b"])
def test_the_papers_study_has_the_rivals_with_their_authors_values(model: str) -> None:
    """KTO's are LASA's (arXiv 2604.12710), DCO's those of its script (2603.04678); rows of the paper's recipe else."""
    config = load_config(StudyConfig, CONFIGS / "study/paper.yaml")
    cells = {cell.method: cell.config for cell in make_cells(config) if cell.model == model}
    recipe = cells["dpo-mlc"]
    translated, own = "data/translated.jsonl", f"data/own-answers-{model}.jsonl"

    def said(method: str) -> dict[str, Any]:
        run = cells[method]
        sources = [source.path for source in run.data.train]
        return {"weight": run.mlc.weight, "every": run.mlc.every, "layer": run.mlc.layer, "data": sources,
                "lr": run.optimizer.learning_rate, "epochs": run.train.epochs, "bundles": run.train.batch_bundles,
                **run.objective.model_dump(exclude_none=True)}  # fmt: skip

    common = {"weight": 0, "every": 2, "layer": recipe.mlc.layer, "lr": 6e-7, "epochs": 3, "bundles": 32}
    kto = {"loss": "kto", "beta": 0.1, "desirable": 1.0, "undesirable": 1.0, "sft_weight": 0.0}
    assert said("kto-translated") == {**common, **kto, "answers": "all", "data": [translated], "lr": 1e-6}
    lasa = {"qwen2.5-7b": 19, "gemma-2-9b": 29}[model]
    shipped = [source.path for source in recipe.data.train]
    expected = {**common, **kto, "answers": "response", "data": shipped, "layer": lasa, "weight": 0.8}
    assert said("kto-mlc-lasa") == expected
    shares = {"english": 0.5, "english_answers": 0.5, "translated": 0.0, "english_prompts": 0.0}
    assert said("sdrrl-english") == {**common, **shares, "loss": "sdrrl", "sft_weight": 0.0, "data": [own]}
    assert said("sdrrl") == {**said("sdrrl-english"), **dict.fromkeys(shares, 0.25)}
    dco = said("dco")
    assert (dco["loss"], dco["beta"], dco["lr"], dco["epochs"], dco["bundles"]) == ("dco", 1.0, 1e-5, 1, 4)
    assert (dco["weight"], dco["data"]) == (0, [translated])
    for name in ("dpo", "simpo", "orpo", "sft"):
        bound = {**said(name), "answers": "all", "data": [translated]}
        assert said(f"{name}-translated") == bound
    forms = {"dpo-cosine": ("linear", None), "dpo-cosine-squared": ("squared", None),
             "dpo-cosine-anchored": ("anchored", None)}  # fmt: skip
    for method, (form, detach) in forms.items():
        tap = cells[method].mlc.model_dump()
        assert (tap["name"], tap["form"], tap["detach"], tap["weight"]) == ("cosine", form, detach, 0.8)


def test_rows_of_ours_differ_from_their_control_by_their_terms() -> None:
    config = load_config(StudyConfig, CONFIGS / "study/paper.yaml")
    cells = {(cell.model, cell.method, cell.seed): cell.config for cell in make_cells(config)}
    ours, own = (cells["qwen2.5-7b", name, 42] for name in ("ours-decision-consistency", "ours-own-answers"))
    assert {name: term.weight for name, term in ours.active_terms.items()} == {"decision": 0.5, "consistency": 0.3}
    assert not own.active_terms and ours.data.train == own.data.train and ours.objective == own.objective
    assert ours.optimizer == own.optimizer and ours.train == own.train and ours.data.other_languages is None
    control, late = (cells["qwen2.5-7b", name, 42] for name in ("sft-benign", "sft-benign-mlc-late"))
    assert late.mlc == cells["qwen2.5-7b", "sft-mlc", 42].mlc.model_copy(update={"start": 0.5})
    assert not control.active_terms and late.data == control.data and late.objective == control.objective
    recipe, shipped = cells["qwen2.5-7b", "ours-recipe", 42], load_config(TrainConfig, CONFIGS / "recipe.yaml")
    assert recipe.objective == shipped.objective and recipe.active_terms == shipped.active_terms
    assert recipe.openings == shipped.openings and (recipe.mlc.weight, recipe.mlc.every) == (0, 2)
    assert recipe.data == own.data and recipe.objective == own.objective and recipe.train == own.train
    kinds = [[(each.only, each.share) for each in run.data.train] for run in (recipe, shipped)]
    assert kinds[0] == kinds[1]
    endpoint = config.scoring.judge.endpoint  # type: ignore[attr-defined]
    assert (endpoint.model, endpoint.max_cost_usd) == ("gpt-4o", 2500)


def test_the_study_of_the_recipe_trains_the_shipped_one() -> None:
    cells = {cell.method: cell.config for cell in make_cells(load_config(StudyConfig, CONFIGS / "study/recipe.yaml"))}
    shipped = load_config(TrainConfig, CONFIGS / "recipe.yaml").model_dump(exclude={"name", "output_dir", "seed"})
    recipe = cells["recipe"].model_dump(exclude={"name", "output_dir", "seed"})
    assert recipe == shipped
    assert cells.keys() == {"recipe", "own-answers"}
    assert not cells["own-answers"].active_terms and cells["own-answers"].data == cells["recipe"].data


def test_no_config_file_is_left_out() -> None:
    assert {p.name for p in TRAIN_FILES} >= {"quickstart.yaml", "qwen2.5-7b.yaml", "gemma-2-9b.yaml"}
    assert SCORE_FILES
    assert SEARCH_FILES
    assert TRANSLATE_FILES and {file.name for file in STUDY_FILES} == {"paper.yaml", "recipe.yaml", "small.yaml"}
    assert SCALE_FILES and SIMULATION_FILES
    of_searches = {*SEARCH_FILES, *STUDY_FILES, *SCALE_FILES}
    known = {*TRAIN_FILES, *SCORE_FILES, *of_searches, *TRANSLATE_FILES, *SIMULATION_FILES}
    assert known == {p for p in CONFIGS.rglob("*") if p.is_file()}


@pytest.mark.parametrize("file", [*TRAIN_FILES, *SEARCH_FILES, *STUDY_FILES, *SCALE_FILES], ids=lambda file: file.name)
def test_shipped_recipes_go_on_by_the_same_command(file: Path) -> None:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert content["resume"] == "auto"
    if file in TRAIN_FILES and file.name != "quickstart.yaml":  # which has 12 steps
        assert content["cluster"]["max_failures"] == 3 and content["checkpoint"]["every"] <= 50


@pytest.mark.parametrize(("file", "layer", "stage"), [("qwen2.5-7b.yaml", 28, 2), ("gemma-2-9b.yaml", 42, 3)])
def test_published_recipes_have_the_published_values(file: str, layer: int, stage: int) -> None:
    config = load_config(TrainConfig, CONFIGS / file)
    assert (config.mlc.layer, config.mlc.weight, config.mlc.every) == (layer, 0.8, 2)
    assert (config.mlc.temperature, config.mlc.scaling, config.mlc.extractor_dim) == (0.2, "leading", 512)
    assert (config.objective.loss, config.objective.beta) == ("dpo", 0.1)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_ratio) == (6e-7, 0.1)
    assert (config.optimizer.schedule, config.train.epochs, config.engine.stage) == ("cosine", 3, stage)
    assert config.train.batch_bundles == 32
    assert config.data.max_prompt_tokens + config.data.max_response_tokens == 1024
    assert config.model.lora is None


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"mlc": {"wieght": 1}}, ["mlc.wieght=1", "no such field", "'weight'"]),
        ({"modle": {}}, ["modle={}", "'model'"]),
        ({"train": {"epochs": "many"}}, ["train.epochs='many'", "integer"]),
        ({"train": {"epochs": 0}}, ["train.epochs=0", "greater than or equal to 1"]),
        ({"mlc": {"scaling": "leeding"}}, ["mlc.scaling='leeding'", "'leading'"]),
        ({"data": {"train": []}}, ["data.train=[]", "at least 1"]),
        ({"data": {"languages": ["en", False]}}, ["data.languages.1=False", "put such a word in quotes"]),
        (
            {"data": {"languages": "en,sw"}},
            ["data.languages='en,sw': Input should be a valid list; a list is written [one, two]\n"],
        ),
        (
            {"data": {"train": "a.jsonl"}},
            ["data.train='a.jsonl'", "; a list of sources is written [{path: one}, {path"],
        ),
        ({"data": {"train": ["https://me:pw@host/a"]}}, ["expected a section", "; write {path: https://...@host/a}\n"]),
        ({"data": {"languages": 3}}, ["data.languages=3: Input should be a valid list; a list is written [3]\n"]),
        (
            {"openings": {"further": {"zh_hant": ["x"]}}},
            ["- openings.further.zh_hant: it is no language tag; write it like 'en', 'zh-Hant', 'pt-BR'; did"],
        ),
        ({"data": {"train": [{"path": "a", "fromat": "sft"}]}}, ["data.train.0.fromat='sft'", "'format'"]),
        ({"model": {"path": "m", "lora": {"rnak": 4}}}, ["model.lora.rnak=4", "'rank'"]),
        ({"name": "a/b"}, ["name='a/b'"]),
        (
            {"objective": {"loss": "sft", "beta": 0.1}},
            ["objective.beta=0.1: no such field (valid here: answers, loss, response_share, sft_weight)"],
        ),
        (
            {"objective": {"loss": "ipo", "label_smoothing": 0.1}},
            ["objective.label_smoothing=0.1: no such field (valid here: answers, beta, loss, response_share, sft_weig"],
        ),
        (
            {"objective": {"loss": "dop"}},
            ["objective: loss='dop': no loss is called 'dop'; did you mean 'dpo'?", "simpo"],
        ),
        ({"objective": {"loss": "contrast"}}, ["no loss is called 'contrast'"]),
        ({"objective": {"loss": "simpo", "beta": 0}}, ["objective.beta=0: Input should be greater than 0"]),
        ({"objective": 3}, ["objective=3: expected a section with loss"]),
        ({"objective": {"loss": "simpo"}, "reference": "online"}, ["reference='online'", "simpo"]),
        ({"mlc": {"name": "contrast"}}, ["mlc: name='contrast' cannot stand here", "Settings that extends TapSection"]),
        (
            {"terms": {"anchor": {"temperature": 0.1}}},
            ["terms.anchor.temperature=0.1: no such field (valid here: name, ramp, start, weight)"],
        ),
        (
            {"terms": {"contrast": {"target_std": 1.0, "wight": 1}, "variance": {"weight": -1}, "two words": {}}},
            [
                "terms.contrast.target_std=1.0: no such field",
                "terms.contrast.wight=1: no such field; did you mean 'weight'?",
                "terms.variance.weight=-1: Input should be greater than or equal to 0",
                "terms.two words: a key is letters",
            ],
        ),
        ({"terms": {"contrastive": {}}}, ["terms.contrastive: name='contrastive': no term is called", "'contrast'?"]),
        ({"terms": {"anchor": None}}, ["terms.anchor=None: expected a section"]),
        ({"terms": ["anchor"]}, ["terms=['anchor']: expected a section with a term per name"]),
        ({"terms": {"total": {"name": "anchor"}}}, ["terms.total: loss/total is the name of another part"]),
        ({"terms": {"reward": {"name": "anchor"}}}, ["terms.reward: reward/... are other numbers that a run logs"]),
        (
            {"terms": {"second": {"name": "mlc"}}},
            ["terms.second.name='mlc' has a tap of its own", "set mlc.name='mlc'"],
        ),
        ({"terms": {"mine": {"name": "pathlib:Path"}}}, ["terms.mine: name='pathlib:Path' cannot stand here"]),
        ({"terms": {"mine": {"name": "no_such_package.m:T"}}}, ["there is no module 'no_such_package'"]),
        (
            {"terms": {"spread": {"name": "variance"}}, "train": {"batch_bundles": 1}},
            ["terms.spread compares the bundles of a batch", "train.batch_bundles=1 gives it a single one; raise it"],
        ),
        ({"train": {"group_bundles": 1}}, ["train.group_bundles=1", "greater than or equal to 2"]),
        (
            {"train": {"group_bundles": 4}, "terms": {"anchor": {}}},
            ["train.group_bundles=4 is read by terms that compare bundles", "remove it", "terms.variance"],
        ),
        ({"train": {"tokens_per_forward": 0}}, ["train.tokens_per_forward"]),
        ({"train": {"bundles_per_worker": 2}}, ["train.bundles_per_worker=2: no such field", "batch_bundles"]),
        ({"collapse": {"window": 15}}, ["collapse.window=15", "16 or more", "0"]),
        ({"collapse": {"min_spread": 1.5}}, ["collapse.min_spread=1.5", "less than or equal to 1"]),
        ({"engine": {"stage": 0, "offload_optimizer": True}}, ["engine.offload_optimizer=True", "engine.stage=0"]),
        ({"engine": {"stage": 2, "offload_parameters": True}}, ["engine.offload_parameters=True", "engine.stage=2"]),
        ({"engine": {"stage": 2, "persistence_threshold": 0}}, ["engine.persistence_threshold=0", "engine.stage=2"]),
        ({"engine": {"stage": 1, "overlap_comm": True}}, ["engine.overlap_comm=True", "engine.stage 2 or 3"]),
        ({"engine": {"stage": 2, "secondary_partition": 8}}, ["engine.secondary_partition=8", "engine.stage=2"]),
        (
            {"engine": {"stage": 3, "secondary_partition": 2}, "cluster": {"workers": [1, 2]}},
            ["engine.secondary_partition=2 needs one number of workers", "cluster.workers=[1, 2]"],
        ),
        (
            {"cluster": {"workers": [1, 2], "max_failures": 3}},
            ["cluster.workers=[1, 2]", "checkpoint.every is not set", "checkpoint.every=100"],
        ),
        (
            {"cluster": {"workers": [1, 2]}, "checkpoint": {"every": 5}},
            ["cluster.workers=[1, 2]", "cluster.max_failures=0 ends", "cluster.max_failures=10"],
        ),
        ({"engine": {"stage": 1, "accumulate_dtype": "float32"}}, ["engine.accumulate_dtype='float32'", "stage=1"]),
        ({"engine": {"extra": {"optimizer": {"type": "Lion"}}}}, ["engine.extra has 'optimizer'", "zero_optimization"]),
        (
            {"logging": {"mlflow": "https://me:pw@host:5000/x"}},
            ["logging.mlflow='https://...@host:5000/x'", "MLFLOW_TRACKING_PASSWORD"],
        ),
        (
            {"model": {"path": "m", "attention": "varlen", "dtype": "float32"}},
            ["model.attention='varlen'", "no float32 kernel", "attention='auto'"],
        ),
        (
            {"model": {"path": "m", "attention": "flex"}, "cluster": {"accelerator": "cpu"}},
            ["model.attention='flex'", "needs a GPU", "attention='auto'"],
        ),
        (
            {"model": {"path": "m", "kernels": "liger"}, "cluster": {"accelerator": "cpu"}},
            ["model.kernels='liger'", "needs a GPU", "kernels='torch'"],
        ),
    ],
)
def test_a_mistake_is_quoted(changes: dict[str, Any], quoted: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, minimal(**changes))
    for part in quoted:
        assert part in f"{caught.value}\n"
    assert isinstance(caught.value, MlcRayError)


def test_bundles_to_compare_are_those_of_a_batch_on_however_many_workers() -> None:
    for kind in ("contrast", "variance"):
        for workers in (1, 64):
            parse_config(TrainConfig, minimal(terms={kind: {}}, cluster={"workers": workers}))
        parse_config(TrainConfig, minimal(terms={kind: {"weight": 0}}, train={"group_bundles": 4}))


def test_an_anchor_gives_every_loss_a_reference_setting() -> None:
    config = parse_config(
        TrainConfig,
        minimal(objective="simpo", mlc={"weight": 0}, terms={"anchor": {}}, reference="online"),
    )
    assert config.needs_reference
    assert not parse_config(TrainConfig, minimal(objective="simpo", terms={"anchor": {"weight": 0}})).needs_reference
    assert parse_config(TrainConfig, minimal()).needs_reference


def test_seen_languages_are_language_tags() -> None:
    score = {"model": "m", "benchmarks": [{"path": "sample:test"}]}
    assert parse_config(ScoreConfig, {**score, "seen_languages": ["en", "zh-Hant", "pt-BR"]}).seen_languages
    with pytest.raises(ConfigError, match=r"seen_languages has 'EN', 'English', not a language tag.*'zh-Hant'"):
        parse_config(ScoreConfig, {**score, "seen_languages": ["sw", "EN", "English"]})


@pytest.mark.parametrize(
    ("tag", "meant"),
    [
        ("zh-cn", "zh-CN"),
        ("PT_br", "pt-BR"),
        ("zh-hans-cn", "zh-Hans-CN"),
        ("ES-419", "es-419"),
        ("chinese", None),
        ("-", None),
        ("es-x", None),
        ("de\n", None),
    ],
)
def test_what_is_no_language_tag_is_told_how_to_write_it(tag: str, meant: str | None) -> None:
    hint = f"; did you mean '{meant}'?" if meant else ""
    words = f"languages.0={tag!r}: it is no language tag; write it like 'en', 'zh-Hant', 'pt-BR'{hint}"
    raw = {"name": "n", "sources": [{"path": "sample:train"}], "translator": {"model": "m"}}
    with pytest.raises(ConfigError, match=f"- {re.escape(words)}$"):
        parse_config(TranslateConfig, {**raw, "languages": [tag]})
    if meant:
        assert parse_config(TranslateConfig, {**raw, "languages": [meant]}).languages == [meant]


@pytest.mark.parametrize(
    ("prices", "named"),
    [
        ({"output": 2.0}, r"set usd_per_million_input_tokens \(0 if it is free\)"),
        ({"input": 2.0}, r"set usd_per_million_output_tokens \(0"),
        ({"input": 0.0, "output": 0.0}, r"set usd_per_million_input_tokens and usd_per_million_output_tokens"),
        ({}, r"set usd_per_million_input_tokens and usd_per_million_output_tokens"),
    ],
)
def test_a_cost_cap_needs_the_prices_of_both_directions(prices: dict[str, float], named: str) -> None:
    endpoint = {"base_url": "http://host/v1", "model": "m", "max_cost_usd": 1.0}
    given = {f"usd_per_million_{way}_tokens": price for way, price in prices.items()}
    with pytest.raises(ConfigError, match=rf"max_cost_usd=1\.0 .*{named}"):
        parse_config(EndpointSection, {**endpoint, **given})
    parse_config(EndpointSection, {**endpoint, "usd_per_million_input_tokens": 0, "usd_per_million_output_tokens": 2})


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, {"name": "r", "mlc": {"weight": -1, "tau": 1}, "engine": {"stage": 4}})
    message = str(caught.value)
    for part in ("mlc.weight=-1", "mlc.tau=1", "engine.stage=4", "model: required", "data: required"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [("- 1\n", "holds list"), ("a: [", "not valid YAML"), (b"\xff\xfe\xff", "not valid YAML"), ("", "holds NoneType")],
)
def test_unreadable_files(tmp_path: Path, text: str | bytes, part: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=part) as caught:
        load_config(TrainConfig, file)
    assert str(file) in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(TrainConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(TrainConfig, tmp_path)


@pytest.mark.parametrize(
    ("schema", "file", "named"),
    [
        (TrainConfig, "recipe:score/quickstart", r"settings of `mlc-ray score`; those of `mlc-ray train` are .*mlc"),
        (ScoreConfig, "recipe:quickstart", "settings of `mlc-ray train`; those of `mlc-ray score` are .*judge"),
        (SearchConfig, "recipe:quickstart", "settings of `mlc-ray train`"),
    ],
)
def test_a_file_of_another_command_is_told_in_a_line(schema: type[Section], file: str, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config file '{file}' has {named}[^\n]*$"):
        load_config(schema, file)


def test_a_field_that_no_command_has_is_a_mistake_in_this_one(tmp_path: Path) -> None:
    file = tmp_path / "score.yaml"
    file.write_text("model: m\nbenchmarks: [{path: sample:test}]\nobjektive: dpo\n")
    with pytest.raises(ConfigError, match="objektive='dpo': no such field"):
        load_config(ScoreConfig, file)


def test_config_is_frozen_and_not_rewritten() -> None:
    config = parse_config(TrainConfig, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    assert parse_config(TrainConfig, config.model_dump(mode="json", exclude_unset=True)) == config


def test_components_are_set_by_overrides_and_survive_the_round_trip() -> None:
    overrides = ["objective.loss=simpo", "objective.margin=1", "terms.keep.name=anchor", "terms.keep.weight=0.25"]
    raw = minimal()
    for override in overrides:
        apply_override(raw, override)
    config = parse_config(TrainConfig, raw)
    assert (config.objective.loss, config.objective.margin, config.objective.beta) == ("simpo", 1.0, 0.1)  # type: ignore[attr-defined]
    assert (config.terms["keep"].name, config.terms["keep"].weight) == ("anchor", 0.25)
    for exclude_unset in (True, False):
        dumped = config.model_dump(mode="json", exclude_unset=exclude_unset)
        assert parse_config(TrainConfig, parse_yaml(dump_yaml(dumped), "run.yaml")) == config


def test_settings_are_read_as_they_were_written() -> None:
    """Of names of eight hexadecimal digits, as trials have, 1.4 % look like numbers with an exponent."""
    texts = [
        "1e5",
        "201759e0",
        "-1.5E+3",
        "on",
        "No",
        "0x1f",
        "0o17",
        "1_000",
        "12:30:45",
        "null",
        "~",
        "",
        "2024-07-26",
    ]
    texts += [
        ".inf",
        "=",
        "<<",
        "1.0",
        "- a",
        "a: b",
        "# a",
        "two\nlines",
        " a ",
        "'",
        "ß\u2028\U0001f600",
        "@a",
        "{a}",
    ]
    numbers = [1e-06, 1e5, 1e300, 0.1, -2.5e-12, 3, -1, True, None]
    raw = {"texts": texts, "numbers": numbers, "nested": {text: [{text: text}] for text in texts}}
    read = parse_yaml(dump_yaml(raw), "run.yaml")
    assert read == raw and list(read["nested"]) == texts
    assert [type(each) for each in read["numbers"]] == [type(each) for each in numbers]


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"objective": LossSettings(loss="nonsense")}, ["loss='nonsense'", "no loss is called 'nonsense'"]),
        (
            {"objective": LossSettings(loss="simpo")},
            ["loss='simpo'", "losses.simpo.Simpo.Settings, not", ".LossSettings"],
        ),
        ({"terms": {"anchor": TermSettings(name="anchor")}}, ["terms.anchor", "name='anchor'", ".TermSettings"]),
    ],
)
def test_settings_made_in_python_are_those_of_their_component(changes: dict[str, Any], quoted: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, minimal(**changes))
    for part in quoted:
        assert part in str(caught.value)
    simpo = resolve("loss", "simpo").Settings(loss="simpo", margin=1.0)
    assert parse_config(TrainConfig, {**MINIMAL, "objective": simpo}).objective is simpo


# ------------------------------------------------------------------------------------------------ overrides


def test_overrides() -> None:
    config = load_config(
        TrainConfig,
        CONFIGS / "quickstart.yaml",
        [
            "mlc.layer=20",
            "optimizer.learning_rate=3e-5",  # a string in YAML 1.1
            "data.languages=[en, ur]",
            "data.train.0.path=other.jsonl",
            "data.train.0.kind=benign",
            "model.lora.rank=4",
            "train.max_steps=null",
            "mlc.layer=0.5",  # the later one wins
        ],
    )
    assert config.mlc.layer == 0.5
    assert config.optimizer.learning_rate == 3e-5
    assert config.data.languages == ["en", "ur"]
    assert (config.data.train[0].path, config.data.train[0].kind) == ("other.jsonl", "benign")
    assert config.model.lora is not None
    assert config.model.lora.rank == 4
    assert config.train.max_steps is None


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("mlc.layer", "is not of the form"),
        ("=3", "is not of the form"),
        ("mlc..layer=3", "is not of the form"),
        ("mlc.layer=[", "not valid YAML"),
        ("data.train.1.path=x", "list of 1"),
        ("data.train.first.path=x", "'first' is not an index"),
        ("name.first=x", "not a section"),
        ("name=no/slash", "name='no/slash'"),
        ("data.train.0.pth=x", "'path'"),
    ],
)
def test_bad_overrides(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        load_config(TrainConfig, CONFIGS / "quickstart.yaml", [override])


def test_override_of_a_list_entry_itself() -> None:
    raw: dict[str, Any] = {"languages": ["en", "fr"]}
    apply_override(raw, "languages.1=ur")
    assert raw == {"languages": ["en", "ur"]}


def test_a_config_can_be_made_of_overrides_alone() -> None:
    config = load_config(ScoreConfig, None, ["model=m", "benchmarks=[{path: sample:test}]"])
    assert config.benchmarks[0].path == "sample:test"


# ---------------------------------------------------------------------------------------------- JSON schema


@pytest.mark.parametrize("schema", [TrainConfig, ScoreConfig])
def test_json_schema_describes_every_field(schema: type[TrainConfig] | type[ScoreConfig]) -> None:
    written = json.loads(json.dumps(config_schema(schema)))
    sections = [written, *written["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            nested = "$ref" in json.dumps({k: v for k, v in field.items() if k != "items"})
            assert nested or field.get("description"), f"{section['title']}.{name} has no description"


def test_json_schema_has_the_pattern_of_language_tags() -> None:
    """Of values and of keys: editors check them."""
    schema = config_schema(TranslateConfig)
    pattern = schema["properties"]["languages"]["items"]["pattern"]
    assert list(schema["$defs"]["OnPolicySection"]["properties"]["refusals"]["patternProperties"]) == [pattern]
    found = [bool(re.search(pattern, tag)) for tag in ("pt-BR", "zh-Hant", "zh-cn", "chinese")]
    assert found == [True, True, False, False]


def test_json_schema_has_the_settings_of_every_component() -> None:
    fields = config_schema(TrainConfig)["properties"]
    losses = {option["properties"]["loss"]["const"]: option for option in fields["objective"]["oneOf"]}
    assert losses.keys() == {"dco", "dpo", "ipo", "kto", "mpo", "orpo", "sdrrl", "sft", "simpo"}
    assert losses["simpo"]["properties"].keys() == {"loss", "answers", "response_share", "beta", "margin", "sft_weight"}
    terms = {option["properties"]["name"]["const"] for option in fields["terms"]["additionalProperties"]["anyOf"]}
    assert terms >= {"anchor", "contrast", "variance"}
    assert [option["properties"]["name"]["const"] for option in fields["mlc"]["oneOf"]] == ["cosine", "mlc"]
    for option in (*losses.values(), *fields["mlc"]["oneOf"], *fields["terms"]["additionalProperties"]["anyOf"]):
        assert all(field.get("description") for field in option["properties"].values())


@pytest.mark.parametrize(("text", "number"), [("1e-6", 1e-6), ("-2E+3", -2e3), ("1.5e8", 1.5e8), ("1.e-2", 1e-2)])
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, text: str, number: float) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"name: 1e-6b\nlisted: [{text}, '{text}', 12, 0x1e]\n", encoding="utf-8")
    assert read_config_file(file) == {"name": "1e-6b", "listed": [number, text, 12, 30]}
    raw: dict[str, Any] = {}
    apply_override(raw, f"optimizer.learning_rate={text}")
    assert raw == {"optimizer": {"learning_rate": number}}


def test_defaults_survive_the_round_trip_through_yaml() -> None:
    config = parse_config(TrainConfig, MINIMAL)
    dumped = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True))
    assert parse_config(TrainConfig, yaml.safe_load(dumped)) == config


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("name: a\nmlc: {weight: 1}\nmlc: {layer: 3}\n")
    with pytest.raises(ConfigError, match=r"(?s)'mlc' is given twice.*line 3"):
        read_config_file(tmp_path / "twice.yaml")


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, minimal(logging={"mlflow": "https://me:pw@host/x"}))
    assert "pw" not in str(caught.value) and "me:" not in str(caught.value)
