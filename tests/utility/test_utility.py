"""Utility through lm-evaluation-harness: its command line, its results, and what real engines of a pool tell it."""

from __future__ import annotations

import importlib.util
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file

from mlc_ray.cli import build_parser
from mlc_ray.cli.arguments import utility_config
from mlc_ray.config import ConfigError, UtilityConfig, parse_config
from mlc_ray.data.tokens import TemplateError
from mlc_ray.generate.engine import EngineError
from mlc_ray.runs import PROVENANCE_FILE, ModelPathError
from mlc_ray.storage import fingerprint_model
from mlc_ray.utility import run as utility
from mlc_ray.utility.file import Utility, UtilityError, UtilityFileError, load_utility, save_utility
from mlc_ray.utility.run import harness_command, measure_utility, open_pool, rows_of
from mlc_ray.utility.stage import SAID
from tests.report.runs import response, write_score
from tests.score.local_pool import LocalPool

TASKS = Path(__file__).parent / "tasks"
HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")

# The layout of the harness's results file, version 0.4.13.
RESULTS: dict[str, Any] = {
    "results": {
        "mmlu": {"name": "mmlu", "alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "mmlu_stem": {"alias": " - stem", "acc,none": 0.25, "acc_stderr,none": "N/A"},
        "gsm": {"alias": "gsm", "exact_match,strict": 0.125, "exact_match_stderr,strict": 0.02, "exact_match,flex": 1},
    },
    "group_subtasks": {"mmlu": ["mmlu_stem"], "mmlu_stem": ["algebra", "biology"]},
    "n-samples": {
        "algebra": {"original": 100, "effective": 8},
        "biology": {"original": 90, "effective": 7},
        "gsm": {"original": 10, "effective": 10},
    },
    "versions": {"gsm": 3.0},
    "n-shot": {"gsm": 5},
    "higher_is_better": {"mmlu": {"acc": True}, "gsm": {"exact_match": True}},
}


def config(**settings: Any) -> UtilityConfig:
    return parse_config(UtilityConfig, {"model": "owner/name", "tasks": ["mmlu"], **settings})


def test_rows_of_a_results_file():
    rows = {(row.task, row.metric, row.filter): row for row in rows_of(RESULTS, config(limit=8))}
    assert list(rows) == [
        ("mmlu", "acc", "none"),
        ("mmlu_stem", "acc", "none"),
        ("gsm", "exact_match", "strict"),
        ("gsm", "exact_match", "flex"),
    ]
    whole = rows["mmlu", "acc", "none"]
    assert (whole.value, whole.stderr, whole.n, whole.version, whole.limit) == (0.5, 0.1, 15, None, 8)
    assert rows["mmlu_stem", "acc", "none"].stderr is None
    strict = rows["gsm", "exact_match", "strict"]
    assert (strict.n, strict.version, strict.num_fewshot, strict.higher_is_better) == (10, "3.0", 5, True)
    assert rows["gsm", "exact_match", "flex"].value == 1.0


def test_results_without_numbers_are_refused():
    with pytest.raises(UtilityError, match="no result for tasks="):
        rows_of({"results": {"mmlu": {"alias": "mmlu"}}}, config())
    with pytest.raises(UtilityError, match="'high' for 'mmlu', which is not a number"):
        rows_of({"results": {"mmlu": {"acc,none": "high"}}}, config())


def test_the_command_line_for_transformers():
    settings = {"backend": "hf", "tasks": ["mmlu", "mmmlu_sw_ke"], "limit": 5, "chat_template": True, "num_fewshot": 0}
    command = harness_command(config(**settings), "/model, with a comma", "cpu")
    assert command[1:6] == ["-m", "lm_eval", "run", "--model", "hf"]
    arguments = json.loads(command[command.index("--model_args") + 1])
    assert (arguments["pretrained"], arguments["max_length"]) == ("/model, with a comma", 4096)
    assert command[command.index("--tasks") + 1] == "mmlu,mmmlu_sw_ke"
    assert command[command.index("--limit") + 1] == "5"
    assert command[command.index("--device") + 1] == "cpu"
    assert command[command.index("--num_fewshot") + 1] == "0"
    assert "--apply_chat_template" in command


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match=r"address='local': not read with backend='hf'"):
        config(backend="hf", address="local")
    with pytest.raises(UtilityError, match="backend='hf' has no pool"):
        utility.open_pool(config(backend="hf"))
    pool = LocalPool(utility._part(config(engine={"dtype": "float32"}), "m", "cpu", None), work=lambda rows: rows)
    with pytest.raises(UtilityError, match="backend='hf' asks no pool of engines; set backend=vllm"):
        measure_utility(config(backend="hf"), pool)
    with pytest.raises(ConfigError, match="tasks"):
        config(tasks=[])
    with pytest.raises(UtilityError, match=r"holds no task file \(\*\.yaml\)"):
        harness_command(config(backend="hf", include_path=str(tmp_path)), "m", "cpu")


