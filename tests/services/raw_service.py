"""A service in nats-py and msgpack alone, written from docs/protocol.md.

A task's input is a JSON list: ["echo", value], ["sleep", seconds, file to note the run in], ["fail", text], or
["exit", status]. On leaving it writes "left" to the file that the common data name.
"""

import asyncio
import base64
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgpack
from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg

ENDPOINT = os.environ.get("RAW_ENDPOINT") or os.environ["FLAME_ENDPOINT"]
NODE = os.environ["FLAME_NODE"]
EXECUTOR = os.environ["FLAME_EXECUTOR"]

TAKEN = "maximum messages per subject exceeded"
NO_MESSAGE = 10037
NO_CONSUMER = 10014
POISON = 3
LIMIT = 256 * 1024


class Lost(Exception):
    """A delivery's lease is not certain any more: another may have the task."""


class Lease:
    """A delivery, and for how long it is certainly ours."""

    def __init__(self, msg: Msg, ack_wait_s: float) -> None:
        self.msg = msg
        self.task = msg.subject.rsplit(".", 1)[1]
        parts = msg.reply.split(".")
        base = 2 if len(parts) == 9 else 4
        self.delivered, self.sequence, self.pending = (int(parts[base + offset]) for offset in (2, 3, 6))
        self.ack_wait_s = ack_wait_s
        self.extended_at = time.monotonic()
        self.void = False
        """The consumer that delivered it is gone."""

    @property
    def held(self) -> bool:
        return not self.void and time.monotonic() - self.extended_at < 0.8 * self.ack_wait_s

    async def keep(self, nc: Client) -> None:
        """Extend until cancelled, or too late."""
        while True:
            await asyncio.sleep(self.ack_wait_s / 3)
            if not self.held:
                return
            sent_at = time.monotonic()
            with contextlib.suppress(errors.Error):  # disconnected
                await nc.publish(self.msg.reply, b"+WPI")
                self.extended_at = sent_at


