"""Asking an OpenAI-compatible endpoint: many conversations at once, with retries, a cost cap and a cache of replies."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from mlc_ray.config import EndpointSection
from mlc_ray.generate.replies import ERROR, NOT_ASKED, EndpointError, Reply, ReplyCache
from mlc_ray.storage import fingerprint

Conversation = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`."""

FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
"""Seconds before the first further try, and at most before a later one; each try doubles the wait."""
LONGEST_RETRY_AFTER = 300.0
"""A server that asks for a longer silence than this many seconds is not asked again at all."""

_RETRIED = frozenset({408, 409, 429})  # and every 5xx
_MISCONFIGURED = frozenset({401, 403, 404})
_MESSAGE_CHARACTERS = 300
# An upper bound on what a chat template adds: role marks and line ends per message, and a default system prompt.
_TOKENS_PER_MESSAGE, _TOKENS_PER_REQUEST = 16, 64


@dataclass
class EndpointUsage:
    """What a session did and cost.

    `requests` were sent, `retries` of them as further tries; `cached` replies were read from disk (or repeated a
    question of the same call) and cost nothing; `failed` questions got no reply, `not_asked` ones would have endangered
    the cap. `cost_usd` follows from the tokens that the endpoint reports. `unconfirmed_usd` is an upper bound on tries
    that may have been billed but reported nothing (time-outs, lost connections); the cap holds for the sum of both.
    """

    requests: int = 0
    retries: int = 0
    cached: int = 0
    failed: int = 0
    not_asked: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    unconfirmed_usd: float = 0.0


@dataclass(frozen=True)
class _Try:
    """How one HTTP request ended. `tokens` are (input, output); None with `billable` means that they are unknown."""

    reply: Reply
    again: bool = False
    retry_after: float = 0.0
    billable: bool = False
    tokens: tuple[int, int] | None = None


class _Purse:
    """Keeps a call's spending under the cap: a request reserves its upper bound before it is sent."""

    def __init__(self, usage: EndpointUsage, cap: float | None):
        self._usage, self._cap = usage, cap
        self._reserved: dict[int, float] = {}
        self._freed = asyncio.Condition()
        self._ticket = 0

    async def reserve(self, bound: float) -> int | None:
        """A ticket for `settle`, once the cap allows `bound` USD; None if it never will."""
        async with self._freed:
            while self._cap is not None:
                spent = self._usage.cost_usd + self._usage.unconfirmed_usd
                if spent + bound > self._cap:
                    return None
                if spent + bound + sum(self._reserved.values()) <= self._cap:
                    break
                await self._freed.wait()  # requests in flight mostly cost less than they reserved
            self._ticket += 1
            self._reserved[self._ticket] = bound
            return self._ticket

    async def settle(self, ticket: int) -> None:
        """Give a reservation back, after the real cost went into the usage."""
        async with self._freed:
            del self._reserved[ticket]
            self._freed.notify_all()