@pytest.mark.parametrize(
    "engine",
    [
        {"tensor_parallel": 2}, {"gpu_memory_utilization": 0.5}, {"enforce_eager": True}, {"cpu_kv_cache_gib": 4},
        {"replicas": 2}, {"hang_seconds": 9.0},
    ],
)  # fmt: skip
def test_engine_settings_that_transformers_do_not_read_are_refused(engine: dict[str, Any]) -> None:
    (name,) = engine
    with pytest.raises(ConfigError, match=rf"engine\.{name}=.*not read with backend='hf'.*set backend=vllm"):
        config(backend="hf", engine=engine)
    assert config(engine=engine).backend == "vllm"
    read = {"dtype": "float32", "max_model_len": 512, "trust_remote_code": True, "cpus_per_replica": 2}
    assert config(backend="hf", engine=read).engine.max_model_len == 512


@pytest.mark.parametrize(
    ("engine", "tokens"), [({}, 4096), ({"dtype": "float32"}, 4096), ({"max_model_len": 512}, 512)]
)
def test_an_engine_that_is_set_in_part_keeps_its_length(engine: dict[str, Any], tokens: int) -> None:
    config = parse_config(UtilityConfig, {"model": "m", "tasks": ["mmlu"], "engine": engine})
    assert config.engine.max_model_len == tokens


def test_transformers_run_where_torch_finds_a_device(monkeypatch) -> None:
    import torch

    assert utility._device(config(backend="hf")) == ("gpu" if torch.cuda.is_available() else "cpu")
    for found, device in ((True, "gpu"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert utility._device(config(backend="hf")) == device
    assert utility._device(config(backend="hf", accelerator="cpu")) == "cpu"
    with pytest.raises(UtilityError, match="accelerator='gpu', but torch finds no CUDA device"):
        utility._device(config(backend="hf", accelerator="gpu"))


def test_a_value_that_is_not_finite_is_kept_as_none(tmp_path: Path) -> None:
    rows = rows_of({"results": {"wiki": {"perplexity,none": float("inf"), "perplexity_stderr,none": 1.0}}}, config())
    saved = Utility("m", "m", "0123", rows, {"lm_eval": "0.4.13"}, "2026-01-01", tmp_path)
    save_utility(saved)
    assert load_utility(tmp_path) == saved


def test_options_of_the_command_win_over_set():
    words = "utility runs/mine --tasks mmlu,mmmlu_sw_ke --scores s --limit 5 --set backend=hf --set limit=9"
    found = utility_config(build_parser().parse_args(words.split()))
    assert (found.model, found.tasks, found.scores) == ("runs/mine", ["mmlu", "mmmlu_sw_ke"], "s")
    assert (found.limit, found.backend) == (5, "hf")
    with pytest.raises(ConfigError, match="tasks: required"):
        utility_config(build_parser().parse_args(["utility", "runs/mine"]))


def test_without_the_harness_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(utility.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UtilityError, match=r"pip install 'lm-eval"):
        measure_utility(config())


@needs_harness
def test_models_and_score_folders_are_checked_before_anything_starts(tmp_path, smollm2):
    with pytest.raises(ModelPathError, match="does not exist"):
        measure_utility(config(model=str(tmp_path / "none")))
    settings = {"model": str(smollm2), "output_dir": str(tmp_path)}
    with pytest.raises(EngineError, match=r"max_model_len=9999 is more than the 8192 positions"):
        measure_utility(config(**settings, engine={"max_model_len": 9999}))
    with pytest.raises(UtilityError, match="is not a score folder"):
        measure_utility(config(**settings, scores=str(tmp_path)))
    other = write_score(tmp_path / "other", [response(0, "harmful", "en")], fingerprint="0000")
    with pytest.raises(UtilityError, match="is the score of another model: its fingerprint is '0000'"):
        measure_utility(config(**settings, scores=str(other)))
    with pytest.raises(UtilityError, match=r"tasks has 'no_such_task', .*include_path adds your own"):
        measure_utility(config(**settings, tasks=["no_such_task"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "not valid JSON"), ("{}", "has format None"), ('{"format": 1}', "damaged")],
)
def test_utility_files_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "utility.json").write_text(content)
    with pytest.raises(UtilityFileError, match=message):
        load_utility(tmp_path)


@pytest.fixture
def settings(tmp_path: Path, smollm2: Path) -> dict[str, Any]:
    """A small task of one's own, and a small engine for it."""
    tasks = tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    task = tasks / "small_facts.yaml"
    task.write_text(task.read_text().replace("small_facts.jsonl", str(tasks / "small_facts.jsonl")))
    engine = {"max_model_len": 512, "cpu_kv_cache_gib": 1, "dtype": "float32", "cpus_per_replica": 0.5}
    return {
        "model": str(smollm2), "tasks": ["small_facts"], "include_path": str(tasks), "engine": engine,
        "output_dir": str(tmp_path / "utility"),
    }  # fmt: skip


@needs_harness
def test_a_measurement_is_logged_behind_the_last_and_leaves_random_numbers_alone(
    tmp_path: Path, settings: dict[str, Any], smollm2: Path
) -> None:
    def said(rows: pa.Table) -> pa.Table:
        drawn.append(random.random())
        return pa.Table.from_pylist([{"log_prob": -1.0, "greedy": False}] * len(rows), schema=SAID)

    drawn: list[float] = []
    asked = config(**settings, scores=str(write_score(
        tmp_path / "scores", [response(0, "harmful", "en")], fingerprint=fingerprint_model(str(smollm2))
    )))  # fmt: skip
    pool = LocalPool(utility._part(asked, str(smollm2), "cpu", None), work=said, asks="ids")
    random.seed(5)
    before, level = random.getstate(), logging.getLogger("lm_eval").level
    for _ in range(2):
        assert measure_utility(asked, pool).row("small_facts").n == 8
    assert random.getstate() == before and logging.getLogger("lm_eval").level == level
    assert len(set(drawn)) == 1  # a task draws the same each time
    assert (tmp_path / "scores" / "utility.log").read_text().count("Setting random seed to") == 2


DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if not enable_thinking %}<no thoughts>{% endif %}"
)


