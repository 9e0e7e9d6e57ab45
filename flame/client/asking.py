"""Asking a scheduler: requests of the control API, repeated where that does no harm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from flame.broker.errors import NoResponders, NotAcknowledged
from flame.broker.seam import Broker
from flame.client.home import check_loop
from flame.errors import BrokerUnavailable, MalformedMessage, SchedulerUnavailable, Unavailable
from flame.protocol import defaults, subjects
from flame.protocol.api import List, Request, Verb, read_answer
from flame.protocol.records import Record, explain

R = TypeVar("R", bound=Record)

SCHEDULER_PATIENCE_S: Final = 5.0
"""How long a call waits for a scheduler when none answers: one may be restarting."""
OUTAGE_PATIENCE_S: Final = 15.0
"""How long a call is repeated that may be: the scheduler, or the broker for it, may have lost a server."""

_ONCE: Final = frozenset({Verb.REGISTER_APPLICATION, Verb.UNREGISTER_APPLICATION, Verb.CREATE_SESSION})
"""What must not be asked again when an answer was lost: it would be refused because it was carried out."""


class ControlClient:
    """The control API as a client calls it. Refusals are raised as the exceptions that they stand for."""

    def __init__(self, broker: Broker) -> None:
        """Ask through a connected broker, until `close`."""
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def close(self) -> None:
        """Ask no more, and don't repeat what is being asked."""
        self._closed = True

    async def call(self, verb: Verb, request: Request, answer: type[R]) -> R:
        """Ask for something and return what it brought."""
        try:
            return answer.model_validate(await self.ask(verb, request), extra="ignore")
        except ValidationError as error:
            raise MalformedMessage(f"the answer to {verb.value}: {explain(error)}") from None

    async def list_all(self, verb: Verb, request: List, page_type: type[Any], name: Callable[[Any], str]) -> list[Any]:
        """Ask for all pages of a list; ``name`` returns what an item is ordered by."""
        items: list[Any] = []
        while True:
            page = await self.call(verb, request, page_type)
            items.extend(page.items)
            if not page.more:
                return items
            request = request.model_copy(update={"after": name(items[-1])})

    async def ask(self, verb: Verb, request: Request) -> dict[str, Any]:
        """Ask for something and return the bare answer."""
        check_loop(f"the connection to {self._broker.endpoint}", self._loop)
        loop = self._loop
        give_up = loop.time() + SCHEDULER_PATIENCE_S
        repeat_until = 0.0 if verb in _ONCE else loop.time() + OUTAGE_PATIENCE_S
        pause_s = 0.05
        while True:
            if self._closed:
                raise BrokerUnavailable("the connection is closed; make another")
            try:
                data = await self._broker.request(subjects.api(verb), request.encode(), defaults.REQUEST_TIMEOUT_S)
                return read_answer(data)
            except NoResponders:
                if loop.time() >= give_up:
                    raise SchedulerUnavailable(
                        f"{verb.value}: the broker at {self._broker.endpoint} answers but no scheduler does;"
                        " start flame-scheduler"
                    ) from None
            except NotAcknowledged as error:
                if loop.time() >= repeat_until:
                    raise SchedulerUnavailable(
                        f"{verb.value}: no scheduler answers at {self._broker.endpoint}: {error}"
                    ) from None
            except Unavailable:  # the scheduler's own answer: it is the broker that doesn't answer there
                if loop.time() >= repeat_until:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)
