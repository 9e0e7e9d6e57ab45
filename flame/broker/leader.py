"""What the leader of a stream says is stored: replicas, and whatever is kept beside them, may be behind."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import TYPE_CHECKING, Any

from flame.broker.errors import NoMessage
from flame.broker.seam import StoredMessage
from flame.broker.wire import insist

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nats.aio.client import Client


async def read_raw(nc: Client, stream: str, which: Mapping[str, object], what: str) -> dict[str, Any] | None:
    """Read a stored message as the broker puts it; ``None`` if there is none."""
    try:
        answer = await insist(nc, f"STREAM.MSG.GET.{stream}", which, what)
    except NoMessage:
        return None
    message: dict[str, Any] = answer["message"]
    return message


def stored_message(message: dict[str, Any]) -> StoredMessage:
    """Return the message that `read_raw` read."""
    stored_at = datetime.fromisoformat(message["time"]).timestamp()
    return StoredMessage(message["subject"], base64.b64decode(message.get("data", "")), int(message["seq"]), stored_at)


async def read_message(nc: Client, stream: str, which: Mapping[str, object], what: str) -> StoredMessage | None:
    """Read a stored message; ``None`` if there is none."""
    message = await read_raw(nc, stream, which, what)
    return None if message is None else stored_message(message)


async def newest_sequence(nc: Client, stream: str, pattern: str) -> int:
    """Return the sequence of the newest message on subjects that match; 0 if there is none."""
    newest = await read_raw(nc, stream, {"last_by_subj": pattern}, f"read {pattern}")
    return 0 if newest is None else int(newest["seq"])
