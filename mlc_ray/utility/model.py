"""lm-evaluation-harness's view of a pool of engines. Imported only where the harness is installed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import jinja2
import pyarrow as pa
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlc_ray.config import PLAIN_CHAT, ChatSection
from mlc_ray.config.chat import dated
from mlc_ray.data.tokens import load_tokenizer
from mlc_ray.generate.pool import EnginePool
from mlc_ray.progress import phase
from mlc_ray.score.kept import Kept
from mlc_ray.utility.file import UtilityError
from mlc_ray.utility.stage import ASKED

logger = logging.getLogger(__name__)

_MOST_NEW_TOKENS = 256  # the harness's own, where a task says none


class PooledLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model that the engines of a `utility.stage.Completer` pool serve, asked by the harness.

    Texts become tokens, and long questions are cut, as by the harness's own class for vLLM: a question that does not
    fit loses its front.

    Args:
        pool: is open, and serves `model`.
        model: Hugging Face folder or hub name.
        max_length: longest question with its answer, in tokens: `engine.max_model_len` of the pool.
        chat: what the chat template is given; its system prompt is the harness's to give (`system_instruction`).
        kept: what an earlier measurement that ended early was told already, and where blocks that are done are kept.
        trust_remote_code: run the tokenizer's own Python code.
    """

    def __init__(
        self,
        pool: EnginePool,
        model: str,
        *,
        max_length: int,
        chat: ChatSection = PLAIN_CHAT,
        kept: Kept | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = load_tokenizer(model, trust_remote_code=trust_remote_code)
        self._chat = {**chat.arguments, **dated(chat.date)}
        self.max_length = max_length
        self._pool, self._kept = pool, kept
        self._cut = 0

    # ------------------------------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text that nothing precedes: the one that begins texts, else that ends them."""
        begins = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else int(begins)

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with those that begin one unless it has them (as out of a chat template)."""
        if not string:
            return []
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            given = {"add_special_tokens": False}
        return list(self.tokenizer(string, return_attention_mask=False, **given).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text; without its system message, and with a warning, where the template has none."""
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        options = {**self._chat, **ends}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options))
        except jinja2.TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise UtilityError(f"the chat template cannot be used: {error}; set chat_template=false") from None
            logger.warning("the chat template takes no system message, which is left out: %s", error)
            return str(self.tokenizer.apply_chat_template(others, tokenize=False, **options))

    # -------------------------------------------------------------------------------------------------- what is asked

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log P(continuation | context) in nats, and whether greedy decoding would give it, for each request.

        Raises:
            UtilityError: a continuation alone is longer than `max_length`, or engines fail on a request.
        """
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log P of each whole text, in nats: of its windows of at most `max_length` tokens, each token once.

        Raises:
            UtilityError: engines fail on a request.
        """
        windows: list[tuple[int, list[int], list[int]]] = []
        for index, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,  # a token before the window, and one that vLLM samples behind it
                context_len=1,
            )
            windows += [(index, *window) for window in map(make_disjoint_window, cut)]
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens([(("", ""), context, tail) for _, context, tail in windows])
        for (index, *_), (log_prob, _greedy) in zip(windows, found, strict=True):
            totals[index] += log_prob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """A text for each request, up to what ends it.

        Raises:
            UtilityError: an answer alone may be as long as `max_length`, or engines fail on a request.
        """
        rows: list[dict[str, Any]] = []
        ends: list[list[str]] = []
        for index, request in enumerate(requests):
            context, given = request.args
            sampling = dict(normalize_gen_kwargs(given, default_max_gen_toks=_MOST_NEW_TOKENS))
            until = handle_stop_sequences(sampling.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
            tokens = int(sampling.pop("max_gen_toks"))
            # A task that says neither is answered greedily, though vLLM's own default is to draw at 1.
            temperature = 1.0 if sampling.pop("do_sample") else 0.0
            if tokens >= self.max_length:
                raise UtilityError(
                    f"a task asks for answers of {tokens} tokens, which leaves no room for a question in "
                    f"engine.max_model_len={self.max_length}; set it to more"
                )
            ids, tokens = maybe_truncate(self.tok_encode(context), tokens, self.max_length, side="left", verbose=True)
            own: dict[str, Any] = {"skip_special_tokens": False, "spaces_between_special_tokens": False, "seed": index}
            own["temperature"] = temperature
            sampling = {**own, **sampling, "max_tokens": tokens, "stop": until}
            rows.append({"ids": ids, "start": None, "sampling": json.dumps(sampling)})
            ends.append(until)
        texts = [row["text"] for row in self._ask(rows)]
        return [postprocess_generated_text(text, until, None) for text, until in zip(texts, ends, strict=True)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = self.max_length - 1  # vLLM samples one token behind
        rows: list[dict[str, Any]] = []
        for _texts, context, tail in requests:
            over = max(0, len(context) + len(tail) - longest)
            if len(context) <= over:
                raise UtilityError(
                    f"an answer of a task takes {len(tail)} tokens, more than engine.max_model_len={self.max_length} "
                    "leaves behind a question; set it to more"
                )
            self._cut += over > 0
            rows.append({"ids": [*context, *tail][over:], "start": len(context) - over, "sampling": None})
        if self._cut:
            logger.warning(
                "%d of %d questions are longer than engine.max_model_len=%d and lose their front",
                self._cut,
                len(requests),
                self.max_length,
            )
            self._cut = 0
        asked = [row for row in rows if row["start"] < len(row["ids"])]
        found = iter(self._ask(asked))
        return [
            (float((said := next(found))["log_prob"]), bool(said["greedy"]))
            if row["start"] < len(row["ids"])
            else (0.0, True)  # nothing is always said
            for row in rows
        ]

    def _ask(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the engines say, in the order of `rows`."""
        # Those that begin alike stand together: what they have in common is computed once.
        order = sorted(range(len(rows)), key=lambda index: rows[index]["ids"])
        table = pa.Table.from_pylist([rows[index] for index in order], schema=ASKED)
        said = self._said(table)
        if faults := [row["fault"] for row in said if row["fault"] is not None]:
            raise UtilityError(
                f"engines fail on {len(faults)} of {len(rows)} questions, the first time by: {faults[0]}"
            )
        found = sorted(zip(order, said, strict=True), key=lambda pair: pair[0])
        return [row for _, row in found]

    def _said(self, table: pa.Table) -> list[dict[str, Any]]:
        """What the engines say of each row, now or in an earlier measurement."""
        keys, found = ([""] * len(table), [None] * len(table)) if self._kept is None else self._kept.look(table)
        missing = [at for at, row in enumerate(found) if row is None]

        def landed(first: int, columns: pa.Table) -> None:
            if self._kept is not None:
                self._kept.land([keys[at] for at in missing[first : first + len(columns)]], columns)

        with phase("utility", len(table), "questions", done=len(table) - len(missing)) as progress:
            rows = table.take(pa.array(missing, pa.int64()))
            said = self._pool.map(rows, progress=progress, landed=landed).to_pylist() if missing else []
        news = dict(zip(missing, said, strict=True))
        return [news[at] if row is None else row for at, row in enumerate(found)]
