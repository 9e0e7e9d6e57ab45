r"""What the built-in application ``flmexec`` takes and returns: a script and what came of it.

A task's input is a MessagePack map or, for those who write it by hand, a JSON object with the fields of `Script`::

    {"language": "shell", "code": "sort | uniq -c", "input": "b\na\nb\n"}

and its output is a map of the same kind with the fields of `ScriptResult`; in JSON, bytes are UTF-8 text. A script
whose exit status is not 0, or that takes too long, is a failed task: its ``error.details`` are the result, as
MessagePack.

    task = await session.invoke(scripts.encode("print(6 * 7)", language="python"))
    print(scripts.decode(task.output).stdout)

The script runs as a process of its own on a node of the cluster, with the rights of the executor manager there, in an
empty folder that is removed afterwards. What it has started and left in its process group ends with it. It has the
environment of the application, but none of Flame's own variables.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import msgpack

from flame.errors import InvalidArgument, MalformedMessage
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.defaults import INLINE_LIMIT_BYTES

APPLICATION: Final = "flmexec"
"""The name under which it is registered when a cluster is founded."""
LANGUAGES: Final = ("shell", "python")
RESULT_BYTES: Final = 16 * 1024 * 1024
"""The most that an encoded result may hold; output over that is cut, and says so. An executor's memory holds it."""
FAILED_BYTES: Final = INLINE_LIMIT_BYTES - 16 * 1024
"""The same of a script that failed: its result is part of the task's record."""
NOTE: Final = b"\n[... output was left out here ...]\n"
"""What stands in its place; `ScriptResult.cut` tells how much it was."""
_TAIL_LINES: Final = 10
_TAIL_BYTES: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A script to run."""

    code: str
    language: str = "shell"
    """``shell``: run by ``/bin/sh``; ``python``: by the interpreter that runs the service."""
    input: bytes = b""
    """What it reads from its standard input."""
    timeout_s: float | None = None
    """After so long it is ended and its task fails; ``None``: no limit of its own."""

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        if not isinstance(self.code, str):
            raise InvalidArgument(f"code: expected text, got {type(self.code).__name__}")
        if self.language not in LANGUAGES:
            raise InvalidArgument(f"language: expected one of {', '.join(LANGUAGES)}, got {self.language!r}")
        if not isinstance(self.input, bytes):
            raise InvalidArgument(f"input: expected bytes or text, got {type(self.input).__name__}")
        limit = self.timeout_s
        if limit is not None and not (type(limit) in (int, float) and math.isfinite(limit) and limit > 0):
            raise InvalidArgument(f"timeout_s: expected a number of seconds above 0, got {limit!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptResult:
    """What came of a script."""

    status: int
    """Its exit status; negative: it was ended by that signal."""
    stdout: bytes = b""
    stderr: bytes = b""
    cut: int = 0
    """Bytes that were left out of the middle of its output, since it was too much; a note stands in their place."""
    timed_out: bool = False
    """It ran longer than it was allowed to and was ended."""

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself and with status 0."""
        return self.status == 0 and not self.timed_out


class ScriptFailed(Exception):
    """A script failed; ``details`` are what came of it."""

    def __init__(self, script: Script, result: ScriptResult) -> None:
        """Say how it ended, and what it wrote last to standard error."""
        how = f"exit status {result.status}" if result.status >= 0 else f"ended by signal {-result.status}"
        if result.timed_out:
            how = f"took longer than {script.timeout_s:g} s and was ended"
        last = last_lines(result.stderr)
        super().__init__(f"{how}; the end of its stderr:\n{last}" if last else how)
        self.details = encode_result(result, limit=FAILED_BYTES)


def encode(code: str, *, language: str = "shell", input: bytes | str = b"", timeout_s: float | None = None) -> bytes:
    """Return the input of a task that runs a script; see `Script`. Raises `InvalidArgument`."""
    data = input.encode() if isinstance(input, str) else input
    script = Script(code=code, language=language, input=data, timeout_s=timeout_s)
    wanted = {name: value for name, value in asdict(script).items() if value is not None}
    return pack({"v": VERSION, "kind": "script", **wanted})


