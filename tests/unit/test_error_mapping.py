"""Every error of NATS becomes one of ours."""

from __future__ import annotations

import inspect
from typing import Any

import nats.errors
import nats.js.errors
import pytest
from nats.js.api import PubAck

from flame.broker import errors as ours
from flame.broker.wire import map_api_error, map_client_error
from flame.errors import BrokerUnavailable, FlameError


def _classes() -> list[type[Exception]]:
    found = {
        value
        for module in (nats.errors, nats.js.errors)
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, nats.errors.Error)
    }
    return sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__name__}")


ARGUMENTS: dict[str, Any] = {
    "subject": "s",
    "reply": "r",
    "sid": 1,
    "sub": None,
    "name": "n",
    "key": "k",
    "ack": PubAck(stream="s", seq=1),
}


def _make(kind: type[Exception]) -> Exception:
    """Make an exception with something for every argument that it has a name for."""
    if not inspect.isfunction(kind.__init__):  # it is Exception's, or that of another built-in class
        return kind()
    parameters = inspect.signature(kind).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return kind(**{name: ARGUMENTS.get(name, 1) for name in named})


EXPECTED: dict[type[Exception], type[FlameError]] = {
    nats.errors.NoRespondersError: ours.NoResponders,
    nats.errors.MaxPayloadError: ours.TooLarge,
    nats.errors.TimeoutError: ours.NotAcknowledged,
    nats.errors.FlushTimeoutError: ours.NotAcknowledged,
    nats.errors.DrainTimeoutError: ours.NotAcknowledged,
    nats.js.errors.FetchTimeoutError: ours.NotAcknowledged,
}
"""Those that callers decide on; every other one is the connection's and may pass."""


@pytest.mark.parametrize("kind", _classes(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_error_of_the_client_becomes_one_of_ours(kind: type[Exception]) -> None:
    mapped = map_client_error("read s", _make(kind))
    assert type(mapped) is EXPECTED.get(kind, BrokerUnavailable)
    assert str(mapped).startswith("read s: ")
    assert len(str(mapped)) > len("read s: ")


@pytest.mark.parametrize(
    "error", [OSError(111, "Connection refused"), ConnectionResetError("reset"), BrokenPipeError()]
)
def test_an_error_of_the_socket_is_the_brokers(error: OSError) -> None:
    assert type(map_client_error("read s", error)) is BrokerUnavailable


def test_what_is_no_error_of_the_client_is_told_as_it_is() -> None:
    mapped = map_client_error("read s", RuntimeError("odd"))
    assert type(mapped) is ours.BrokerError
    assert "RuntimeError('odd')" in str(mapped)


API: list[tuple[int, int, str, type[FlameError]]] = [
    (10014, 404, "consumer not found", ours.ConsumerMissing),
    (10037, 404, "no message found", ours.NoMessage),
    (10054, 400, "message size exceeds maximum allowed", ours.TooLarge),
    (10059, 404, "stream not found", ours.StreamMissing),
    (10099, 400, "multiple non-filtered consumers not allowed on workqueue stream", ours.ConsumerConflict),
    (10100, 400, "filtered consumer not unique on workqueue stream", ours.ConsumerConflict),
    (10071, 400, "wrong last sequence: 3", ours.RevisionConflict),
    (10164, 400, "wrong last sequence", ours.RevisionConflict),
    (10005, 400, "no suitable peers for placement", BrokerUnavailable),
    (10039, 503, "JetStream not enabled for account", BrokerUnavailable),
    (10076, 503, "JetStream not enabled", BrokerUnavailable),
    (10023, 503, "insufficient resources", BrokerUnavailable),
    (10047, 500, "insufficient storage resources available", ours.StreamFull),
    (10077, 503, "maximum messages per subject exceeded", ours.Duplicate),
    (10077, 503, "maximum messages exceeded", ours.StreamFull),
    (10077, 503, "maximum bytes exceeded", ours.StreamFull),
    (10077, 503, "store is closed", BrokerUnavailable),
    (10077, 503, "", BrokerUnavailable),
    (10008, 503, "JetStream system temporarily unavailable", BrokerUnavailable),
    (10001, 500, "something new", BrokerUnavailable),
    (10025, 400, "bad request", ours.BrokerError),
    (0, 0, "", ours.BrokerError),
]


@pytest.mark.parametrize(("err_code", "code", "description", "kind"), API)
def test_an_error_of_the_server_becomes_what_its_number_means(
    err_code: int, code: int, description: str, kind: type[FlameError]
) -> None:
    mapped = map_api_error("store on s", {"code": code, "err_code": err_code, "description": description})
    assert type(mapped) is kind
    assert str(mapped) == f"store on s: {description} ({err_code})"


def test_an_error_of_the_server_without_any_field_is_still_one_of_ours() -> None:
    assert type(map_api_error("store on s", {})) is ours.BrokerError