class RawService:
    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.state = "idle"
        self.fault: dict[str, str] | None = None
        self.counts = {"succeeded": 0, "failed": 0, "running": 0, "pending": 0}
        self.idle_since = time.monotonic()
        self.lost_consumer = False
        self.woken = asyncio.Event()
        self.leaving = asyncio.Event()
        self.restored = asyncio.Event()
        self.arrived: asyncio.Queue[Msg | Lease] = asyncio.Queue()
        self.running: Lease | None = None
        self.last_handle = ""
        self.fence = 0

    # ---- the manager

    async def report(self) -> dict[str, Any]:
        """Report and return the orders, however long that takes."""
        pause_s = 0.1
        while True:
            fields = {"v": 1, "kind": "report", "state": self.state, "pid": os.getpid(), **self.counts}
            if self.fault is not None:
                fields["error"] = self.fault
            if self.lost_consumer:
                fields["lost_consumer"] = True
            if not self.counts["running"]:
                fields["idle_s"] = time.monotonic() - self.idle_since
            subject = f"flame.executor.{NODE}.{EXECUTOR}"
            with contextlib.suppress(errors.Error):
                return read((await self.nc.request(subject, msgpack.packb(fields), timeout=2)).data, "orders")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 2)

    async def go_on_reporting(self) -> None:
        while True:
            self.woken.clear()
            orders = await self.report()
            if orders["want"] == "leave" and not self.leaving.is_set():
                self.leaving.set()
                self.state = "unbinding"
                self.woken.set()
            elif orders.get("assignment") and self.lost_consumer:
                self.fence = max(self.fence, orders["assignment"]["fence"])
                self.lost_consumer = False
                self.restored.set()
            await asyncio.sleep(0.1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.woken.wait(), 0.5 if self.lost_consumer else 5)

    async def on_control(self, msg: Msg) -> None:
        if read(msg.data, "control").get("executor", "") in ("", EXECUTOR):
            self.woken.set()

    # ---- its life

    async def serve(self) -> int:
        orders = await self.report()
        if orders["want"] == "leave":
            return 0
        self.assignment: dict[str, Any] = orders["assignment"]
        self.fence = self.assignment["fence"]
        self.place = f"{self.assignment['application']}.{self.assignment['session']}"
        common_data: bytes = self.assignment["common_data"]
        if common_data == b"no entry":
            self.state = "binding"
            self.fault = {"code": "task_failed", "message": "no entry today", "type": "Closed"}
            await self.report()
            return 1
        self.state = "bound"
        await self.nc.subscribe(f"flame.control.{self.place}", cb=self.on_control)
        reporting = asyncio.create_task(self.go_on_reporting())
        await self.serve_tasks()
        if common_data:
            append(common_data.decode(), "left")
        reporting.cancel()
        self.state = "released"
        await self.report()
        return 0

    async def serve_tasks(self) -> None:
        inbox = self.nc.new_inbox()

        async def on_message(msg: Msg) -> None:
            self.arrived.put_nowait(msg if status_of(msg) else Lease(msg, self.assignment["ack_wait_s"]))

        subscription = await self.nc.subscribe(inbox, cb=on_message)
        left = asyncio.create_task(self.leaving.wait())
        while not self.leaving.is_set():
            pulling = asyncio.create_task(self.pull(inbox))
            await asyncio.wait((pulling, left), return_when=asyncio.FIRST_COMPLETED)
            if not pulling.done():
                pulling.cancel()
                break
            lease = pulling.result()
            if lease is not None and lease.held:
                await self.run(lease)
        await subscription.drain()  # type: ignore[no-untyped-call]
        while not self.arrived.empty():
            late = self.arrived.get_nowait()
            if isinstance(late, Lease) and late.held:
                with contextlib.suppress(errors.Error):  # disconnected: its lease runs out
                    await self.nc.publish(late.msg.reply, b"-NAK")
        if self.last_handle:
            with contextlib.suppress(errors.Error):
                await self.nc.request(self.last_handle, b"+ACK", timeout=2)

    # ---- tasks

    async def pull(self, inbox: str) -> Lease | None:
        """Ask for one task and wait for it; None if it is time to ask again."""
        if self.arrived.empty():
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.assignment['stream']}.{self.assignment['consumer']}"
            request = {"batch": 1, "expires": 30 * 10**9, "idle_heartbeat": 2 * 10**9}
            try:
                await self.nc.publish(subject, json.dumps(request).encode(), inbox)
            except errors.Error:  # disconnected
                await asyncio.sleep(0.1)
                return None
        while True:
            try:
                msg = await asyncio.wait_for(self.arrived.get(), 5)
            except TimeoutError:
                return None
            if isinstance(msg, Lease):
                return msg
            status = status_of(msg)
            if status == "503" or (status == "409" and "Deleted" in (msg.headers or {}).get("Description", "")):
                self.restored.clear()
                self.lost_consumer = True
                self.woken.set()
                await self.restored.wait()
                return None
            if status != "100":
                await asyncio.sleep(0.1 if status == "409" else 0)
                return None

    async def run(self, lease: Lease) -> None:
        self.running = lease
        self.counts["running"] = 1
        self.counts["pending"] = lease.pending
        self.woken.set()
        keeping = asyncio.create_task(lease.keep(self.nc))
        try:
            await self.finish(lease)
        except Lost:
            pass
        finally:
            keeping.cancel()
            self.running = None
            self.counts["running"] = 0
            self.idle_since = time.monotonic()
            self.woken.set()

    async def finish(self, lease: Lease) -> None:
        try:
            task = read(lease.msg.data, "task")
        except ValueError as error:
            await self.store(lease, "failed", error={"code": "invalid_argument", "message": str(error)})
            return
        attempt = 1
        if lease.delivered > 1 or lease.sequence <= self.fence or task.get("again"):
            lost = await self.look(lease)
            if lost is None:
                await self.acknowledge(lease)
                return
            if lost >= POISON:
                fault = {"code": "task_failed", "message": f"given up: {lost} executors were lost while they ran it"}
                await self.store(lease, "failed", error=fault, attempt=lost)
                return
            attempt = lost + 1
        await self.count_start(lease, attempt)
        started = time.time()
        announcing = asyncio.create_task(self.announce_later(lease.task, attempt, started))
        if task.get("listen"):
            announcing.cancel()
            await self.announce(lease.task, attempt, started)
        try:
            output = await invoke(*json.loads(task.get("input", b"")))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the task's outcome
            fault = {"code": "task_failed", "message": str(error), "type": type(error).__name__}
            await self.store(lease, "failed", error=fault, attempt=attempt, started=started)
        else:
            await self.store(lease, "succeed", output, attempt=attempt, started=started)
        finally:
            announcing.cancel()

    async def announce(self, task: str, attempt: int, at: float) -> None:
        fields = {"v": 1, "kind": "running", "executor": EXECUTOR, "attempt": attempt, "at": at}
        with contextlib.suppress(errors.Error):  # who misses it learns of the end
            await self.nc.publish(f"flame.event.{self.place}.{task}.running", msgpack.packb(fields))

    async def announce_later(self, task: str, attempt: int, at: float) -> None:
        await asyncio.sleep(0.1)
        await self.announce(task, attempt, at)

    async def look(self, lease: Lease) -> int | None:
        """Return how many executors were lost with a task; None if it has its record."""
        stream = f"flame-result-{self.assignment['application']}"
        if await self.last(lease, stream, f"flame.result.{self.place}.{lease.task}"):
            return None
        entry = await self.last(lease, "KV_flame-attempts", f"$KV.flame-attempts.{self.place}.{lease.task}")
        if entry is None or b"KV-Operation" in base64.b64decode(entry.get("hdrs", "")):
            return 0
        lost: int = read(base64.b64decode(entry["data"]), "attempts").get("lost", 0)
        return lost

    async def last(self, lease: Lease, stream: str, subject: str) -> dict[str, Any] | None:
        """Read the last message of a subject from its stream's leader."""
        body = json.dumps({"last_by_subj": subject}).encode()
        while lease.held:
            with contextlib.suppress(errors.Error):
                answer = json.loads((await self.nc.request(f"$JS.API.STREAM.MSG.GET.{stream}", body, timeout=1)).data)
                if "message" in answer:
                    found: dict[str, Any] = answer["message"]
                    return found
                if answer["error"]["err_code"] == NO_MESSAGE:
                    return None
            await asyncio.sleep(0.1)
        raise Lost

    async def count_start(self, lease: Lease, attempt: int) -> None:
        fields = msgpack.packb({"v": 1, "kind": "attempts", "lost": attempt})
        while lease.held:
            with contextlib.suppress(errors.Error):
                answer = await self.nc.request(f"$KV.flame-attempts.{self.place}.{lease.task}", fields, timeout=1)
                if "error" not in json.loads(answer.data):
                    return
            await asyncio.sleep(0.1)
        raise Lost

    async def store(self, lease: Lease, state: str, output: bytes = b"", **fields: Any) -> None:
        """Store a record, for as long as it takes, then acknowledge its task."""
        record = {
            "v": 1,
            "kind": "result",
            "state": state,
            "output": output,
            "executor": EXECUTOR,
            "attempt": 1,
            "finished": time.time(),
            **fields,
        }
        data = msgpack.packb(record)
        if len(data) > LIMIT:
            fault = {"code": "payload_too_large", "message": f"output of {len(output)} bytes: the limit is {LIMIT}"}
            await self.store(lease, "failed", **(fields | {"error": fault}))
            return
        while True:
            with contextlib.suppress(errors.Error):
                answer = await self.nc.request(f"flame.result.{self.place}.{lease.task}", data, timeout=5)
                fault = json.loads(answer.data).get("error", {})
                if not fault or fault["description"] == TAKEN:
                    break
            await asyncio.sleep(0.1)
        await self.acknowledge(lease)
        if not fault:
            self.counts["succeeded" if state == "succeed" else "failed"] += 1

    async def acknowledge(self, lease: Lease) -> None:
        self.last_handle = lease.msg.reply
        with contextlib.suppress(errors.Error):  # disconnected: it comes back, and is looked up
            await self.nc.publish(lease.msg.reply, b"+ACK")

    async def on_reconnect(self) -> None:
        """Take what is in the stream now for something that may have run, and see whether the consumer is there."""
        if self.state == "idle":
            return
        stream, consumer = self.assignment["stream"], self.assignment["consumer"]
        with contextlib.suppress(errors.Error):
            answer = json.loads((await self.nc.request(f"$JS.API.STREAM.INFO.{stream}", timeout=2)).data)
            self.fence = max(self.fence, answer["state"]["last_seq"])
            answer = json.loads((await self.nc.request(f"$JS.API.CONSUMER.INFO.{stream}.{consumer}", timeout=2)).data)
            if self.running is not None and answer.get("error", {}).get("err_code") == NO_CONSUMER:
                self.running.void = True


