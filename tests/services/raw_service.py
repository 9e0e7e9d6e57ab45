"""A service in nats-py and msgpack alone, written from docs/protocol.md.

A task's input is a JSON list: ["echo", value], ["sleep", seconds, file to note the run in], ["fail", text],
["fail twice", file to note the run in], or ["exit", status]. On leaving it writes "left" to the file that the common
data name.
"""

import asyncio
import base64
import contextlib
import json
import os
import random
import secrets
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
ANOTHER_VALUE = 10071
POISON = 3
LIMIT = 256 * 1024
PART = 200_000
"""Of a large value: any size will do."""


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
        self.stored_at = int(parts[base + 5]) / 1e9
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


class Past:
    """What is noted of a task's earlier runs, and the sequence of that note; 0 if there is none."""

    def __init__(self, fields: dict[str, Any] | None = None, sequence: int = 0) -> None:
        fields = fields or {}
        self.lost: int = fields.get("lost", 0)
        self.raised: int = fields.get("raised", 0)
        self.not_before: float = fields.get("not_before", 0.0)
        self.sequence = sequence


class RawService:
    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.state = "idle"
        self.fault: dict[str, str] | None = None
        self.counts = {"succeeded": 0, "failed": 0, "cancelled": 0, "running": 0, "pending": 0}
        self.idle_since = time.monotonic()
        self.lost_consumer = False
        self.woken = asyncio.Event()
        self.leaving = asyncio.Event()
        self.restored = asyncio.Event()
        self.arrived: asyncio.Queue[Msg | Lease] = asyncio.Queue()
        self.running: Lease | None = None
        self.invoking: asyncio.Task[bytes] | None = None
        self.cancelled: set[str] = set()
        self.forced = False
        self.due_at = 0.0
        """When the last task that was handed back with a delay comes again, by the monotonic clock."""
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
            if not self.counts["running"] and not self.due_soon():
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
            if orders.get("force") and not self.forced:
                self.forced = True
                if self.invoking is not None:
                    self.invoking.cancel()
            await asyncio.sleep(0.1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.woken.wait(), 0.5 if self.lost_consumer else 5)

    async def on_control(self, msg: Msg) -> None:
        control = read(msg.data, "control")
        if control.get("cancel"):
            self.cancelled.update(control["cancel"])
            if self.invoking is not None and self.running is not None and self.running.task in self.cancelled:
                self.invoking.cancel()
        elif control.get("executor", "") in ("", EXECUTOR):
            self.woken.set()

    def due_soon(self) -> bool:
        wait_s = self.due_at - time.monotonic()
        if wait_s <= 0:
            return False
        release_s: float = self.assignment.get("delay_release_s", 60.0)
        return wait_s < release_s

    # ---- its life

    async def serve(self) -> int:
        orders = await self.report()
        if orders["want"] == "leave":
            return 0
        self.assignment: dict[str, Any] = orders["assignment"]
        self.fence = self.assignment["fence"]
        self.place = f"{self.assignment['application']}.{self.assignment['session']}"
        ref = self.assignment.get("common_data_ref")
        common_data: bytes = self.assignment["common_data"] if ref is None else await self.load(ref)
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
            append(common_data.decode().strip(), "left")
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
        terms = Terms(task.get("options") or {}, self.assignment)
        past = await self.begin(lease, terms, again=task.get("again", False))
        if past is None:
            return
        attempt = past.lost + past.raised + 1
        if ref := task.get("input_ref"):
            task["input"] = await self.load(ref)
            if len(task["input"]) != ref["size"]:
                fault = {"code": "value_gone", "message": f"the input {ref['id']} is not kept any more"}
                await self.store(lease, "failed", error=fault, attempt=attempt - 1)
                return
        past.lost += 1
        await self.note(lease, past)
        started = time.time()
        announcing = asyncio.create_task(self.announce_later(lease.task, attempt, started))
        if task.get("listen"):
            announcing.cancel()
            await self.announce(lease.task, attempt, started)
        try:
            state, fields = await self.invoke(task, terms)
        finally:
            announcing.cancel()
        if lease.task in self.cancelled:
            await self.acknowledge(lease)
        elif state == "failed" and terms.may_retry(fields["error"]["type"], past.raised):
            past.lost -= 1
            past.raised += 1
            wait_s = min(terms.backoff_s * 2 ** (past.raised - 1), max(5, terms.backoff_s)) * random.uniform(0.5, 1)
            past.not_before = time.time() + wait_s
            await self.note(lease, past)
            await self.hand_back(lease, wait_s)
        else:
            await self.store(lease, state, **fields, attempt=attempt, started=started)

    async def begin(self, lease: Lease, terms: "Terms", *, again: bool) -> Past | None:
        """Return what is known of a task's earlier runs; None if it is not to run now, and all was done for it."""
        past = Past()
        if lease.delivered > 1 or lease.sequence <= self.fence or again:
            found = await self.look(lease)
            if found is None:
                await self.acknowledge(lease)
                return None
            past = found
            if past.lost >= POISON:
                text = f"given up: {past.lost} executors were lost while they ran it"
                fault = {"code": "task_poisoned", "message": text}
                await self.store(lease, "failed", error=fault, attempt=past.lost + past.raised)
                return None
        if lease.task in self.cancelled:
            await self.acknowledge(lease)
            return None
        now = time.time()
        wait_s = max(past.not_before, lease.stored_at + terms.delay_s) - now
        if wait_s > 0:
            await self.hand_back(lease, wait_s)
            return None
        if past.lost + past.raised == 0 and 0 < terms.expires_s < now - lease.stored_at:
            fault = {"code": "task_expired", "message": f"it was not started within {terms.expires_s} s"}
            await self.store(lease, "failed", error=fault, attempt=0)
            return None
        return past

    async def invoke(self, task: dict[str, Any], terms: "Terms") -> tuple[str, dict[str, Any]]:
        """Run a task; return the state that it has then, and what its record says of that."""
        limit = asyncio.timeout(terms.timeout_s)
        fault: dict[str, str]
        self.invoking = asyncio.create_task(do(*json.loads(task.get("input", b""))))
        try:
            async with limit:
                return "succeed", {"output": await self.invoking}
        except asyncio.CancelledError:  # by `control`, or orders
            return "cancelled", {"error": {"code": "task_cancelled", "message": "its session was closed by force"}}
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the task's outcome
            if limit.expired():
                text = f"the run took longer than {terms.timeout_s} s"
                fault = {"code": "task_timeout", "message": text, "type": "TaskTimeout"}
            else:
                fault = {"code": "task_failed", "message": str(error), "type": type(error).__name__}
            return "failed", {"error": fault}
        finally:
            self.invoking = None

    async def hand_back(self, lease: Lease, wait_s: float) -> None:
        self.due_at = max(self.due_at, time.monotonic() + wait_s)
        with contextlib.suppress(errors.Error):  # disconnected: its lease runs out
            await self.nc.publish(lease.msg.reply, b"-NAK " + json.dumps({"delay": int(wait_s * 1e9)}).encode())

    async def announce(self, task: str, attempt: int, at: float) -> None:
        fields = {"v": 1, "kind": "running", "executor": EXECUTOR, "attempt": attempt, "at": at}
        with contextlib.suppress(errors.Error):  # who misses it learns of the end
            await self.nc.publish(f"flame.event.{self.place}.{task}.running", msgpack.packb(fields))

    async def announce_later(self, task: str, attempt: int, at: float) -> None:
        await asyncio.sleep(0.1)
        await self.announce(task, attempt, at)

    async def look(self, lease: Lease) -> Past | None:
        """Return what is noted of a task's earlier runs; None if it has its record."""
        stream = f"flame-result-{self.assignment['application']}"
        if await self.last(lease, stream, f"flame.result.{self.place}.{lease.task}"):
            return None
        return await self.past(lease)

    async def past(self, lease: Lease) -> Past:
        entry = await self.last(lease, "KV_flame-attempts", f"$KV.flame-attempts.{self.place}.{lease.task}")
        if entry is None:
            return Past()
        if b"KV-Operation" in base64.b64decode(entry.get("hdrs", "")):
            return Past(None, entry["seq"])
        return Past(read(base64.b64decode(entry["data"]), "attempts"), entry["seq"])

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

    async def note(self, lease: Lease, past: Past) -> None:
        """Note what is known of a task's runs by now, unless somebody else has noted something meanwhile."""
        fields = {"v": 1, "kind": "attempts", "lost": past.lost, "raised": past.raised, "not_before": past.not_before}
        subject = f"$KV.flame-attempts.{self.place}.{lease.task}"
        while lease.held:
            headers = {"Nats-Expected-Last-Subject-Sequence": str(past.sequence)}
            with contextlib.suppress(errors.Error):
                data = msgpack.packb(fields)
                answer = json.loads((await self.nc.request(subject, data, timeout=1, headers=headers)).data)
                if "error" not in answer:
                    past.sequence = answer["seq"]
                    return
                if answer["error"]["err_code"] == ANOTHER_VALUE:
                    past.sequence = (await self.past(lease)).sequence
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
            ref = await self.store_in_parts(output)
            data = msgpack.packb(record | {"output": b"", "output_ref": ref})
        while True:
            with contextlib.suppress(errors.Error):
                answer = await self.nc.request(f"flame.result.{self.place}.{lease.task}", data, timeout=5)
                fault = json.loads(answer.data).get("error", {})
                if not fault or fault["description"] == TAKEN:
                    break
            await asyncio.sleep(0.1)
        await self.acknowledge(lease)
        if not fault:
            self.counts["succeeded" if state == "succeed" else state] += 1

    async def store_in_parts(self, output: bytes) -> dict[str, Any]:
        """Store an output one part after the other, and return what refers to it."""
        value, parts = secrets.token_hex(8), [output[at : at + PART] for at in range(0, len(output), PART)]
        for number, part in enumerate(parts):
            subject = f"flame.blob.{self.place}.out.{value}.{number}"
            while True:
                with contextlib.suppress(errors.Error):
                    answer = await self.nc.request(subject, part, timeout=5, headers={"Nats-TTL": "90000s"})
                    fault = json.loads(answer.data).get("error", {})
                    if not fault or fault["description"] == TAKEN:
                        break
                await asyncio.sleep(0.1)
        return {"id": value, "size": len(output), "parts": len(parts)}

    async def load(self, ref: dict[str, Any]) -> bytes:
        """Read a large value; less than it has if it is gone."""
        application = self.assignment["application"]
        found = []
        for number in range(ref["parts"]):
            subject = f"flame.blob.{self.place}.in.{ref['id']}.{number}"
            give_up = time.monotonic() + 5
            while True:
                with contextlib.suppress(errors.Error):
                    answer = await self.nc.request(f"$JS.API.DIRECT.GET.flame-blob-{application}.{subject}", timeout=5)
                    if status_of(answer) != "404":
                        found.append(answer.data)
                        break
                    if time.monotonic() > give_up:
                        return b""
                await asyncio.sleep(0.1)
        return b"".join(found)

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


class Terms:
    """How a task is to be run: as it says itself, otherwise as its application says."""

    def __init__(self, options: dict[str, Any], assignment: dict[str, Any]) -> None:
        said = assignment | options
        self.timeout_s: float = said.get("timeout_s", 3600.0)
        self.expires_s: float = said.get("expires_s", 0.0)
        self.delay_s: float = said.get("delay_s", 0.0)
        self.max_attempts: int = said.get("max_attempts", 1)
        self.retry_on: list[str] = assignment.get("retry_on", [])
        self.backoff_s: float = assignment.get("retry_backoff_s", 0.1)

    def may_retry(self, kind: str, raised: int) -> bool:
        if raised + 1 >= self.max_attempts:
            return False
        return kind in self.retry_on or (not self.retry_on and kind != "TaskTimeout")


async def do(verb: str, *arguments: Any) -> bytes:
    """Do what a task says."""
    if verb == "sleep":
        seconds, mark = arguments
        append(mark, str(os.getpid()))
        await asyncio.sleep(seconds)
    elif verb == "fail":
        raise ValueError(arguments[0])
    elif verb == "fail twice":
        append(arguments[0], "run")
        if len(Path(arguments[0]).read_text().splitlines()) < 3:
            raise ValueError("not yet")
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
