"""``python -m benchmarks``: run them, show a table, write the results."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.figures import Figure, Peer
from benchmarks.jobs import JOBS
from benchmarks.processes import Lifetime
from benchmarks.report import results as reports
from benchmarks.report.chart import svg
from benchmarks.report.results import Results
from benchmarks.report.table import figures, markdown, peers
from benchmarks.scale import FULL, QUICK
from benchmarks.stage import Stage

_RESULTS: Final = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; the status is 1 if something did not work."""
    given = _parser().parse_args(argv)
    if given.list:
        for name, job in JOBS.items():
            print(f"{name:15} {job.summary}")
        return 0
    with (
        tempfile.TemporaryDirectory(prefix="flame-bench-", dir=given.work_dir, ignore_cleanup_errors=True) as work,
        Lifetime() as lifetime,
    ):
        results = reports.begin(Path(work), quick=given.quick)
        scale = QUICK if given.quick else FULL
        stage = Stage(Path(work), scale, lifetime, _progress, given.peers_python)
        try:
            uvloop.run(_run(stage, given.only or list(JOBS), results))
        except (KeyboardInterrupt, asyncio.CancelledError):
            print("interrupted: nothing was written", file=sys.stderr)
            return 130
    _write(results, given.out, given.json)
    return 1 if results.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure Flame beside the floor.")
    parser.add_argument("--quick", action="store_true", help="small numbers: shows that everything works")
    parser.add_argument("--only", nargs="+", choices=list(JOBS), metavar="NAME", help="run these alone; see --list")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON to this file too")
    parser.add_argument(
        "--out", type=Path, default=_RESULTS, metavar="DIR", help="where results are written (default: %(default)s)"
    )
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="where brokers store; not in memory (default: the system's)"
    )
    parser.add_argument(
        "--peers-python", default=sys.executable, metavar="PYTHON", help="an interpreter that has Ray and Dask"
    )
    return parser


async def _run(stage: Stage, names: list[str], results: Results) -> None:
    """Run benchmarks one after the other; one that doesn't work does not stop the others."""
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)  # as uvloop.run does for Ctrl-C
    for name in names:
        _progress(f"== {name}: {JOBS[name].summary}")
        begin = time.monotonic()
        try:
            async with asyncio.timeout(stage.scale.limit_s):
                found = await JOBS[name].run(stage)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is reported, and is this run's failure
            traceback.print_exception(error)
            results.failed.append(f"{name} ({type(error).__name__})")
            continue
        lines = [line for line in found if isinstance(line, Figure)]
        others = [line for line in found if isinstance(line, Peer)]
        results.figures += lines
        results.peers += others
        print(figures(lines) if lines else peers(others), flush=True)
        _progress(f"   {time.monotonic() - begin:.1f} s")


def _write(results: Results, out: Path, copy: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    chart, table, data = (out / f"{results.stem}.{kind}" for kind in ("svg", "md", "json"))
    chart.write_text(svg(results))
    table.write_text(markdown(results, chart.name))
    for file in filter(None, (data, copy)):
        file.write_text(results.as_json())
    print()
    print(markdown(results))
    print(f"Written to {data}, {table.name} and {chart.name}")


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
