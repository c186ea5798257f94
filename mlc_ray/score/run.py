"""Scoring on Ray: answer the prompts of benchmarks, judge the answers, count, and write it all down.

The phases (answer, translate, judge) run one after another, each with actors of its own and its table on disk in
between: two engines never share a machine, and responses are kept whatever befalls the judge.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlc_ray.cluster import check_capacity, connect, use_gpu, with_dtype
from mlc_ray.config import ScoreConfig, parse_config
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, check_lengths
from mlc_ray.judges.base import BaseJudge, make_judge, make_reader
from mlc_ray.judges.refusal import RefusalJudge
from mlc_ray.runs import (
    REQUEST_FILE,
    RESPONSES_FILE,
    SCORES_FILE,
    output_folder,
    resolve_model,
    training_languages,
)
from mlc_ray.score.phases import Benchmark, Phase, prompts_of, read_benchmarks, run_phase, slug
from mlc_ray.score.results import ScoreResult, count, records_of, save_scores
from mlc_ray.score.stages import (
    JUDGED,
    RESPONSES,
    TRANSLATED,
    GenerateStage,
    JudgeStage,
    PromptJudgeStage,
    TranslateStage,
)
from mlc_ray.storage import fingerprint, fingerprint_model, library_versions, write_json_atomic
from mlc_ray.types import Measure, Via

GENERATED_FILE = "generated.parquet"
TRANSLATED_FILE = "translated.parquet"
USAGE_FILES = {"judge": "judge_usage.json", "translate": "translate_usage.json"}


class ScoreError(MlcRayError):
    """The score cannot be made as asked; the message names the setting to change."""


class TooManyUnparsedError(MlcRayError):
    """A larger share of responses than `max_unparsed` got no verdict: the rates mean little. All files are written.

    `result` is the score all the same.
    """

    def __init__(self, message: str, result: ScoreResult | None = None) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Request:
    """What a score folder is a score of; written into it before anything runs, so that a failed one can go on."""

    config: ScoreConfig
    resolved: str
    fingerprint: str
    prompts: str
    seen_languages: list[str] | None

    def save(self, folder: Path) -> None:
        """Write `request.json`."""
        content = {**vars(self), "config": self.config.model_dump(mode="json", exclude_unset=True)}
        write_json_atomic(folder / REQUEST_FILE, content)


def score(config: ScoreConfig) -> ScoreResult:
    """Generate, judge, count; write the score folder.

    The folder `output_dir/name` gets `responses.parquet` and `scores.json` (written last). On a cluster, a
    local model folder must lie where every node sees it. Everything that can be refused is refused before an engine
    starts: `ModelPathError`, `JudgeError`, `UncoveredLanguageError`, `EngineError`, `ScoreError`, `ClusterError`, and
    the reader's errors. When a judge fails, the responses stay in the folder as `generated.parquet`, and `judge_again`
    takes them up. Raises `TooManyUnparsedError` when all is written.
    """
    model = resolve_model(config.model)
    judge = make_judge(config.judge)
    if judge.runs != "prompts":
        check_lengths(model, config.engine, config.max_new_tokens)
    name = config.name or f"{slug(Path(config.model).name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = _claim_folder(_output_folder(config) / name)
    judge.check_ready(_cache(config))
    device = _connect(config, answering=True, judge=judge)
    decided: ScoreConfig = config.model_copy(update={"engine": with_dtype(config.engine, gpu=device == "gpu")})
    benchmarks = read_benchmarks(decided, rejects=folder)
    languages = {code for benchmark in benchmarks for code in benchmark.languages}
    judging = plan_judging(judge, languages)
    request = Request(
        config=decided,
        resolved=model,
        fingerprint=fingerprint_model(model),
        prompts=prompts_fingerprint(benchmarks),
        seen_languages=decided.seen_languages or training_languages(decided.model),
    )
    request.save(folder)
    print(f"scoring {model} on {', '.join(f'{b.name} ({b.prompts} prompts)' for b in benchmarks)}", file=sys.stderr)

    settings: dict[str, Any] = {"model": model, "engine": decided.engine}
    prompts = prompts_of(benchmarks)
    if judge.runs == "prompts":
        settings |= {"settings": judge.settings, "ways": judging.ways}
        phase = Phase("prompts", PromptJudgeStage, settings, decided.engine)
        judged = run_phase(phase, prompts, folder / RESPONSES_FILE, JUDGED, device)
    else:
        settings["max_new_tokens"] = decided.max_new_tokens
        phase = Phase("responses", GenerateStage, settings, decided.engine)
        responses = run_phase(phase, prompts, folder / GENERATED_FILE, RESPONSES, device)
        judged = _judge(request, judging, responses, folder, device)
    return _finish(request, judging, judged, folder)


def judge_again(scored: str | Path, *, name: str | None = None, **changes: Any) -> ScoreResult:
    """Judge the responses of a score folder again; no prompt is answered again.

    `changes` are fields of its settings that differ: `judge`, `max_unparsed`, `address`, `accelerator`.
    The result goes into a folder `name` beside it (default: the old name and the judge's). A folder whose judge failed
    is completed in place when no name is given. Raises `ScoreError` if the folder holds no responses.
    """
    source = Path(scored).expanduser().resolve()
    request = load_request(source)
    finished = (source / SCORES_FILE).is_file()
    found = [path for path in (source / RESPONSES_FILE, source / GENERATED_FILE) if path.is_file()]
    if not found or make_judge(request.config.judge).runs == "prompts":
        raise ScoreError(f"{str(source)!r} holds no responses to judge ({RESPONSES_FILE}); score the model again")
    config = request.config.model_copy(update={name: value for name, value in changes.items() if value is not None})
    judge = make_reader(config.judge)
    judge.check_ready(_cache(config))
    request = replace(request, config=config)
    responses = pq.read_table(found[0], columns=RESPONSES.names).cast(RESPONSES)
    judging = plan_judging(judge, responses["language"].unique().to_pylist())
    folder = source
    if finished or name is not None:
        folder = _claim_folder(source.parent / (name or f"{source.name}-{judge.name}"))
    device = _connect(config, answering=False, judge=judge)
    request.save(folder)
    print(f"judging {len(responses)} responses of {source} by {judge.name}", file=sys.stderr)
    return _finish(request, judging, _judge(request, judging, responses, folder, device), folder)


def load_request(folder: Path) -> Request:
    """What the score in `folder` is of. Raises `ScoreError` if it is no score folder."""
    try:
        content = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
        return Request(**{**content, "config": parse_config(ScoreConfig, content["config"])})
    except FileNotFoundError:
        raise ScoreError(f"{str(folder)!r} is not a score folder: it has no {REQUEST_FILE}") from None
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ScoreError(f"{str(folder / REQUEST_FILE)!r} is damaged: {error}") from None


# ------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Judging:
    """The judge, and how it reads each language; `phrase_ways` of the phrase judge, where it has to join in."""

    judge: BaseJudge
    ways: Mapping[str, Via]
    phrase_ways: Mapping[str, Via] | None

    @property
    def measured_by(self) -> dict[Measure, str]:
        """The name of the judge behind each measure."""
        names: dict[Measure, str] = {} if self.phrase_ways is None else {"refused": "refusal"}
        return {**names, **dict.fromkeys(self.judge.measures, self.judge.name)}

    @property
    def translated(self) -> dict[str, Via] | None:
        """How each language is read, "translated" if either judge needs it; None where nothing is translated."""
        ways = {**(self.phrase_ways or {}), **self.ways}
        ways |= {code: via for code, via in (self.phrase_ways or {}).items() if via == "translated"}
        return ways if self.judge.settings.translator is not None and "translated" in ways.values() else None


def plan_judging(judge: BaseJudge, languages: Iterable[str]) -> Judging:
    """Who judges, and how each language is read; raises `UncoveredLanguageError` before anything is generated."""
    codes = sorted(set(languages))
    ways = judge.coverage(codes)
    if "refused" in judge.measures:
        return Judging(judge, ways, None)
    settings = judge.settings
    phrases = RefusalJudge(
        RefusalJudge.Settings(translate=settings.translator, allow_uncovered=settings.allow_uncovered)
    )
    why = f"its phrases join because {judge.name} does not say what is refused"
    return Judging(judge, ways, phrases.coverage(codes, why=why))


def _judge(request: Request, judging: Judging, responses: pa.Table, folder: Path, device: Device) -> pa.Table:
    try:
        return _verdicts(request, judging, responses, folder, device)
    except MlcRayError:
        print(f"the responses are kept; go on with `mlc-ray judge {folder}`", file=sys.stderr)
        raise


def _verdicts(request: Request, judging: Judging, responses: pa.Table, folder: Path, device: Device) -> pa.Table:
    judge, translate = judging.judge, judging.judge.settings.translator
    cache = str(_cache(request.config))
    for file in USAGE_FILES.values():
        (folder / file).unlink(missing_ok=True)  # of an earlier judge
    if translate is not None and judging.translated is not None:
        phase = Phase(
            "translations",
            TranslateStage,
            {"settings": translate, "device": device, "ways": judging.translated,
             "cache_dir": cache, "usage_file": str(folder / USAGE_FILES["translate"])},
            translate.engine if translate.model is not None else None,
            actors=1,
        )  # fmt: skip
        schema = pa.schema([*RESPONSES, *TRANSLATED])
        responses = run_phase(phase, responses, folder / TRANSLATED_FILE, schema, device)
    phase = Phase(
        "verdicts",
        JudgeStage,
        {"settings": judge.settings, "device": device, "ways": judging.ways, "phrase_ways": judging.phrase_ways,
         "cache_dir": cache, "usage_file": str(folder / USAGE_FILES["judge"])},
        judge.engine,
        actors=1 if judge.runs == "service" else Phase.actors,
    )  # fmt: skip
    return run_phase(phase, responses, folder / RESPONSES_FILE, JUDGED, device)


# ------------------------------------------------------------------------------------------------------------ counting


def _finish(request: Request, judging: Judging, judged: pa.Table, folder: Path) -> ScoreResult:
    result = write_score(request, judging, judged, folder)
    (folder / GENERATED_FILE).unlink(missing_ok=True)  # its rows are in responses.parquet as well
    check_unparsed(result, request.config.max_unparsed)
    return result


def write_score(request: Request, judging: Judging, judged: pa.Table, folder: Path, **settings: Any) -> ScoreResult:
    """Count verdicts and write `scores.json` (last of all); `settings` are recorded beside the request's own."""
    result = count(
        records_of(judged),
        folder=folder,
        seen_languages=request.seen_languages,
        model=request.config.model,
        resolved=request.resolved,
        fingerprint=request.fingerprint,
        prompts=request.prompts,
        judge=judging.judge.identity,
        measured_by=judging.measured_by,
        usage={
            name: json.loads((folder / file).read_text(encoding="utf-8"))
            for name, file in USAGE_FILES.items()
            if (folder / file).is_file()
        },
        finish=dict(Counter(judged["finish"].to_pylist())),
        config={**request.config.model_dump(mode="json"), **settings},
        versions=library_versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    save_scores(result)
    return result


def prompts_fingerprint(benchmarks: Sequence[Benchmark]) -> str:
    """Names a set of prompts: two scores with the same one can be compared."""
    return fingerprint([[b.name, sorted((key, *codes) for key, codes in b.kept.items())] for b in benchmarks])


def check_unparsed(result: ScoreResult, bound: float) -> None:
    """Raise `TooManyUnparsedError` if a larger share of responses than `bound` got no verdict."""
    if result.unparsed_share > bound:
        raise TooManyUnparsedError(
            f"{result.unparsed} of {result.responses} responses ({result.unparsed_share:.1%}) got no verdict; "
            f"max_unparsed={bound:g} allows fewer; they are in {str(result.responses_file)!r} (columns behaviour, "
            "safety and reason); remove the cause, or raise max_unparsed",
            result,
        )


# --------------------------------------------------------------------------------------------------------- the folder


def _cache(config: ScoreConfig) -> Path:
    return _output_folder(config) / "cache"


def _connect(config: ScoreConfig, *, answering: bool, judge: BaseJudge) -> Device:
    connect(config.address)
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # else two lines for every small pipeline
    device: Device = "gpu" if use_gpu(config.accelerator) else "cpu"
    translate = judge.settings.translator
    engines = {
        "engine": config.engine if answering else None,
        "judge.engine": judge.engine,
        "judge.translate.engine": translate.engine if translate is not None and translate.model is not None else None,
    }
    for what, engine in engines.items():
        if engine is None:
            continue
        gpus = engine.tensor_parallel if device == "gpu" else 0
        check_capacity(what, workers=engine.replicas, cpus_each=engine.cpus_per_replica, gpus_each=gpus)
    return device


def _output_folder(config: ScoreConfig) -> Path:
    return output_folder(config.output_dir)


def _claim_folder(folder: Path) -> Path:
    if (folder / SCORES_FILE).exists():
        raise ScoreError(f"score folder {str(folder)!r} is there already; choose another name, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
