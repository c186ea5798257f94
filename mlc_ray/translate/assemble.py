"""The last step: bundles and rejected rows of every shard as files, and the counts of the quality report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlc_ray.config import TranslateConfig
from mlc_ray.config.translate import OnPolicySection
from mlc_ray.data.bundles import FIELDS, BundleError, make_bundle
from mlc_ray.data.labelled import LABELS
from mlc_ray.translate.checks import BUNDLE_REJECTED, INCOMPLETE, NEAR_DUPLICATE, NearDuplicates, Tools
from mlc_ray.translate.drafts import Draft, Own, Shard, equal, good, record, remade
from mlc_ray.translate.quality import Counts
from mlc_ray.types import AnswerPair, Bundle

_NOT_USED = "it has no answers in this language that are used, and translate_answers=complete"
TOO_FEW, NO_OWN, INVALID = "too few languages", "no own answer in English", "no valid bundle"


@dataclass
class Files:
    """The lines of a shard's files."""

    bundles: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


class Assembly:
    """Puts bundles together, shard by shard in order: prompts are compared with all that came before."""

    def __init__(self, config: TranslateConfig, tools: Tools, counts: Counts) -> None:
        self._config, self._tools, self._counts = config, tools, counts
        self._earlier = NearDuplicates(config.checks.near_duplicate)

    def shard(self, shard: Shard) -> Files:
        """The bundles that are written, and a row for everything that is not used, with its reasons."""
        files, counts, written = Files(), self._counts, dict[str, str]()
        for failed in shard.failed:
            counts.twin(failed.kind, failed.check)
            files.rejected.append(
                _line(failed.name, failed.kind, "en", "twin", text=failed.text, checks={failed.check: failed.reason})
            )
        for draft in shard.drafts:
            bundle = draft.bundle
            files.answers += _labelled(draft)
            made = self._bundle(draft)
            lost = {} if isinstance(made, Bundle) else made
            if draft.twin_of:
                counts.twin(bundle.kind, BUNDLE_REJECTED if lost else "")
            else:
                counts.read[bundle.kind] += 1
            if isinstance(made, Bundle):
                # A twin stands behind its origin; where that is rejected, nothing is there to be its pair.
                pair = written.get(draft.twin_of) or bundle.pair or bundle.bundle_id
                written[bundle.bundle_id] = pair
                files.bundles.append(json.dumps(record(made, pair), ensure_ascii=False))
                counts.written[made.kind] += 1
            else:
                counts.rejected.update(lost.keys())
                files.rejected.append(
                    _line(bundle.bundle_id, bundle.kind, "en", "bundle", text=bundle.prompts["en"], checks=lost)
                )
            _mark_unused(draft, made)
            files.rejected += self._rows(draft, made)
        return files

    def _bundle(self, draft: Draft) -> Bundle | dict[str, str]:
        """The bundle, or why it is not written; its prompts are compared with later ones only if it is."""
        bundle, config = draft.bundle, self._config
        if near := self._earlier.nearest(bundle.prompts["en"], bundle.kind, "en"):
            return {NEAR_DUPLICATE: f"its English prompt nearly repeats that of {near}"}
        for text in draft.texts:
            if text.part == "prompt" and good(text):
                near = self._earlier.nearest(str(text.text), bundle.kind, text.language)
                if near is not None:
                    text.faults[NEAR_DUPLICATE] = f"it nearly repeats the prompt of {near}"
        prompts = draft.prompts()
        if config.translate_answers == "complete" and bundle.chosen is not None:
            answered = {bundle.response_language, *bundle.answers, *draft.translated_answers()}
            prompts = {code: prompt for code, prompt in prompts.items() if code in answered}
        there = [code for code in config.languages if code in prompts]
        if len(there) < min(config.min_languages, len(config.languages)):
            return {TOO_FEW: f"it has prompts in {len(there)} of {len(config.languages)} languages: {there!r}"}
        answers = {code: pair for code, pair in bundle.answers.items() if code in prompts} | draft.translated_answers()
        made = remade(bundle, prompts=prompts, answers=answers if bundle.chosen is not None else {})
        if config.answers is not None and bundle.kind in config.answers.kinds:
            with_own = _with_own(made, draft.own, config.answers)
            if not isinstance(with_own, Bundle):
                return with_own
            made = with_own
        try:
            make_bundle({name: value for name, value in record(made, "").items() if name in FIELDS})
        except BundleError as error:
            return {INVALID: str(error)}
        for code, prompt in made.prompts.items():
            self._earlier.add(prompt, bundle.kind, code, bundle.bundle_id)
        return made

    def _rows(self, draft: Draft, made: Bundle | dict[str, str]) -> Iterator[str]:
        """Rows of the texts and own answers that are not used; all are counted."""
        bundle = draft.bundle
        for code, prompt in bundle.prompts.items():
            if isinstance(made, Bundle) and code not in made.prompts:
                yield _line(bundle.bundle_id, bundle.kind, code, "prompt", text=prompt, checks={INCOMPLETE: _NOT_USED})
            elif code in self._config.languages:
                self._counts.given(code, "prompt")
        for text in draft.texts:
            identified = self._tools.identifier.reads(text.language)
            self._counts.text(text.language, text.part, text.faults, text.chrf, identified=identified)
            if text.faults:
                more = {"source": text.source, "text": text.text, "back": text.back, "checks": text.faults}
                yield _line(bundle.bundle_id, bundle.kind, text.language, text.part, **more)
        for own in draft.own:
            self._counts.own(own, bundle.kind, identified=self._tools.identifier.reads(own.language))
            if own.outcome != "kept":
                more = {"text": own.answer, "refusal": own.refusal, "checks": {own.outcome: own.reason}}
                yield _line(bundle.bundle_id, bundle.kind, own.language, "own answer", **more)


