"""Bundles from English ones: twins, translations and a model's own answers, shard by shard, each step resumable.

A step runs over all shards of bundles with the same engines, then the next one, so that two models never share a
machine's memory. The drafts of a shard are kept as a file after each step, and the replies of engines block by block
while it lasts; so an interrupted translation goes on behind the last block. The files of bundles come at the end, and
the manifest last.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlc_ray.cluster import check_fits, connect, use_gpu
from mlc_ray.config import EngineSection, TranslateConfig
from mlc_ray.data.bundles import NAMED_FIRST, RejectedRow
from mlc_ray.data.bundles import place as place_of
from mlc_ray.data.prepare import read_bundles
from mlc_ray.data.rejects import Rejects
from mlc_ray.data.sources import resolve_source
from mlc_ray.data.store import REJECTS_FILE
from mlc_ray.generate.engine import Device
from mlc_ray.generate.replica import place_of as engine_place
from mlc_ray.generate.translate import translator_identity
from mlc_ray.judges.languages import Identifier
from mlc_ray.lease import lease
from mlc_ray.log_files import log_file
from mlc_ray.logs import keep_in
from mlc_ray.monitoring import told_of
from mlc_ray.runs import (
    ANSWERS_FOLDER,
    BUNDLES_FOLDER,
    KEPT_FOLDER,
    QUALITY_FILE,
    QUALITY_TEXT,
    REJECTED_FOLDER,
    REPLIES_FILE,
    TRANSLATION_FILE,
    output_place,
)
from mlc_ray.score.plan import counted, read_usage, usage_file
from mlc_ray.score.prompts import choose_prompts
from mlc_ray.storage import MANIFEST, Place, checksum, fault_of, fingerprint, scratch_folder, user_cache, write_manifest
from mlc_ray.translate.answers import AnswerJudge, answering_part, check_judge, check_refusals, own_answers
from mlc_ray.translate.asking import Work, asking, with_what_is_left, working
from mlc_ray.translate.assemble import Assembly
from mlc_ray.translate.checks import Tools
from mlc_ray.translate.decided import Decided, TranslationError, decide, identity, read_request, with_dtypes
from mlc_ray.translate.drafts import Shard, drafts_of, load_shard, save_shard
from mlc_ray.translate.plan import Plan, plan_of
from mlc_ray.translate.quality import Counts, Quality, as_json, as_markdown, load_quality
from mlc_ray.translate.texts import judge_twins, translate_texts, write_twins

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TranslateResult:
    """What was made: its folder, and the quality report."""

    folder: Place
    quality: Quality

    @property
    def bundles(self) -> Place:
        """The folder of the files of bundles, which `data.train` takes as a path."""
        return self.folder / BUNDLES_FOLDER


def plan(config: TranslateConfig) -> Plan:
    """What a translation would ask, and about what it would cost; no model is asked and nothing written.

    The sources are read by Ray, the hub is asked for commits, and tokens are counted by the translator's tokenizer.

    Raises:
        MlcRayError: what is wrong with the settings or the sources.
    """
    _check_sources(config)
    decided = decide(config, None)
    connect(config.address, config.env)
    with tempfile.TemporaryDirectory() as folder:
        return plan_of(decided.config, drafts_of(_read(config, Path(folder) / REJECTS_FILE)))


def translate(config: TranslateConfig) -> TranslateResult:
    """Make the bundles; write the folder `output_dir/name`, and return what is in it. Nothing is printed.

    The folder gets `translation.json` first, then `bundles/` and `rejected/` with a file for each shard, `quality.json`
    and `quality.md`, and `manifest.json` last. With `resume: auto` an interrupted translation goes on.

    Raises:
        TranslationError: the folder holds a translation, with `resume: auto` another one; or no bundle is left.
        LeaseError: another process works in the folder.
        CostCapError: an endpoint's cost cap is reached; what it answered is kept.
        MlcRayError: what the readers of the sources, the engines, the endpoint and the judge raise.
    """
    place = output_place(config.output_dir) / config.name
    told_of(run=config.name)
    before = _begun(config, place)
    _check_sources(config)
    decided = decide(config, before)
    connect(config.address, config.env)
    with lease(place, wait=config.resume == "auto"), log_file(config.logging, place):
        if (now := _begun(config, place)) != before:  # another process has worked there meanwhile
            before, decided = now, decide(config, now)
        return _translate(config, place, before, decided)


def _begun(config: TranslateConfig, place: Place) -> dict[str, Any] | None:
    """What was asked for in the folder before; None where nothing was.

    Raises:
        TranslationError: something was, and `resume` is `never`.
    """
    before = read_request(place)
    if before is not None and config.resume == "never":
        raise TranslationError(
            f"{str(place)!r} holds a translation: go on with it by `mlc-ray translate --resume {place}` or by "
            "resume=auto, choose another name, or remove it"
        )
    return before


def _translate(
    config: TranslateConfig, place: Place, before: dict[str, Any] | None, decided: Decided
) -> TranslateResult:
    """The translation, in a folder where nobody else works."""
    if place.is_local:
        keep_in(Path(place))
    device: Device = "gpu" if use_gpu(config.accelerator) else "cpu"
    decided = with_dtypes(decided, before, gpu=device == "gpu")
    _check_places(decided.config, device)
    with scratch_folder() as scratch:
        bundles = _read(config, scratch / REJECTS_FILE)
        if (answers := decided.config.answers) is not None:
            languages = _answered_in(config, bundles)
            check_refusals(answers, languages)
            check_judge(answers, languages, user_cache())
        own = fingerprint([identity(decided), bundles["bundle_id"].to_pylist()])
        if before is not None and before["identity"] != own:
            raise TranslationError(
                f"{str(place)!r} holds a translation of other bundles, by other models or with other settings, with "
                "which resume: auto cannot go on; choose another name, or remove it"
            )
        unanswered = before is not None and _ask_again(place)
        if before is not None and (place / MANIFEST).is_file() and fault_of(place) is None and not unanswered:
            logger.info("%s is finished already", place)
            return TranslateResult(place, load_quality(place))
        (place / TRANSLATION_FILE).write_json({"identity": own, **decided.request()})
        if (scratch / REJECTS_FILE).is_file():
            (place / REJECTS_FILE).write_bytes((scratch / REJECTS_FILE).read_bytes())
        planned = plan_of(decided.config, drafts_of(bundles))
        for line in planned.lines():
            logger.log(logging.WARNING if line in planned.warnings else logging.INFO, "%s", line)
        run = _Run(decided, bundles, place, device, scratch)
        run.steps()
        quality = run.assemble()
    if lost := sum(file.read_json() for file in _unanswered(place)):
        logger.warning(
            "%d requests got no reply, after all retries; to ask them again: mlc-ray translate --resume %s", lost, place
        )
    else:
        (place / KEPT_FOLDER).remove()
    return TranslateResult(place, quality)


def resume_translation(folder: str | Path | Place) -> TranslateResult:
    """Go on with the translation in a folder, by its own settings.

    Raises:
        TranslationError: none began there.
        MlcRayError: as `translate`.
    """
    place = Place(folder).absolute()
    before = read_request(place)
    if before is None:
        raise TranslationError(f"{str(place)!r} is no translation: it has no {TRANSLATION_FILE}")
    own = {"name": place.name, "output_dir": str(place.parent), "resume": "auto"}
    return translate(before["config"].model_copy(update=own))


_STEPS = ("twins", "judged", "texts", "answers")  # in this order
_UNANSWERED = "unanswered"


def _unanswered(place: Place) -> list[Place]:
    """Files that say of a step of a shard how many requests got no reply."""
    kept = place / KEPT_FOLDER
    return [file for file in kept.iterdir() if file.name.startswith(f"{_UNANSWERED}-")] if kept.is_dir() else []


def _ask_again(place: Place) -> bool:
    """Forget the steps of shards in which requests got no reply, and what followed from them; whether there are any."""
    found = _unanswered(place)
    for file in found:
        _, step, number = file.name.removesuffix(".json").split("-")
        for later in _STEPS[_STEPS.index(step) :]:
            for name in (f"drafts-{later}-{number}.json", f"{_UNANSWERED}-{later}-{number}.json"):
                if (again := place / KEPT_FOLDER / name).is_file():
                    again.remove()
    return bool(found)


# ------------------------------------------------------------------------------------------------------------- reading


def _read(config: TranslateConfig, rejects: Path) -> pa.Table:
    """The bundles to work on, each with an English prompt, in the order of the sources.

    They are held in memory, as benchmarks are: what is made of them is not.

    Raises:
        TranslationError: a bundle has no English prompt, or answers that cannot be translated.
        MlcRayError: what the readers raise.
    """
    table = read_bundles(config.sources, on_invalid=config.on_invalid, rejects_path=rejects)
    english = ["en" in codes for codes in table["languages"].to_pylist()]
    if lacking := table.filter(pa.array([not has for has in english])).to_pylist():
        named = ", ".join(place_of(row["file"], row["line"]) for row in lacking[:NAMED_FIRST])
        what = f"{len(lacking)} of {len(table)} bundles have no English prompt ({named})"
        if config.on_invalid == "fail" or len(lacking) == len(table):
            raise TranslationError(f"{what}; add one to each, or leave them out by on_invalid=skip")
        logger.warning("%s; they are left out", what)
        with rejects.open("a", encoding="utf-8") as file:
            for row in lacking:
                text = json.dumps(dict(zip(row["languages"], row["texts"], strict=True)), ensure_ascii=False)
                file.write(Rejects().reject(RejectedRow(row["file"], row["line"], "it has no English prompt", text)))
        table = table.filter(pa.array(english))
    rows = table.select(["bundle_id", "kind", "languages"]).to_pylist()
    chosen = choose_prompts(rows, ["en"], config.limit)
    table = table.filter(pa.array([row["bundle_id"] in chosen for row in rows]))
    if config.translate_answers:
        other = {row for row in table["response_language"].to_pylist() if row != "en"}
        if other:
            raise TranslationError(
                f"translate_answers={config.translate_answers}, but bundles have answers in "
                f"{', '.join(map(repr, sorted(other)))}: answers are translated from English alone; leave these "
                "sources out, or translate_answers"
            )
    return table


def _check_sources(config: TranslateConfig) -> None:
    """Raise of a source that is not there before Ray starts, which takes much longer to find out.

    Raises:
        BundleFileError: as `resolve_source`.
    """
    for source in config.sources:
        resolve_source(source)


def _languages(bundles: pa.Table) -> set[str]:
    return {code for codes in bundles["languages"].to_pylist() for code in codes}


def _answered_in(config: TranslateConfig, bundles: pa.Table) -> list[str]:
    """The languages in which a model may be asked for its own answers."""
    assert config.answers is not None
    everything = {*_languages(bundles), *config.languages} if config.answers.languages != "english" else set[str]()
    return sorted({"en", *everything})


def _check_places(config: TranslateConfig, device: Device) -> None:
    """Raise before anything starts if the engines of a step cannot be had; steps follow each other."""
    sections = [config.translator, None if config.twins is None else config.twins.judge]
    engines: list[EngineSection] = [each.engine for each in sections if each is not None and each.model is not None]
    engines += [] if config.answers is None else [config.answers.engine]
    for engine in engines:
        found = counted(engine, device)
        assert found.replicas != "auto"
        check_fits("engine (replicas x cpus_per_replica)", [engine_place(found, device)] * found.replicas)


# --------------------------------------------------------------------------------------------------------------- steps

_Step = Callable[[Shard, str, Work], None]


@dataclass(frozen=True)
class _Run:
    """A translation that works: its settings, all decided, and where it keeps what."""

    decided: Decided
    bundles: pa.Table
    place: Place
    device: Device
    scratch: Path

    @property
    def config(self) -> TranslateConfig:
        return self.decided.config

    @property
    def shards(self) -> int:
        return -(-len(self.bundles) // self.config.shard_bundles)

    def steps(self) -> None:
        """Run every step that is asked for over all shards."""
        config, tools = self.config, self.tools()
        twins, before = config.twins, None
        apart = twins is not None and twins.judge is not None  # then two models take turns
        if apart:
            opened = partial(self._translator, "writing twins")
            self._step("twins", None, opened, lambda shard, name, work: self._twins(shard, name, work, tools))
            self._step("judged", "twins", self._judge, lambda shard, name, work: judge_twins(shard, name, work, tools))
            before = "judged"

        def texts(shard: Shard, name: str, work: Work) -> None:
            if twins is not None and not apart:
                self._twins(shard, name, work, tools)
                judge_twins(shard, name, work, tools)
            if config.languages:
                translate_texts(shard, name, config.languages, work, tools, answers=bool(config.translate_answers))

        if config.languages or (twins is not None and not apart):
            self._step("texts", before, partial(self._translator, "translating"), texts)
            before = "texts"
        if config.answers is not None:
            self._own(before, tools)

    def _twins(self, shard: Shard, name: str, work: Work, tools: Tools) -> None:
        assert self.config.twins is not None
        write_twins(shard, name, self.config.twins.of, work, tools)

    def _own(self, before: str | None, tools: Tools) -> None:
        settings = self.config.answers
        assert settings is not None
        languages = _answered_in(self.config, self.bundles)
        judge = AnswerJudge(settings, languages, self.scratch, self.place / REPLIES_FILE)
        try:
            self._step(
                "answers",
                before,
                self._answering,
                lambda shard, name, work: own_answers(shard, name, settings, languages, work, judge, tools),
            )
        finally:
            judge.close()

    def tools(self) -> Tools:
        """What checks need."""
        return Tools(self.config.checks, Identifier({*self.config.languages, *_languages(self.bundles)}))

    def _step(
        self, step: str, before: str | None, opened: Callable[[], AbstractContextManager[Work]], work_on: _Step
    ) -> None:
        """Run a step over the shards that have not had it; without any nothing is started."""
        left = [number for number in range(self.shards) if not self._file(step, number).is_file()]
        if not left:
            return
        with opened() as work:
            for number in left:
                if self.shards > 1:
                    logger.info("%s: shard %d of %d", work.part.name, number + 1, self.shards)
                shard = self._shard(before, number)
                work.lost.clear()
                work_on(shard, f"{number:05}", work)
                if work.lost:
                    file = f"{_UNANSWERED}-{step}-{number:05}.json"
                    (self.place / KEPT_FOLDER / file).write_json(len(work.lost))
                save_shard(self._file(step, number), shard)

    def _shard(self, step: str | None, number: int) -> Shard:
        """A shard as a step left it; None: as it was read."""
        if step is not None:
            return load_shard(self._file(step, number))
        rows = self.config.shard_bundles
        return Shard(drafts_of(self.bundles.slice(number * rows, rows)))

    def _file(self, step: str, number: int) -> Place:
        return self.place / KEPT_FOLDER / f"drafts-{step}-{number:05}.json"

    @contextmanager
    def _translator(self, name: str) -> Iterator[Work]:
        settings = self.config.translator
        assert settings is not None
        made_by = translator_identity(settings)
        settings = with_what_is_left(settings, self.scratch / usage_file("writing twins"))
        with asking(settings, self.place, self.device, name=name, made_by=made_by, usage=self.scratch) as work:
            yield work

    @contextmanager
    def _judge(self) -> Iterator[Work]:
        assert self.config.twins is not None and self.config.twins.judge is not None
        judge = self.config.twins.judge
        made_by = translator_identity(judge)
        with asking(judge, self.place, self.device, name="judging twins", made_by=made_by, usage=self.scratch) as work:
            yield work

    @contextmanager
    def _answering(self) -> Iterator[Work]:
        settings, chat = self.config.answers, self.decided.chat
        assert settings is not None and chat is not None
        part = answering_part(settings, settings.model, chat, self.device)
        with working(part, self.place, self.device, self.decided.answers_identity()) as work:
            yield work

    # ------------------------------------------------------------------------------------------------------- the end

    def assemble(self) -> Quality:
        """Write the files of bundles and rejected rows, the quality report, and the manifest.

        Raises:
            TranslationError: no bundle is left; what was rejected is written.
        """
        config, tools, counts = self.config, self.tools(), Counts(self.config.name)
        last = "answers" if config.answers is not None else "texts" if config.languages else None
        if last is None:
            last = "judged" if config.twins is not None and config.twins.judge is not None else "texts"
        assembly = Assembly(config, tools, counts)
        sizes, sums = dict[str, int](), dict[str, str]()

        for folder in (BUNDLES_FOLDER, REJECTED_FOLDER, ANSWERS_FOLDER):
            if (self.place / folder).is_dir():  # of an assembly that was cut off, or lacked what was asked again since
                (self.place / folder).remove()

        def write(name: str, content: bytes) -> None:
            (self.place / name).write_bytes(content)
            sizes[name], sums[name] = len(content), checksum(content)

        for number in range(self.shards):
            made = assembly.shard(self._shard(last, number))
            for folder, lines in (
                (BUNDLES_FOLDER, made.bundles),
                (REJECTED_FOLDER, made.rejected),
                (ANSWERS_FOLDER, made.answers),
            ):
                if lines:
                    write(f"{folder}/{folder}-{number:05}.jsonl", "".join(f"{line}\n" for line in lines).encode())
        quality = counts.result()
        quality.usage = read_usage(self.scratch)
        quality.created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write(QUALITY_FILE, (json.dumps(as_json(quality), indent=2, ensure_ascii=False) + "\n").encode())
        write(QUALITY_TEXT, as_markdown(quality).encode())
        if not quality.written:
            raise TranslationError(
                f"no bundle is left of {sum(quality.read.values())}: {str(self.place / QUALITY_TEXT)!r} counts why, "
                f"and {str(self.place / REJECTED_FOLDER)!r} has every text; begin again under another name with "
                "looser checks or another translator"
            )
        write_manifest(self.place, files=sizes, checksums=sums, kind="translation")
        return quality
