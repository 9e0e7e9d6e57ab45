"""A NATS server of our own: started, watched and ended together with the program that wants it.

    async with EmbeddedBroker(EmbeddedBrokerConfig(data_dir=Path("data"))) as broker:
        client = await nats.connect(broker.endpoint)

Three processes take part. The *owner* is the program that calls `EmbeddedBroker.start`. It starts a small
*guard*, which starts the *server*. The guard ends the server when the owner is gone, for whatever reason, and
on Linux the kernel ends the server when the guard is gone. So no server outlives its owner.

Nothing here imports the NATS client, so it can be used from anywhere.
"""

from flame.broker.embedded.broker import EmbeddedBroker
from flame.broker.embedded.config import EmbeddedBrokerConfig
from flame.broker.embedded.errors import BrokerNotInstalled, BrokerStartFailed, DataDirInUse, PortInUse
from flame.broker.embedded.executable import find_nats_server

__all__ = [
    "BrokerNotInstalled",
    "BrokerStartFailed",
    "DataDirInUse",
    "EmbeddedBroker",
    "EmbeddedBrokerConfig",
    "PortInUse",
    "find_nats_server",
]
