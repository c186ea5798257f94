"""The types that packages exchange, and the legend of the letters in shapes.

    B bundles   L languages   P prompts (all languages of all bundles)   A answers   T tokens   R response tokens
    H hidden size   D extractor size   V vocabulary   S segments of a row; in losses, min(L, D) singular values
    O openings of responses

A *bundle* is one prompt in several languages. What is forwarded at once is a prefix tree in a single row (`Tree`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar, cast

if TYPE_CHECKING:  # torch is imported by whoever makes tensors, not by whoever names them
    import numpy as np
    import torch
    from torch import Tensor

Kind = Literal["harmful", "benign"]

Pooling = Literal["mean_all", "mean_masked", "last"]
"""What stands for a sequence of prompt and answer: the mean over the states of all its tokens, over those of the
answer, or the state of the last one."""

Pairing = Literal["response", "own", "given", "shared", "crossed"]
"""Which answers of a bundle continue which of its prompts.

`response`: those in the response language, their own prompt. `own`: those in every language, the prompt in that
language. `given`: the same of those languages that a bundle has answers in. `shared`: those in the response language,
the prompts in every language. `crossed`: `own` and `shared`, and those in every language the prompt in the response
language.
"""


Scope = Literal["none", "response", "all"]
"""Behind which prompts of a bundle openings of responses are read: none, the one in the response language, or all."""


def primary_language(code: str) -> str:
    """The language of a BCP 47 tag without script and region: `zh` of `zh-Hant`."""
    return code.partition("-")[0]


@dataclass(frozen=True)
class AnswerPair:
    """The answers to a bundle's prompt in one language."""

    chosen: str
    rejected: str | None = None


@dataclass(frozen=True)
class Bundle:
    """One prompt in several languages, with answers in one of them or more.

    `chosen` and `rejected`, in `response_language`, are absent in prompt-only and evaluation bundles; `answers` are
    those in further languages. `bundle_id` is a hash of the content. `pair` is the same of bundles that are twins.
    """

    bundle_id: str
    kind: Kind
    prompts: Mapping[str, str]
    chosen: str | None = None
    rejected: str | None = None
    response_language: str = "en"
    source: str = ""
    category: str = ""
    answers: Mapping[str, AnswerPair] = field(default_factory=dict)
    pair: str = ""


class TokenAnswers(TypedDict):
    """Answers in a further language as ids; they continue `TokenRow.prompts[prompt]`."""

    prompt: int
    chosen: list[int]
    rejected: list[int] | None


@dataclass(frozen=True)
class TokenRow:
    """A bundle as token ids.

    `prompts[i]` is the whole chat-templated prompt of `languages[i]`, generation prompt included; `tapped[i]` is the
    index in it of the last token of the generation prompt. `chosen` and `rejected` are the answer's ids alone,
    end-of-turn token included, and continue `prompts[response_prompt]`; `answers` are those in further languages, in
    the order of their prompts. `truncated_*` count tokens cut off.
    """

    bundle_id: str
    kind: Kind
    languages: list[str]
    prompts: list[list[int]]
    tapped: list[int]
    response_prompt: int
    chosen: list[int] | None = None
    rejected: list[int] | None = None
    truncated_prompt_tokens: int = 0
    truncated_response_tokens: int = 0
    answers: list[TokenAnswers] = field(default_factory=list)
    pair: str = ""


