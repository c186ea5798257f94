"""What a score folder that is there already means for a new score; nothing is answered here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlc_ray.config import CalibrationConfig, ConfigError, LogSection, ScoreConfig, ScoringSection, parse_config
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import ANSWERS, PROMPTS, Generator
from mlc_ray.judges.base import JudgeError, make_judge
from mlc_ray.judges.guards.base import GuardSettings
from mlc_ray.lease import LeaseError, lease
from mlc_ray.score.calibrate import calibrate
from mlc_ray.score.calibration import CalibrationError
from mlc_ray.score.plan import with_dtypes, with_judge_models
from mlc_ray.score.prompts import Prompts
from mlc_ray.score.request import Request, ScoreError, load_request
from mlc_ray.score.results import ScoreResult, load_in_language
from mlc_ray.score.run import TooManyUnparsedError, judge_again, score
from mlc_ray.score.stages import RESPONSES
from mlc_ray.storage import IncompleteArtifactError, Place, fingerprint
from tests.checkpoints import complete
from tests.generate.chat_server import Step, serving
from tests.score.local_pool import LocalPool
from tests.score.test_pipeline import config_for, translate_then_judge, write_bundles

ROW = {
    "benchmark": "own", "bundle_id": "a", "kind": "benign", "category": "", "language": "en", "prompt": "Why?",
    "response": "So.", "finish": "stop", "prompt_tokens": 9, "response_tokens": 2,
}  # fmt: skip


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster is joined, and its nodes are not asked: they compute in float32, and hold the engines."""
    monkeypatch.setattr("mlc_ray.cluster.native_dtype", lambda *, gpu, labels: "float32")
    monkeypatch.setattr("mlc_ray.score.run._connect", lambda config: "cpu")
    monkeypatch.setattr("mlc_ray.score.run._check_engines", lambda *_: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Enough of a model for what is checked before one is loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 512}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def unfinished(config: ScoreConfig, *, answered: bool) -> Path:
    """A score that ended before its answers were judged, or before there were any."""
    folder = Path(config.output_dir) / str(config.name)
    folder.mkdir(parents=True)
    Request(config, config.model, "0123456789abcdef", "prompts", ["en"]).save(folder)
    if answered:
        pq.write_table(pa.Table.from_pylist([ROW], schema=RESPONSES), folder / "responses.parquet")
    return folder


@pytest.mark.parametrize("answered", [True, False])
def test_an_unfinished_score_is_not_written_over(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    def no_cluster(*_: Any) -> None:
        raise AssertionError("a cluster was asked")

    monkeypatch.setattr("mlc_ray.score.run.connect", no_cluster)
    config = config_for(model, write_bundles(tmp_path / "own.jsonl"), tmp_path / "scores")
    folder = unfinished(config, answered=answered)
    before = (folder / "request.json").read_bytes()
    with pytest.raises(ScoreError, match=f"unfinished score.*mlc-ray score --resume {folder}` or by resume=auto"):
        score(config)
    assert (folder / "request.json").read_bytes() == before
    finished = unfinished(config.model_copy(update={"name": "other"}), answered=True)
    with pytest.raises(ScoreError, match="unfinished score"):
        judge_again(finished, out=folder)


def test_what_goes_on_has_a_name() -> None:
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "resume": "auto"}
    with pytest.raises(ConfigError, match="resume='auto' needs a name"):
        parse_config(ScoreConfig, raw)
    assert parse_config(ScoreConfig, {**raw, "name": "s"}).resume == "auto"


@pytest.mark.parametrize("asking", [{"temperature": 0.5}, {"reasoning": "judge"}])
def test_answers_that_were_asked_otherwise_are_not_gone_on_with(asking: dict[str, Any]) -> None:
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}]}
    requests = [
        Request(parse_config(ScoreConfig, {**raw, **own}), "m", "0123456789abcdef", "prompts", ["en"])
        for own in ({}, {"asking": asking}, {"asking": {}})
    ]
    assert requests[0].asks_as(requests[2]) and not requests[0].asks_as(requests[1])
    kept = [fingerprint(request.decoding) for request in requests]  # of answers that an interrupted score goes on from
    assert kept[0] == kept[2] != kept[1]


