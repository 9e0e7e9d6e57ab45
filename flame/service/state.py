"""The state of a session: values by key that its executors share, and that end with it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, NamedTuple, TypeVar

from flame.broker.errors import NoResponders, NotAcknowledged
from flame.broker.seam import Broker
from flame.errors import (
    BrokerUnavailable,
    InvalidArgument,
    MalformedMessage,
    PayloadTooLarge,
    Unavailable,
    WrongThread,
    from_code,
)
from flame.protocol import defaults, subjects
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.session_state import StateAnswer, StateRequest, StateVerb

T = TypeVar("T")

ATTEMPT_S: Final = 5.0
PATIENCE_S: Final = 30.0
"""How long an operation is tried: its executor manager, or the broker, may be restarting."""
_PAUSE_S: Final = 0.1


class StateEntry(NamedTuple):
    """A value of a session's state, with what tells whether it was changed since."""

    value: Any
    """``None`` if there is none."""
    revision: int
    """Rises with every change; 0 if there is no value."""


class State:
    """The state of the session that an executor serves; ``context.state``.

    Whatever becomes of an executor, what `put` has returned for is there for the session's other executors and for
    those that come later. It goes when the session has ended. No other session's executors can reach it: they ask their
    executor manager, which knows whose they are.

    Values are ``None``, ``bool``, ``int`` of 64 bits, ``float``, ``str``, ``bytes``, and lists and dicts with keys that
    are ``str`` of such; a tuple comes back as a list. One value holds at most 256 KiB. Keys are texts of 1 to 128
    characters.

    Every method raises `InvalidName` for what can be no key, and `Unavailable` if neither the executor manager nor the
    broker has answered for 30 s; what was to be changed may have been changed then.
    """

    def __init__(self, broker: Broker, node: str, executor: str) -> None:
        """Made by an executor, in its event loop."""
        self._broker = broker
        self._subject = subjects.executor_report(node, executor)
        self._loop = asyncio.get_running_loop()
        self.sync: Final = SyncState(self, self._loop)
        """The same methods for handlers that are not ``async``."""

    async def get(self, key: str, default: Any = None) -> Any:
        """Return a value; ``default`` if there is none."""
        entry = await self.entry(key)
        return entry.value if entry.revision else default

    async def entry(self, key: str) -> StateEntry:
        """Return a value and its revision, to be changed with `put` or `delete` only if it is the same still."""
        answer = await self._ask(StateRequest(StateVerb.GET, _checked(key)))
        if answer.value is None:
            return StateEntry(None, 0)
        return StateEntry(unpack(answer.value).get("value"), answer.revision)

    async def put(self, key: str, value: Any, *, expected: int | None = None) -> int:
        """Keep a value and return its revision: from then on every reader finds this one, or a later one.

        Args:
            key: Whose value it is.
            value: What is to be kept.
            expected: Only if the present value has this revision, see `entry`; 0: only if there is none.

        Raises:
            StaleVersion: It has another revision than ``expected``; nothing was changed.
            PayloadTooLarge: The value is over the limit.
            InvalidArgument: The value is of a kind that can't be kept.
        """
        data = _packed(_checked(key), value)
        return (await self._ask(StateRequest(StateVerb.PUT, key, data, _revision(expected)))).revision

    async def delete(self, key: str, *, expected: int | None = None) -> None:
        """Remove a value; no error if there is none. ``expected`` and `StaleVersion` as in `put`."""
        await self._ask(StateRequest(StateVerb.DELETE, _checked(key), expected=_revision(expected)))

    async def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that there are and that begin with ``prefix``, sorted."""
        if not isinstance(prefix, str):
            raise InvalidArgument(f"state: prefix: expected str, got {type(prefix).__name__}")
        return sorted((await self._ask(StateRequest(StateVerb.KEYS, prefix))).keys)

    async def _ask(self, request: StateRequest) -> StateAnswer:
        give_up = self._loop.time() + PATIENCE_S
        while True:
            try:
                answer = StateAnswer.decode(await self._broker.request(self._subject, request.encode(), ATTEMPT_S))
                if answer.error is None:
                    return answer
                raise from_code(answer.error.code, answer.error.message)
            except (NoResponders, NotAcknowledged, BrokerUnavailable, MalformedMessage, Unavailable) as error:
                if self._loop.time() >= give_up:
                    raise Unavailable(
                        f"state: no answer of the executor manager for {PATIENCE_S:g} s: {error}"
                    ) from None
            request.again = True
            await asyncio.sleep(_PAUSE_S)


class SyncState:
    """The methods of `State` for handlers that are not ``async``, which run in a thread of their own.

    On the event loop's thread they raise `WrongThread`.
    """

    def __init__(self, state: State, loop: asyncio.AbstractEventLoop) -> None:
        """Made by a `State`."""
        self._state = state
        self._loop = loop

    def get(self, key: str, default: Any = None) -> Any:
        """See `State.get`."""
        return self._run(self._state.get(key, default))

    def entry(self, key: str) -> StateEntry:
        """See `State.entry`."""
        return self._run(self._state.entry(key))

    def put(self, key: str, value: Any, *, expected: int | None = None) -> int:
        """See `State.put`."""
        return self._run(self._state.put(key, value, expected=expected))

    def delete(self, key: str, *, expected: int | None = None) -> None:
        """See `State.delete`."""
        self._run(self._state.delete(key, expected=expected))

    def keys(self, prefix: str = "") -> list[str]:
        """See `State.keys`."""
        return self._run(self._state.keys(prefix))

    def _run(self, asking: Coroutine[Any, Any, T]) -> T:
        try:
            here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is not None:
            asking.close()
            raise WrongThread("state.sync: called in an event loop, which would wait for itself; await state's methods")
        return asyncio.run_coroutine_threadsafe(asking, self._loop).result()


def _checked(key: str) -> str:
    subjects.state_key("", key)
    return key


def _revision(expected: object) -> int | None:
    if expected is None or (isinstance(expected, int) and not isinstance(expected, bool) and expected >= 0):
        return expected
    raise InvalidArgument(f"state: expected: a revision or None, got {repr(expected)[:60]}")


def _packed(key: str, value: object) -> bytes:
    try:
        data = pack({"v": VERSION, "value": value})
        unpack(data)
    except Exception as error:  # noqa: BLE001  # msgpack raises half a dozen unrelated types
        raise InvalidArgument(f"state: the value of {key!r}, {type(value).__name__}, can't be kept: {error}") from None
    if len(data) > defaults.INLINE_LIMIT_BYTES:
        raise PayloadTooLarge(
            f"state: the value of {key!r} has {len(data)} bytes: the limit is {defaults.INLINE_LIMIT_BYTES}"
        )
    return data
