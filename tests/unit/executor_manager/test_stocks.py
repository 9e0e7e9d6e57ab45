"""Which registration of an application a node's stock is for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flame.broker.seam import Entry
from flame.protocol.records import ApplicationRecord, ApplicationSpec
from flame.protocol.states import ApplicationState, ExecutorState
from flame.protocol.supervision import ExecutorReport
from flame_services.executor_manager.assignment import Registered
from flame_services.executor_manager.berth import Berths
from flame_services.executor_manager.gpus import Gpus
from flame_services.executor_manager.settings import ManagerSettings
from flame_services.executor_manager.stock import ASKED_FOR, BACKOFF_FIRST_S, NO_TEMPLATE_NOW
from flame_services.executor_manager.stocks import GONE, STOPPING, Stocks
from flame_services.executor_manager.work_folder import WorkFolder


def record(created: float = 1.0, **spec: Any) -> ApplicationRecord:
    return ApplicationRecord(name="app", spec=ApplicationSpec(**{"command": "/no/such", **spec}), created=created)


def entry(record: ApplicationRecord | None, revision: int) -> Entry:
    return Entry("app", None if record is None else record.encode(), revision)


@pytest.fixture
async def stocks(tmp_path: Path) -> AsyncIterator[Stocks]:
    folder = WorkFolder(tmp_path)
    folder.claim()
    made = Stocks(Berths("node", ManagerSettings(node="node", work_dir=tmp_path), folder, Gpus(())))
    yield made
    await made.stop()
    folder.release()


async def test_one_registration_has_one_stock(stocks: Stocks) -> None:
    stock = stocks.of(Registered(record(), 1))
    assert stocks.of(Registered(record(), 1)) is stock
    disabled = record().changed(state=ApplicationState.DISABLED)
    stocks.on_application(entry(disabled, 2))
    assert stocks.of(Registered(disabled, 2)) is stock
    assert stock.template_path() is not None


@pytest.mark.parametrize("change", [{"created": 2.0}, {"arguments": ("other",)}])
async def test_another_registration_has_another(stocks: Stocks, change: dict[str, Any]) -> None:
    stock = stocks.of(Registered(record(), 1))
    stocks.on_application(entry(record(**change), 2))
    assert stock.why_fresh() == GONE
    assert stock.template_path() is None
    assert stocks.of(Registered(record(**change), 2)) is not stock


async def test_what_was_read_may_be_newer_than_what_was_heard(stocks: Stocks) -> None:
    new = stocks.of(Registered(record(2.0), 5))
    stocks.on_application(entry(record(1.0), 3))
    assert stocks.of(Registered(record(2.0), 5)) is new
    assert new.why_fresh() != GONE


async def test_what_was_read_may_be_older(stocks: Stocks) -> None:
    stocks.on_application(entry(record(2.0), 5))
    old = stocks.of(Registered(record(1.0), 3))
    assert old.template_path() is None
    assert old.why_fresh() == GONE
    assert stocks.of(Registered(record(2.0), 5)).template_path() is not None


async def test_an_application_that_is_gone_has_none(stocks: Stocks) -> None:
    stocks.on_application(entry(record(), 1))
    assert stocks.registered("app") == Registered(record(), 1)
    stock = stocks.of(Registered(record(), 1))
    stocks.on_application(entry(None, 2))
    assert stocks.registered("app") is None
    assert stock.why_fresh() == GONE


async def test_a_foreign_value_is_taken_for_none(stocks: Stocks) -> None:
    stocks.on_application(Entry("app", b"?", 1))
    assert stocks.registered("app") is None


async def test_a_manager_that_stops_keeps_nothing_ready(stocks: Stocks) -> None:
    stock = stocks.of(Registered(record(), 1))
    stocks.close()
    assert stock.template_path() is None
    other = stocks.of(Registered(record(2.0), 2))
    assert (other.template_path(), other.why_fresh()) == (None, STOPPING)


async def test_an_application_may_ask_for_fresh_processes(stocks: Stocks) -> None:
    stock = stocks.of(Registered(record(fresh_process=True), 1))
    assert (stock.template_path(), stock.why_fresh()) == (None, ASKED_FOR)


async def test_what_can_not_be_started_ahead_is_tried_again_later(stocks: Stocks) -> None:
    stocks.on_application(entry(record(warm_instances=2), 1))
    stock = stocks.of(Registered(record(warm_instances=2), 1))
    assert (stock.take_warm(), stock.template_path()) == (None, None)
    assert stock.why_fresh() == NO_TEMPLATE_NOW
    stock._retry_at -= BACKOFF_FIRST_S
    assert stock.template_path() is not None


async def test_a_report_of_a_process_that_an_executor_has_goes_on(stocks: Stocks) -> None:
    assert await stocks.wait_in("e1", ExecutorReport(ExecutorState.IDLE, 1))