async def invoke(verb: str, *arguments: Any) -> bytes:
    """Do what a task says."""
    if verb == "sleep":
        seconds, mark = arguments
        append(mark, str(os.getpid()))
        await asyncio.sleep(seconds)
    elif verb == "fail":
        raise ValueError(arguments[0])
    elif verb == "exit":
        os._exit(arguments[0])
    return json.dumps(arguments).encode()


def append(file: str, line: str) -> None:
    with Path(file).open("a") as notes:
        notes.write(f"{line}\n")


def status_of(msg: Msg) -> str:
    return (msg.headers or {}).get("Status", "")


def read(data: bytes, kind: str) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(data)
    except Exception as error:  # msgpack raises half a dozen unrelated types for bad bytes
        raise ValueError(f"not MessagePack: {error}") from error
    if not isinstance(fields, dict) or fields.get("v") != 1 or fields.get("kind") != kind:
        raise ValueError(f"no {kind} of version 1")
    return fields


async def main() -> int:
    nc = Client()
    service = RawService(nc)

    async def on_error(error: Exception) -> None:
        sys.stderr.write(f"{error}\n")

    # Without a buffer: what was to be said of leases before a reconnect must not be said after it.
    await nc.connect(
        ENDPOINT,
        max_reconnect_attempts=-1,
        pending_size=0,
        error_cb=on_error,
        reconnected_cb=service.on_reconnect,
    )
    if lifetime := os.environ.get("FLAME_LIFETIME_FD"):
        asyncio.get_running_loop().add_reader(int(lifetime), os._exit, 1)
    try:
        return await service.serve()
    finally:
        await nc.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
