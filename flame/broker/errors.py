"""What a broker operation can end with, besides its result.

Each class says whether the operation may have happened: callers decide on that, never on a text.
"""

from __future__ import annotations

from flame.errors import BrokerUnavailable, FlameError


class BrokerError(FlameError):
    """The broker refused an operation for a reason that no other class names. It did not happen."""


class Duplicate(BrokerError):
    """The subject holds a message already, and its stream keeps the first. Nothing was stored."""


class StreamFull(BrokerError):
    """The stream is at its limit and refuses new messages. Nothing was stored."""


class TooLarge(BrokerError):
    """The message is larger than the server takes. Nothing was sent."""


class StreamMissing(BrokerError):
    """There is no such stream or bucket. Nothing was stored."""


class ConsumerMissing(BrokerError):
    """There is no such consumer: it was deleted, or its server restarted."""


class ConsumerConflict(BrokerError):
    """Another consumer of the stream has the same filter. Nothing was created."""


class NoMessage(BrokerError):
    """The stream holds no such message."""


class RevisionConflict(BrokerError):
    """The key was changed since it was read, or exists already. Nothing was written."""


class NoResponders(BrokerError):
    """Nobody serves the subject of a request. Nothing happened."""


class NotAcknowledged(BrokerUnavailable):
    """No answer came in time. The operation may have happened."""