def with_engines(**dtypes: str) -> ScoreConfig:
    """A guard and a translator, each with an engine; `dtypes` of the policy's, the judge's and the translator's."""
    engines = {name: {"dtype": dtypes[name]} if name in dtypes else {} for name in ("policy", "judge", "translator")}
    judge = {
        "name": "llama-guard", "model": "g", "engine": engines["judge"],
        "translate": {"model": "t", "engine": engines["translator"]},
    }  # fmt: skip
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "judge": judge, "engine": engines["policy"]}
    return parse_config(ScoreConfig, raw)


def dtypes_of(scoring: ScoringSection) -> list[str]:
    assert isinstance(scoring.judge, GuardSettings) and scoring.judge.translate is not None
    return [engine.dtype for engine in (scoring.engine, scoring.judge.engine, scoring.judge.translate.engine)]


def test_a_judge_of_the_hub_is_named_with_its_commit_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, digit in {"g": "a", "t": "b"}.items():  # of which the cache has one commit; the hub cannot be asked here
        folder = tmp_path / f"models--{name}" / "snapshots" / (digit * 40)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = with_judge_models(with_engines())
    assert isinstance(config.judge, GuardSettings) and config.judge.translate is not None
    assert (config.judge.model, config.judge.translate.model) == ("g#" + "a" * 40, "t#" + "b" * 40)
    began = config.judge.model_copy(update={"model": "g#" + "c" * 40})
    again = with_judge_models(with_engines(), began)
    assert again.judge == began  # what is newest now does not count
    named = with_engines().judge.model_copy(update={"model": "g#" + "d" * 40})
    other = with_judge_models(with_engines().model_copy(update={"judge": named}), began)
    assert isinstance(other.judge, GuardSettings) and other.judge.model == "g#" + "d" * 40


def test_a_panels_judges_of_the_hub_keep_their_commits() -> None:
    def panel(model: str) -> ScoreConfig:
        judges = [{"judge": "refusal"}, {"judge": {"name": "llama-guard", "model": model}}]
        raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "judge": {"name": "panel", "judges": judges}}
        return parse_config(ScoreConfig, raw)

    began = panel("owner/guard#" + "c" * 40).judge
    assert with_judge_models(panel("owner/guard"), began).judge == began


def test_two_processes_do_not_score_into_one_folder(small_llama: Path, tmp_path: Path) -> None:
    config = config_for(small_llama, write_bundles(tmp_path / "own.jsonl"), tmp_path)
    with lease(Place(tmp_path / "score"), wait=False), pytest.raises(LeaseError, match=f"process {os.getpid()} on"):
        score(config)
    assert not (tmp_path / "score").exists()


def test_every_engine_gets_the_dtype_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlc_ray.cluster.native_dtype", lambda *, gpu, labels: "bfloat16" if gpu else "float32")
    decided = with_dtypes(with_engines(judge="float16"), gpu=True)
    assert dtypes_of(decided) == ["bfloat16", "float16", "bfloat16"]
    # One that goes on, elsewhere, keeps what was decided; what is set now wins.
    again = with_dtypes(with_engines(policy="float32"), gpu=False, before=decided)
    assert dtypes_of(again) == ["float32", "float16", "bfloat16"]
    stored = parse_config(ScoreConfig, decided.model_dump(mode="json", exclude_unset=True))
    assert dtypes_of(stored) == dtypes_of(decided)


def test_engine_settings_of_the_other_device_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mlc_ray.cluster.native_dtype", lambda *, gpu, labels: "bfloat16")
    engine = {"cpu_kv_cache_gib": 4, "gpu_memory_utilization": 0.5}
    raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "engine": engine}
    with caplog.at_level("WARNING"):
        with_dtypes(parse_config(ScoreConfig, raw), gpu=True)
        with_dtypes(parse_config(ScoreConfig, raw), gpu=False)
    assert [record.getMessage() for record in caplog.records] == [
        "engine.cpu_kv_cache_gib=4 is not read where engines run on GPUs",
        "engine.gpu_memory_utilization=0.5 is not read where engines run on CPUs",
    ]


