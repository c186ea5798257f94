"""The connection to an endpoint: the openai client sends, waits and tries again, and each of its tries is paid for.

A module of its own because to import `openai` takes 2.4 s, which only a process that sends requests should wait for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import httpx2
import openai

from mlc_ray.config import EndpointSection
from mlc_ray.generate.purse import Question
from mlc_ray.generate.replies import Fault, server_message

# Codes of 400 answers of OpenAI and Azure. A judge reads harmful text: a filter may refuse many responses in a row.
_ABOUT_CONTENT = frozenset({"content_filter", "content_policy_violation", "invalid_prompt", "context_length_exceeded"})
_question: ContextVar[Question] = ContextVar("question")


class Connection:
    """Sends requests to `settings.base_url`; an asynchronous context manager, within one event loop.

    Args:
        settings: address, time-out, retries and concurrency.
        key: sent as a bearer token; empty for none.
    """

    def __init__(self, settings: EndpointSection, key: str) -> None:
        self._timeout = settings.timeout_seconds
        http = _PaidClient(timeout=settings.timeout_seconds, limits=httpx2.Limits(max_connections=settings.concurrency))
        self._client = openai.AsyncOpenAI(
            api_key=key or "none", base_url=settings.base_url, max_retries=settings.retries,
            timeout=settings.timeout_seconds, http_client=http,
        )  # fmt: skip
        self._headers: dict[str, Any] = {"Content-Type": "application/json"}
        if not key:
            self._headers["Authorization"] = openai.Omit()

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def post(self, body: Mapping[str, Any], question: Question) -> bytes | Fault:
        """The body of the answer with status 200, whose try is still to be settled; or why there is none.

        Raises:
            CapReachedError: a try was not sent.
        """
        _question.set(question)
        try:
            response = await self._client.post(
                "/chat/completions",
                # As ASCII: half a surrogate pair has no UTF-8 bytes.
                content=json.dumps(body).encode("ascii"),
                options={"headers": self._headers},
                cast_to=httpx2.Response,
            )
        except openai.APIStatusError as error:
            message = f"the endpoint answers {error.status_code}: {server_message(error.response.content)}"
            by_content = error.status_code == 400 and error.code in _ABOUT_CONTENT
            return Fault(message + _tried(question), error.status_code, by_content=by_content)
        except openai.APIConnectionError as error:
            cause = error.__cause__
            if isinstance(cause, _UNSENT):
                return Fault(f"the endpoint cannot be reached: {cause}{_tried(question)}", reached=False)
            if isinstance(error, openai.APITimeoutError):
                return Fault(f"no reply within endpoint.timeout_seconds={self._timeout:g}{_tried(question)}")
            return Fault(f"the connection was lost: {type(cause).__name__}: {cause}{_tried(question)}")
        if response.status_code != 200:
            return Fault(f"the endpoint answers {response.status_code}, without a reply", response.status_code)
        return response.content


_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class _PaidClient(httpx2.AsyncClient):
    """Pays for every request, also for those that the openai client sends as further tries of the same question."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        question = _question.get()
        await question.begin_try()
        try:
            response = await super().send(request, **options)
        except BaseException as error:
            await question.end_try(0.0 if isinstance(error, _UNSENT) else None)
            raise
        if response.status_code != 200:  # not billed; what a reply costs is said by the reply
            await question.end_try()
        return response


def _tried(question: Question) -> str:
    return f" (tried {question.tries} times)" if question.tries > 1 else ""
