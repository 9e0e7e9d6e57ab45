"""An executor that speaks the protocol to its manager and does nothing else, except what MODE tells it.

It notes what it hears in the file NOTES, one JSON list a line.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from flame.broker.jetstream import JetStreamBroker, connect
from flame.broker.seam import LiveMessage
from flame.errors import FlameError
from flame.protocol import subjects
from flame.protocol.messages import TaskFault
from flame.protocol.states import ExecutorState
from flame.protocol.supervision import LEAVE, Assignment, Control, ExecutorReport, Orders

MODE = os.environ.get("MODE", "")
EXECUTOR = os.environ["FLAME_EXECUTOR"]
NODE = os.environ["FLAME_NODE"]


def note(*words: object) -> None:
    with Path(os.environ["NOTES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps([EXECUTOR, *words]) + "\n")


def sleep_on() -> None:
    time.sleep(600)


def start_child() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note("child", child.pid)


class RawExecutor:
    def __init__(self, broker: JetStreamBroker) -> None:
        self.broker = broker
        self.nudged = asyncio.Event()

    async def report(self, state: ExecutorState, **fields: object) -> Orders:
        report = ExecutorReport(state, int(os.environ.get("CLAIM_PID") or os.getpid()))
        for name, value in fields.items():
            setattr(report, name, value)
        while True:
            try:
                answer = await self.broker.request(subjects.executor_report(NODE, EXECUTOR), report.encode(), 2)
            except FlameError:
                await asyncio.sleep(0.1)
            else:
                orders = Orders.decode(answer)
                note("told", state.value, orders.want)
                return orders

    async def serve(self) -> None:
        orders = await self.report(ExecutorState.IDLE)
        if orders.want == LEAVE or orders.assignment is None:
            note("refused")
            return
        assignment = orders.assignment
        note("assigned", assignment.fields() | {"common_data": assignment.common_data.decode()})
        await self.broker.subscribe(subjects.control(assignment.application, assignment.session), self.on_control)
        if MODE == "fails to enter":
            fault = TaskFault("task_failed", "no key", "ValueError", "Traceback:\n  line 1\nValueError: no key\n")
            await self.report(ExecutorState.BINDING, error=fault)
            return
        if MODE == "never enters":
            await asyncio.sleep(600)
        await self.bound(assignment)
        running = 1 if MODE == "runs a task" else 0
        await self.report(ExecutorState.UNBINDING, running=running)
        if running:
            await asyncio.sleep(600)
        if MODE == "never leaves":
            await asyncio.sleep(600)
        await self.report(ExecutorState.RELEASED, succeeded=7, failed=2)
        if MODE == "lingers":
            await asyncio.sleep(600)

    async def bound(self, assignment: Assignment) -> None:
        """Report until told to leave."""
        note("bound", os.getpid())
        fields: dict[str, object] = {"succeeded": 3, "pending": 5, "running": 1}
        if MODE == "idles":
            fields = {"idle_s": 1.0}
        while (await self.report(ExecutorState.BOUND, **fields)).want != LEAVE:
            if MODE.endswith("blocks"):
                sleep_on()
            if MODE == "has lost its consumer":
                orders = await self.report(ExecutorState.BOUND, lost_consumer=True)
                note("repaired", orders.want, orders.assignment and orders.assignment.fence)
                if orders.want == LEAVE:
                    return
            await self.nudged.wait()
            self.nudged.clear()

    def on_control(self, message: LiveMessage) -> None:
        if Control.decode(message.data).executor in ("", EXECUTOR):
            note("nudged")
            self.nudged.set()


async def main() -> None:
    if MODE.startswith("ignores SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE in ("has children", "ignores SIGTERM and blocks"):
        start_child()
    if MODE == "writes":
        sys.stdout.write("café is open\n" + "x" * 100_000 + "\nno end of line")
        sys.stdout.flush()
        sys.stderr.write("to stderr\n")
    broker = await connect(os.environ["FLAME_ENDPOINT"])
    try:
        await RawExecutor(broker).serve()
    finally:
        await broker.close()


note("started", os.getpid(), str(Path.cwd()))
if MODE == "waits for a sign":
    while not Path(os.environ["NOTES"]).with_name("go").exists():
        time.sleep(0.01)
if MODE == "dies":
    sys.stderr.write("\x1b[31mthe last words\x1b[0m\n  of a service\n")
    sys.exit(3)
if MODE == "is never ready":
    sys.stderr.write("warming up\n")
    sleep_on()
if MODE == "is wrapped":
    subprocess.call([sys.executable, __file__], env=os.environ | {"MODE": ""})
    sleep_on()
asyncio.run(main())
