"""What a cluster consists of from its first start: buckets, streams, built-in applications."""

from __future__ import annotations

import contextlib
import time
from typing import Final

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker
from flame.errors import MalformedMessage
from flame.logs import get_logger
from flame.protocol import subjects, topology
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.records import ApplicationRecord, ApplicationSpec, decode_record

log = get_logger("flame.scheduler")

FOUNDED_KEY = "cluster.founded"
"""In the applications bucket; no application can have this name, since it has a dot."""

BUILT_IN: dict[str, ApplicationSpec] = {
    "flmexec": ApplicationSpec(
        command="flmexec-service", description="Runs a given script, of shell or Python, on a node of the cluster"
    ),
    "flmfunc": ApplicationSpec(
        command="flmfunc-service", description="Calls the Python functions that its clients send; see flame.functions"
    ),
    "flmping": ApplicationSpec(command="flmping-service", description="Echoes its input, for timing a cluster"),
    "flmtest": ApplicationSpec(shim="Log", description="Records and echoes its input, for trying things out"),
}
CLIENT_CODE: Final = frozenset({"flmexec", "flmfunc"})
"""Those that run what any client sends."""
_FIRST: Final = frozenset({"flmexec", "flmping", "flmtest"})
"""Those of clusters that don't say which they were offered."""


async def found_cluster(broker: Broker, replicas: int, *, client_code: bool = True) -> None:
    """Make what is missing. Built-in applications are registered once each: who unregisters one is rid of it.

    Without ``client_code`` those that run what clients send are left out, until a start with it.
    """
    for bucket in topology.buckets(replicas):
        await broker.ensure_bucket(bucket)
    applications = broker.bucket(subjects.APPLICATIONS)
    for entry in await applications.entries("*"):
        if entry.value is not None and decode_record(ApplicationRecord, entry.value) is not None:
            await _ensure_streams(broker, entry.key, replicas)
    founded = await applications.get(FOUNDED_KEY)
    offered = _offered(None if founded is None else founded.value)
    missing = [name for name in BUILT_IN if name not in offered and (client_code or name not in CLIENT_CODE)]
    if not missing:
        return
    for name in missing:
        await _ensure_streams(broker, name, replicas)
        with contextlib.suppress(RevisionConflict):  # another scheduler, or an application of the users' own
            record = ApplicationRecord(name=name, spec=BUILT_IN[name], created=time.time())
            await applications.create(name, record.encode())
    now = {"v": VERSION, "at": time.time(), "applications": sorted({*offered, *missing})}
    await applications.put(FOUNDED_KEY, pack(now))
    log.info("cluster founded" if founded is None else "built-in applications added", applications=missing)


def _offered(founded: bytes | None) -> frozenset[str]:
    """Return the built-in applications that this cluster has, or has had."""
    if founded is None:
        return frozenset()
    try:
        return frozenset(map(str, unpack(founded).get("applications") or _FIRST))
    except MalformedMessage:  # a newer scheduler's: it has done what there is to do
        return frozenset(BUILT_IN)


async def _ensure_streams(broker: Broker, application: str, replicas: int) -> None:
    for stream in topology.application_streams(application, replicas):
        await broker.ensure_stream(stream)
