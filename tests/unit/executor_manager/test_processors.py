"""Which processors an executor runs on."""

from __future__ import annotations

import os
import threading

import pytest

from flame_services.executor_manager.processors import Processors, confine


def test_each_whole_processor_goes_where_the_fewest_are() -> None:
    processors = Processors(range(4))
    first, second, third = processors.take(1), processors.take(1.5), processors.take(2)
    assert (first, second, third) == ((0,), (1, 2), (0, 3))
    processors.give_back(second)
    assert processors.take(2) == (1, 2)


@pytest.mark.parametrize("cpu", [0, 0.1, 0.99, 4, 64])
def test_one_that_asks_for_less_than_one_or_for_all_is_not_confined(cpu: float) -> None:
    assert Processors(range(4)).take(cpu) == ()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system confines nothing")
def test_every_thread_is_confined() -> None:
    before = os.sched_getaffinity(0)
    end, seen = threading.Event(), []

    def run() -> None:
        end.wait(10)
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        confine([os.getpid(), 2**22 + 1], [min(before)])
        assert os.sched_getaffinity(0) == {min(before)}
        end.set()
        thread.join()
        assert seen == [{min(before)}]
    finally:
        end.set()
        confine([os.getpid()], sorted(before))
