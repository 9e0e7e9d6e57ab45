"""Live messages: from whoever sends to whoever listens at that moment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flame.broker.memory.clock import Clock
from flame.broker.memory.faults import Chance
from flame.broker.memory.link import Link
from flame.broker.memory.patterns import PatternTree


class Unanswered(Exception):
    """Something was carried out that the server answers to nobody."""


class Message:
    """Something sent: a live message, or a request, which has somebody to ``reply`` to."""

    __slots__ = ("data", "reply", "stored_as", "subject")

    def __init__(
        self, subject: str, data: bytes, stored_as: str = "", reply: Callable[[bytes], None] | None = None
    ) -> None:
        """Make one; ``stored_as`` is the subject under which a stream that announces it stored it."""
        self.subject = subject
        self.data = data
        self.stored_as = stored_as
        self.reply = reply


class Interest:
    """That a connection listens."""

    __slots__ = ("group", "link", "pattern", "receive", "stopped")

    def __init__(self, pattern: str, link: Link, receive: Callable[[Message], None], group: str = "") -> None:
        """Hear ``pattern`` over ``link``. Of those with the same pattern and ``group`` one hears each message."""
        self.pattern = pattern
        self.link = link
        self.receive = receive
        self.group = group
        self.stopped = False

    def hear(self, message: Message) -> None:
        """Take a message that has arrived, unless nobody listens any more."""
        if not self.stopped:
            self.receive(message)


class Exchange:
    """Knows who listens, and sends to them."""

    def __init__(self, clock: Clock, chance: Chance) -> None:
        """Know nobody."""
        self._clock = clock
        self._chance = chance
        self._interests: PatternTree[Interest] = PatternTree()

    def add(self, interest: Interest) -> None:
        """Send to a listener from now on, unless it has stopped."""
        if not interest.stopped:
            self._interests.add(interest.pattern, interest)

    def remove(self, interest: Interest) -> None:
        """Send to a listener no more, also not what is on its way."""
        interest.stopped = True
        self._interests.remove(interest.pattern, interest)

    def send(self, message: Message) -> bool:
        """Send to whoever listens; tell whether anybody does."""
        listening = [interest for interest in self._interests.find(message.subject) if interest.link.connected]
        groups: dict[tuple[str, str], list[Interest]] = {}
        for interest in listening:
            if interest.group:
                groups.setdefault((interest.pattern, interest.group), []).append(interest)
            else:
                self._send_to(interest, message)
        for members in groups.values():
            self._send_to(self._chance.choose(members), message)
        return bool(listening)

    def _send_to(self, interest: Interest, message: Message) -> None:
        arrive = partial(interest.hear, message)
        if message.reply is not None:
            interest.link.deliver(arrive)
            return
        faults = self._chance.faults
        if self._chance.happens(faults.lose_live):
            return
        for _ in range(1 + self._chance.happens(faults.duplicate_live)):
            if self._chance.happens(faults.delay_live):
                later = partial(interest.link.deliver, arrive)
                self._clock.call_later(self._chance.below(faults.longest_delay_s), later)
            else:
                interest.link.deliver(arrive)
