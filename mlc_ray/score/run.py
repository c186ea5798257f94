"""Scoring on Ray: generate responses to the prompts of benchmarks, judge them, count the verdicts, and save all of it.

Answering, translating and judging (`score.passes`) run each in a pool of its own (`generate.pool`), at once where they
have devices of their own, else one after another: two engines never share a GPU, nor a machine's memory on CPU.

The way of a prompt's text through a score, from a row of a bundle table (`data`): a cell of the driver's table of
prompts; a cell of a block in the object store, where it is copied once for each pass; in the engine's actor a Python
string, the rendered conversation, its ids and vLLM's request; in the judge's actor part of an `Answer`; and in the end
a cell of `responses.parquet`. The answer comes back to the driver once, without the prompt.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlc_ray.capacity import Need
from mlc_ray.checkpoints import verify_weights
from mlc_ray.cluster import check_fits, connect, use_gpu
from mlc_ray.config import ScoreConfig
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.engine import Device, Warm, check_lengths
from mlc_ray.generate.pool import EnginePool
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import PROMPTS
from mlc_ray.judges.base import make_judge, make_reader
from mlc_ray.lease import lease
from mlc_ray.log_files import log_file, output_kept
from mlc_ray.monitoring import told_of
from mlc_ray.plan.check_engines import check_engine, check_readers
from mlc_ray.runs import (
    KEPT_FOLDER,
    REPLIES_FILE,
    REQUEST_FILE,
    RESPONSES_FILE,
    SCORES_FILE,
    names_of,
    output_place,
    pinned_weights,
    training_languages,
)
from mlc_ray.score.calibration import check_calibration, with_corrected_rates
from mlc_ray.score.languages import unread_languages, with_languages
from mlc_ray.score.passes import Passes
from mlc_ray.score.plan import (
    Judging,
    answering,
    fitted,
    judge_with_dtypes,
    plan_judging,
    read_usage,
    reading,
    with_chat,
    with_dtypes,
    with_judge_models,
    with_longest_answer,
)
from mlc_ray.score.prompts import Prompts, read_prompts, slug
from mlc_ray.score.request import Request, ScoreError, load_request
from mlc_ray.score.results import ScoreResult, count, load_scores, records_of, save_scores, write_responses
from mlc_ray.score.stages import RESPONSES, answers_of
from mlc_ray.score.thoughts import with_reasoning
from mlc_ray.storage import Place, engine_named, fingerprint_model, user_cache, working_folder
from mlc_ray.types import ENGINE_FAULT

logger = logging.getLogger(__name__)


class TooManyUnparsedError(MlcRayError):
    """A larger share of responses than `max_unparsed` got no verdict: the rates mean little. All files are written.

    `result` is the score all the same.
    """

    exit_status = 3  # as of scores that cannot be compared: a script must not take it for a mistake in the command

    def __init__(self, message: str, result: ScoreResult | None = None) -> None:
        super().__init__(message)
        self.result = result


def score(config: ScoreConfig, *, pool: EnginePool | None = None) -> ScoreResult:
    """Answer, judge, count; write the score folder and return what is in it. Nothing is printed.

    The folder `output_dir/name` gets `responses.parquet` and `scores.json` (written last). On a cluster, a local model
    folder must lie where every node sees it. When a judge fails, the responses stay in the folder: `judge_again`
    continues with them, and so does the same call with `resume: auto`, which returns a score that is complete already.

    Args:
        pool: engines that are up (`open_pool`); they are given the model's weights, and stay open. By default engines
            are started, and end before the judge's.

    Raises:
        ModelPathError, IncompleteArtifactError: the model is not there, is incomplete, or its weights are damaged.
        JudgeError: the judge cannot be made as asked.
        UncoveredLanguageError: no judge may be asked about a language.
        EngineError: lengths do not fit, or an engine does not start.
        ScoreError: the folder holds a score, with `resume: auto` another one; or `pool` was opened for other settings.
        LeaseError: another process works in the folder. With `resume: auto` it is waited for whether that one is alive.
        ClusterError: the cluster can never hold the engines.
        PlanError: an engine cannot hold the model (`plan`).
        EngineDiedError: engines die, hang or fail whatever is done; what is answered is kept.
        MlcRayError: what the readers of the benchmarks raise.
        TooManyUnparsedError: when all is written.
    """
    config = with_longest_answer(config)
    name = config.name or f"{slug(Path(config.model).name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    place = output_place(config.output_dir) / name
    before = load_request(place) if config.resume == "auto" and (place / REQUEST_FILE).is_file() else None
    model = pinned_weights(config.model, {} if before is None else {before.config.model: before.resolved})
    config = with_judge_models(config, None if before is None else before.config.judge)
    judge = make_judge(config.judge)
    if judge.runs != "prompts":
        assert config.max_new_tokens is not None, "decided by now (with_longest_answer)"
        check_lengths(model, config.engine, config.max_new_tokens)
    _check_free(place, resume=config.resume == "auto")
    judge.check_ready(user_cache())
    run, trial = names_of(place)
    told_of(run=run, trial=trial)
    with lease(place, wait=config.resume == "auto"), log_file(config.logging, place):
        _check_free(place, resume=config.resume == "auto")  # another process may have scored there meanwhile
        with _worked_on(place) as folder:
            result = _score(config, model, folder, place, pool)
    return check_unparsed(replace(result, folder=place), config.max_unparsed, by_language=True)


def _score(config: ScoreConfig, model: str, folder: Path, place: Place, pool: EnginePool | None) -> ScoreResult:
    """The score, in a folder of this machine; what an earlier call finished is not done again."""
    device = _connect(config)
    begun = config.resume == "auto" and (folder / REQUEST_FILE).is_file()
    config = with_dtypes(config, gpu=device == "gpu", before=load_request(folder).config if begun else None)
    config = with_reasoning(with_chat(config, config.model), model)
    judge = make_judge(config.judge)
    prompts = read_prompts(config, rejects=folder)
    judging = plan_judging(judge, prompts.table)
    request = Request(
        config=config,
        resolved=model,
        fingerprint=fingerprint_model(model),
        prompts=prompts.fingerprint,
        seen_languages=config.seen_languages or training_languages(config.model),
    )
    _check_engines(request, judging, device, pool)
    if config.plan == "check" and pool is None:
        check_engine(model, config, gpu=device == "gpu", readers=judging.readers)
    check_calibration(config.calibration, judging.identity)
    earlier = _earlier(folder, request, prompts, judging) if config.resume == "auto" else None
    if isinstance(earlier, ScoreResult):
        return earlier
    answered = earlier is not None and ENGINE_FAULT not in earlier["finish"].to_pylist()
    if not answered:
        verify_weights(model)
        settings = fitted(judge, prompts.by_language(), config, model)
        judging = plan_judging(make_judge(settings), prompts.table)
    request.save(folder)
    if not place.is_local:  # with what is kept there, it is what a score on another machine goes on from
        place.storage.publish(folder / REQUEST_FILE, str(place / REQUEST_FILE))
    work = Passes(request, folder, place, device)
    if answered:
        return write_score(request, judging, work.judge(_fitted_to(judging, earlier), earlier), folder)
    asked = ", ".join(f"{name} ({number} prompts)" for name, number in prompts.counts().items())
    logger.info("scoring %s on %s", model, asked)
    return write_score(request, judging, work.answer_and_judge(judging, prompts.table, pool, earlier), folder)


def open_pool(config: ScoreConfig, *, in_turn: bool = False) -> EnginePool:
    """Engines with the weights of `config.model`, for several scores one after another: `score(config, pool=pool)`.

    A score of other weights than those that the engines serve swaps and proves them (`generate.swap`) instead of
    starting an engine. Close the pool when done; it is a context manager:

        with open_pool(before, in_turn=True) as pool:
            first = score(before, pool=pool)
            exported = ...                        # train meanwhile
            second = score(after, pool=pool)

    Args:
        in_turn: training runs while the engines do nothing: they reserve neither CPUs nor GPUs of Ray, and on GPUs
            give their memory back between scores. They keep their weights and cache in memory: on CPU some two GB
            beside `engine.cpu_kv_cache_gib`.

    Raises:
        MlcRayError: as `score`, before anything is read or written.
    """
    if in_turn and config.engine.replicas == "auto":
        raise ScoreError("engine.replicas='auto' fills the nodes, and training is to have them in turn; set a number")
    model = pinned_weights(config.model)
    verify_weights(model)
    device = _connect(config)
    config = with_chat(with_dtypes(with_longest_answer(config), gpu=device == "gpu"), config.model)
    config = with_reasoning(config, model)
    warm = Warm(sleeps=in_turn and device == "gpu")
    judge = make_reader(config.judge)  # what a judge of prompts is made with is known only when those are read
    part = answering(model, config, plan_judging(judge, PROMPTS.empty_table()), device, warm=warm, in_turn=in_turn)
    check_fits("engine (replicas x cpus_per_replica)", part.places(device))
    return EnginePool.open(part, device)


def judge_again(scored: str | Path | Place, *, out: str | Path | Place | None = None, **changes: Any) -> ScoreResult:
    """Judge the responses of a score folder again, without generating new ones.

    The result goes into a folder beside it. A folder whose judge failed is completed in place when no `out` is given.

    Args:
        scored: the score folder.
        out: the new folder (default: the old name and the judge's).
        changes: fields of its settings that differ: `judge`, `calibration` (None for none), `max_unparsed`, `address`,
            `env`, `accelerator`, `plan`, `logging`.

    Raises:
        ScoreError: the folder holds no responses, or the new one exists already.
        MlcRayError: as `score`.
    """
    source = Place(scored).absolute()
    request = load_request(source)
    finished = (source / SCORES_FILE).is_file()
    responses = read_responses(source)
    if responses is None or make_judge(request.config.judge).runs == "prompts":
        raise ScoreError(f"{str(source)!r} holds no responses to judge ({RESPONSES_FILE}); score the model again")
    earlier = request.config.judge
    config = request.config.model_copy(update=changes)
    config = with_judge_models(with_longest_answer(config), earlier)
    judge = make_reader(config.judge)
    judge.check_ready(user_cache())
    plan_judging(judge, responses)
    target = source
    if finished or out is not None:
        beside = source.parent / f"{source.name}-{judge.name}"
        target = beside if out is None else output_place(str(out), setting="out")
        _check_free(target)
    run, trial = names_of(target)
    told_of(run=run, trial=trial)
    with lease(target, wait=False), log_file(config.logging, target), _worked_on(target) as folder:
        device = _connect(config)
        decided = judge_with_dtypes(config.judge, gpu=device == "gpu", before=earlier)
        request = replace(request, config=config.model_copy(update={"judge": decided}))
        judging = plan_judging(make_reader(decided), responses)
        check_calibration(request.config.calibration, judging.identity)
        _check_readers(judging, device, [])
        if config.plan == "check":
            check_readers(request.config, judging.readers, gpu=device == "gpu")
        logger.info("judging %d responses of %s by %s", len(responses), source, judge.name)
        request.save(folder)
        work = Passes(request, folder, target, device)
        write_responses(responses, folder)  # what fails from here on is continued from these
        if target != source and (source / REPLIES_FILE).is_file():
            with (source / REPLIES_FILE).open() as replies:
                (target / REPLIES_FILE).write_bytes(replies.read())
        judged = work.judge(_fitted_to(judging, responses), responses)
        result = write_score(request, judging, judged, folder)
    return check_unparsed(replace(result, folder=target), config.max_unparsed, by_language=True)


def resume_score(folder: str | Path | Place) -> ScoreResult:
    """Go on with the score in a folder, by its own settings, as `score` does with `resume: auto`.

    Raises:
        ScoreError: no score began there.
        MlcRayError: as `score`.
    """
    place = Place(folder).absolute()
    own = {"name": place.name, "output_dir": str(place.parent), "resume": "auto"}
    return score(load_request(place).config.model_copy(update=own))


# ------------------------------------------------------------------------------------------------------------ counting


def write_score(request: Request, judging: Judging, judged: pa.Table, folder: Path, **settings: Any) -> ScoreResult:
    """Tell the language of responses, count verdicts, and write `scores.json` (last of all).

    `settings` are recorded beside the request's own.
    """
    judged, told_by = with_languages(judged, folder) if request.config.tell_languages else (judged, "")
    result = count(
        records_of(judged),
        folder=folder,
        told_by=told_by,
        seen_languages=request.seen_languages,
        model=request.config.model,
        resolved=request.resolved,
        fingerprint=request.fingerprint,
        prompts=request.prompts,
        judge=judging.identity,
        measured_by=judging.measured_by,
        usage=read_usage(folder),
        finish=dict(Counter(judged["finish"].to_pylist())),
        judge_faults=len(judged) - judged["judge_fault"].null_count,
        config={**request.config.model_dump(mode="json"), **settings},
        versions=request.versions,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    result = with_corrected_rates(result, request.config.calibration)
    save_scores(result)
    return result


def check_unparsed(result: ScoreResult, bound: float, *, by_language: bool = False) -> ScoreResult:
    """The result, unless too few of its responses got a verdict.

    Raises:
        TooManyUnparsedError: A larger share than `bound` got none; or with `by_language` none of a language did, which
            the share of all may hide, unless `bound` allows any.
    """
    if result.unparsed_share > bound or (by_language and unread_languages(result, bound)):
        raise TooManyUnparsedError(_unparsed_above(bound, result), result)
    return result


def _unparsed_above(bound: float, result: ScoreResult) -> str:
    whole = unread_languages(result, bound)
    alone = f", and none of {', '.join(whole)} did" if whole else ""
    return (
        f"{result.unparsed} of {result.responses} responses ({result.unparsed_share:.1%}) got no verdict{alone}; "
        f"max_unparsed={bound:g} allows fewer; they are in {str(result.responses_file)!r} (columns behaviour, "
        "safety and reason); remove the cause, or raise max_unparsed"
    )


# --------------------------------------------------------------------------------------------------------- the folder


def _connect(config: ScoreConfig) -> Device:
    connect(config.address, config.env)
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # else two lines for every small pipeline
    return "gpu" if use_gpu(config.accelerator) else "cpu"


def _check_engines(request: Request, judging: Judging, device: Device, pool: EnginePool | None) -> None:
    """Raise before anything starts where engines of a part cannot be had even beside those of `pool` alone."""
    own = answering(request.resolved, request.config, judging, device, in_turn=False)
    if pool is None:
        check_fits("engine (replicas x cpus_per_replica)", own.places(device))
    else:
        _check_pool(pool, own)
    _check_readers(judging, device, [] if pool is None else pool.part.places(device))


def _check_pool(pool: EnginePool, asked: Part) -> None:
    """Refuse an open pool of other engines than those that are asked for."""
    of_pool, own = ({"stage": each.stage, **each.settings, "model": None, "warm": None} for each in (pool.part, asked))
    if own != of_pool:
        raise ScoreError("the pool was opened for other engine settings, chat, max_new_tokens, judge or device")


def _check_readers(judging: Judging, device: Device, held: Sequence[Need]) -> None:
    for part in reading(judging, device, rows=1, usage=Path(), replies=Place(Path())).values():
        if part.engine is not None:
            check_fits(f"{part.name}, by engines of its own,", [*held, *part.places(device)])


@contextmanager
def _worked_on(place: Place) -> Iterator[Path]:
    """A folder of this machine for what is to be in `place`; it keeps what libraries say where it is that place."""
    with working_folder(place, last=(SCORES_FILE,)) as folder, output_kept(place):
        yield folder
    (place / KEPT_FOLDER).remove()  # now that the score is where it belongs


def _fitted_to(judging: Judging, responses: pa.Table) -> Judging:
    """`judging` by a judge whose window holds these responses."""
    return plan_judging(make_reader(judging.judge.fitted_to(answers_of(responses))), responses)


def _check_free(folder: Place, *, resume: bool = False) -> None:
    if not resume and any((folder / name).exists() for name in (SCORES_FILE, REQUEST_FILE, RESPONSES_FILE)):
        raise ScoreError(_what_holds(folder))


def _what_holds(folder: Place) -> str:
    if (folder / SCORES_FILE).exists():
        return (
            f"score folder {str(folder)!r} exists already; choose another name, or remove it (resume: auto returns it "
            "if the settings are the same)"
        )
    return (
        f"score folder {str(folder)!r} holds an unfinished score: go on with it by `mlc-ray score --resume "
        f"{folder}` or by resume=auto, choose another name, or remove it"
    )


def _earlier(folder: Path, request: Request, prompts: Prompts, judging: Judging) -> ScoreResult | pa.Table | None:
    """What an earlier call saved of the same score: all of it, or the answers; None if neither.

    Raises:
        ScoreError: the folder holds something else.
    """
    if not (folder / REQUEST_FILE).is_file():
        return None
    found = load_request(folder)
    finished = load_scores(folder) if (folder / SCORES_FILE).is_file() else None
    if not request.asks_as(found) or (
        finished is not None
        and (finished.judge, finished.config.get("calibration")) != (judging.identity, request.config.calibration)
    ):
        raise ScoreError(
            f"score folder {str(folder)!r} holds a score of another model, other prompts, or other settings of engine, "
            "judge or calibration, with which resume: auto cannot go on; choose another name, or remove it"
        )
    if finished is not None and not finished.judge_faults:
        logger.info("%s is finished already", folder)
        return finished
    responses = read_responses(Place(folder))
    if (
        responses is None
        or judging.judge.runs == "prompts"
        or not responses.select(PROMPTS.names).equals(prompts.table)
    ):
        return None
    was, now = engine_named(found.versions), engine_named(request.versions)
    if was != now:
        raise ScoreError(
            f"score folder {str(folder)!r} holds responses by {was}, and here is {now}: judge those by `mlc-ray judge "
            f"{folder}`, or choose another name"
        )
    logger.info("%d responses are there already", len(responses) - responses["finish"].to_pylist().count(ENGINE_FAULT))
    return responses


def read_responses(folder: Place) -> pa.Table | None:
    """Prompts and answers of a score folder, without what judges made of them; None where there are none."""
    file = folder / RESPONSES_FILE
    if not file.is_file():
        return None
    with file.open() as opened:
        return pq.read_table(opened, columns=RESPONSES.names).cast(RESPONSES)
