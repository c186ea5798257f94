"""The guard judges: a guard model in an engine of its own reads prompt and response, and its reply is the verdict.

None of the weights is needed to build or test this package; `guard_formats` is tested on documented replies.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError

from mlc_ray.config import JudgeSection
from mlc_ray.generate.engine import PROMPT_TOO_LONG, Device, Engine, check_lengths, prepare_process
from mlc_ray.judges.base import JudgeError
from mlc_ray.judges.guards.formats import FORMATS, GuardFormat
from mlc_ray.runs import resolve_model
from mlc_ray.types import Answer, Measure, Verdict

_PROBE = ("qS7zK2vX9w", "hT4mB8cN1r")  # a prompt and a response that no template holds by itself


def guard_facts(name: str) -> tuple[tuple[Measure, ...], frozenset[str]]:
    """What the guard `name` answers, and the primary codes of the languages it declares; needs no weights.

    Raises `JudgeError` if there is no such guard.
    """
    guard = _format(name)
    return guard.measures, guard.languages


def check_guard(settings: JudgeSection) -> None:
    """Raise what can be known of a guard's weights and settings before an engine starts.

    `ModelPathError`, or `EngineError` where a reply would not fit in `judge.engine.max_model_len`.
    """
    check_lengths(resolve_model(settings.model or ""), settings.engine, _format(settings.name).max_new_tokens)


class GuardJudge:
    """A guard model in an `Engine` (its own, unless one that serves it is given); a `Judge`.

    The weights are those of `settings.model` (folder or hub name), in one of the formats of `guard_formats`. Raises
    `JudgeError` if its chat template does not write out both messages, `ModelPathError`, `EngineError`.
    """

    def __init__(self, settings: JudgeSection, device: Device, *, shared: Engine | None = None):
        check_guard(settings)
        prepare_process(settings.engine, device)

        from mlc_ray.data.tokens import load_tokenizer

        self.settings = settings
        self.format = _format(settings.name)
        self.name: str = self.format.name
        self.measures = self.format.measures
        self.languages: frozenset[str] | None = self.format.languages
        model = resolve_model(settings.model or "")
        self._tokenizer = load_tokenizer(model, trust_remote_code=settings.engine.trust_remote_code)
        check_template(self.format, self._tokenizer)
        self._engine = shared or Engine(model, settings.engine, device=device)

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """A verdict per answer, in order.

        `unparsed` without asking: an empty response, a response that was never made, and texts that the guard's
        template changes. `unparsed` too: a conversation that is too long for the guard's context (it is not cut), a
        reply outside the documented format, and the whole batch if the engine fails on it.
        """
        verdicts: dict[int, Verdict] = {}
        asked: list[tuple[int, tuple[str, ...]]] = []
        for index, answer in enumerate(answers):
            if fault := _unfit(answer):
                verdicts[index] = self.format.unparsed(fault)
                continue
            texts = self.format.render(self._tokenizer, answer.prompt, answer.response)
            if _holds(texts, answer.prompt, answer.response):
                asked.append((index, texts))
            else:
                verdicts[index] = self.format.unparsed("the guard's chat template drops or changes the text")
        ids = [self._ids(text) for _, texts in asked for text in texts]
        try:
            replies = iter(self._engine.generate(ids, self.format.max_new_tokens))
        except (RuntimeError, ValueError) as error:
            # What the other batches brought is kept, and max_unparsed decides whether so much is missing that it fails.
            verdicts |= {index: self.format.unparsed(f"engine: {error}") for index, _ in asked}
            return [verdicts[index] for index in range(len(answers))]
        for index, texts in asked:
            parts = [next(replies) for _ in texts]
            if any(part.finish == PROMPT_TOO_LONG for part in parts):
                tokens = max(part.prompt_tokens for part in parts)
                verdicts[index] = self.format.unparsed(
                    f"prompt and response take {tokens} tokens in the guard's template, too many for "
                    f"judge.engine.max_model_len={self.settings.engine.max_model_len}; the guard was not asked"
                )
                continue
            read = [self.format.parse(part.text, part.finish, self.settings) for part in parts]
            verdicts[index] = self.format.combine(read)
        return [verdicts[index] for index in range(len(answers))]

    def close(self) -> None:
        """Free the engine's memory; the judge cannot be used afterwards."""
        self._engine.close()

    def _ids(self, text: str) -> list[int]:
        # Rendered texts hold their BOS.
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def check_template(guard: GuardFormat, tokenizer: object) -> None:
    """Raise `JudgeError` if the guard's prompt cannot be made by this tokenizer, or does not hold both messages."""
    path = getattr(tokenizer, "name_or_path", "")
    if guard.name != "wildguard" and not getattr(tokenizer, "chat_template", None):
        raise JudgeError(f"judge.model={path!r}: its tokenizer has no chat template, which {guard.name!r} needs")
    try:
        texts = guard.render(tokenizer, *_PROBE)
    except (TemplateError, TypeError) as error:
        raise JudgeError(
            f"judge.model={path!r}: its chat template does not take the messages of judge.name={guard.name!r}: {error}"
        ) from None
    if not _holds(texts, *_PROBE):
        raise JudgeError(
            f"judge.model={path!r}: its chat template does not write out both a user's and an assistant's message; "
            f"are these weights for judge.name={guard.name!r}?"
        )


def _format(name: str) -> GuardFormat:
    if name not in FORMATS:
        raise JudgeError(f"judge.name={name!r} is no guard model; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def _unfit(answer: Answer) -> str:
    """Why there is nothing to ask a guard about, or ''. An answer cut at its length limit is judged as far as it is."""
    if answer.finish not in ("stop", "length"):
        return f"there is no response (finish {answer.finish!r})"
    return "" if answer.response.strip() else "the response is empty"


def _holds(texts: Sequence[str], prompt: str, response: str) -> bool:
    # Templates may trim the ends of a message.
    return all(prompt.strip() in text and response.strip() in text for text in texts)