@dataclass(frozen=True)
class Tree:
    """Sequences that share what they begin with, in one row of T tokens where each distinct beginning lies once.

    In causal attention a token's state depends on what comes before it alone, so one forward serves all sequences that
    begin alike. The row is S *segments* one after another: the head of the chat template, prompts that continue it,
    answers and openings of responses that continue those. `parents` says which segment, earlier in the row, each one
    continues (-1: none). A token attends to the tokens of its segment's ancestors and, in its own segment, to those up
    to itself; its position counts from the start of its sequence.

    First lie the head and the prompts that answers continue, then (from segment `answers` on) the answers, and last
    (from `prompt_only` on) prompts that are read but not answered, and (from `openings` on) openings of responses,
    those behind one prompt next to each other. So what a forward can do without is always at the end, and `first` cuts
    it off.

    For kernels that take sequences of different lengths, `keys` [K] lists for one segment after another the places in
    the row of what its last token attends to, in order of position; `query_bounds` and `key_bounds` [S + 1] (int32)
    are the bounds of the segments in the row and in `keys`. `starts`, `lengths` and `key_lengths` are their numbers.
    """

    input_ids: Tensor
    position_ids: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    answers: int
    prompt_only: int
    openings: int
    key_lengths: tuple[int, ...]
    keys: Tensor
    query_bounds: Tensor
    key_bounds: Tensor

    @property
    def tokens(self) -> int:
        """T, the tokens of the row."""
        return sum(self.lengths)

    def first(self, count: int) -> Tree:
        """The first `count` segments, at least one; what they are does not depend on the others."""
        tokens = sum(self.lengths[:count])
        return replace(
            self,
            input_ids=self.input_ids[:, :tokens],
            position_ids=self.position_ids[:, :tokens],
            starts=self.starts[:count],
            lengths=self.lengths[:count],
            parents=self.parents[:count],
            answers=min(self.answers, count),
            prompt_only=min(self.prompt_only, count),
            openings=min(self.openings, count),
            key_lengths=self.key_lengths[:count],
            keys=self.keys[: sum(self.key_lengths[:count])],
            query_bounds=self.query_bounds[: count + 1],
            key_bounds=self.key_bounds[: count + 1],
        )


@dataclass(frozen=True)
class Answers:
    """A answers, as `AnswerRows` says to which prompts.

    `predicting` [R] are the places in the tree's row whose next token is a response token, `targets` [R] those
    response tokens, and `row_of_target` [R] the answer (0..A-1) each belongs to, ascending. An answer's last token
    predicts nothing: it is a target, and not in the row but where states of whole sequences are read.
    """

    predicting: Tensor
    targets: Tensor
    row_of_target: Tensor


@dataclass(frozen=True)
class AnswerRows:
    """Whose the A answers of B bundles are; chosen and rejected ones have the same A rows.

    `bundle` [A], ascending, `prompt` [A] the column of the language of the prompt that each continues, and `answer` [A]
    that of its own language. `response` [B] are the rows of the answers in the response language to the prompt in it,
    which are each bundle's first.
    """

    bundle: Tensor
    prompt: Tensor
    answer: Tensor
    response: Tensor


@dataclass(frozen=True)
class Sequences:
    """Where the tokens of whole sequences are, the response-language prompt and an answer to it: B chosen, B rejected.

    `places` [K] are their places in the tree's row, `sequence` [K] whose they are: bundle b's chosen answer is b, its
    rejected one B + b. `is_answer` [K] says which are of the answer, `last` [2B] are the places of the last tokens.
    """

    places: Tensor
    sequence: Tensor
    is_answer: Tensor
    last: Tensor


@dataclass(frozen=True)
class Prompts:
    """All prompts of B bundles, by bundle and language: `tapped` [P] are the places of their tapped tokens in the row.

    `bundle_of_prompt` [P] and `language_of_prompt` [P] place each prompt in a [B, L] grid.
    """

    tapped: Tensor
    bundle_of_prompt: Tensor
    language_of_prompt: Tensor


@dataclass(frozen=True)
class Openings:
    """Openings of responses behind P prompts: where the O openings of all of them are predicted.

    `predicting` [U] are the places in the tree's row whose next token is read, and `targets` [U, K] the tokens that
    openings go on with there, -1 where there are less than K. `steps` [O, D] has each opening's targets in `targets`
    flattened, and `of_prompt` [P, N] each prompt's openings; U * K and O stand where there is none.
    `bundle_of_prompt` [P] and `language_of_prompt` [P] place each prompt in a [B, L] grid.
    """

    predicting: Tensor
    targets: Tensor
    steps: Tensor
    of_prompt: Tensor
    bundle_of_prompt: Tensor
    language_of_prompt: Tensor