def decode(data: bytes) -> ScriptResult:
    """Read the output of a task that ran a script, or the ``error.details`` of one that failed.

    Raises `MalformedMessage` if it is none.
    """
    found = _json_object(data) if _is_json(data) else unpack(data)
    try:
        return ScriptResult(
            status=int(found["status"]),
            stdout=_as_bytes(found["stdout"]),
            stderr=_as_bytes(found["stderr"]),
            cut=int(found.get("cut", 0)),
            timed_out=bool(found.get("timed_out")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedMessage(f"result of a script: {error!r}") from None


# ---- for the service


def read_script(data: bytes) -> tuple[Script, bool]:
    """Read the input of a task, and tell whether it is JSON; raise `InvalidArgument`."""
    as_json = _is_json(data)
    try:
        found = _json_object(data) if as_json else _plain_map(data)
    except MalformedMessage as error:
        raise InvalidArgument(f"input: expected a MessagePack or JSON map of a script: {error}") from None
    known = {field.name for field in fields(Script)}
    unknown = set(map(str, found)) - known - {"v", "kind"}
    if unknown:
        raise InvalidArgument(f"{', '.join(sorted(unknown))}: unknown; a script has {', '.join(sorted(known))}")
    if found.get("code") is None:
        raise InvalidArgument("code: missing; it is the script")
    wanted = {name: value for name, value in found.items() if name in known and value is not None}
    if isinstance(wanted.get("input"), str):
        wanted["input"] = wanted["input"].encode()
    return Script(**wanted), as_json


def encode_result(result: ScriptResult, *, as_json: bool = False, limit: int | None = None) -> bytes:
    """Encode what came of a script, with as much of its output as fits: `RESULT_BYTES` unless ``limit`` is given.

    In JSON, where a byte may become six, `FAILED_BYTES`.
    """
    if limit is None:
        limit = FAILED_BYTES if as_json else RESULT_BYTES
    keep = limit // 2
    while True:
        stdout, cut_out = shorten(result.stdout, keep)
        stderr, cut_err = shorten(result.stderr, keep)
        cut = result.cut + cut_out + cut_err
        found: dict[str, Any] = {
            "status": result.status,
            "stdout": stdout,
            "stderr": stderr,
            "cut": cut,
            "timed_out": result.timed_out,
        }
        data = _encode_json(found) if as_json else pack({"v": VERSION, "kind": "script result", **found})
        if len(data) <= limit or keep == 0:
            return data
        keep = keep * 7 // 8


def shorten(data: bytes, limit: int) -> tuple[bytes, int]:
    """Return as much as fits of the beginning and the end, with a note in between, and how much was left out."""
    if len(data) <= limit:
        return data, 0
    head = limit // 2
    tail = limit - head
    left_out = data[head : len(data) - tail]
    return data[:head] + NOTE + data[len(data) - tail :], len(left_out) - left_out.count(NOTE) * len(NOTE)


def last_lines(data: bytes) -> str:
    """Return the last lines of some output, as text."""
    text = data[-_TAIL_BYTES:].decode("utf-8", "replace").strip()
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


def _is_json(data: bytes) -> bool:
    """Whether it looks like a JSON object. No MessagePack map begins with such a character."""
    return data.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"{")


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"not JSON: {error}") from None
    assert isinstance(found, dict)
    return found


def _plain_map(data: bytes) -> dict[str, Any]:
    """Read a map that need not say which version it is of."""
    try:
        found = msgpack.unpackb(data)
    except Exception as error:  # noqa: BLE001  # msgpack raises half a dozen unrelated types for bad bytes
        raise MalformedMessage(f"{len(data)} bytes are neither: {error}") from None
    if not isinstance(found, dict):
        raise MalformedMessage(f"got {type(found).__name__}")
    return unpack(data) if "v" in found else found


def _encode_json(found: dict[str, Any]) -> bytes:
    text = {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value for name, value in found.items()
    }
    return json.dumps(text, ensure_ascii=False).encode()


def _as_bytes(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    raise TypeError(f"expected bytes, got {type(value).__name__}")