def _labelled(draft: Draft) -> Iterator[str]:
    """What the model said in each language, used or not, in the format of labelled responses; no refusal of settings.

    The label is the judge's verdict, also of a text in another language or cut off; without a verdict there is no line.
    """
    prompts = draft.prompts()
    for own in draft.own:
        for reply in own.replies:
            if reply.text and reply.behaviour in LABELS:
                row = {
                    "prompt": prompts.get(own.language, ""),
                    "prompt_kind": draft.bundle.kind,
                    "language": own.language,
                }
                label = {"response": reply.text, "label": reply.behaviour}
                yield json.dumps({**row, **label}, ensure_ascii=False)


def _mark_unused(draft: Draft, made: Bundle | dict[str, str]) -> None:
    """Say of texts and own answers that pass, and are not in a written bundle, why they are not."""
    passed = [text for text in draft.texts if good(text)]
    kept = [own for own in draft.own if own.outcome == "kept"]
    if not isinstance(made, Bundle):
        reason = f"its bundle is rejected: {', '.join(made)}"
        for text in passed:
            text.faults[BUNDLE_REJECTED] = reason
        for own in kept:
            own.outcome, own.reason = BUNDLE_REJECTED, reason
        return
    for own in kept:
        if own.language not in made.prompts:
            own.outcome, own.reason = "no prompt", "its prompt is rejected"
    translated = draft.translated_answers()
    for text in passed:
        if text.part != "prompt" and text.language not in translated:
            text.faults[INCOMPLETE] = "its prompt or its counterpart is not used, or its counterpart is the same"
        elif text.language not in made.prompts:
            text.faults[INCOMPLETE] = _NOT_USED


def _with_own(bundle: Bundle, own: Sequence[Own], settings: OnPolicySection) -> Bundle | dict[str, str]:
    """A bundle with the model's own answers where there are any; in English there must be one, of either origin."""
    keep_given = settings.otherwise == "given"
    kept = dict[str, AnswerPair]()
    for each in own:
        # A prompt may have turned out to be a near-duplicate since it was answered.
        if each.outcome == "kept" and each.language in bundle.prompts:
            pair = _pair(bundle, each, pairs=settings.pairs)
            if pair.rejected is None and settings.pairs:
                reason = f"the model's plain answer is not one ({each.plain}: {each.reason}), and none is given"
                each.outcome, each.reason = "no rejected answer", reason
            elif equal(pair):
                each.outcome, each.reason = "equal answers", "chosen and rejected are the same"
            else:
                kept[each.language] = pair
    english = kept.pop("en", None)
    if english is None:
        reason = next((f"{each.outcome}: {each.reason}" for each in own if each.language == "en"), "it was not asked")
        if not keep_given or bundle.chosen is None or bundle.response_language != "en":
            return {NO_OWN: reason}
        return remade(bundle, answers={**bundle.answers, **kept})
    answers = dict(bundle.answers) if keep_given else {}
    if keep_given and bundle.chosen is not None:
        answers[bundle.response_language] = AnswerPair(bundle.chosen, bundle.rejected)
    answers |= kept
    answers.pop("en", None)
    return remade(
        bundle, chosen=english.chosen, rejected=english.rejected, response_language="en", answers=answers
    )  # fmt: skip


def _pair(bundle: Bundle, own: Own, *, pairs: bool) -> AnswerPair:
    """The answer and the refusal, in the order that the bundle's kind asks for; without `pairs` the first alone."""
    if bundle.kind == "benign":
        return AnswerPair(own.answer, own.refusal if pairs else None)
    given = bundle.answers.get(own.language)
    known = bundle.rejected if own.language == bundle.response_language else None if given is None else given.rejected
    rejected = own.answer if own.answer and own.plain == "kept" else known
    return AnswerPair(str(own.refusal), rejected if pairs else None)


def _line(name: str, kind: str, language: str, part: str, **more: Any) -> str:
    fields = {"bundle_id": name, "kind": kind, "language": language, "part": part, **more}
    return json.dumps({key: value for key, value in fields.items() if value is not None}, ensure_ascii=False)
