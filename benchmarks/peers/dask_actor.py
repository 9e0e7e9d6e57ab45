"""A Dask actor whose method returns what it gets, in a process of its own."""

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


def _measure(client: Any, tasks: int, in_turn: int, warm_up: int) -> dict[str, object]:
    echo = client.submit(Echo, actor=True, pure=False).result()
    echo.invoke(_PAYLOAD).result()
    actors, firsts = [echo], []
    for _ in range(_NEW):
        begin = time.perf_counter()
        echo = client.submit(Echo, actor=True, pure=False).result()
        echo.invoke(_PAYLOAD).result()
        firsts.append(time.perf_counter() - begin)
        actors.append(echo)  # it stays, so that the next one is a new one
    for _ in range(warm_up):
        echo.invoke(_PAYLOAD).result()
    latencies = []
    for _ in range(in_turn):
        begin = time.perf_counter()
        echo.invoke(_PAYLOAD).result()
        latencies.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    for future in [echo.invoke(_PAYLOAD) for _ in range(tasks)]:
        future.result()
    elapsed_s = time.perf_counter() - begin
    latencies.sort()
    return {
        "invoke_p50_ms": latencies[len(latencies) // 2] * 1000,
        "invoke_p99_ms": latencies[len(latencies) * 99 // 100] * 1000,
        "tasks_per_s": tasks / elapsed_s,
        "first_result_ms": statistics.median(firsts) * 1000,
        "note": "nothing is stored; the actor's worker was there already",
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name in ("--tasks", "--in-turn", "--warm-up"):
        parser.add_argument(name, type=int, required=True)
    given = parser.parse_args()
    try:
        distributed = importlib.import_module("distributed")
    except ImportError:
        sys.exit(_NOT_INSTALLED)
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = _measure(client, given.tasks, given.in_turn, given.warm_up)
    print(json.dumps({"version": distributed.__version__, **found}))


if __name__ == "__main__":
    main()