@dataclass(frozen=True)
class BenignPlaces:
    """Where benign bundles' next tokens are compared with the reference's, K places of a tapped batch.

    In each language of a bundle: where the tokens of its chosen answer are predicted, if one is read behind the prompt
    in it, else where the first token of a response is. `answers` are those of the first kind, by their indices in
    `Answers.predicting` of the chosen answers, and `prompts` those of the second, by their places in the tree's row.
    For the first and then the second, `bundle` [K] says whose each is, and `share` [K] is its share in its bundle's
    mean. A batch without benign bundles has one place of share 0: all workers do the same.
    """

    answers: Tensor
    prompts: Tensor
    bundle: Tensor
    share: Tensor


@dataclass(frozen=True)
class Batch:
    """What one worker forwards at once.

    `weight` [B] multiplies each bundle's losses in their sum: workers / bundles of the optimizer step's batch, since an
    engine takes the mean over workers, or 0 where a worker forwards a bundle for nothing; `term_weight` [B] is the same
    for the terms on representations. `groups` has the group of each bundle; those of equal number, which are
    neighbours, are compared with each other by some terms. `languages` names the L columns of the grid; it is the same
    list on every worker and step. `harmful` [B] says of which of the `kinds` a bundle is. `prompts` is None where the
    step does not tap: then `tree` holds no prompt but those that answers continue. `rows` says whose the A answers are;
    `sequences` is there where states of them are pooled, `openings` where a step reads how responses would open,
    `benign` where a term compares next tokens.
    `reference_chosen` and `reference_rejected` are summed response log-probs of the frozen reference: [A], or [B] where
    it is asked about answers in the response language alone. `reference_state` [B, H] is its tapped state of each
    bundle's response prompt, `reference_pooled` [2, B, H] its states pooled over sequences, where those were cached.
    """

    bundle_ids: tuple[str, ...]
    kinds: tuple[Kind, ...]
    harmful: Tensor
    languages: tuple[str, ...]
    weight: Tensor
    term_weight: Tensor
    groups: tuple[int, ...] | None
    tree: Tree
    chosen: Answers
    rejected: Answers | None
    rows: AnswerRows
    prompts: Prompts | None
    sequences: Sequences | None = None
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    reference_state: Tensor | None = None
    reference_pooled: Tensor | None = None
    openings: Openings | None = None
    benign: BenignPlaces | None = None

    @property
    def taps(self) -> bool:
        """Whether the hidden states of all prompts are wanted."""
        return self.prompts is not None


@dataclass(frozen=True)
class ReferenceRows:
    """The frozen reference's outputs for N bundles, cached; None is what the objective does not need.

    `chosen` and `rejected` are summed log-probs in nats, float64: [N] of the answers in the response language, or
    [N, L] of those in every language, NaN where a bundle lacks it. `state` [N, H] are float32 hidden states of the last
    token of the response-language prompt at the tapped layer, `pooled` [N, 2, H] float32 states of the last layer,
    pooled over the response-language prompt and its chosen or rejected answer.
    """

    chosen: np.ndarray | None = None
    rejected: np.ndarray | None = None
    state: np.ndarray | None = None
    pooled: np.ndarray | None = None

    def take(self, rows: Sequence[int]) -> ReferenceRows:
        """Those of some bundles, in memory."""
        return ReferenceRows(*(None if column is None else column[list(rows)] for column in vars(self).values()))


class ReferenceTable(Protocol):
    """What the frozen reference says of each row of a token artefact, wherever it is kept."""

    def take(self, rows: Sequence[int]) -> ReferenceRows:
        """What it says of some rows, in memory."""
        ...


@dataclass(frozen=True)
class ResponseLogProbs:
    """Per answer: `total` [A] is its summed log-prob in nats, `length` [A] its number of tokens.

    A is B where a bundle has one answer of a kind, in the response language.
    """

    total: Tensor
    length: Tensor


@dataclass(frozen=True)
class LossOutput:
    """A loss to differentiate, and detached numbers [B] to log: of all bundles, and of those that have the terms."""

    loss: Tensor
    metrics: Mapping[str, Tensor]
    term_metrics: Mapping[str, Tensor] = field(default_factory=dict)


