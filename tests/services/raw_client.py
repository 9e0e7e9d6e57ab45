"""A client in nats-py and msgpack alone, written from docs/protocol.md.

It opens two sessions of an application that echoes, invokes tasks in one, cancels a waiting task of the other and has
another one cancelled with its session, is refused some things, and says on standard output, as JSON, what it heard.
Usage: raw_client.py ENDPOINT APPLICATION
"""

import asyncio
import itertools
import json
import secrets
import sys
import time
from typing import Any

import msgpack
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

TAKEN = "maximum messages per subject exceeded"
LIMIT = 250_000
"""Larger inputs go in parts, well below what a message holds."""
PART = 300_000
NOWHERE = [1e6, 0, 0]
"""Resources that no node has."""


class Refused(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Session:
    """A session and what was heard of it."""

    def __init__(self, client: "RawClient", application: str, name: str) -> None:
        self.client = client
        self.application = application
        self.name = name
        self.running: dict[str, dict[str, Any]] = {}
        self.results: dict[str, dict[str, Any]] = {}
        self.states: list[str] = []
        self.events: list[str] = []
        self.settled = False
        self.changed = asyncio.Event()

    async def listen(self) -> None:
        await self.client.nc.subscribe(f"flame.event.{self.application}.{self.name}.*.*", cb=self.on_event)
        await self.client.nc.subscribe(f"flame.session.{self.application}.{self.name}", cb=self.on_session)

    async def on_event(self, msg: Msg) -> None:
        _, task, kind = msg.subject.rsplit(".", 2)
        if kind == "running":
            self.running[task] = read(msg.data, "running")
        elif kind == "done":
            self.take(task, msg.data, (msg.headers or {}).get("Nats-Subject", ""))
        self.changed.set()

    def take(self, task: str, data: bytes, stored_as: str) -> None:
        if stored_as == f"flame.result.{self.application}.{self.name}.{task}" and task not in self.results:
            self.results[task] = read(data, "result")

    async def on_session(self, msg: Msg) -> None:
        event = read(msg.data, "event")
        self.events.append(f"{event['noun']} {event['event']} {event.get('reason', '')}".strip())
        if "record" in event:
            self.note(read(event["record"]))
        self.changed.set()

    def note(self, record: dict[str, Any]) -> None:
        if record["state"] not in self.states:
            self.states.append(record["state"])
        self.settled = self.settled or record.get("settled", False)
        self.changed.set()

    async def create_task(self, payload: bytes) -> tuple[str, str]:
        """Store a task; return its id, and what it was refused for."""
        task = self.client.mint()
        return task, await self.store(task, payload)

    async def store(self, task: str, payload: bytes) -> str:
        message: dict[str, Any] = {"v": 1, "kind": "task", "input": payload, "listen": True}
        if len(payload) > LIMIT:
            message |= {"input": b"", "input_ref": await self.store_in_parts(payload)}
        data = msgpack.packb(message)
        answer = await self.client.nc.request(f"flame.task.{self.application}.{self.name}.{task}", data, timeout=5)
        fault: dict[str, str] = json.loads(answer.data).get("error", {})
        return fault.get("description", "")

    async def store_in_parts(self, data: bytes) -> dict[str, Any]:
        value, parts = secrets.token_hex(8), [data[at : at + PART] for at in range(0, len(data), PART)]
        for number, part in enumerate(parts):
            subject = f"flame.blob.{self.application}.{self.name}.in.{value}.{number}"
            answer = json.loads((await self.client.nc.request(subject, part, timeout=5)).data)
            assert "error" not in answer or answer["error"]["description"] == TAKEN
        return {"id": value, "size": len(data), "parts": len(parts)}

    async def read_output(self, result: dict[str, Any]) -> bytes:
        ref = result["output_ref"]
        place = f"flame.blob.{self.application}.{self.name}.out.{ref['id']}"
        read = f"$JS.API.DIRECT.GET.flame-blob-{self.application}.{place}"
        answers = [await self.client.nc.request(f"{read}.{number}", timeout=5) for number in range(ref["parts"])]
        return b"".join(answer.data for answer in answers)

    async def look_up(self, *tasks: str) -> dict[str, Any]:
        looks = await self.client.call(
            "look_up_tasks", application=self.application, session=self.name, tasks=list(tasks)
        )
        for task, data in looks.get("results", {}).items():
            self.take(task, data, f"flame.result.{self.application}.{self.name}.{task}")
        return looks

    async def results_of(self, tasks: list[str]) -> list[dict[str, Any]]:
        """Wait for the ends of tasks, and look up what was not heard."""
        pause_s = 5.0
        while missing := [task for task in tasks if task not in self.results]:
            if not await self.hear(pause_s):
                await self.look_up(*missing)
                pause_s = min(2 * pause_s, 60)
        return [self.results[task] for task in tasks]

    async def cancel(self, *tasks: str, reason: str = "") -> dict[str, str]:
        answer = await self.client.call("cancel_tasks", session=self.name, tasks=list(tasks), reason=reason)
        states: dict[str, str] = answer["states"]
        return states

    async def close(self, mode: str = "close") -> None:
        self.note(await self.client.call("close_session", id=self.name, mode=mode))
        while not self.settled:
            if not await self.hear(0.5):
                self.note((await self.client.call("get_session", name=self.name))["session"])

    async def hear(self, limit_s: float) -> bool:
        self.changed.clear()
        try:
            await asyncio.wait_for(self.changed.wait(), limit_s)
        except TimeoutError:
            return False
        return True


class RawClient:
    def __init__(self, nc: Client) -> None:
        self.nc = nc
        self.counter = itertools.count()
        self.suffix = secrets.token_hex(3)

    def mint(self) -> str:
        return f"{time.time_ns() // 1_000_000:x}-{next(self.counter):04x}-{self.suffix}"

    async def call(self, verb: str, **fields: Any) -> dict[str, Any]:
        return await self.ask(verb, {"v": 1, **fields})

    async def ask(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        answer = read((await self.nc.request(f"flame.api.{verb}", msgpack.packb(fields), timeout=10)).data)
        if "error" in answer:
            raise Refused(answer["error"]["code"])
        result: dict[str, Any] = answer["ok"]
        return result

    async def refusal(self, verb: str, **fields: Any) -> str:
        try:
            await self.ask(verb, {"v": 1, **fields})
        except Refused as refused:
            return refused.code
        return ""

    async def create_session(self, application: str, **options: Any) -> Session:
        session = Session(self, application, f"raw-{secrets.token_hex(6)}")
        session.note(await self.call("create_session", application=application, id=session.name, options=options))
        await session.listen()
        return session


def read(data: bytes, kind: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(data)
    if fields["v"] != 1 or (kind and fields["kind"] != kind):
        raise ValueError(f"not a {kind or 'record'} of version 1: {fields}")
    return fields


def text(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in record.items()}


async def main(endpoint: str, application: str) -> dict[str, Any]:
    problems: list[str] = []

    async def on_error(error: Exception) -> None:
        problems.append(str(error))

    nc = await nats.connect(endpoint, error_cb=on_error)
    client = RawClient(nc)
    session = await client.create_session(application, max_instances=1)
    tasks = [(await session.create_task(f"number {number}".encode()))[0] for number in range(3)]
    results = await session.results_of(tasks)
    looked_up = await session.look_up(tasks[0], "never-was")

    large = secrets.token_bytes(700_000)
    [of_large] = await session.results_of([(await session.create_task(large))[0]])

    idle = await client.create_session(application, resources=NOWHERE)
    waiting, refused = await idle.create_task(b"nobody runs this")
    again = await idle.store(waiting, b"the same once more")
    waits = await idle.look_up(waiting)
    given_up, _ = await idle.create_task(b"nor this")
    cancels = await idle.cancel(given_up, "never-was", reason="no longer needed")
    [on_request] = await idle.results_of([given_up])
    cancels_again = await idle.cancel(given_up)
    while not any(event.startswith("session waiting") for event in idle.events):
        await idle.hear(5)
    await idle.close("force")
    [cancelled] = await idle.results_of([waiting])
    counts = await client.call("get_session", name=idle.name)

    said = {
        "results": [text(result) for result in results],
        "running": [session.running.get(task, {}).get("executor") for task in tasks],
        "looked_up": text(read(looked_up["results"][tasks[0]], "result")),
        "unknown": [name for name in looked_up if "never-was" in looked_up[name]],
        "refused": refused,
        "again": again == TAKEN,
        "waits": waits["waiting"] == [waiting] and not waits["results"],
        "large": of_large["output"] == b"" and await session.read_output(of_large) == large,
        "cancelled": text(cancelled),
        "cancels": [cancels == {given_up: "cancelled"}, cancels_again == cancels],
        "on_request": text(on_request)["error"],
        "too_late": await session.cancel(tasks[0]) == {tasks[0]: "succeed"},
        "waited_for": next(event for event in idle.events if event.startswith("session waiting")),
        "idle_states": idle.states,
        "idle_counts": {name: counts[name] for name in ("pending", "cancelled")},
        "refusals": {
            "the same id": await client.refusal("create_session", application=application, id=session.name),
            "a bad name": await client.refusal("create_session", application=application, id="a.b"),
            "no application": await client.refusal("create_session", application="nothing"),
            "no session": await client.refusal("get_session", name="nothing"),
            "an ended session": await client.refusal("open_session", id=idle.name),
            "other options": await client.refusal("open_session", id=session.name, create={"application": application}),
            "an unknown option": await client.refusal(
                "create_session", application=application, options={"colour": "red"}
            ),
            "a wrong field": await client.refusal("close_session", name=session.name),
            "a mode that is none": await client.refusal("close_session", id=session.name, mode="now"),
            "to cancel in no session": await client.refusal("cancel_tasks", session="nothing", tasks=["t"]),
            "to cancel nothing": await client.refusal("cancel_tasks", session=session.name, tasks=[]),
            "a newer version": await client.refusal("info", v=2),
        },
        "nodes": (await client.call("info", colour="red"))["nodes"],
        "listed": [
            item["session"]["id"] == session.name
            for item in (await client.call("list_sessions", after=session.name[:-1], limit=1))["items"]
        ],
    }
    await session.close("drain")
    said["states"] = session.states
    said["executors"] = [event for event in session.events if event.startswith("executor ")]
    await nc.close()
    return said | {"problems": problems}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(main(*sys.argv[1:3]))))
