"""Asking an OpenAI-compatible endpoint: many conversations at once, with a cost cap and a cache of replies."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_ray.config import EndpointSection
from mlc_ray.generate.purse import CapReachedError, EndpointUsage, Purse, Question
from mlc_ray.generate.replies import (
    BUSY,
    ERROR,
    NOT_ASKED,
    EndpointError,
    Fault,
    Reply,
    ReplyCache,
    one_line,
    server_message,
)
from mlc_ray.storage import fingerprint

if TYPE_CHECKING:
    from mlc_ray.generate.connection import Connection

Conversation = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`."""

EQUAL_REFUSALS = 3
"""Equal 4xx answers in a row that stop a run: two prompts may both be too long, but a wrong setting fails them all."""
FAULTS = 50
"""Questions in a row without a reply that stop a run, whatever the reason: messages may carry a request's own id."""

_MISCONFIGURED = frozenset({401, 403, 404})
# An upper bound on what a chat template adds: role marks and line ends per message, and a default system prompt.
_TOKENS_PER_MESSAGE, _TOKENS_PER_REQUEST = 16, 64


class ChatEndpoint:
    """A session with one endpoint: `ask` sends what the cache does not know, `usage` tells what that cost.

    Requests have temperature 0 and the fields of `settings.request`. The openai client tries rate limits (429), 408,
    409, server errors, lost connections and time-outs again. A fault that is left is the reply's own, but wrong
    settings raise `EndpointError`: 401, 403, 404, a redirect, an unsupported parameter or no connection at the first
    request, which goes out alone, and later `EQUAL_REFUSALS` or `FAULTS` in a row. `max_cost_usd` bounds this session,
    as long as the endpoint keeps to max_tokens.

    Args:
        settings: the endpoint, and how it is asked.
        cache_dir: folder on this machine of the cached replies, unless the settings name one.

    Raises:
        EndpointError: the key is missing, or the cache is not writable.
    """

    def __init__(self, settings: EndpointSection, cache_dir: Path) -> None:
        self._settings = settings
        self._key = _api_key(settings)
        self.cache = ReplyCache(cache_dir if settings.cache_dir is None else Path(settings.cache_dir).expanduser())
        self._usage = EndpointUsage()
        self._proven = False
        self._faults: list[Fault] = []  # in a row

    @property
    def usage(self) -> EndpointUsage:
        """What this session did so far."""
        return replace(self._usage)

    def ask(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """A reply to each conversation, in order; equal ones are asked once. Not for use inside a running event loop.

        Raises:
            EndpointError: requests show that the settings are wrong, or the cache is not writable.
        """
        bodies = [self._body(conversation) for conversation in conversations]
        keys = [self._cache_key(body) for body in bodies]
        found: dict[str, Reply] = {}
        missing: dict[str, dict[str, Any]] = {}
        for key, body in zip(keys, bodies, strict=True):
            if key not in found and key not in missing:
                if (known := self.cache.read(key)) is not None:
                    found[key] = known
                else:
                    missing[key] = body
        if missing:
            found |= asyncio.run(self._ask_all(missing))
        replies = []
        for key in keys:
            replies.append(found[key])
            self._usage.cached += found[key].cached
            if found[key].finish not in (ERROR, NOT_ASKED):
                found[key] = replace(found[key], cached=True)  # a further one in this call cost nothing
        return replies

    def close(self) -> None:
        """Close the cache."""
        self.cache.close()

    def _body(self, conversation: Conversation) -> dict[str, Any]:
        settings = self._settings
        fields = {
            "model": settings.model,
            "messages": [dict(message) for message in conversation],
            "temperature": 0,
            settings.token_limit: settings.max_reply_tokens,
            **settings.request,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _cache_key(self, body: Mapping[str, Any]) -> str:
        # As ASCII: half a surrogate pair has no UTF-8 bytes to be hashed.
        base_url = self._settings.base_url.rstrip("/")
        return fingerprint({"base_url": base_url, "request": json.dumps(body, sort_keys=True)})

    async def _ask_all(self, bodies: Mapping[str, dict[str, Any]]) -> dict[str, Reply]:
        from mlc_ray.generate.connection import Connection

        replies: dict[str, Reply] = {}
        waiting = iter(bodies.items())
        purse = Purse(self._usage, self._settings.max_cost_usd)
        async with Connection(self._settings, self._key) as connection:

            async def work(items: Iterator[tuple[str, dict[str, Any]]]) -> None:
                for key, body in items:  # shared: each worker takes the next one
                    reply = await self._ask_one(connection, Question(purse, self._upper_bound(body)), body)
                    if reply.finish in ("stop", "length", "refusal") and (reply.text or reply.finish == "refusal"):
                        self.cache.write(key, reply, self._settings.model)
                    replies[key] = reply

            if not self._proven:
                await work(iter([next(waiting)]))
                self._proven = True
            workers = [asyncio.create_task(work(waiting)) for _ in range(self._settings.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:  # after an error no worker asks on
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return replies

    async def _ask_one(self, connection: Connection, question: Question, body: Mapping[str, Any]) -> Reply:
        try:
            answer = await connection.post(body, question)
        except CapReachedError:
            self._usage.not_asked += 1
            tries = f" again after {question.tries} tries" if question.tries else ""
            cap = self._settings.max_cost_usd
            return Reply("", NOT_ASKED, f"not asked{tries}: it could have exceeded endpoint.max_cost_usd={cap}")
        if isinstance(answer, bytes):
            reply, tokens = self._read(answer)
            cost = None
            if tokens is not None:
                self._usage.input_tokens += tokens[0]
                self._usage.output_tokens += tokens[1]
                cost = self._price(*tokens)
            await question.end_try(cost)
            if reply.finish != ERROR:
                self._faults.clear()
                return reply
            answer = Fault(reply.fault)
        self._usage.failed += 1
        self._check_settings(answer, body)
        return Reply("", ERROR, self._scrub(answer.message), lost=answer.outage)

    def _check_settings(self, fault: Fault, body: Mapping[str, Any]) -> None:
        """Raise where a fault, or a row of them, means that every further request will fail as well."""
        if fault.by_content:
            return
        self._faults = [*self._faults, fault][-FAULTS:]
        fix = self._fix(fault, body)
        if not self._proven:
            redirected = fault.status is not None and 300 <= fault.status < 400
            if not fault.reached or redirected or fault.status in _MISCONFIGURED or fix:
                raise self._misconfigured(fault.message, fix)
        last = self._faults[-EQUAL_REFUSALS:]
        # Statuses that are tried again say that the endpoint is busy, not that it will refuse all.
        refused = fault.refused and fault.status not in BUSY
        if refused and len(last) == EQUAL_REFUSALS and all(each == fault for each in last):
            raise self._misconfigured(f"{fault.message}, to {EQUAL_REFUSALS} requests in a row", fix)
        if len(self._faults) == FAULTS:
            if fault.status == 429:
                fix = "lower endpoint.concurrency, raise endpoint.retries, or see to the account's limit and credit"
            raise self._misconfigured(f"{fault.message}; {FAULTS} requests in a row got no reply", fix)

    def _fix(self, fault: Fault, body: Mapping[str, Any]) -> str:
        """What to set where the server says that it does not take a field of the request; empty where it does not."""
        if not fault.refused:
            return ""
        if "max_completion_tokens" in fault.message and "max_tokens" in body and "support" in fault.message:
            return "set endpoint.token_limit=max_completion_tokens"
        for name in ("temperature", *self._settings.request):
            if name in body and re.search(rf"\b{re.escape(name)}\b", fault.message):
                return f"set endpoint.request={{{name}: null}} to leave out {name}={body[name]!r}, or to another value"
        return ""

    def _read(self, raw: bytes) -> tuple[Reply, tuple[int, int] | None]:
        """The reply in an answer's body, and its (input, output) tokens; None where the endpoint does not say."""
        try:
            payload = json.loads(raw)
            choice = payload["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason") or "unknown"
            text, refusal = message.get("content") or "", str(message.get("refusal") or "")
            if not isinstance(text, str) or not isinstance(finish, str):
                raise TypeError("content or finish_reason is not a string")
        except (ValueError, LookupError, TypeError, AttributeError):
            fault = self._scrub(f"the reply is not a chat completion: {server_message(raw)}")
            return Reply("", ERROR, fault), None
        text = _storable(text)
        if refusal:
            reply = Reply("", "refusal", self._scrub(_storable(f"the model refused to reply: {one_line(refusal)}")))
        elif finish == "length":
            limit = self._settings.max_reply_tokens
            reply = Reply(text, finish, f"the reply was cut off at endpoint.max_reply_tokens={limit}")
        elif finish != "stop":
            reply = Reply(text, finish, f"the reply ended with finish_reason={finish!r}")
        elif not text.strip():
            reply = Reply("", finish, "the reply is empty")
        else:
            reply = Reply(text, finish)
        return reply, _tokens(payload.get("usage"))

    def _price(self, input_tokens: int, output_tokens: int) -> float:
        settings = self._settings
        return (
            input_tokens * settings.usd_per_million_input_tokens
            + output_tokens * settings.usd_per_million_output_tokens
        ) / 1e6

    def _upper_bound(self, body: Mapping[str, Any]) -> float:
        """USD that a request can cost at most: a token of a byte-level vocabulary covers at least one byte."""
        messages = body["messages"]
        size = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)
        # Fields such as response_format bring a text of their own into the prompt.
        size += len(json.dumps(self._settings.request)) if self._settings.request else 0
        return self._price(
            size + _TOKENS_PER_MESSAGE * len(messages) + _TOKENS_PER_REQUEST, self._settings.max_reply_tokens
        )

    def _misconfigured(self, what: str, fix: str = "") -> EndpointError:
        settings = self._settings
        return EndpointError(
            self._scrub(
                f"the endpoint with base_url={settings.base_url!r}, model={settings.model!r}, "
                f"api_key_env={settings.api_key_env!r}: {what}; "
                + (
                    fix
                    or "check that base_url is what /chat/completions follows (it often ends in /v1), that the "
                    "endpoint has the model, and that api_key_env names the environment variable with a valid key"
                )
            )
        )

    def _scrub(self, text: str) -> str:
        """A server may quote the key that it refuses."""
        return text.replace(self._key, "***") if self._key else text


def _api_key(settings: EndpointSection) -> str:
    if settings.api_key_env is None:
        return ""
    key = os.environ.get(settings.api_key_env, "")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        state = "is not set" if not key else "holds spaces, line breaks or other characters that no key has"
        raise EndpointError(
            f"the environment variable api_key_env={settings.api_key_env!r} (for {settings.base_url!r}) {state}; "
            "set it to the key, in the processes of the cluster too"
        )
    return key


def _storable(text: str) -> str:
    """`text` with halves of surrogate pairs, which JSON can hold and neither SQLite nor Parquet, replaced."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _tokens(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return None
    return counts  # type: ignore[return-value]
