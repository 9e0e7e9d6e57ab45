"""Testing services and their clients: a cluster in this process, or a real one of your own, and a clock to control.

A service runs in-process, driven by the same client classes, the same scheduler and the same executor loop as in a
cluster, over a broker in memory: sessions, retries, time limits, cancellation and closing mean the same there. What
differs is that executors share this process. See `MemoryCluster`.

With pytest and pytest-asyncio there is nothing to set up: the fixtures of `flame.testing.plugin` are there wherever
Flame is installed, and cost nothing where they aren't used::

    async def test_answers(flame_service):
        session = await flame_service(Agent, b"You said:")
        assert (await session.invoke(b"hello")).output == b"You said: hello"

Names are loaded when they are first used, as those of `flame` are. `MemoryCluster` is the one that comes from the
programs (`flame_services.testing`): it contains a scheduler. Nothing else of `flame` knows of it, or of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flame.lazy import load_on_use

if TYPE_CHECKING:
    from flame.broker.memory import Faults
    from flame.testing.clock import Stuck, VirtualClock, run_virtually
    from flame.testing.embedded import EmbeddedCluster
    from flame.testing.events import EventLog
    from flame_services.testing.cluster import MemoryCluster

__all__ = ["EmbeddedCluster", "EventLog", "Faults", "MemoryCluster", "Stuck", "VirtualClock", "run_virtually"]

_MODULE_OF = {
    "EmbeddedCluster": "flame.testing.embedded",
    "EventLog": "flame.testing.events",
    "Faults": "flame.broker.memory",
    "MemoryCluster": "flame_services.testing.cluster",
    "Stuck": "flame.testing.clock",
    "VirtualClock": "flame.testing.clock",
    "run_virtually": "flame.testing.clock",
}

__getattr__, __dir__ = load_on_use(__name__, _MODULE_OF)
