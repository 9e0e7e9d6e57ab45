from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

import flame
from flame.broker.embedded import EmbeddedBroker, EmbeddedBrokerConfig
from flame.broker.jetstream import connect
from tests.support.cluster import Cluster, lasting
from tests.support.node import Control, left_of


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster of one node for a module's tests; afterwards nothing of it is alive."""
    options: tuple[str, ...] = getattr(request.module, "MANAGER_OPTIONS", ())
    scheduler_options: tuple[str, ...] = getattr(request.module, "SCHEDULER_OPTIONS", ())
    nodes: int = getattr(request.module, "NODES", 1)
    folder: Path = tmp_path_factory.mktemp("cluster")
    made = Cluster(folder, nodes=nodes, manager_options=options, scheduler_options=scheduler_options)
    with lasting(made, request.session):
        yield made


@pytest.fixture
async def connection(cluster: Cluster) -> AsyncIterator[flame.Connection]:
    """A client of the cluster."""
    async with cluster.connect() as client:
        yield client


@pytest.fixture
async def lab(cluster: Cluster, connection: flame.Connection) -> str:
    """The application of tests/services/lab.py, which does what its input says."""
    name = "lab"
    if name not in {application.name for application in await connection.list_applications()}:
        await connection.register_application(name, cluster.service("lab", delay_release_s=30))
    return name


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Control]:
    """A broker and a folder for executor managers; afterwards nothing of them is alive."""
    embedded = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=tmp_path / "broker"))
    async with embedded:
        broker = await connect(embedded.endpoint)
        control = Control(broker, embedded, tmp_path)
        await control.prepare()
        try:
            yield control
        finally:
            for manager in control.managers:
                await manager.stop()
            await broker.close()
    left = left_of(embedded.endpoint)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert left == []
