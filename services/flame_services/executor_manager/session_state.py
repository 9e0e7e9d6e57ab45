"""The state of sessions, for their executors: a node's manager reads and writes it, each for its own session only."""

from __future__ import annotations

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker, Bucket, Entry
from flame.errors import FlameError, StaleVersion
from flame.protocol import subjects
from flame.protocol.messages import TaskFault
from flame.protocol.session_state import StateAnswer, StateRequest, StateVerb


class SessionStates:
    """Answers what executors ask of their sessions' state."""

    def __init__(self, broker: Broker) -> None:
        """Keep it in the broker's bucket."""
        self._broker = broker

    @property
    def _bucket(self) -> Bucket:
        return self._broker.bucket(subjects.STATE)

    async def answer(self, session: str, data: bytes) -> bytes:
        """Answer a request of an executor of ``session``."""
        try:
            request = StateRequest.decode(data)
            answer = await self._carry_out(session, request)
        except FlameError as error:
            answer = refusal(error)
        return answer.encode()

    async def _carry_out(self, session: str, request: StateRequest) -> StateAnswer:
        if request.verb is StateVerb.KEYS:
            entries = await self._bucket.entries(subjects.session_state(session))
            keys = (subjects.parse_state_key(entry.key) for entry in entries)
            return StateAnswer(keys=tuple(key for key in keys if key.startswith(request.key)))
        key = subjects.state_key(session, request.key)
        if request.verb is StateVerb.GET:
            entry = await self._bucket.get(key)
            return StateAnswer() if entry is None else StateAnswer(entry.value, entry.revision)
        if request.verb is StateVerb.PUT:
            return StateAnswer(revision=await self._put(session, key, request))
        await self._delete(session, key, request)
        return StateAnswer()

    async def _put(self, session: str, key: str, request: StateRequest) -> int:
        try:
            if request.expected is None:
                return await self._bucket.put(key, request.value)
            if request.expected == 0:
                return await self._bucket.create(key, request.value)
            return await self._bucket.update(key, request.value, request.expected)
        except RevisionConflict:
            present = await self._bucket.get(key)
            if request.again and present is not None and present.value == request.value:
                return present.revision  # it was done, and the answer lost
            raise _stale(session, request, present) from None

    async def _delete(self, session: str, key: str, request: StateRequest) -> None:
        present = await self._bucket.get(key)
        if present is None:
            if request.expected and not request.again:
                raise _stale(session, request, None)
            return
        if request.expected not in (None, present.revision):
            raise _stale(session, request, present)
        try:
            await self._bucket.delete(key, None if request.expected is None else present.revision)
        except RevisionConflict:
            raise _stale(session, request, await self._bucket.get(key)) from None


def refusal(error: FlameError) -> StateAnswer:
    """Return the answer that says why something was refused."""
    return StateAnswer(error=TaskFault(error.code.value, str(error)))


def _stale(session: str, request: StateRequest, present: Entry | None) -> StaleVersion:
    has = "no value" if present is None else f"revision {present.revision}"
    expected = f"revision {request.expected}" if request.expected else "no value"
    return StaleVersion(f"state {request.key!r} of session {session} has {has}, not {expected}; nothing was changed")
