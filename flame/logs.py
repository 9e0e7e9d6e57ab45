"""Structured logs: key-value pairs on standard error, for people or as JSON lines.

structlog is loaded when something is logged: it takes a quarter of the time in which an executor starts, and most
executors never log.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "exception": logging.ERROR,
    "critical": logging.CRITICAL,
}


class Logger:
    """The logger of one part of Flame, with structlog's methods: ``log.info("what happened", key=value)``."""

    def __init__(self, name: str) -> None:
        """Take a name; nothing is loaded yet."""
        self._plain = logging.getLogger(name)
        self._structured: Any = None

    def __getattr__(self, method: str) -> Any:
        """Return one of structlog's methods, or what does nothing if its level is not wanted."""
        level = _LEVELS.get(method)
        if level is not None and not self._plain.isEnabledFor(level):
            return _silent
        if self._structured is None:
            self._structured = _structured(self._plain)
        return getattr(self._structured, method)


def get_logger(name: str) -> Any:
    """Return the logger of one part of Flame. A library stays silent below warnings unless told otherwise."""
    return Logger(name)


def _silent(*_: object, **__: object) -> None:
    """Log nothing."""


def _structured(plain: logging.Logger) -> Any:
    import structlog  # noqa: PLC0415  # see above

    return structlog.wrap_logger(
        plain,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    )


def configure_logs(level: str = "info", json: bool = False) -> None:
    """Send the logs of a Flame program to standard error. For programs, never called by the library."""
    import structlog  # noqa: PLC0415  # see above

    # Not with the values of local variables, as it would be where rich is installed: there may be secrets among them.
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    renderer = structlog.processors.JSONRenderer() if json else console
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ]
            if json
            else [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("nats").setLevel(logging.CRITICAL)  # its errors reach us by callback and are logged by us
