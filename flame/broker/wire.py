"""The JetStream API: its subjects, its error codes and how they become ours. Every one of them is here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from nats import errors as nats_errors

from flame.broker.errors import (
    BrokerError,
    ConsumerConflict,
    ConsumerMissing,
    Duplicate,
    NoMessage,
    NoResponders,
    NotAcknowledged,
    RevisionConflict,
    StreamFull,
    StreamMissing,
    TooLarge,
)
from flame.errors import BrokerUnavailable, FlameError

if TYPE_CHECKING:
    from nats.aio.client import Client

API: Final = "$JS.API"
SECOND_NS: Final = 1_000_000_000

STATUS: Final = "Status"
NOT_FOUND: Final = "404"
STORED_SUBJECT: Final = b"Nats-Subject"
EXPECTED_REVISION: Final = "Nats-Expected-Last-Subject-Sequence"
LAST_CONSUMER: Final = "Nats-Last-Consumer"
CONSUMER_STALLED: Final = "Nats-Consumer-Stalled"
KV_OPERATION: Final = "KV-Operation"
KV_MARKER: Final = "Nats-Marker-Reason"
ROLLUP: Final = "Nats-Rollup"
TTL: Final = "Nats-TTL"

ACK: Final = b"+ACK"
IN_PROGRESS: Final = b"+WPI"
NAK: Final = b"-NAK"
NAK_AFTER: Final = b'-NAK {"delay":%d}'
"""With nanoseconds."""

API_TIMEOUT_S: Final = 5.0
"""For what changes streams and consumers."""
INSIST_TIMEOUT_S: Final = 12.0
"""For what may be asked again: longer than a stream is without a leader when the server that led it dies."""
_ASK_FIRST_S: Final = 0.5
_ASK_MAX_S: Final = 4.0
"""How long one attempt waits for its answer. A stream without a leader doesn't answer, nor does it later."""

# Error codes of nats-server (server/errors.json), and what they mean to us.
_PASSING: Final = (10005, 10008)
"""Too few servers are up for the copies that are asked for; there is no leader now."""
_SUBJECT_TAKEN = "maximum messages per subject exceeded"
_FULL = ("maximum messages exceeded", "maximum bytes exceeded")
_BY_CODE: Final[Mapping[int, type[FlameError]]] = {
    10014: ConsumerMissing,
    10037: NoMessage,
    10054: TooLarge,
    10059: StreamMissing,
    10099: ConsumerConflict,
    10100: ConsumerConflict,
    10071: RevisionConflict,
    10164: RevisionConflict,
    10005: BrokerUnavailable,  # no suitable peers for placement
    10039: BrokerUnavailable,  # JetStream not enabled for this account
    10076: BrokerUnavailable,  # JetStream not enabled
    10023: BrokerUnavailable,  # insufficient resources
    10047: StreamFull,  # no more storage on the server
}


def map_api_error(what: str, error: Mapping[str, Any]) -> FlameError:
    """Turn the ``error`` of a JetStream answer into ours. Only the text of 10077 tells what it means."""
    code = int(error.get("err_code", 0))
    text = str(error.get("description", "no description"))
    message = f"{what}: {text} ({code})"
    if code == 10077:
        if text == _SUBJECT_TAKEN:
            return Duplicate(message)
        if text in _FULL:
            return StreamFull(message)
        return BrokerUnavailable(message)
    kind = _BY_CODE.get(code)
    if kind is not None:
        return kind(message)
    if int(error.get("code", 0)) in (500, 503):
        return BrokerUnavailable(message)
    return BrokerError(message)


def map_client_error(what: str, error: Exception) -> FlameError:
    """Turn what nats-py raised into ours."""
    if isinstance(error, nats_errors.NoRespondersError):
        return NoResponders(f"{what}: nobody answers there")
    if isinstance(error, nats_errors.MaxPayloadError):
        return TooLarge(f"{what}: the message is larger than the server takes")
    if isinstance(error, nats_errors.TimeoutError):
        return NotAcknowledged(f"{what}: no answer in time; it may have been carried out")
    if isinstance(error, nats_errors.ConnectionClosedError | nats_errors.ConnectionDrainingError):
        return BrokerUnavailable(f"{what}: the connection is closed")
    if isinstance(error, nats_errors.OutboundBufferLimitError):
        return BrokerUnavailable(f"{what}: disconnected, and the buffer for that time is full; it was not sent")
    if isinstance(error, nats_errors.Error | OSError):
        return BrokerUnavailable(f"{what}: {str(error).removeprefix('nats: ') or type(error).__name__}")
    return BrokerError(f"{what}: {error!r}")


async def request(nc: Client, subject: str, data: bytes, timeout_s: float, what: str) -> Any:
    """Send a request and return the message that answers it, with errors mapped."""
    try:
        return await nc.request(subject, data, timeout=timeout_s)
    except (nats_errors.Error, OSError) as error:
        raise map_client_error(what, error) from error


async def insist(nc: Client, verb: str, body: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """As `call`, for what may be asked any number of times: asked again while there is no leader who could answer."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + INSIST_TIMEOUT_S
    wait_s = _ASK_FIRST_S
    while True:
        asked_at = loop.time()
        try:
            answer = await _ask(nc, verb, body, what, wait_s)
        except NotAcknowledged:
            if asked_at + wait_s >= deadline:
                raise
        else:
            if _code(answer) not in _PASSING or asked_at + wait_s >= deadline:
                return _checked(answer, what)
            await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _ASK_MAX_S)


async def call(
    nc: Client, verb: str, body: Mapping[str, Any] | None, what: str, timeout_s: float = API_TIMEOUT_S
) -> dict[str, Any]:
    """Call the JetStream API and return its answer; ``verb`` is the subject after ``$JS.API.``."""
    return _checked(await _ask(nc, verb, body, what, timeout_s), what)


async def has_stream(nc: Client, subject: str) -> bool:
    """Whether a stream takes a subject; nobody answering there may also mean that it has no leader now."""
    try:
        answer = await call(nc, "STREAM.NAMES", {"subject": subject}, f"find the stream of {subject}")
    except FlameError:
        return True  # the cluster itself has no leader now
    return bool(answer.get("streams"))


async def _ask(nc: Client, verb: str, body: Mapping[str, Any] | None, what: str, timeout_s: float) -> dict[str, Any]:
    data = json.dumps(body).encode() if body is not None else b""
    try:
        message = await request(nc, f"{API}.{verb}", data, timeout_s, what)
    except NoResponders as error:
        raise BrokerUnavailable(
            f"{what}: the broker has no JetStream; start nats-server with -js or a jetstream block"
        ) from error
    answer: dict[str, Any] = json.loads(message.data)
    return answer


def _code(answer: Mapping[str, Any]) -> int:
    return int((answer.get("error") or {}).get("err_code", 0))


def _checked(answer: dict[str, Any], what: str) -> dict[str, Any]:
    fault = answer.get("error")
    if fault is not None:
        raise map_api_error(what, fault)
    return answer
