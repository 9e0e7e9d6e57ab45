"""This node in the eyes of the cluster: its name, which only one manager may use, and its heartbeat."""

from __future__ import annotations

import asyncio
import math
from typing import Final

from flame.broker.errors import NotAcknowledged, RevisionConflict, StreamMissing
from flame.broker.seam import Broker, Entry
from flame.errors import ConfigurationError, FlameError, Unavailable
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.records import NodeRecord, decode_record

log = get_logger("flame.manager.node")

WRITE_S: Final = 2.0
"""For one heartbeat."""
LAST_WRITE_S: Final = 1.0
WATCH_S: Final = 2.5 * defaults.NODE_HEARTBEAT_S
"""How long a record of our name must stand still before its manager is taken for dead."""
_LOOK_S: Final = 0.2
_RETRY_S: Final = 0.1
_PATIENCE_S: Final = 3.0
"""How long registering may take without a word."""


class NodeHeartbeat:
    """The one writer of this node's record."""

    def __init__(self, broker: Broker, record: NodeRecord) -> None:
        """Bind to a node; nothing is sent before `claim`."""
        self._broker = broker
        self._bucket = broker.bucket(subjects.NODES)
        self._record = record
        self._revision = 0
        self._outage = False
        self._claimed = False

    async def claim(self, dead: float | None) -> None:
        """Register the node. Waits for a scheduler to have made the control plane, without limit.

        ``dead``: when a manager of this name was started that is known to be gone. Raises `ConfigurationError`
        if another one lives under this name.
        """
        loop = asyncio.get_running_loop()
        warn_at = loop.time() + _PATIENCE_S
        while True:
            try:
                entry = await self._bucket.get(self._record.name)
                if entry is not None:
                    await self._refuse_if_alive(entry, dead)
                await self._first_write(entry)
            except StreamMissing:
                problem = "the cluster has no control plane yet; a scheduler makes it"
            except (RevisionConflict, Unavailable) as error:
                problem = str(error)
            else:
                self._claimed = True
                return
            if loop.time() >= warn_at:
                log.warning("waiting to be registered", node=self._record.name, reason=problem)
                warn_at = math.inf
            await asyncio.sleep(_RETRY_S)

    async def run(self) -> None:
        """Beat until cancelled, whatever becomes of the broker."""
        while True:
            await asyncio.sleep(defaults.NODE_HEARTBEAT_S)
            problem = await self._beat(WRITE_S)
            if problem and not self._outage:
                log.warning(
                    "heartbeats don't reach the broker; executors go on", node=self._record.name, reason=problem
                )
            elif not problem and self._outage:
                log.info("heartbeats reach the broker again", node=self._record.name)
            self._outage = bool(problem)

    async def announce_stop(self) -> None:
        """Say that nothing new is to be placed here. Gives up after a second."""
        self._record = self._record.changed(stopping=True)
        if self._claimed:
            await self._beat(LAST_WRITE_S)

    async def sign_off(self) -> None:
        """Remove the record, unless another manager has taken the name. Gives up after a second. Stop `run` first."""
        if not self._claimed or not self._broker.connected:
            return
        try:
            async with asyncio.timeout(LAST_WRITE_S):
                await self._bucket.delete(self._record.name, self._revision)
        except (FlameError, TimeoutError) as error:
            log.warning("the node's record stays", node=self._record.name, reason=str(error) or "no answer in time")

    async def _beat(self, limit_s: float) -> str:
        """Write the record with the next beat; return the problem, if any."""
        self._record = self._record.changed(beat=self._record.beat + 1)
        if not self._broker.connected:
            return "not connected"
        try:
            async with asyncio.timeout(limit_s):
                self._revision = await self._bucket.put(self._record.name, self._record.encode())
        except TimeoutError:
            return f"no answer within {limit_s:g} s"
        except FlameError as error:
            return str(error)
        return ""

    async def _first_write(self, entry: Entry | None) -> None:
        """Write only over what was looked at: of two managers that start at once, one finds the other's record."""
        data = self._record.encode()
        if entry is None:
            self._revision = await self._bucket.create(self._record.name, data)
        else:
            self._revision = await self._bucket.update(self._record.name, data, entry.revision)

    async def _refuse_if_alive(self, entry: Entry, dead: float | None) -> None:
        found = decode_record(NodeRecord, entry.value or b"")
        if found is None:
            return
        ours = (found.hostname, found.started) == (self._record.hostname, self._record.started)
        if not (found.stopping or ours or found.started == dead) and await self._beats(entry):
            raise ConfigurationError(
                f"node {found.name!r} is run by another executor manager, on host {found.hostname!r}: "
                f"stop that one, or give this one another name with --node"
            )
        # So that whoever watches sees a change even before the first heartbeat.
        self._record = self._record.changed(beat=found.beat + 1)

    async def _beats(self, entry: Entry) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WATCH_S
        log.info("the name is in use or was; watching whether it beats", node=entry.key)
        while loop.time() < deadline:
            await asyncio.sleep(_LOOK_S)
            try:
                now = await self._bucket.get(entry.key)
            except NotAcknowledged:
                continue
            if now is None or now.revision != entry.revision:
                return now is not None
        return False
