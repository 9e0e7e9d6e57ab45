"""A broker in this process's memory, behind the same seam: for tests, and for trying things out.

    server = MemoryServer(seed=7, faults=Faults(lose_live=0.1, lose_acknowledgements=0.1))
    broker = server.connect()

It keeps the guarantees that the specifications of `flame.protocol.topology` have on JetStream, delivers everything
asynchronously, and takes faults from a seed: the same seed and the same calls in the same order have the same
consequences. What was acknowledged is never lost. `flame.broker.memory.server` lists where it differs from JetStream.
"""

from flame.broker.memory.broker import MemoryBroker
from flame.broker.memory.clock import Clock, LoopClock, ManualClock, Timer
from flame.broker.memory.faults import Faults
from flame.broker.memory.server import MemoryServer

__all__ = ["Clock", "Faults", "LoopClock", "ManualClock", "MemoryBroker", "MemoryServer", "Timer"]