@pytest.fixture
def dated_model(smollm2: Path, tmp_path: Path) -> Path:
    """A model whose chat template writes today's date, and has a switch for thoughts."""
    from mlc_ray.data.tokens import load_tokenizer

    folder = Path(shutil.copytree(smollm2, tmp_path / "dated"))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return folder


@needs_harness
def test_questions_stand_in_the_conversation_of_training_and_on_its_date(
    tmp_path: Path, settings: dict[str, Any], dated_model: Path
) -> None:
    def said(rows: pa.Table) -> pa.Table:
        texts.extend(tokenizer.decode(ids) for ids in rows["ids"].to_pylist())
        return pa.Table.from_pylist([{"log_prob": -1.0, "greedy": False}] * len(rows), schema=SAID)

    from mlc_ray.data.tokens import load_tokenizer

    texts: list[str] = []
    tokenizer = load_tokenizer(str(dated_model))
    trained = {"system": "Be brief.", "arguments": {"enable_thinking": True}, "date": "2025-03-04"}
    (dated_model / PROVENANCE_FILE).write_text(json.dumps({"chat": trained}))
    for chat, date, system, thinks in (
        ({}, "04 Mar 2025", "Be brief.", True),
        ({"chat": {"date": "2024-01-02"}}, "02 Jan 2024", None, False),
    ):
        own = {**settings, "model": str(dated_model), "chat_template": True, **chat}
        asked = config(**own, scores=None)
        pool = LocalPool(utility._part(asked, str(dated_model), "cpu", None), work=said, asks="ids")
        row = measure_utility(asked, pool).row("small_facts")
        assert row.chat is not None and row.chat["system"] == system
        assert all(text.startswith(date) for text in texts)
        assert all(
            ("<system>Be brief." in text, "<no thoughts>" not in text) == (bool(system), thinks) for text in texts
        )
        texts.clear()
    with pytest.raises(UtilityError, match=r"its chat template writes today's date.*set backend=vllm"):
        utility.with_chat(config(model=str(dated_model), backend="hf", chat_template=True), str(dated_model))
    with pytest.raises(ConfigError, match="chat: not read with chat_template=false"):
        config(chat={"system": "Be brief."})
    command = harness_command(
        config(backend="hf", chat_template=True, chat={"system": "Be brief.", "arguments": {"a": 1}}), "m", "cpu"
    )
    assert command[command.index("--system_instruction") + 1] == "Be brief."
    assert json.loads(command[command.index("--model_args") + 1])["chat_template_args"] == {"a": 1}


