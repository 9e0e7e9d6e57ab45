"""Assertions on what happens in a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from flame.cancel import end_task
from flame.protocol.events import ClusterEvent, Noun

if TYPE_CHECKING:
    from flame.client.connection import Connection
    from flame.client.events import ClusterEvents

WITHIN_S: Final = 10.0
"""How long something may take to happen, unless a test says otherwise."""
_SHOWN: Final = 40
"""Of what was seen, so much is shown when something is missing."""

_ABOUT: Final = (Noun.TASK, Noun.EXECUTOR, Noun.SESSION, Noun.NODE, Noun.APPLICATION)
"""Of several that are named, the first of these is what an event has to be about."""
_FIELDS: Final = frozenset(field.name for field in fields(ClusterEvent)) | {Noun.TASK.value}


class EventLog:
    """What has happened in a cluster since it listens, and assertions on that.

    Made by the clusters' ``events``, or over any connection::

        async with EventLog(connection) as events:
            session = await connection.create_session("agent")
            await events.expect(session=session, state="open")
            task = await session.create_task(b"!")
            await events.expect(task=task, state="failed", within_s=5)
            await events.expect(noun="executor", session=session, state="released", code="…")
            events.refute(session=session, state="failed")

    What an assertion asks for is written as fields of `flame.ClusterEvent`, see there. ``session=``, ``task=``,
    ``executor=``, ``node=`` and ``application=`` take a name or an object that has an ``id``, and say what the event
    is about: the first of *task, executor, session, node, application* that is given. The others narrow it down. With
    ``noun`` the event is about any of those: ``noun="task", session=session`` is any task of that session. A callable
    as a value is asked: ``reason=lambda text: "memory" in text``.
    """

    def __init__(self, connection: Connection, *, session: str | None = None, application: str | None = None) -> None:
        """Listen over ``connection``, to all of the cluster or to one session or application, once it is entered."""
        self._events: ClusterEvents = connection.events(session=session, application=application, tasks=True)
        self._began = 0.0
        self._seen: list[ClusterEvent] = []
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Self:
        """Listen from now on."""
        await self._events.__aenter__()
        self._task = asyncio.create_task(self._follow(), name="flame.testing events")
        return self

    async def stop(self) -> None:
        """Listen no more; what was seen stays. Safe before `start`, and again."""
        task, self._task = self._task, None
        await end_task(task)
        if task is not None:
            await self._events.aclose()

    async def __aenter__(self) -> Self:
        """Listen from now on."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Listen no more."""
        await self.stop()

    async def _follow(self) -> None:
        async for event in self._events:
            self._seen.append(event)
            self._news.set()

    # ---- what was seen

    @property
    def seen(self) -> list[ClusterEvent]:
        """Return every event so far, in the order in which they were heard."""
        return list(self._seen)

    def __iter__(self) -> Iterator[ClusterEvent]:
        """Go through every event so far."""
        return iter(self.seen)

    def matching(self, **wanted: Any) -> list[ClusterEvent]:
        """Return the events so far that are as described; see the class."""
        wanted = _checked(wanted)
        return [event for event in self._seen if _fits(event, wanted)]

    def clear(self) -> None:
        """Forget what was seen: assertions are about what happens from now on."""
        self._seen.clear()

    # ---- assertions

    async def expect(
        self, *, within_s: float = WITHIN_S, after: ClusterEvent | None = None, **wanted: Any
    ) -> ClusterEvent:
        """Return the first event that is as described, waiting for it if it hasn't happened yet.

        Args:
            within_s: How long to wait, by the loop's clock: under a `VirtualClock` that is its time.
            after: Only what came after this event, which an earlier assertion has returned.
            wanted: What to look for; see the class.

        Raises:
            AssertionError: It has not happened in time; the text lists what was seen instead.
            TypeError: There is no such field.
        """
        wanted = _checked(wanted)
        try:
            async with asyncio.timeout(within_s):
                while True:
                    found = next((event for event in self._from(after) if _fits(event, wanted)), None)
                    if found is not None:
                        return found
                    self._news.clear()
                    await self._next()
        except TimeoutError:
            why = f"did not happen within {within_s:g} s: {_described(wanted)}"
            raise AssertionError(f"{why}\n{self._told(after)}") from None

    def refute(self, *, after: ClusterEvent | None = None, **wanted: Any) -> None:
        """Assert that nothing as described has happened so far; to let time pass first, see `VirtualClock.advance`.

        Raises:
            AssertionError: It has; the text lists what was seen.
            TypeError: There is no such field.
        """
        wanted = _checked(wanted)
        if any(_fits(event, wanted) for event in self._from(after)):
            raise AssertionError(f"happened, and should not have: {_described(wanted)}\n{self._told(after)}")

    async def _next(self) -> None:
        """Wait for news, or for the end of all news."""
        following = self._task
        if following is None:
            await asyncio.Event().wait()  # it listens no more: the time limit says so
            return
        waiting = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait((waiting, following), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if following.done() and not self._news.is_set():
            following.result()  # why nothing more can be heard
            await asyncio.Event().wait()

    def _from(self, after: ClusterEvent | None) -> list[ClusterEvent]:
        if after is None:
            return self._seen
        places = [place for place, event in enumerate(self._seen) if event is after]
        return self._seen[places[0] + 1 :] if places else self._seen

    def _told(self, after: ClusterEvent | None) -> str:
        seen = self._from(after)
        if not seen:
            return "nothing at all was seen"
        lines = [f"  {_line(event, seen[0].at)}" for event in seen[-_SHOWN:]]
        earlier = f", the last {_SHOWN} of them" if len(seen) > _SHOWN else ""
        return f"seen were {len(seen)} events{earlier}:\n" + "\n".join(lines)


def _checked(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be compared with an event's fields; raise `TypeError` for one that there isn't."""
    unknown = sorted(wanted.keys() - _FIELDS)
    if unknown:
        raise TypeError(f"events have no {', '.join(unknown)}; they have {', '.join(sorted(_FIELDS))}")
    if not wanted:
        raise TypeError("nothing to look for: name fields of an event, such as session=… and state=…")
    found = {name: getattr(value, "id", value) if name in _NOUNS else value for name, value in wanted.items()}
    if Noun.TASK in found or "noun" not in found:
        about = next((noun for noun in _ABOUT if noun in found), None)
        if about is not None:
            found["noun"], found["id"] = about, found.pop(about)
    if "noun" in found and not callable(found["noun"]) and found["noun"] not in _NOUNS:
        raise TypeError(f"noun: expected one of {', '.join(_NOUNS)}, got {found['noun']!r}")
    return found


_NOUNS: Final = tuple(str(noun) for noun in Noun)


def _fits(event: ClusterEvent, wanted: dict[str, Any]) -> bool:
    return all(_agrees(getattr(event, name), value) for name, value in wanted.items())


def _agrees(value: object, wanted: object) -> bool:
    if callable(wanted):
        ask: Callable[[Any], object] = wanted
        return bool(ask(value))
    return value == wanted


def _described(wanted: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!s}" for name, value in wanted.items())


def _line(event: ClusterEvent, began: float) -> str:
    """Show an event in one line."""
    told = [f"{event.at - began:+9.3f} s  {event.noun} {event.id}: {event.event}"]
    if event.state and event.state != event.event:
        told.append(f"(state={event.state})")
    for name in ("session", "executor", "node", "code"):
        value = getattr(event, name)
        if value and name != event.noun:
            told.append(f"{name}={value}")
    if event.reason:
        told.append(f"reason={event.reason.partition(chr(10))[0]!r:.200}")
    return " ".join(told)