class ChatEndpoint:
    """A session with one endpoint: `ask` sends what the cache does not know, `usage` tells what that cost.

    Requests have temperature 0. Rate limits (429), 408, 409, server errors, lost connections and time-outs are tried
    again after growing, jittered waits, never sooner than `Retry-After` asks. The first request of a session goes out
    alone: 401, 403, 404, a redirect or no connection at all then mean wrong settings and raise `EndpointError` at once.
    Later faults are the reply's own. `max_cost_usd` bounds this session, as long as the endpoint keeps to max_tokens.
    """

    def __init__(self, settings: EndpointSection, cache_dir: Path):
        self._settings = settings
        self._base_url = settings.base_url.rstrip("/")
        self._key = _api_key(settings)
        self._cache = ReplyCache(cache_dir if settings.cache_dir is None else Path(settings.cache_dir).expanduser())
        self._usage = EndpointUsage()
        self._proven = False

    @property
    def usage(self) -> EndpointUsage:
        """What this session did so far."""
        return replace(self._usage)

    def ask(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """A reply to each conversation, in order; equal ones are asked once. Not for use inside a running event loop.

        Raises:
            EndpointError: the first request shows that the settings are wrong, or the cache is not writable.
        """
        bodies = [self._body(conversation) for conversation in conversations]
        keys = [self._cache_key(body) for body in bodies]
        found: dict[str, Reply] = {}
        missing: dict[str, dict[str, Any]] = {}
        for key, body in zip(keys, bodies, strict=True):
            if key not in found and key not in missing:
                if (known := self._cache.read(key)) is not None:
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

    def _body(self, conversation: Conversation) -> dict[str, Any]:
        settings = self._settings
        messages = [dict(message) for message in conversation]
        return {
            "model": settings.model,
            "messages": messages,
            "temperature": 0,
            settings.token_limit: settings.max_reply_tokens,
        }

    def _cache_key(self, body: Mapping[str, Any]) -> str:
        # As ASCII: half a surrogate pair has no UTF-8 bytes to be hashed.
        return fingerprint({"base_url": self._base_url, "request": json.dumps(body, sort_keys=True)})

    async def _ask_all(self, bodies: Mapping[str, dict[str, Any]]) -> dict[str, Reply]:
        settings = self._settings
        replies: dict[str, Reply] = {}
        waiting = iter(bodies.items())
        purse = _Purse(self._usage, settings.max_cost_usd)
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=aiohttp.ClientTimeout(total=settings.timeout_seconds),
            connector=aiohttp.TCPConnector(limit=settings.concurrency),
        ) as session:

            async def work(items: Iterator[tuple[str, dict[str, Any]]]) -> None:
                for key, body in items:  # shared: each worker takes the next one
                    reply = await self._ask_one(session, purse, body)
                    if reply.finish in ("stop", "length", "refusal") and (reply.text or reply.finish == "refusal"):
                        self._cache.write(key, reply, settings.model)
                    replies[key] = reply

            if not self._proven:
                await work(iter([next(waiting)]))
                self._proven = True
            await asyncio.gather(*(work(waiting) for _ in range(settings.concurrency)))
        return replies

    async def _ask_one(self, session: aiohttp.ClientSession, purse: _Purse, body: dict[str, Any]) -> Reply:
        usage, retries = self._usage, self._settings.retries
        bound = self._upper_bound(body)
        for attempt in range(retries + 1):
            ticket = await purse.reserve(bound)
            if ticket is None:
                usage.not_asked += 1
                tries = f" again after {attempt} tries" if attempt else ""
                cap = self._settings.max_cost_usd
                return Reply("", NOT_ASKED, f"not asked{tries}: it could have exceeded endpoint.max_cost_usd={cap}")
            usage.requests += 1
            usage.retries += attempt > 0
            outcome = await self._try(session, body)
            self._charge(outcome, bound)
            await purse.settle(ticket)
            if not outcome.again:
                break
            if attempt < retries:
                await asyncio.sleep(_wait(attempt, outcome.retry_after))
        if outcome.reply.finish == ERROR:
            usage.failed += 1
        if outcome.again:
            return replace(outcome.reply, fault=f"{outcome.reply.fault} (tried {retries + 1} times)")
        return outcome.reply

    async def _try(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> _Try:
        url = f"{self._base_url}/chat/completions"
        try:
            async with session.post(url, json=body, allow_redirects=False, proxy=_proxy(url)) as response:
                status, raw = response.status, await response.read()
                retry_after = _retry_after(response.headers.get("Retry-After"))
        except aiohttp.ClientConnectorError as error:
            if not self._proven:
                raise self._misconfigured(f"cannot be reached ({error})") from None
            return _Try(Reply("", ERROR, self._scrub(f"the endpoint cannot be reached: {error}")), again=True)
        except ValueError as error:  # aiohttp's InvalidURL, and what yarl and the codec of host names raise
            raise self._misconfigured(f"has no valid address ({error})") from None
        except TimeoutError:
            fault = f"no reply within endpoint.timeout_seconds={self._settings.timeout_seconds:g}"
            return _Try(Reply("", ERROR, fault), again=True, billable=True)
        except aiohttp.ClientError as error:
            fault = self._scrub(f"the connection was lost: {type(error).__name__}: {error}")
            return _Try(Reply("", ERROR, fault), again=True, billable=True)
        if status == 200:
            return self._read(raw)
        message = self._scrub(f"{status}: {_error_message(raw)}")
        if not self._proven and (status in _MISCONFIGURED or 300 <= status < 400):
            raise self._misconfigured(f"answers {message}")
        if retry_after > LONGEST_RETRY_AFTER:
            return _Try(Reply("", ERROR, f"the endpoint answers {message}, and asks to wait {retry_after:.0f} s"))
        again = status in _RETRIED or status >= 500
        return _Try(Reply("", ERROR, f"the endpoint answers {message}"), again, retry_after)

    def _read(self, raw: bytes) -> _Try:
        try:
            payload = json.loads(raw)
            choice = payload["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason") or "unknown"
            text, refusal = message.get("content") or "", message.get("refusal")
            if not isinstance(text, str) or not isinstance(finish, str):
                raise TypeError("content or finish_reason is not a string")
        except (ValueError, LookupError, TypeError, AttributeError):
            fault = self._scrub(f"the reply is not a chat completion: {_error_message(raw)}")
            return _Try(Reply("", ERROR, fault), billable=True)
        if refusal:
            reply = Reply("", "refusal", self._scrub(f"the model refused to reply: {_one_line(str(refusal))}"))
        elif finish == "length":
            limit = self._settings.max_reply_tokens
            reply = Reply(text, finish, f"the reply was cut off at endpoint.max_reply_tokens={limit}")
        elif finish != "stop":
            reply = Reply(text, finish, f"the reply ended with finish_reason={finish!r}")
        elif not text.strip():
            reply = Reply("", finish, "the reply is empty")
        else:
            reply = Reply(text, finish)
        return _Try(reply, billable=True, tokens=_tokens(payload.get("usage")))

    def _charge(self, outcome: _Try, bound: float) -> None:
        if outcome.tokens is not None:
            self._usage.input_tokens += outcome.tokens[0]
            self._usage.output_tokens += outcome.tokens[1]
            self._usage.cost_usd += self._price(*outcome.tokens)
        elif outcome.billable:
            self._usage.unconfirmed_usd += bound

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
        return self._price(
            size + _TOKENS_PER_MESSAGE * len(messages) + _TOKENS_PER_REQUEST, self._settings.max_reply_tokens
        )

    def _misconfigured(self, what: str) -> EndpointError:
        settings = self._settings
        return EndpointError(
            self._scrub(
                f"the endpoint with base_url={settings.base_url!r}, model={settings.model!r}, "
                f"api_key_env={settings.api_key_env!r} {what}; check that base_url is what /chat/completions follows "
                "(it often ends in /v1), that the endpoint has the model, and that api_key_env names the environment "
                "variable with a valid key"
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


def _proxy(url: str) -> str | None:
    # aiohttp's own trust_env would also send passwords from ~/.netrc.
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def _wait(attempt: int, retry_after: float) -> float:
    """Seconds before try number `attempt` + 2: never less than `retry_after`, and never all workers at once."""
    growing = min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
    return max(growing, retry_after + random.uniform(0.0, FIRST_WAIT / 2))


def _retry_after(header: str | None) -> float:
    """Seconds that a `Retry-After` header (RFC 9110: a number, or a date) asks to wait; 0 if there is none to read."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", header):
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _tokens(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return None
    return counts  # type: ignore[return-value]


def _error_message(raw: bytes) -> str:
    """What the server says: OpenAI's `error.message`, other servers' `error`, `message` or `detail`, or its words."""
    text = raw.decode("utf-8", "replace")
    try:
        payload = json.loads(text)
    except ValueError:
        return _one_line(text) or "(nothing)"
    for name in ("error", "message", "detail"):
        if isinstance(payload, dict) and payload.get(name):
            inner = payload[name]
            return _one_line(str(inner["message"] if isinstance(inner, dict) and inner.get("message") else inner))
    return _one_line(text)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MESSAGE_CHARACTERS else line[:_MESSAGE_CHARACTERS] + "..."
