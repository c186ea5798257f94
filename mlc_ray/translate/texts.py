"""Two steps of a shard by a translator: twins of its prompts, and its texts in further languages."""

from __future__ import annotations

from collections.abc import Sequence

from mlc_ray.generate.translate import ENDPOINT_FAULT, Translation, read_translation, translation_request
from mlc_ray.judges.phrase_lists import normalise
from mlc_ray.translate.asking import Work
from mlc_ray.translate.checks import (
    CHECKS,
    NO_BACK_TRANSLATION,
    NO_TRANSLATION,
    Pair,
    Tools,
    back_translation,
    faults,
)
from mlc_ray.translate.drafts import Draft, Failed, Part, Shard, Text, remade
from mlc_ray.translate.languages import named
from mlc_ray.translate.requests import OTHER, kind_request, read_kind, read_twin, twin_request
from mlc_ray.types import Bundle, Kind

_OF_TWINS = ("language", "script", "length", "refusal", "template")  # what else is checked may differ in a twin


# ---------------------------------------------------------------------------------------------------------------- twins


def write_twins(shard: Shard, name: str, of: Sequence[Kind], work: Work, tools: Tools) -> None:
    """Add a twin to each draft of the kinds in `of`, or say why there is none; whether it is one is not judged yet."""
    origins = [draft.bundle for draft in shard.drafts if draft.bundle.kind in of]
    prompts = [bundle.prompts["en"] for bundle in origins]
    requests = [twin_request(text, OTHER[bundle.kind]) for text, bundle in zip(prompts, origins, strict=True)]
    for bundle, prompt, reply in zip(origins, prompts, work.ask(f"twins-{name}", requests), strict=True):
        twin = reply if reply.text is None else read_twin(reply.text, prompt, strict=tools.settings.markers)
        kind = OTHER[bundle.kind]
        if twin.text is None:
            shard.failed.append(Failed(bundle.bundle_id, kind, reply.text, "no twin", twin.reason))
        elif found := _twin_faults(prompt, twin.text, tools):
            shard.failed += [Failed(bundle.bundle_id, kind, twin.text, check, why) for check, why in found.items()][:1]
        else:
            made = Bundle("", kind, {"en": twin.text}, source=f"twin of {bundle.bundle_id}", category=bundle.category)
            shard.drafts.append(Draft(remade(made), twin_of=bundle.bundle_id))


def _twin_faults(prompt: str, twin: str, tools: Tools) -> dict[str, str]:
    if normalise(prompt) == normalise(twin):
        return {"copy": "it is the prompt itself"}
    pair = Pair(prompt, twin, "en")
    found = {name: CHECKS[name](pair, tools) for name in _OF_TWINS}
    return {name: reason for name, reason in found.items() if reason is not None}


def judge_twins(shard: Shard, name: str, work: Work, tools: Tools) -> None:
    """Take out the twins that are not of the other kind, as the model that is asked sees it."""
    twins = [draft for draft in shard.drafts if draft.twin_of]
    texts, lost = [draft.bundle.prompts["en"] for draft in twins], set[int]()
    for draft, text, reply in zip(
        twins, texts, work.ask(f"kinds-{name}", [kind_request(text) for text in texts]), strict=True
    ):
        verdict = reply if reply.text is None else read_kind(reply.text, text, strict=tools.settings.markers)
        kind = draft.bundle.kind
        if verdict.text == kind:
            continue
        check, reason = "no verdict", verdict.reason
        if verdict.text is not None:
            check, reason = "wrong kind", f"it is to be {kind}, and is called {verdict.text}"
        shard.failed.append(Failed(draft.twin_of, kind, text, check, reason))
        lost.add(id(draft))
    shard.drafts = [draft for draft in shard.drafts if id(draft) not in lost]


# ---------------------------------------------------------------------------------------------------------------- texts


def texts_of(draft: Draft, languages: Sequence[str], *, answers: bool) -> list[Text]:
    """What of a bundle is to be translated: its prompt, and with `answers` its chosen and rejected ones."""
    bundle, found = draft.bundle, list[Text]()
    given: list[tuple[Part, str | None]] = [("chosen", bundle.chosen), ("rejected", bundle.rejected)]
    for language in languages:
        if language not in bundle.prompts:
            found.append(Text(language, "prompt", bundle.prompts["en"]))
        if answers and language not in bundle.answers:
            found += [Text(language, part, source) for part, source in given if source is not None]
    return found


def translate_texts(
    shard: Shard, name: str, languages: Sequence[str], work: Work, tools: Tools, *, answers: bool
) -> None:
    """Translate what the drafts lack, check it, and translate what is good so far back into English."""
    strict = tools.settings.markers
    for draft in shard.drafts:
        draft.texts = texts_of(draft, languages, answers=answers)
    texts = [text for draft in shard.drafts for text in draft.texts]
    requests = [translation_request(text.source, "en", named(text.language)) for text in texts]
    for text, reply in zip(texts, work.ask(f"texts-{name}", requests), strict=True):
        found = reply
        if reply.text is not None:
            found = read_translation(reply.text, text.source, "en", named(text.language), strict=strict)
        text.text = found.text
        if found.text is None:
            text.faults = _no_translation(text, found, reply.text, tools)
        else:
            text.faults = faults(Pair(text.source, found.text, text.language), tools)
    if not tools.settings.min_chrf:
        return
    texts = [text for text in texts if not text.faults]
    requests = [translation_request(str(text.text), text.language) for text in texts]
    for text, reply in zip(texts, work.ask(f"back-{name}", requests), strict=True):
        found = reply
        if reply.text is not None:
            found = read_translation(reply.text, str(text.text), text.language, strict=strict)
        text.back = found.text
        if found.text is None:
            text.faults[NO_BACK_TRANSLATION] = found.reason
            continue
        text.chrf = tools.chrf(found.text, text.source)
        if reason := back_translation(Pair(text.source, str(text.text), text.language, found.text), tools):
            text.faults["back-translation"] = reason


def _no_translation(text: Text, found: Translation, reply: str | None, tools: Tools) -> dict[str, str]:
    """Why a reply is no translation: it may be a refusal."""
    refused = reply is not None and tools.refuses(reply, text.language)
    refused = refused or found.reason.startswith(f"{ENDPOINT_FAULT}the model refused")
    return {"refusal" if refused else NO_TRANSLATION: found.reason}
