"""A Ray actor whose method returns what it gets."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from typing import Any

_NOT_INSTALLED = 3
_NEW = 5
_PAYLOAD = bytes(64)


class Echo:
    """Becomes an actor."""

    def invoke(self, data: bytes) -> bytes:
        """Return the input."""
        return data


def _measure(ray: Any, tasks: int, in_turn: int, warm_up: int) -> dict[str, object]:
    actor = ray.remote(num_cpus=0)(Echo)
    echo = actor.remote()
    ray.get(echo.invoke.remote(_PAYLOAD))  # the first one in a cluster starts more than itself
    actors, firsts = [echo], []
    for _ in range(_NEW):
        begin = time.perf_counter()
        echo = actor.remote()
        ray.get(echo.invoke.remote(_PAYLOAD))
        firsts.append(time.perf_counter() - begin)
        actors.append(echo)  # it stays, so that the next one is a new one
    for _ in range(warm_up):
        ray.get(echo.invoke.remote(_PAYLOAD))
    latencies = []
    for _ in range(in_turn):
        begin = time.perf_counter()
        ray.get(echo.invoke.remote(_PAYLOAD))
        latencies.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    ray.get([echo.invoke.remote(_PAYLOAD) for _ in range(tasks)])
    elapsed_s = time.perf_counter() - begin
    latencies.sort()
    return {
        "version": ray.__version__,
        "invoke_p50_ms": latencies[len(latencies) // 2] * 1000,
        "invoke_p99_ms": latencies[len(latencies) * 99 // 100] * 1000,
        "tasks_per_s": tasks / elapsed_s,
        "first_result_ms": statistics.median(firsts) * 1000,
        "note": "nothing is stored",
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("--tasks", "--in-turn", "--warm-up"):
        parser.add_argument(name, type=int, required=True)
    given = parser.parse_args()
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        sys.exit(_NOT_INSTALLED)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        print(json.dumps(_measure(ray, given.tasks, given.in_turn, given.warm_up)))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