@needs_harness
@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_a_conversation_that_the_template_does_not_use_is_refused_before_a_folder_is_made(
    backend: str, tmp_path: Path, smollm2: Path
) -> None:
    from mlc_ray.data.tokens import load_tokenizer

    model = Path(shutil.copytree(smollm2, tmp_path / "users_alone"))
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}{% endfor %}<model>"
    tokenizer.save_pretrained(model)
    given = {"model": str(model), "backend": backend, "chat_template": True, "output_dir": str(tmp_path / "utility")}
    with pytest.raises(TemplateError, match=r"chat\.system='Be brief\.': the chat template leaves it out"):
        measure_utility(config(**given, chat={"system": "Be brief."}))
    with pytest.raises(TemplateError, match=r"chat\.arguments has 'thoughts', which the chat template of .* not read"):
        measure_utility(config(**given, chat={"arguments": {"thoughts": True}}))
    assert not (tmp_path / "utility").exists()


@needs_harness
def test_a_measurement_that_ended_early_asks_for_the_rest_alone(
    tmp_path: Path, settings: dict[str, Any], smollm2: Path
) -> None:
    def said(rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([{"log_prob": -1.0, "greedy": False}] * len(rows), schema=SAID)

    def dying(rows: pa.Table) -> pa.Table:
        if len(first.asked) > 8:
            raise EngineError("the node is gone")
        return said(rows)

    scores = write_score(
        tmp_path / "scores", [response(0, "harmful", "en")], fingerprint=fingerprint_model(str(smollm2))
    )
    engine = {**settings["engine"], "block_rows": 4}
    asked = config(**{**settings, "engine": engine}, scores=str(scores))
    part = utility._part(asked, str(smollm2), "cpu", None)
    first, second, third = (LocalPool(part, work=work, asks="ids") for work in (dying, said, said))
    with pytest.raises(EngineError, match="the node is gone"):
        measure_utility(asked, first)
    assert (scores / "kept").is_dir()
    measured = measure_utility(asked, second)
    assert not (scores / "kept").exists()
    assert measure_utility(asked, third).row("small_facts") == measured.row("small_facts")
    assert len(first.asked) == 12 and len(second.asked) == len(third.asked) - 8


@needs_harness
def test_answers_are_kept_by_the_number_type_that_was_computed_in_and_where_they_are_found_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any], smollm2: Path
) -> None:
    def dying(rows: pa.Table) -> pa.Table:
        if len(pool.asked) > 8 and len(first) < 3:
            raise EngineError("the node is gone")
        return pa.Table.from_pylist([{"log_prob": -1.0, "greedy": False}] * len(rows), schema=SAID)

    scores = write_score(
        tmp_path / "scores", [response(0, "harmful", "en")], fingerprint=fingerprint_model(str(smollm2))
    )
    engine, first = {**settings["engine"], "block_rows": 4}, list[list[str]]()

    def told(dtype: str, **given: str) -> UtilityConfig:
        return config(**{**settings, "engine": {**engine, "dtype": dtype}}, **given)

    for asked, native in (
        (told("auto", scores=str(scores)), "float32"),
        (told("auto", scores=str(scores)), "bfloat16"),
        (told("float32"), "float32"),
    ):
        monkeypatch.setattr("mlc_ray.cluster.native_dtype", lambda native=native, **_: native)  # of the cluster
        pool = LocalPool(utility._part(asked, str(smollm2), "cpu", None), work=dying, asks="ids")
        with pytest.raises(EngineError, match="the node is gone"):
            measure_utility(asked, pool)
        first.append(pool.asked)
    assert first[0] == first[1] == first[2] and len(first[0]) == 12  # none found what another one kept
    [own] = (tmp_path / "utility").iterdir()
    assert not (own / "kept").exists()  # nobody finds that folder again
    asked = told("float32", scores=str(scores))
    pool = LocalPool(utility._part(asked, str(smollm2), "cpu", None), work=dying, asks="ids")
    measure_utility(asked, pool)
    assert len(pool.asked) == 24 - 8