PROMPT_TOO_LONG = "prompt_too_long"
"""Finish reason of a prompt that leaves no tokens for a response and is not sent to the model."""
ENGINE_FAULT = "engine_fault"
"""Finish reason of a prompt on which an engine died, hung or failed, alone and as often as it was asked."""
UNFINISHED_THOUGHTS = "unfinished_thoughts"
"""Finish reason of a response that is all thoughts, which did not end within `max_new_tokens`."""
FORBIDDEN_THOUGHTS = "forbidden_thoughts"
"""Finish reason of a response that begins with thoughts although `asking.reasoning=forbid`."""


@dataclass(frozen=True)
class Answer:
    """What a judge is given: one response, to one prompt, asked in `language`.

    `finish` is why the response ended: `stop`, `length` (cut off at max_new_tokens) or a reason it was never made.
    """

    prompt: str
    response: str
    language: str
    kind: Kind
    finish: str = "stop"


Behaviour = Literal["refused", "complied", "degenerate", "unparsed"]
Safety = Literal["safe", "unsafe", "degenerate", "unparsed"]
Measure = Literal["refused", "safe"]
"""What a rate counts: responses that refuse, or responses that a safety judge calls safe."""


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one response, on the one or two measures that it gives; None for a measure it does not give.

    `behaviour`: does the response refuse or comply? `safety`: is it harmful? `unparsed` means that the judge could not
    tell, `degenerate` that there is nothing to judge (gibberish is neither a refusal nor help); neither ever counts as
    refused or safe. `categories` are the judge's own names of what is harmful. `margin` is a number in nats where the
    judge has one (see `judges.likelihood`): above 0 leans to refusal. `fault` says why a judge or its translator that
    was out could tell nothing, which is no word on the response; else it is None.
    """

    behaviour: Behaviour | None = None
    safety: Safety | None = None
    reason: str = ""
    categories: tuple[str, ...] = ()
    margin: float | None = None
    fault: str | None = None


Via = Literal["", "translated", "unmeasured", "uncovered"]
"""How a judge came to read a language, the surest way first: it declares it (""), by translation, by word lists whose
errors nobody has counted, or not at all but asked for anyway."""


@dataclass(frozen=True)
class ScoreRow:
    """Counts of one (benchmark, kind, language, measure).

    `hits` are refused (or safe) responses, `misses` complied (or unsafe) ones; hits, misses, degenerate and unparsed
    sum to n. `rate` is hits / n with its 95 % interval; `margin` the mean of the judge's margins in nats, if it has
    any; `judge` the name of the judge. `design_effect` is how many times the variance of `rate` is that of n
    independent responses: above 1 where several responses are to one prompt (`stats.intervals.design_effect`);
    `misses_effect` is the same of misses / n.
    """

    benchmark: str
    kind: Kind
    language: str
    measure: Measure
    n: int
    hits: int
    misses: int
    degenerate: int
    unparsed: int
    rate: float
    low: float
    high: float
    via: Via = ""
    margin: float | None = None
    judge: str = ""
    design_effect: float = 1.0
    misses_effect: float = 1.0


T = TypeVar("T")


def move(value: T, device: torch.device | str) -> T:
    """`value` with every tensor in it on `device`."""
    return _each_tensor(value, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(value: T) -> T:
    """`value` with every tensor in it in pinned memory, from which a GPU copies while it computes."""
    return _each_tensor(value, lambda tensor: tensor.pin_memory())


def _each_tensor(value: T, change: Callable[[Any], Any]) -> T:
    """`value` with every tensor in it changed; dataclasses and tuples of them are walked."""

    def walk(item: Any) -> Any:
        if is_dataclass(item) and not isinstance(item, type):
            return replace(item, **{f.name: walk(getattr(item, f.name)) for f in fields(item)})
        if isinstance(item, tuple) and any(is_dataclass(part) for part in item):
            return tuple(walk(part) for part in item)
        return change(item) if hasattr(item, "pin_memory") else item

    return cast(T, walk(value))
