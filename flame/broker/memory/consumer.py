"""A pull consumer: which messages of its stream wait, which are in somebody's hands, and until when."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from flame.broker.memory.clock import Clock, Timer
from flame.broker.memory.faults import Chance
from flame.broker.memory.link import Link
from flame.broker.seam import ConsumerState, Delivery
from flame.protocol.topology import ConsumerSpec, Retention

if TYPE_CHECKING:
    from flame.broker.memory.stream import MemoryStream

SILENCE_S: Final = 5.0
"""After this long without a sign of it a request that stood is known to be lost."""
_SECOND_NS: Final = 1_000_000_000


class Pull:
    """A request for messages, standing at a consumer."""

    __slots__ = ("_life", "_link", "end", "most", "take", "timer")

    def __init__(self, link: Link, most: int, take: Callable[[Delivery], None], end: Callable[[str], None]) -> None:
        """Ask over ``link`` for up to ``most``; if fewer come, ``end`` is told, and why if the consumer is gone."""
        self._link = link
        self._life = link.lives
        self.most = most
        self.take = take
        self.end = end
        self.timer: Timer | None = None

    @property
    def stands(self) -> bool:
        """Whether whoever asked is still there to be answered."""
        return self.most > 0 and self._link.connected and self._link.lives == self._life

    def close(self, missing: str | None = None) -> None:
        """Drop it, and say so unless everything it asked for was sent."""
        if self.timer is not None:
            self.timer.cancel()
        if missing is not None and self.stands:
            self._link.deliver(partial(self.end, missing))
        self.most = 0

    def give(self, delivery: Delivery) -> None:
        """Send a message."""
        self.most -= 1
        self._link.deliver(partial(self.take, delivery))

    def lose(self, clock: Clock) -> None:
        """Lose a message on its way. Whoever waits for it notices that the request is gone: nothing shows its life."""
        self.most -= 1
        clock.call_later(SILENCE_S, lambda: self._link.deliver(partial(self.end, "")))


class MemoryDelivery(Delivery):
    """A delivery whose handle is ``<stream>.<consumer>.<delivered>.<sequence>.<n>.<time>``."""

    __slots__ = ()

    @property
    def stored_at(self) -> float:
        """See `flame.broker.seam.Delivery.stored_at`."""
        return int(self.handle.rpartition(".")[2]) / _SECOND_NS


class MemoryConsumer:
    """One consumer. What was handed back or ran out comes before what is new, and in that order."""

    def __init__(self, spec: ConsumerSpec, stream: MemoryStream, clock: Clock, chance: Chance) -> None:
        """Begin with everything that its stream holds."""
        self.spec = spec
        self._stream = stream
        self._clock = clock
        self._chance = chance
        self._new: OrderedDict[int, None] = OrderedDict.fromkeys(stream.matching(spec.filter_subject))
        self._again: OrderedDict[int, None] = OrderedDict()
        self._out: OrderedDict[int, float] = OrderedDict()
        """Until when what was handed out is good; since all are good for equally long, the first ends first."""
        self._delayed: dict[int, Timer] = {}
        """What was handed back and is handed out again when its timer ends."""
        self._counts: dict[int, int] = {}
        self._handed_out = 0
        self._pulls: deque[Pull] = deque()
        self._timer: Timer | None = None

    def state(self) -> ConsumerState:
        """Tell what it has to do."""
        return ConsumerState(self.spec.name, len(self._new), len(self._out) + len(self._delayed) + len(self._again))

    # ---- what its stream says

    def offer(self, sequence: int) -> None:
        """Take a new message."""
        self._new[sequence] = None
        self._hand_out()

    def forget(self, sequence: int) -> None:
        """Drop a message that its stream doesn't hold any more."""
        self._new.pop(sequence, None)
        self._again.pop(sequence, None)
        self._out.pop(sequence, None)
        self._end_delay(sequence)
        self._counts.pop(sequence, None)

    def end(self, why: str) -> None:
        """Answer whoever waits: it is gone."""
        if self._timer is not None:
            self._timer.cancel()
        for sequence in list(self._delayed):
            self._end_delay(sequence)
        pulls, self._pulls = self._pulls, deque()
        for pull in pulls:
            pull.close(why)

    # ---- what executors say

    def pull(self, pull: Pull, wait_s: float) -> None:
        """Give what there is, and what comes within ``wait_s``."""
        self._pulls = deque(other for other in self._pulls if other.stands)
        if wait_s > 0 and len(self._pulls) >= self.spec.max_waiting:
            pull.close("")
            return
        if wait_s > 0:
            pull.timer = self._clock.call_later(wait_s, partial(pull.close, ""))
        self._pulls.append(pull)
        self._hand_out()
        if wait_s <= 0:
            pull.close("")

    def acknowledge(self, sequence: int) -> None:
        """Finish a message, whoever holds it; one that it hasn't handed out stays."""
        if sequence not in self._counts:
            return
        self.forget(sequence)
        if self._stream.spec.retention is Retention.WORK:
            self._stream.remove(sequence)

    def extend(self, sequence: int) -> None:
        """Begin the time of a message anew, whoever holds it, or nobody since it is delayed."""
        if self._out.pop(sequence, None) is not None or self._end_delay(sequence):
            self._begin_time(sequence)

    def hand_back(self, sequence: int, delay_s: float) -> None:
        """Hand a message out again, whoever holds it: at once, or after a delay."""
        if self._out.pop(sequence, None) is None and not self._end_delay(sequence):
            return
        if delay_s > 0:
            self._delayed[sequence] = self._clock.call_later(delay_s, partial(self._delay_over, sequence))
        else:
            self._again[sequence] = None
            self._hand_out()

    def _end_delay(self, sequence: int) -> bool:
        timer = self._delayed.pop(sequence, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _delay_over(self, sequence: int) -> None:
        del self._delayed[sequence]
        self._again[sequence] = None
        self._hand_out()

    # ---- handing out

    def _hand_out(self) -> None:
        while self._pulls and (self._again or self._new):
            pull = self._pulls[0]
            if pull.stands:
                self._give(pull, next(iter(self._again or self._new)))
            if not pull.stands:
                self._pulls.popleft().close()

    def _give(self, pull: Pull, sequence: int) -> None:
        message = self._stream.message(sequence)
        self._new.pop(sequence, None)
        self._again.pop(sequence, None)
        if message is None:
            return
        self._begin_time(sequence)
        count = self._counts[sequence] = self._counts.get(sequence, 0) + 1
        self._handed_out += 1
        view = f"{count}.{sequence}.{self._handed_out}.{int(message.stored_at * _SECOND_NS)}"
        handle = f"{self._stream.spec.name}.{self.spec.name}.{view}"
        if self._chance.happens(self._chance.faults.lose_deliveries):
            pull.lose(self._clock)
            return
        pull.give(MemoryDelivery(message.subject, message.data, handle, count, sequence, len(self._new)))

    def _begin_time(self, sequence: int) -> None:
        self._out[sequence] = self._clock.time() + self.spec.ack_wait_s
        if self._timer is None:
            self._timer = self._clock.call_later(self.spec.ack_wait_s, self._take_back)

    def _take_back(self) -> None:
        """Hand out again what nobody finished in time."""
        self._timer = None
        now = self._clock.time()
        while self._out:
            sequence, until = next(iter(self._out.items()))
            if until > now:
                self._timer = self._clock.call_later(until - now, self._take_back)
                break
            del self._out[sequence]
            self._again[sequence] = None
        self._hand_out()


def read_handle(handle: str) -> tuple[str, str, int] | None:
    """Return the stream, the consumer and the sequence that a delivery's handle names; ``None`` if it names none."""
    stream, _, rest = handle.partition(".")
    parts = rest.rsplit(".", 4)
    if len(parts) != 5 or not parts[2].isdigit():
        return None
    return stream, parts[0], int(parts[2])