@needs_harness
def test_an_answer_that_leaves_no_room_for_a_question_is_refused(smollm2: Path) -> None:
    from lm_eval.api.instance import Instance

    from mlc_ray.utility.model import PooledLM

    part = utility._part(config(engine={"dtype": "float32"}), str(smollm2), "cpu", None)
    lm = PooledLM(LocalPool(part, work=lambda rows: rows), str(smollm2), max_length=512)
    for tokens in (512, 900):
        with pytest.raises(UtilityError, match=rf"answers of {tokens} tokens, .*engine\.max_model_len=512; set it"):
            lm.generate_until([Instance("generate_until", {}, ("Why?", {"max_gen_toks": tokens}), 0)])


@needs_harness
@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_pool_of_engines_serves_the_harness_and_says_what_its_own_class_does(
    tmp_path: Path, settings: dict[str, Any], smollm2: Path
) -> None:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from mlc_ray.utility.model import PooledLM

    def asked(kind: Any, *arguments: Any) -> list[Instance]:
        return [Instance(kind, {}, each, 0) for each in arguments]

    facts = [json.loads(line) for line in (TASKS / "small_facts.jsonl").read_text().splitlines()]
    front = "".join(f"Question: {fact['question']}\nAnswer: {fact['choices'][fact['answer']]}\n\n" for fact in facts)
    pairs = [
        (f"{front}Question: {fact['question']}\nAnswer:", f" {each}") for fact in facts for each in fact["choices"]
    ]
    pairs += [("", "The sky is blue."), ("One, two, ", "three"), (front * 9, " water"), ("One, two,", " three, four")]
    until = {"until": ["\n"], "max_gen_toks": 12}
    texts = [(f"{front}Question: {fact['question']}\nAnswer:", until) for fact in facts[:3]]
    scores = write_score(
        tmp_path / "scores", [response(0, "harmful", "en")], fingerprint=fingerprint_model(str(smollm2))
    )

    with open_pool(config(**settings)) as pool:
        ours = PooledLM(pool, str(smollm2), max_length=512)
        # It takes a token more than its length, and vLLM one less: the long question loses as much of its front.
        theirs = HFLM(str(smollm2), dtype="float32", batch_size=8, device="cpu", max_length=510)
        for mine, its in zip(
            ours.loglikelihood(asked("loglikelihood", *pairs)),
            theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True),
            strict=True,
        ):
            assert mine[0] == pytest.approx(its[0], abs=1e-3) and mine[1] == its[1]
        rolling = asked("loglikelihood_rolling", (front,), ("A short text.",))
        assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-2)
        drawn = ours.generate_until(asked("generate_until", *texts))
        assert drawn == theirs.generate_until(asked("generate_until", *texts), disable_tqdm=True)
        assert all(drawn) and not any("\n" in text for text in drawn)
        with pytest.raises(UtilityError, match=r"takes 600 tokens, more than engine\.max_model_len=512"):
            ours._loglikelihood_tokens([(("", ""), [1], [2] * 600)])
        with pytest.raises(EngineError, match=r"cannot sample as the task says: .*nonsense"):
            ours.generate_until(asked("generate_until", ("a", {"nonsense": 1})))

        measured = measure_utility(config(**settings, scores=str(scores)), pool)
        row = measured.row("small_facts")
        assert row.n == 8 and row.stderr is not None and row.value is not None
        assert 0.5 <= row.value <= 1.0  # three choices each: guessing gives a third
        assert load_utility(scores) == measured and measured.versions["lm_eval"]
        # The same engine serves another model.
        other = tmp_path / "other"
        shutil.copytree(smollm2, other)
        weights = load_file(other / "model.safetensors")
        save_file(
            {name: torch.roll(each, 1, 0) for name, each in weights.items()},
            other / "model.safetensors",
            {"format": "pt"},
        )
        broken = measure_utility(config(**{**settings, "model": str(other)}), pool).row("small_facts")
        assert pool.weights == str(other) and broken.value is not None and broken.value < row.value
        with pytest.raises(UtilityError, match="other settings of engine"):
            measure_utility(config(**{**settings, "engine": {"max_model_len": 256}}), pool)
