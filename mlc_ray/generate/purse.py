"""What asking an endpoint costs, and how a session stays under its cap: by reserving before it sends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


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


class CapReachedError(Exception):
    """A try was not sent, because it could have exceeded the cap."""


class Purse:
    """The spending of all questions that are asked at once: none is sent whose highest cost could exceed the cap.

    Args:
        usage: what the session spent so far; kept up to date.
        cap: USD, or None for no cap.
    """

    def __init__(self, usage: EndpointUsage, cap: float | None) -> None:
        self.usage, self.cap = usage, cap
        self._reserved = 0.0
        self._freed = asyncio.Condition()

    async def reserve(self, bound: float) -> None:
        """Wait until the cap allows `bound` USD beside all that is reserved.

        Raises:
            CapReachedError: it never will.
        """
        async with self._freed:
            while self.cap is not None:
                spent = self.usage.cost_usd + self.usage.unconfirmed_usd
                if spent + bound > self.cap:
                    raise CapReachedError
                if spent + bound + self._reserved <= self.cap:
                    break
                await self._freed.wait()  # requests in flight mostly cost less than they reserved
            self._reserved += bound

    async def settle(self, bound: float, *, cost: float = 0.0, unconfirmed: float = 0.0) -> None:
        """Give back a reservation of `bound` USD for what was spent instead, in USD."""
        async with self._freed:
            self._reserved -= bound
            self.usage.cost_usd += cost
            self.usage.unconfirmed_usd += unconfirmed
            self._freed.notify_all()


class Question:
    """One question on its way: each of its tries reserves `bound` USD, the most that it can cost, before it is sent."""

    def __init__(self, purse: Purse, bound: float) -> None:
        self.tries = 0
        self._purse, self._bound = purse, bound

    async def begin_try(self) -> None:
        """Reserve, and count a request.

        Raises:
            CapReachedError: the cap does not allow another try.
        """
        await self._purse.reserve(self._bound)
        self._purse.usage.requests += 1
        self._purse.usage.retries += self.tries > 0
        self.tries += 1

    async def end_try(self, cost: float | None = 0.0) -> None:
        """Settle; `cost` is in USD, None if the try may have been billed but it is unknown for how much."""
        if cost is None:
            await self._purse.settle(self._bound, unconfirmed=self._bound)
        else:
            await self._purse.settle(self._bound, cost=cost)
