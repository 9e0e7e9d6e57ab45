"""The functions of a session: pickled once, and sent with its common data before they are called."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from typing import TYPE_CHECKING, Any, Final

from flame.calls.messages import Definitions
from flame.calls.pickling import module_of
from flame.calls.sending import definition_bytes
from flame.errors import StaleVersion

if TYPE_CHECKING:
    from flame.client.connection import Connection
    from flame.client.session import Session

_ATTEMPTS: Final = 10
_HASH_BYTES: Final = 16


class SentFunctions:
    """What a session's executors can be asked to call. Functions may be added in any thread."""

    def __init__(self, session: Session, connection: Connection) -> None:
        """Begin with none."""
        self.sent: dict[bytes, bytes] = {}
        """Pickled functions that executors have, or will have before they run a task that is created from now on."""
        self.modules: set[str] = set()
        """The program's own modules: what belongs to them travels by value."""
        self._session = session
        self._connection = connection
        self._added: dict[bytes, bytes] = {}
        self._adding = threading.Lock()
        self._sending = asyncio.Lock()
        self._version = session.common_data_version

    def add(self, function: Any) -> bytes:
        """Take a function over as it is now, and return what it is called by. Raises `Unpicklable`."""
        with self._adding:
            if module := module_of(function):
                self.modules.add(module)
            pickled = definition_bytes(function, "function", self.modules)
        name = hashlib.sha256(pickled).digest()[:_HASH_BYTES]
        if name not in self.sent:
            self._added[name] = pickled
        return name

    async def send(self, name: bytes) -> None:
        """Return when a function that was added is there for every task that is created after this."""
        async with self._sending:
            if name in self.sent:
                return
            pickled = self._added[name]
            await self._update(Definitions({**self.sent, name: pickled}).encode())
            self.sent[name] = self._added.pop(name)

    async def _update(self, data: bytes) -> None:
        """Replace the common data; an earlier request that is late must not take its place afterwards."""
        session = self._session
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._version = await session.update_common_data(data, expected_version=self._version)
            except StaleVersion:
                if attempt == _ATTEMPTS:
                    raise
                self._version = (await self._connection.get_session(session.id)).session.common_data_version
            else:
                return
