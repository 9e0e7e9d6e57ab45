"""The scheduler as a program: it keeps a view, answers the control API, and plans."""

from __future__ import annotations

import asyncio
import secrets
import socket

from pydantic import Field

from flame.broker.jetstream import connect
from flame.broker.seam import Broker
from flame.protocol import defaults
from flame.protocol.subjects import to_token
from flame_services.program import Settings
from flame_services.scheduler.cluster import found_cluster
from flame_services.scheduler.control_api import ControlApi
from flame_services.scheduler.planner import Planner
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View


class SchedulerSettings(Settings):
    """What a scheduler can be told."""

    name: str = Field(default="", description="its name among schedulers; empty: made from the host's name")
    ack_wait_s: float = Field(
        default=defaults.ACK_WAIT_S,
        ge=1,
        le=3600,
        description="for how many seconds a task stays with an executor that gives no sign of life",
    )
    max_executors: int | None = Field(
        default=None, ge=1, description="the most executors that all sessions have together; no such limit if not given"
    )
    client_code: bool = Field(
        default=True,
        description="register, once, the built-in applications that run what clients send, flmexec and flmfunc; without"
        " it they are left out, and those that are there stay: flmctl disable or unregister them",
    )
    replicas: int = Field(default=1, ge=1, le=5, description="copies of every stream and bucket, in a broker cluster")


class Scheduler:
    """Binds sessions to executors, and answers the control API."""

    def __init__(self, settings: SchedulerSettings) -> None:
        """Take settings; nothing is connected before `start`."""
        self._settings = settings
        self._name = settings.name or f"{to_token(socket.gethostname())[:48]}-{secrets.token_hex(3)}"
        self._broker: Broker | None = None
        self._store: Store | None = None
        self._api: ControlApi | None = None
        self._planner: Planner | None = None

    async def start(self) -> None:
        """Return when the view is complete and requests are answered."""
        broker = self._broker = await connect(self._settings.endpoint, name=f"flame-scheduler-{self._name}")
        await found_cluster(broker, self._settings.replicas, client_code=self._settings.client_code)
        view = View(self._settings.max_executors)
        store = self._store = Store(broker, view)
        await store.start()
        recorder = Recorder(broker, store, self._name)
        self._planner = Planner(broker, view, store, recorder, self._settings.ack_wait_s)
        self._api = ControlApi(broker, view, store, recorder, self._name, self._settings.replicas)
        await self._api.start()
        await self._planner.start()

    async def stop(self) -> None:
        """Stop answering, finish what is under way, and disconnect."""
        for part in (self._api, self._planner, self._store):
            if part is not None:
                await part.stop()
        if self._broker is not None:
            await self._broker.close()

    async def failed(self) -> str:
        """Return why planning ended by itself."""
        if self._planner is None:
            await asyncio.Event().wait()
        assert self._planner is not None
        return await self._planner.failed()
