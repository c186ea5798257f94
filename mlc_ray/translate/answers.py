"""A model's own answers to the prompts of a shard: asked plainly, and asked to decline.

Of a benign bundle the chosen answer is what the model says to its prompt, where the judge says that it answers and
lingua that it does so in the prompt's language; the rejected one is a refusal. Of a harmful bundle it is the reverse.
Of a language that lingua does not know, the script is checked, and that the text is not English.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlc_ray.config import ChatSection, OpeningsSection
from mlc_ray.config.translate import OnPolicySection
from mlc_ray.data.bundles import drawn_order, pair_number
from mlc_ray.errors import MlcRayError
from mlc_ray.generate.blocks import joined
from mlc_ray.generate.engine import Device
from mlc_ray.generate.replica import Part
from mlc_ray.generate.stage import PROMPTS, Generator
from mlc_ray.judges.base import make_reader
from mlc_ray.judges.languages import prose
from mlc_ray.judges.openings import refusal_openings
from mlc_ray.judges.understanding import merely_not_understood
from mlc_ray.report.languages import name_and_code
from mlc_ray.runs import REPLIES_FILE
from mlc_ray.score.plan import counted, plan_judging, reading
from mlc_ray.storage import Place
from mlc_ray.translate.asking import NOT_ASKED, Work, cap_reached
from mlc_ray.translate.checks import Pair, Tools, script, template
from mlc_ray.translate.drafts import Draft, Outcome, Own, Reply, Shard
from mlc_ray.translate.languages import named
from mlc_ray.translate.requests import decline_request
from mlc_ray.types import Kind

PLAIN, DECLINE = "plain", "decline"


class OwnAnswersError(MlcRayError):
    """Own answers cannot be made as asked; the message names the setting to change."""


@dataclass(frozen=True)
class Said:
    """A response: its text, why it ended, and what the judge made of it."""

    text: str
    finish: str
    behaviour: str
    reason: str


def answering_part(settings: OnPolicySection, model: str, chat: ChatSection, device: Device) -> Part:
    """The engines of the model that answers."""
    made = {
        "model": model,
        "settings": settings.engine,
        "chat": chat,
        "max_new_tokens": settings.max_new_tokens,
        "device": device,
    }
    return Part("answering", Generator, made, counted(settings.engine, device))


class AnswerJudge:
    """The judge of a model's answers, in this process: one session, whatever the number of shards.

    Args:
        settings: who judges, and which kinds of prompts.
        languages: all that it may be asked about.
        usage: folder of this machine for what an endpoint did and cost.
        replies: the file of an endpoint's replies, which it starts from and adds to.

    Raises:
        UncoveredLanguageError: it may not be asked about one of them.
    """

    def __init__(self, settings: OnPolicySection, languages: Sequence[str], usage: Path, replies: Place) -> None:
        asked = [_row("", kind, code, PLAIN, "") for kind in settings.kinds for code in languages]
        judging = plan_judging(make_reader(settings.judge), _table(asked))
        parts = reading(judging, "cpu", rows=1, usage=usage, replies=replies)
        self._stages = [part.stage(**part.settings) for part in parts.values()]

    def said(self, answered: pa.Table) -> list[Said]:
        """What it makes of each response of a table of prompts and answers.

        Raises:
            CostCapError: an endpoint's cap is reached.
        """
        table = answered
        for stage in self._stages:
            table = joined(table, stage(table))
        found = [
            Said(row["response"].strip(), row["finish"], row["behaviour"] or "unparsed", row["reason"] or "")
            for row in table.to_pylist()
        ]
        if left := sum(each.reason.startswith(NOT_ASKED) for each in found):
            raise cap_reached(left, len(found))
        return found

    def close(self) -> None:
        """End the session of an endpoint."""
        for stage in self._stages:
            stage.close()


def check_refusals(settings: OnPolicySection, languages: Sequence[str]) -> None:
    """Check that prompts are in the language of each refusal in the settings.

    Raises:
        OwnAnswersError: none is, of all `languages` that prompts are in.
    """
    if unread := sorted(settings.refusals.keys() - set(languages)):
        raise OwnAnswersError(
            f"answers.refusals has {unread[0]!r}, which no prompt is in, only {', '.join(languages)}: remove it, or "
            "give it under the tag that the prompts have"
        )


def unlike_openings(settings: OnPolicySection) -> list[str]:
    """What is to be said of each refusal in the settings that begins, letter by letter, as no opening of its language.

    English ones, which runs count everywhere by default, are no reason to begin so in another language.
    """
    found = []
    for code, text in settings.refusals.items():
        openings = refusal_openings(code, OpeningsSection(english_everywhere=False))
        if not text.startswith(tuple(openings)):
            listed = f"begin it as one of its list does ({openings[0]!r}, ...), or " if openings else ""
            found.append(
                f"answers.refusals.{code}={text!r} begins with no opening of refusals in {name_and_code(code)}, and "
                f"terms such as `decision` count no other refusal: {listed}give its beginning to the run that is "
                f"trained on it by openings.further.{code}"
            )
    return found


def check_judge(settings: OnPolicySection, languages: Sequence[str], cache_dir: Path) -> None:
    """Check that the judge may be asked about all languages, and calls the refusals in the settings what they are.

    Args:
        settings: who judges, and the refusals, whose languages the judge is asked about too.
        languages: of prompts, as far as they are known.
        cache_dir: as of `BaseJudge.check_ready`.

    Raises:
        UncoveredLanguageError: it may not.
        OwnAnswersError: it does not call one of `refusals` a refusal.
        MlcRayError: what the judge raises before it starts.
    """
    given = settings.refusals
    languages = list(dict.fromkeys([*languages, *given]))
    judge = make_reader(settings.judge)
    judge.check_ready(cache_dir)
    asked = [_row("", kind, code, PLAIN, "") for kind in settings.kinds for code in languages]
    plan_judging(judge, _table(asked))
    if judge.runs != "inline" or not given:
        return  # an endpoint is not asked before anything else is sure
    rows = [
        {**_row("", settings.kinds[0], code, PLAIN, ""), "response": text, "finish": "stop"}
        for code, text in given.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        said = AnswerJudge(settings, languages, place, Place(place / REPLIES_FILE)).said(pa.Table.from_pylist(rows))
    for (code, text), verdict in zip(given.items(), said, strict=True):
        if verdict.behaviour != "refused":
            raise OwnAnswersError(f"answers.refusals.{code}={text!r} is no refusal: {verdict.reason}; write another")


def own_answers(
    shard: Shard, name: str, settings: OnPolicySection, languages: Sequence[str], work: Work, judge: AnswerJudge,
    tools: Tools,
) -> None:  # fmt: skip
    """Let the model answer the prompts of a shard, and say which of its answers are used.

    `languages` are all that prompts of the job may be in.
    """
    asked = list[tuple[Draft, str, str]]()
    for draft, used in _answering(shard, settings, languages):
        for code, prompt in draft.prompts().items():
            if code in used and settings.asks(draft.bundle.kind, code):
                asked.append((draft, code, prompt))
            elif code in used:
                draft.own.append(Own(code, "", "kept", refusal=settings.refusals[code], asked=False))
    rows = [_row(draft.bundle.bundle_id, draft.bundle.kind, code, PLAIN, prompt) for draft, code, prompt in asked]
    declining = [index for index, (draft, code, _) in enumerate(asked) if _declines(draft, code, settings)]
    for index in declining:
        draft, code, prompt = asked[index]
        request = decline_request(prompt, named(code).name)
        rows.append(_row(draft.bundle.bundle_id, draft.bundle.kind, code, DECLINE, request))
    if not rows:
        return
    answered = work.rows(f"answers-{name}", _table(rows), "prompts")
    prompts = [prompt for _, _, prompt in asked] + [asked[index][2] for index in declining]
    column = answered.schema.get_field_index("prompt")
    answered = answered.set_column(column, "prompt", pa.array(prompts, pa.string()))  # what the judge is to read
    said = judge.said(answered)
    refusals = dict(zip(declining, said[len(asked) :], strict=True))
    for index, (draft, code, prompt) in enumerate(asked):
        refusal = _refusal(settings, draft.bundle.kind, code, prompt, (said[index], refusals.get(index)), tools)
        own = _own(settings, draft.bundle.kind, code, said[index], refusal, tools)
        own.replies = [Reply(each.text, each.behaviour) for each in (said[index], refusals.get(index)) if each]
        draft.own.append(own)


def _answering(
    shard: Shard, settings: OnPolicySection, languages: Sequence[str]
) -> Iterator[tuple[Draft, Collection[str]]]:
    """Each bundle that is answered, and in which languages; twins of a shard in one that both have."""
    drafts = [draft for draft in shard.drafts if draft.bundle.kind in settings.kinds]
    origins = {draft.bundle.bundle_id: draft.bundle for draft in shard.drafts}
    numbers = [pair_number(origins.get(draft.twin_of, draft.bundle)) for draft in drafts]
    common = dict[int, set[str]]()
    for draft, number in zip(drafts, numbers, strict=True):
        own = {*draft.prompts()}
        common[number] = common.get(number, own) & own
    for draft, number in zip(drafts, numbers, strict=True):
        there = common[number] if settings.languages == "one_other" else draft.prompts()
        yield draft, answered_in(settings, number, there, languages)


def answered_in(settings: OnPolicySection, number: int, languages: Iterable[str], among: Iterable[str]) -> set[str]:
    """In which of its `languages` a bundle is answered; one other is drawn by its `number` from all those `among` which
    prompts are, and where the bundle lacks it, is the next one of them."""
    others = {*languages} - {"en"}
    if settings.languages == "english" or not others:
        return {"en"}
    if settings.languages == "all":
        return {"en", *others}
    return {"en", next(code for code in drawn_order({*among} - {"en"}, number) if code in others)}


def _declines(draft: Draft, code: str, settings: OnPolicySection) -> bool:
    return settings.needs_refusal(draft.bundle.kind) and code not in settings.refusals


def _refusal(
    settings: OnPolicySection, kind: Kind, code: str, prompt: str, said: tuple[Said, Said | None], tools: Tools
) -> tuple[str | None, str]:
    """The refusal to use in a language, or None and why there is none.

    It is the one of the settings, or of what was `said`, plainly and asked to decline, the first that can be used: a
    model's refusal of a prompt as it stands is nearest to what it does.
    """
    if not settings.needs_refusal(kind):
        return None, ""
    if code in settings.refusals:
        return settings.refusals[code], ""
    plain, declined = said
    if _no_refusal(plain, code, prompt, tools) is None:
        return plain.text, ""
    assert declined is not None
    fault = _no_refusal(declined, code, prompt, tools)
    return (declined.text, "") if fault is None else (None, f"asked to decline{fault}")


def _no_refusal(said: Said, code: str, prompt: str, tools: Tools) -> str | None:
    """Why a reply is no refusal to use; None where it is one."""
    if said.finish != "stop":
        return f", it ended with {said.finish!r}"
    if said.behaviour != "refused":
        return f", it did not: {said.reason}"
    if merely_not_understood(said.text, code):
        return ", it only says that it did not understand the question"
    fault = _other_language(said.text, code, tools) or template(Pair(prompt, said.text, code), tools)
    return None if fault is None else f": {fault}"


def _other_language(text: str, code: str, tools: Tools) -> str | None:
    """Why a text does not count as one in a language; it is to be in that alone, not to have a share of it."""
    if fault := tools.identifier.fault(text, code, tools.settings.min_confidence):
        return fault
    if not tools.identifier.reads(code):
        return script(Pair("", prose(text), code), tools)
    return tools.identifier.unclear(text, code)


def _own(
    settings: OnPolicySection, kind: Kind, code: str, said: Said, refusal: tuple[str | None, str], tools: Tools
) -> Own:
    """What becomes of an answer to a prompt of `kind` in the language `code`."""
    outcome, reason, text = _outcome(settings, code, said, tools)
    own = Own(code, text, outcome, reason, refusal[0], outcome, text != said.text)
    if kind == "harmful":  # the refusal is what is chosen; the plain answer is rejected where it complies
        own.outcome = "kept"
    if own.outcome == "kept" and refusal[0] is None and settings.needs_refusal(kind):
        own.outcome, own.reason = "no refusal", refusal[1]
    return own


def _outcome(settings: OnPolicySection, code: str, said: Said, tools: Tools) -> tuple[Outcome, str, str]:
    if said.finish not in ("stop", "length"):
        return "no answer", f"it ended with {said.finish!r}", said.text
    for behaviour in ("refused", "degenerate", "unparsed"):
        if said.behaviour == behaviour:
            return behaviour, said.reason, said.text
    if fault := _other_language(said.text, code, tools):
        return "other language", fault, said.text
    if said.finish == "stop":
        return "kept", "", said.text
    text = to_last_sentence(said.text) if settings.cut_off == "shorten" else None
    if text is None:
        return "cut off", f"it was cut off at answers.max_new_tokens={settings.max_new_tokens}", said.text
    return "kept", "", text


_SENTENCE_END = re.compile(r"(?:(?<![.!?؟।۔])[.!?؟।۔]+[\"'”’»)]*(?=\s|(?<!\d\.)$)|[。！？።፧။។]+[」』”）]*)")
_NO_END = re.compile(
    r"(?:^\W*\d+|(?:^|[\s(])(?:\d{1,2}|[^\W\d]|(?:[^\W\d]\.)+[^\W\d]|Dr|Mr|Mrs|Ms|Prof|St|vs|Sr|Sra|bzw))\.$",
    re.MULTILINE,
)
"""A list's number (`3.`), an initial or an abbreviation (`e.g.`, `Dr.`), whose full stop ends no sentence."""
_SHORTEST = 20


def to_last_sentence(text: str) -> str | None:
    """A text up to the end of its last whole sentence; None where too little is left."""
    for end in reversed([found.end() for found in _SENTENCE_END.finditer(text)]):
        left = text[:end]
        if not _NO_END.search(left) and left.count("```") % 2 == 0:  # else it would end within code
            return left if end >= _SHORTEST else None
    return None


# ------------------------------------------------------------------------------------------------------ rows, verdicts


def _row(name: str, kind: str, code: str, how: str, prompt: str) -> dict[str, Any]:
    return {
        "benchmark": how, "bundle_id": name, "kind": kind, "category": "", "language": code, "prompt": prompt,
        "sample": 0,
    }  # fmt: skip


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=PROMPTS)
