"""Tests of the service beside this file: ``pytest examples/testing``."""

from pathlib import Path

import pytest
from forecaster import Forecaster, WeatherStation

import flame

SCRIPT = Path(__file__).with_name("forecaster.py")


async def test_a_session_greets_as_it_was_told_to(flame_service) -> None:
    session = await flame_service(Forecaster, b"Hello!")
    task = await session.invoke(b"Berlin")
    assert task.output == b"Hello! Berlin: sunny"


async def test_an_error_is_its_tasks_alone(flame_service) -> None:
    session = await flame_service(Forecaster)
    with pytest.raises(flame.TaskFailed, match="which city") as failed:
        await session.invoke(b"")
    assert failed.value.task.error.type == "ValueError"
    assert (await session.invoke(b"Rome")).attempt == 1


async def test_what_was_prepared_is_archived_when_the_session_is_closed(flame_service, flame_memory) -> None:
    session = await flame_service(Forecaster)
    await session.invoke(b"Oslo")
    await session.close()
    [forecaster] = flame_memory.services("Forecaster")
    assert forecaster.asked == ["Oslo"]
    assert forecaster.archived


async def test_a_station_that_is_away_for_a_while_is_asked_again(flame_service, flame_clock) -> None:
    station = WeatherStation(failures=2)
    session = await flame_service(lambda: Forecaster(station), name="flaky", max_attempts=3, retry_backoff_s=600)
    assert (await session.invoke(b"Lima")).attempt == 3
    assert flame_clock.elapsed > 600  # seconds that nobody waited for


async def test_a_station_that_is_silent_does_not_keep_anybody_waiting(flame_service, flame_clock, flame_events) -> None:
    session = await flame_service(lambda: Forecaster(WeatherStation(takes_s=90)), name="slow", timeout_s=60)
    task = await session.create_task(b"Cairo")
    await flame_clock.advance(59)
    assert not task.done()
    await flame_clock.advance(2)
    event = await flame_events.expect(task=task, state="failed")
    assert event.code == "task_timeout"


async def test_a_task_survives_its_executor(flame_service, flame_memory, flame_clock, flame_events) -> None:
    session = await flame_service(lambda: Forecaster(WeatherStation(takes_s=5)), name="steady")
    task = await session.create_task(b"Delhi")
    running = await flame_events.expect(task=task, state="running")
    flame_memory.kill_executor(running.executor)
    assert (await task).attempt == 2
    assert flame_clock.elapsed > 5


async def test_as_a_program_in_a_real_cluster(flame_cluster) -> None:
    application = await flame_cluster.register(SCRIPT)
    async with await flame.create_session(application, b"Hello!") as session:
        assert (await session.invoke(b"Berlin")).output == b"Hello! Berlin: sunny"
