"""What guard models share: a guard in an engine of its own reads prompt and response, and its reply is the verdict.

Each guard is a file beside this one: what it is asked (`render`), how its reply is read (`read`), its languages and the
address of its card. It is asked in the wording that it was trained on, and in no other: that of the chat template in
its own folder, or of a file that the user gives (`wording`). How the judged texts are kept inside their slots is in
`slots`.

A reply counts only if it is, letter case and blanks apart, what the model's documentation says it writes. All else is
`unparsed`, with the text in its reason: an empty reply, one that was cut off, lines twice or missing, prose around
them, words outside the documented ones, a verdict that its own categories contradict. None of the weights is needed to
build or test this package: formats and languages are those of the cards and papers, tested on documented replies.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from jinja2 import TemplateError
from pydantic import Field

from mlc_ray.config import EngineSection, JudgeSettings, ReadingJudgeSettings
from mlc_ray.config.chat import dated
from mlc_ray.config.paths import StoredPath
from mlc_ray.generate.engine import (
    PROMPT_TOO_LONG,
    Device,
    Engine,
    Generation,
    check_finished,
    check_lengths,
    prepare_process,
)
from mlc_ray.judges.base import Judge, JudgeError, Policy, Runs
from mlc_ray.judges.guards import replies, slots
from mlc_ray.judges.guards.replies import UnreadableError
from mlc_ray.judges.guards.slots import EscapeError, Filled, SlotError, Slots
from mlc_ray.judges.guards.window import check_window, context_of, needed_for
from mlc_ray.runs import resolve_model
from mlc_ray.storage import fingerprint, fingerprint_model
from mlc_ray.types import Answer, Verdict

Messages = list[dict[str, Any]]


class GuardEngineSection(EngineSection):
    """vLLM engines of a guard."""

    max_model_len: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Longest conversation in the guard's template plus reply, in tokens (0: what the prompts and "
        "max_new_tokens need, up to all positions that it has).",
    )


class GuardSettings(ReadingJudgeSettings):
    """What the settings of every guard model share."""

    model: StoredPath = Field(description="Folder, its URL, or hub name `NAME[#REVISION]` of the guard's weights.")
    engine: GuardEngineSection = Field(GuardEngineSection(), description="Its vLLM engines.")


class Guard(Judge):
    """One family of guard models.

    `card` is where format and languages are documented. `max_new_tokens` is ample for a reply; `verdict_first` marks
    replies that explain themselves after the verdict, so that being cut off there loses nothing. `policies` names what
    a model is asked about, one at a time; `has_template` is False for a family whose tokenizer has no chat template.
    `template_says` is a word that the family's template holds, in any case, and that of a chat model does not.
    """

    runs: ClassVar[Runs] = "engine"
    sources = (*Judge.sources, slots.__name__, replies.__name__)
    card: ClassVar[str]
    max_new_tokens: ClassVar[int]
    verdict_first: ClassVar[bool] = False
    policies: ClassVar[tuple[str, ...]] = ("",)
    has_template: ClassVar[bool] = True
    template_says: ClassVar[str] = ""

    Settings: ClassVar[type[GuardSettings]] = GuardSettings
    settings: GuardSettings

    # ------------------------------------------------------------------------------------ what a family differs in

    def render(self, tokenizer: Any, prompt: str, response: str) -> tuple[str, ...]:
        """The texts that the model is to complete, BOS included: one, or one for each of `policies`.

        By default the conversation in the guard's template.
        """
        return (conversation(tokenizer, prompt, response),)

    @abstractmethod
    def read(self, text: str) -> Verdict:
        """The verdict in a complete reply.

        Raises:
            UnreadableError: the reply is not in the documented format.
        """

    # ---------------------------------------------------------------------------------------------- what they share

    @property
    def engine(self) -> EngineSection:
        """The guard's engines."""
        return self.settings.engine

    @cached_property
    def asked(self) -> list[Slots]:
        """What the guard is asked, one for each of `policies`.

        Raises:
            JudgeError: the tokenizer cannot be loaded, or see `learn`; for some guards, no wording is given.
        """
        from mlc_ray.data.tokens import TemplateError as TokenizerError
        from mlc_ray.data.tokens import load_tokenizer

        path = self.settings.model
        try:
            code = self.settings.engine.trust_remote_code
            return self.learn(load_tokenizer(resolve_model(path), trust_remote_code=code))
        except TokenizerError as error:
            raise JudgeError(f"judge.model={path!r}: {error}") from None

    def learn(self, tokenizer: Any) -> list[Slots]:
        """What the guard is asked with this tokenizer.

        Raises:
            JudgeError: the tokenizer has no template that writes out both messages as they are, or the template is not
                that of this family.
        """
        where = f"judge.model={self.settings.model!r}"
        if self.has_template and not getattr(tokenizer, "chat_template", None):
            raise JudgeError(f"{where}: its tokenizer has no chat template, which {self.name!r} needs")
        try:
            found = [Slots(tokenizer, self._asking(tokenizer, number)) for number in range(len(self.policies))]
        except (TemplateError, TypeError) as error:
            raise JudgeError(
                f"{where}: its chat template does not take the messages of judge.name={self.name!r}: {error}"
            ) from None
        except SlotError as error:
            raise JudgeError(
                f"{where}: what judge.name={self.name!r} is asked cannot be made with its chat template: {error}; are "
                "these the weights of that guard?"
            ) from None
        if self.template_says not in found[0].framed.casefold():
            raise JudgeError(
                f"{where}: its chat template does not ask what {self.name!r} was trained to answer (the word "
                f"{self.template_says!r} is not in it); take the guard's own folder as {self.card} publishes it"
            )
        return found

    def identity_parts(self) -> list[str]:
        """The weights' fingerprint, settings of the family's own, and a hash of what the guard is asked."""
        known = {*GuardSettings.model_fields, "prompt"}  # of a file, what it says counts
        own = sorted(type(self.settings).model_fields.keys() - known)
        weights = f"weights={fingerprint_model(resolve_model(self.settings.model))}"
        asked = fingerprint([slots.framed for slots in self.asked])
        return [weights, *(f"{field}={getattr(self.settings, field)}" for field in own), f"asked={asked}"]

    def check_ready(self, cache_dir: Path) -> None:
        """Check the weights, that a reply fits, and what the guard is asked.

        Raises:
            ModelPathError: there are no weights at `judge.model`.
            EngineError: a reply would not fit in `judge.engine.max_model_len`.
            JudgeError: see `asked`; or nothing says how many positions the guard has.
        """
        model = resolve_model(self.settings.model, setting="judge.model")
        check_lengths(model, self._windowed(model), self.max_new_tokens)
        _ = self.asked
        super().check_ready(cache_dir)

    def fitted(self, prompts: Mapping[str, Sequence[str]], policy: Policy) -> JudgeSettings:
        """Check that the guard's context holds the longest prompt, all that `policy` may write, and a reply.

        An engine for all positions would need a key-value cache for as many: a window that is left open (0) is what
        was counted.

        Raises:
            JudgeError: it does not; the message has the numbers and the fix.
            TranslateError: as `Judge.fitted`.
        """
        window = self._windowed(resolve_model(self.settings.model)).max_model_len
        needed = check_window(self, prompts, policy, window=window)
        super().fitted(prompts, policy)
        return self._with_window(needed)

    def fitted_to(self, answers: Sequence[Answer]) -> JudgeSettings:
        """An open window becomes what these answers need, up to all positions."""
        if self.settings.engine.max_model_len:
            return self.settings
        positions = self._windowed(resolve_model(self.settings.model)).max_model_len
        return self._with_window(min(positions, needed_for(self, answers)))

    def start(self, device: Device, cache_dir: Path, *, shared: Engine | None = None) -> None:
        """Start an `Engine` with the weights, unless one that serves them is given.

        Raises:
            JudgeError: as `check_ready`.
            ModelPathError: there are no weights at `judge.model`.
            EngineError: the engine cannot be started so.
        """
        prepare_process(self.settings.engine, device)
        self.check_ready(cache_dir)
        model = resolve_model(self.settings.model)
        self._engine = shared or Engine(model, self._windowed(model), device=device)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict per answer, in order.

        `unparsed` without asking: an empty response, a response that was never made, a conversation that is too long
        for the guard's context (it is not cut), and a control token that cannot be kept apart. `unparsed` too: a reply
        outside the documented format. The reason says how many markers of the guard's own format were in the texts.

        Raises:
            RuntimeError, ValueError: what the engine raises; a fault of the engine is no verdict on any response.
        """
        verdicts: dict[int, Verdict] = {}
        questions: dict[int, list[Filled]] = {}
        for index, answer in enumerate(answers):
            if fault := _unfit(answer):
                verdicts[index] = self.unparsed(fault)
                continue
            try:
                questions[index] = [slots.fill(answer.prompt, answer.response) for slots in self.asked]
            except EscapeError as error:
                verdicts[index] = self.unparsed(f"{error}; the guard was not asked")
        ids = [question.ids for each in questions.values() for question in each]
        replies = iter(self._engine.generate(ids, self.max_new_tokens))
        for index, each in questions.items():
            verdicts[index] = self._verdict([next(replies) for _ in each], each[0])
        return [verdicts[index] for index in range(len(answers))]

    def close(self) -> None:
        """Free the engine's memory; the judge cannot be used afterwards."""
        self._engine.close()

    def parse(self, text: str, finish: str) -> Verdict:
        """The verdict in one reply. `finish` is the engine's reason why the reply ended (`stop`, `length`)."""
        if not text.strip():
            return self.unparsed(f"the guard's reply is empty (finish {finish!r})")
        if finish != "stop" and not (self.verdict_first and re.match(r"\s*\w+\W", text)):
            return self.unparsed(f"the guard's reply was cut off (finish {finish!r}): {text!r}")
        try:
            return self.read(text)
        except UnreadableError as error:
            return self.unparsed(f"the guard's reply is not in its format, {error}: {text!r}")

    def combine(self, verdicts: Sequence[Verdict]) -> Verdict:
        """The verdict from the replies on all `policies`: unsafe by any of them, safe only by every one of them."""
        if len(verdicts) == 1:
            return verdicts[0]
        unsafe = tuple(
            policy for policy, verdict in zip(self.policies, verdicts, strict=True) if verdict.safety == "unsafe"
        )
        if unsafe:
            return Verdict(safety="unsafe", reason=f"violates {', '.join(unsafe)}", categories=unsafe)
        for verdict in verdicts:
            if verdict.safety != "safe":
                return verdict
        return Verdict(safety="safe", reason="violates no policy")

    def _verdict(self, replies: Sequence[Generation], question: Filled) -> Verdict:
        """The verdict in the replies on one response, one for each of `policies`."""
        check_finished(replies)
        if any(reply.finish == PROMPT_TOO_LONG for reply in replies):
            tokens = max(reply.prompt_tokens for reply in replies)
            return self.unparsed(
                f"prompt and response take {tokens} tokens in the guard's template, too many for "
                f"judge.engine.max_model_len={self._engine.max_model_len}; the guard was not asked"
            )
        verdict = self.combine([self.parse(reply.text, reply.finish) for reply in replies])
        if not (question.markers or question.control_tokens):
            return verdict
        escaped = f"in the texts, {question.markers} markers and {question.control_tokens} control tokens of the guard"
        return replace(verdict, reason=f"{verdict.reason} ({escaped} were made ordinary text)")

    def _asking(self, tokenizer: Any, policy: int) -> Callable[[str, str], str]:
        return lambda prompt, response: self.render(tokenizer, prompt, response)[policy]

    def _with_window(self, tokens: int) -> GuardSettings:
        if self.settings.engine.max_model_len:
            return self.settings
        return self.settings.model_copy(
            update={"engine": self.settings.engine.model_copy(update={"max_model_len": tokens})}
        )

    def _windowed(self, model: str) -> EngineSection:
        """The engine's settings with the context that it is to have.

        Raises:
            JudgeError: it is left to the model, and nothing says how many positions that has.
        """
        engine = self.settings.engine
        if engine.max_model_len:
            return engine
        if (positions := context_of(model, trust_remote_code=engine.trust_remote_code)) is None:
            raise JudgeError(
                f"judge.model={self.settings.model!r}: its config.json has no max_position_embeddings; set "
                "judge.engine.max_model_len to the longest conversation plus reply, in tokens"
            )
        return engine.model_copy(update={"max_model_len": positions})


def _unfit(answer: Answer) -> str:
    """Why there is nothing to ask a guard about, or ''. An answer cut at its length limit is judged up to there."""
    if answer.finish not in ("stop", "length"):
        return f"there is no response (finish {answer.finish!r})"
    return "" if answer.response.strip() else "the response is empty"


def conversation(tokenizer: Any, prompt: str, response: str, **options: Any) -> str:
    """The pair in the template; where it does not take plain texts (multimodal guards), as lists of text parts."""
    pair = [message("user", prompt), message("assistant", response)]
    try:
        text = render(tokenizer, pair, **options)
    except (TemplateError, TypeError):
        text = ""
    if prompt.strip() in text and response.strip() in text:
        return text
    parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in pair]
    try:
        return render(tokenizer, parts, **options)
    except (TemplateError, TypeError):
        return text


def render(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """Messages in the tokenizer's chat template, with the beginning of the reply, and on the date of `config.chat`."""
    given = {**dated(), **options}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given))


def message(role: str, content: str) -> dict[str, Any]:
    """One message of a conversation."""
    return {"role": role, "content": content}
