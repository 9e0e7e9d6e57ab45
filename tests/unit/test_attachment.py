"""A process that is started by hand: its manager's start, and the signals that it gets."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import threading
from pathlib import Path

import pytest

from flame.config import Security, Target
from flame.errors import ConfigurationError
from flame.service import attachment as module
from flame.service.attachment import Attachment
from flame.service.interrupts import Interrupts

TARGET = Target("nats://u:secret@127.0.0.1:9", Security(credentials=Path("/c"), tls_ca=Path("/ca")))


async def test_without_the_programs_of_flame_nothing_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    attachment = Attachment(TARGET, "app")
    with pytest.raises(ConfigurationError, match=r"pip install 'flame-engine\[server\]'"):
        await attachment.start()
    await attachment.close()


async def test_a_manager_that_does_not_start_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANAGER", "no_such_module")
    attachment = Attachment(TARGET, "app")
    with pytest.raises(ConfigurationError, match=r"has ended \(status 1\).*\n.*No module named no_such_module"):
        await attachment.start()
    folder = attachment._folder
    assert folder is not None
    await attachment.close()
    assert not folder.exists()


def test_the_manager_is_told_where_the_cluster_is_and_nothing_that_is_not_its(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAME_NODE", "another")
    monkeypatch.setenv("FLAME_TLS_KEY", "/another")
    monkeypatch.setenv("HOME", "/home")

    async def environment() -> dict[str, str]:
        return Attachment(TARGET, "app")._environment()

    given = asyncio.run(environment())
    assert {name: value for name, value in given.items() if name.startswith("FLAME_")} == {
        "FLAME_ENDPOINT": TARGET.endpoint,
        "FLAME_CREDENTIALS": "/c",
        "FLAME_TLS_CA": "/ca",
    }
    assert given["HOME"] == "/home"
    assert Security.from_environment(given) == TARGET.security


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_asks_and_whoever_had_them_gets_them_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    asked = asyncio.Event()
    with Interrupts(asked.set, lambda: False):
        os.kill(os.getpid(), number)
        async with asyncio.timeout(10):
            await asked.wait()
    assert signal.getsignal(number) == before


async def test_signals_that_a_debugger_has_taken_stay_its() -> None:
    def debug(*_: object) -> None:
        """Be the debugger's."""

    before = signal.getsignal(signal.SIGINT)
    try:
        with Interrupts(lambda: None, lambda: False):
            signal.signal(signal.SIGINT, debug)
        assert signal.getsignal(signal.SIGINT) is debug
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)

    async def program() -> None:
        with Interrupts(lambda: None, lambda: False):
            assert signal.getsignal(signal.SIGINT) == before

    thread = threading.Thread(target=asyncio.run, args=(program(),))
    thread.start()
    thread.join()
