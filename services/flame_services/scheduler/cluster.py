"""What a cluster consists of from its first start: buckets, streams, built-in applications."""

from __future__ import annotations

import time

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker
from flame.logs import get_logger
from flame.protocol import subjects, topology
from flame.protocol.codec import VERSION, pack
from flame.protocol.records import ApplicationRecord, ApplicationSpec, decode_record

log = get_logger("flame.scheduler")

FOUNDED_KEY = "cluster.founded"
"""In the applications bucket; no application can have this name, since it has a dot."""

BUILT_IN: dict[str, ApplicationSpec] = {
    "flmexec": ApplicationSpec(
        command="flmexec-service", description="Runs a given script, of shell or Python, on a node of the cluster"
    ),
    "flmping": ApplicationSpec(command="flmping-service", description="Echoes its input, for timing a cluster"),
    "flmtest": ApplicationSpec(shim="Log", description="Records and echoes its input, for trying things out"),
}


async def found_cluster(broker: Broker, replicas: int) -> None:
    """Make what is missing. Built-in applications are registered once: who unregisters one is rid of it."""
    for bucket in topology.buckets(replicas):
        await broker.ensure_bucket(bucket)
    applications = broker.bucket(subjects.APPLICATIONS)
    for entry in await applications.entries("*"):
        if entry.value is not None and decode_record(ApplicationRecord, entry.value) is not None:
            await _ensure_streams(broker, entry.key, replicas)
    if await applications.get(FOUNDED_KEY) is not None:
        return
    for name, spec in BUILT_IN.items():
        await _ensure_streams(broker, name, replicas)
        try:
            await applications.create(name, ApplicationRecord(name=name, spec=spec, created=time.time()).encode())
        except RevisionConflict:
            continue
    await applications.put(FOUNDED_KEY, pack({"v": VERSION, "at": time.time()}))
    log.info("cluster founded", applications=sorted(BUILT_IN))


async def _ensure_streams(broker: Broker, application: str, replicas: int) -> None:
    for stream in topology.application_streams(application, replicas):
        await broker.ensure_stream(stream)
