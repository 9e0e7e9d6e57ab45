"""Asks a server, in NATS' own words and without a client library, whether JetStream answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

_INBOX = "_INBOX.flame.probe"
_CONNECT = {"name": "flame probe", "lang": "python", "version": "1", "protocol": 1, "verbose": False}
_ASK = (
    f"CONNECT {json.dumps(_CONNECT | {'headers': True, 'no_responders': True})}\r\n"
    f"SUB {_INBOX} 1\r\n"
    f"PUB $JS.API.INFO {_INBOX} 0\r\n\r\n"
).encode("ascii")


async def jetstream_fault(host: str, port: int) -> str | None:
    """Return None when JetStream answers, otherwise what is wrong. The caller sets the time limit."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        return f"it takes no connection: {error.strerror or error}"
    try:
        return await _ask(reader, writer)
    except (OSError, EOFError, ValueError) as error:
        return f"it does not speak NATS: {error}"
    finally:
        writer.transport.abort()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
    verb, info = _split(await reader.readline())
    if verb != "INFO":
        return f"it greets with {verb!r}, expected INFO"
    if not json.loads(info).get("jetstream"):
        return "JetStream is not enabled"
    writer.write(_ASK)
    await writer.drain()
    while True:
        verb, rest = _split(await reader.readline())
        match verb:
            case "MSG":
                answer = json.loads(await reader.readexactly(int(rest.split()[-1])))
                return _error_in(answer)
            case "HMSG":  # a status without a body: nobody serves the JetStream API
                return "JetStream does not answer"
            case "PING":
                writer.write(b"PONG\r\n")
            case "-ERR":
                return f"it refuses the connection: {rest}"
            case "":
                return "it closed the connection"


def _split(line: bytes) -> tuple[str, str]:
    verb, _, rest = line.decode("utf-8").strip().partition(" ")
    return verb, rest


def _error_in(answer: dict[str, Any]) -> str | None:
    error = answer.get("error")
    return None if error is None else f"JetStream answers with an error: {error.get('description', error)}"
