"""What all executors of a node share."""

from __future__ import annotations

from dataclasses import dataclass

from flame.broker.seam import Broker
from flame_services.executor_manager.berth import Berths
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.enforcement import Enforcement
from flame_services.executor_manager.keeper import LeaseKeeper
from flame_services.executor_manager.output import OutputFollower
from flame_services.executor_manager.settings import ManagerSettings
from flame_services.executor_manager.stocks import Stocks
from flame_services.executor_manager.work_folder import WorkFolder


@dataclass(frozen=True, slots=True)
class Place:
    """A node, for its executors."""

    node: str
    settings: ManagerSettings
    broker: Broker
    folder: WorkFolder
    output: OutputFollower
    consumers: Consumers
    leases: LeaseKeeper
    enforcement: Enforcement
    berths: Berths
    stocks: Stocks