def test_a_score_goes_on_in_the_dtype_it_began_in(
    ray_local: object, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlc_ray.cluster.native_dtype", lambda *, gpu, labels: "bfloat16")
    monkeypatch.setattr("mlc_ray.score.run._connect", lambda config: "cpu")
    asked: list[ScoreConfig] = []

    def no_engines(request: Request, *_: Any) -> None:
        asked.append(request.config)
        raise ScoreError("far enough")

    monkeypatch.setattr("mlc_ray.score.run._check_engines", no_engines)
    config = config_for(model, write_bundles(tmp_path / "own.jsonl"), tmp_path / "scores", resume="auto")
    engine = config.engine.model_copy(update={"dtype": "float32"})
    unfinished(config.model_copy(update={"engine": engine}), answered=True)
    with pytest.raises(ScoreError, match="far enough"):
        score(config)
    assert asked[0].engine.dtype == "float32"


@pytest.fixture
def local(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScoreResult]:
    """A score in this process of a prompt in each of `languages`, without Ray; `judges` makes the judge's pool."""
    monkeypatch.setattr("mlc_ray.cluster.native_dtype", lambda *, gpu, labels: "float32")
    monkeypatch.setattr("mlc_ray.score.run._connect", lambda config: "cpu")
    monkeypatch.setattr("mlc_ray.score.run._check_engines", lambda *_: None)
    monkeypatch.setattr("mlc_ray.score.run._check_readers", lambda *_: None)
    monkeypatch.setattr("mlc_ray.score.passes.side_by_side", lambda parts, device, is_open: [[one] for one in parts])
    answer = {"response": "I cannot help with that.", "finish": "stop", "prompt_tokens": 9, "response_tokens": 6}

    def run(
        judges: Callable[[Part], LocalPool] = LocalPool,
        languages: Sequence[str] = ["en"] * 4,
        max_unparsed: float = 1.0,
        **changes: Any,
    ) -> ScoreResult:
        own = [
            {"bundle_id": f"b{number}", "language": code, "prompt": f"Why {number}?"}
            for number, code in enumerate(languages)
        ]
        rows = [{**{name: ROW.get(name, 0) for name in PROMPTS.names}, **row} for row in own]
        table = pa.Table.from_pylist(rows, schema=PROMPTS)
        monkeypatch.setattr("mlc_ray.score.run.read_prompts", lambda config, rejects: Prompts(table, str(len(rows))))
        monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", lambda part, device, **_: judges(part))
        told = {"tell_languages": False, "resume": "auto", "max_unparsed": max_unparsed, **changes}
        config = config_for(model, write_bundles(tmp_path / "own.jsonl"), tmp_path / "scores", **told)
        part = Part("answering", Generator, {}, config.engine)
        pool = LocalPool(part, work=lambda rows: pa.Table.from_pylist([answer] * len(rows), schema=ANSWERS))
        return score(config, pool=pool)

    return run


def test_responses_keep_the_engine_that_gave_them(
    local: Callable[..., ScoreResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(rows: pa.Table) -> pa.Table:
        raise JudgeError("the judge is away")

    monkeypatch.setattr("mlc_ray.score.run.Request", lambda **fields: Request(**fields, versions={"vllm": installed}))
    installed = "1.0"
    with pytest.raises(JudgeError, match="is away"):
        local(lambda part: LocalPool(part, work=away))
    installed = "2.0"
    with pytest.raises(ScoreError, match=r"responses by vllm 1\.0, and here is vllm 2\.0: judge those by `mlc-ray"):
        local()
    monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", lambda part, device, **_: LocalPool(part))
    assert judge_again(tmp_path / "scores" / "score").versions == {"vllm": "1.0"}


def logged(folder: Path) -> list[str]:
    """What the driver's log of a folder has, each line of that folder's."""
    lines = [json.loads(line) for line in (folder / "logs" / "driver.jsonl").read_text().splitlines()]
    assert {(line["run"], line["trial"], line["worker"], line["step"]) for line in lines} == {
        (folder.name, "", None, None)
    }
    return [line["message"] for line in lines]


def test_a_score_and_a_judging_keep_logs_where_they_are_asked_to(
    local: Callable[..., ScoreResult], tmp_path: Path
) -> None:
    def away(rows: pa.Table) -> pa.Table:
        raise JudgeError("the judge is away")

    with pytest.raises(JudgeError, match="is away"):
        local(lambda part: LocalPool(part, work=away), logging={"json_lines": True})
    folder = tmp_path / "scores" / "score"
    first = logged(folder)
    assert any(line.startswith("scoring ") for line in first) and first[-1] == "ended by JudgeError: the judge is away"
    local(logging={"json_lines": True})
    assert logged(folder)[: len(first)] == first and len(logged(folder)) > len(first)
    again = judge_again(folder, out=tmp_path / "again")  # as the score was asked to
    assert any(line.startswith("judging 4 responses") for line in logged(Path(again.folder)))
    judge_again(folder, out=tmp_path / "none", logging=LogSection())
    assert not (tmp_path / "none" / "logs").exists()


def test_a_fault_of_a_judges_engines_is_told_from_a_verdict_and_judged_again(
    local: Callable[..., ScoreResult],
) -> None:
    found = local(lambda part: LocalPool(part, fails=lambda row: row["bundle_id"] == "b2", asks="bundle_id"))
    assert (found.judge_faults, found.unparsed) == (1, 1)
    rows = pq.read_table(found.responses_file).to_pylist()
    assert [row["behaviour"] for row in rows] == ["refused", "refused", "unparsed", "refused"]
    assert [row["judge_fault"] is None for row in rows] == [True, True, False, True]
    assert "it died" in rows[2]["judge_fault"]
    again = local()
    assert (again.judge_faults, again.unparsed, again.finish) == (0, 0, {"stop": 4})
    pools: list[LocalPool] = []
    assert local(lambda part: pools.append(LocalPool(part)) or pools[0]) == again and not pools  # it is finished


def test_responses_that_an_endpoint_was_out_for_are_judged_again_and_unreadable_replies_are_not(
    local: Callable[..., ScoreResult], tmp_path: Path
) -> None:
    with serving(lambda messages, number: Step("Who knows?") if number == 0 else Step(status=503)) as server:
        own = {"base_url": server.base_url, "model": "m", "retries": 1, "concurrency": 1, "cache_dir": str(tmp_path)}
        judge = {"name": "endpoint", "endpoint": own}
        found = local(languages=["en", "sw"], judge=judge)
        rows = pq.read_table(found.responses_file).to_pylist()
        assert [row["behaviour"] for row in rows] == ["unparsed", "unparsed"]
        assert rows[0]["judge_fault"] is None and "answers 503" in rows[1]["judge_fault"]
        assert (found.judge_faults, len(server.bodies)) == (1, 3)
        server.answer = translate_then_judge
        again = local(languages=["en", "sw"], judge=judge)
        assert (again.judge_faults, again.unparsed, len(server.bodies)) == (0, 1, 4)


def test_a_language_without_any_verdict_ends_a_score_with_an_error(local: Callable[..., ScoreResult]) -> None:
    def judges(part: Part) -> LocalPool:
        return LocalPool(part, fails=lambda row: row["language"] == "sw", asks="language")

    with pytest.raises(
        TooManyUnparsedError, match=r"1 of 41 .* and none of benign prompts in sw of own \(refused\) did"
    ):
        local(judges, languages=[*40 * ["en"], "sw"], max_unparsed=0.05)
    assert TooManyUnparsedError.exit_status == 3
    assert local(judges, languages=[*40 * ["en"], "sw"], max_unparsed=1.0).unparsed == 1


def test_options_of_an_engine_are_few_and_part_of_what_answers(tmp_path: Path) -> None:
    def asked(**options: object) -> Request:
        raw = {"model": "m", "benchmarks": [{"path": "sample:test"}], "engine": {"options": options}}
        return Request(parse_config(ScoreConfig, raw), "m", "0123", "prompts", None)

    assert not asked(kv_cache_dtype="fp8").asks_as(asked())
    assert asked(kv_cache_dtype="fp8").asks_as(asked(kv_cache_dtype="fp8"))
    with pytest.raises(ConfigError, match=r"cannot hold 'load_format', but only attention_backend, .*quantization"):
        asked(load_format="pt")
    with pytest.raises(
        ConfigError, match=r"pipeline_parallel_size: an engine lies on one node.*; set engine.tensor_par"
    ):
        asked(pipeline_parallel_size=2)


def test_judges_in_two_dtypes_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlc_ray.judges.guards.base.resolve_model", str)
    monkeypatch.setattr("mlc_ray.judges.guards.base.fingerprint_model", lambda model: "0123")
    monkeypatch.setattr("mlc_ray.judges.guards.base.Guard.asked", [])
    half, whole = (make_judge(with_engines(judge=name).judge).identity for name in ("bfloat16", "float32"))
    assert half.replace("bfloat16", "float32") == whole != half
    other = make_judge(with_engines(judge="float32", translator="float32").judge).identity
    assert other != whole


def test_what_to_go_on_with_is_named_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise JudgeError("the judge is away")

    monkeypatch.setattr("mlc_ray.score.run._connect", lambda config: "cpu")
    monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", failing)
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    benchmark = write_bundles(tmp_path / "own.jsonl")
    source = unfinished(config_for(tmp_path / "model", benchmark, tmp_path / "scores"), answered=True)
    with pytest.raises(JudgeError, match="is away"):
        judge_again(source, out="vault://team/mine")
    assert "go on with `mlc-ray judge vault://team/mine`" in caplog.text
    assert (Place("vault://team/mine") / "responses.parquet").is_file()
    with pytest.raises(ScoreError, match=r"unfinished score.*vault://team/mine"):
        judge_again(source, out="vault://team/mine")


def test_a_score_can_be_judged_again_without_the_calibration_of_another_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_engines(*_: Any, **__: Any) -> None:
        raise JudgeError("far enough")

    monkeypatch.setattr("mlc_ray.score.run._connect", lambda config: "cpu")
    monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", no_engines)
    labelled = tmp_path / "en.jsonl"
    labelled.write_text('{"response": "I cannot help.", "label": "refused", "language": "en"}\n', encoding="utf-8")
    judge = {"name": "examples.my_judge:ShortAnswerJudge"}
    made = {"labelled": [str(labelled)], "out": str(tmp_path / "c.json"), "judge": judge}
    _, file = calibrate(parse_config(CalibrationConfig, made))
    benchmark = write_bundles(tmp_path / "own.jsonl")
    config = config_for(tmp_path / "model", benchmark, tmp_path / "scores", calibration=str(file))
    source = unfinished(config, answered=True)
    with pytest.raises(CalibrationError, match="or set calibration=null"):
        judge_again(source, out=tmp_path / "mine")
    with pytest.raises(JudgeError, match="far enough"):
        judge_again(source, out=tmp_path / "other", calibration=None)
    assert load_request(tmp_path / "other").config.calibration is None


def test_damaged_weights_are_refused_before_engines_load_them(
    ray_local: object, on_cpu: None, model: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "train" / "checkpoint_000002"
    shutil.copytree(model, checkpoint / "model")
    (checkpoint / "model" / "model.safetensors").write_bytes(b"weights")
    complete(checkpoint, 2)
    (checkpoint / "model" / "model.safetensors").write_bytes(b"weightr")
    config = config_for(tmp_path / "run", write_bundles(tmp_path / "own.jsonl"), tmp_path / "scores", resume="auto")
    pool = LocalPool(Part("answering", Generator, {}, config.engine), work=lambda rows: rows)
    with pytest.raises(IncompleteArtifactError, match=r"not used: .*'model/model\.safetensors' has checksum"):
        score(config, pool=pool)
    assert pool.asked == []


def test_prompts_that_engines_failed_on_are_asked_again_by_a_score_that_goes_on(
    ray_local: object, on_cpu: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"response": "I cannot help with that.", "finish": "stop", "prompt_tokens": 9, "response_tokens": 6}
    config = config_for(model, write_bundles(tmp_path / "own.jsonl"), tmp_path / "scores", resume="auto")
    part = Part("answering", Generator, {}, config.engine.model_copy(update={"block_rows": 4, "retries": 0}))
    bad: list[str] = []

    def fails(row: dict[str, Any]) -> bool:
        bad[:] = bad or [row["prompt"]]
        return bool(row["prompt"] == bad[0])

    def away(rows: pa.Table) -> pa.Table:
        raise JudgeError("the judge is away")

    def engines(**settings: Any) -> LocalPool:
        return LocalPool(part, work=lambda rows: pa.Table.from_pylist([answer] * len(rows), schema=ANSWERS), **settings)

    monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", lambda part, device, **_: LocalPool(part, work=away))
    with pytest.raises(JudgeError, match="is away"):
        score(config, pool=engines(fails=fails))
    folder = Path(config.output_dir) / str(config.name)
    assert pq.read_table(folder / "responses.parquet")["finish"].to_pylist().count("engine_fault") == 1
    shutil.rmtree(folder / "kept", ignore_errors=True)
    monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", lambda part, device, **_: LocalPool(part))
    again = engines()
    result = score(config, pool=again)
    assert again.asked == bad
    assert (result.responses, result.unparsed, result.finish) == (16, 0, {"stop": 16})
    told = pq.read_table(result.responses_file)["response_language"]
    assert told.to_pylist() == ["en"] * 16 and result.told_by.startswith("lingua ")

    # Judged again it has them as well, also where they were not told before.
    assert pq.read_table(judge_again(folder, out=tmp_path / "again").responses_file)["response_language"].equals(told)
    pq.write_table(pq.read_table(result.responses_file).drop("response_language"), str(result.responses_file))
    judged = judge_again(folder, out=tmp_path / "judged")
    untold = judge_again(folder, out=tmp_path / "untold", tell_languages=False)
    assert not untold.told_by and "response_language" not in pq.read_table(untold.responses_file).column_names
    assert pq.read_table(judged.responses_file)["response_language"].equals(told) and judged.told_by == result.told_by
    mean = load_in_language(judged).mean("own", "benign")
    assert mean is not None and mean.value == pytest.approx(100 / 3)  # of en, es and zh


def test_what_an_object_store_holds_while_a_score_is_judged_is_enough_to_go_on(
    ray_local: object, on_cpu: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver dies while judging: the store is as it was then, and nothing on its machine is left."""
    vault, then = tmp_path / "vault", tmp_path / "then"
    monkeypatch.setenv("VAULT", str(vault))

    def dying(rows: pa.Table) -> pa.Table:
        shutil.copytree(vault, then)
        raise JudgeError("the machine is gone")

    monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", lambda part, device, **_: LocalPool(part, work=dying))
    benchmark = write_bundles(tmp_path / "own.jsonl")
    config = config_for(model, benchmark, tmp_path, output_dir="vault://team/scores", resume="auto")
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"block_rows": 4})})
    answer = {"response": "I cannot help with that.", "finish": "stop", "prompt_tokens": 9, "response_tokens": 6}
    part = Part("answering", Generator, {}, config.engine)

    def engines() -> Any:
        return LocalPool(part, work=lambda rows: pa.Table.from_pylist([answer] * len(rows), schema=ANSWERS))

    first, second = engines(), engines()
    with pytest.raises(JudgeError, match="machine is gone"):
        score(config, pool=first)
    assert len(first.asked) == 16

    monkeypatch.setenv("VAULT", str(then))
    folder = Place("vault://team/scores/score")
    (folder / "lease.json").remove()  # its process is dead; this one, which wrote it, is not
    assert [place.name for place in folder.iterdir()] == ["kept", "request.json"]
    assert len((folder / "kept" / "answering").iterdir()) == 4
    with pytest.raises(ScoreError, match="unfinished score"):
        score(config.model_copy(update={"resume": "never"}), pool=second)
    monkeypatch.setattr("mlc_ray.generate.pool.EnginePool.open", lambda part, device, **_: LocalPool(part))
    result = score(config, pool=second)
    assert second.asked == []
    assert (result.responses, result.unparsed, result.finish) == (16, 0, {"stop": 16})
    assert [place.name for place in folder.iterdir()] == ["request.json", "responses.parquet", "scores.json"]
