"""The embedded broker with a real server: while all goes well, and when something is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.js.api import ConsumerConfig

from flame.broker.embedded import (
    BrokerNotInstalled,
    BrokerStartFailed,
    DataDirInUse,
    EmbeddedBroker,
    EmbeddedBrokerConfig,
    PortInUse,
    find_nats_server,
)
from flame.broker.embedded.data_folder import DataFolder
from flame.errors import BrokerUnavailable, ConfigurationError

LIMIT_S = 5.0

OWNER = """
import asyncio, json, os, sys, time
from pathlib import Path
from flame.broker.embedded import EmbeddedBroker, EmbeddedBrokerConfig

def fork(broker):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        broker.kill()  # does nothing: it is the parent's
        os.write(tell, b".")
        time.sleep(60)
        os._exit(0)
    os.read(told, 1)
    return child

async def main():
    broker = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=Path(sys.argv[1])))
    await broker.start()
    child = fork(broker) if "fork" in sys.argv else None
    print(json.dumps({"server": broker.pid, "guard": broker.guard_pid, "child": child}), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture(autouse=True, scope="module")
def _no_process_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every guard and server holds its store's lock while it lives, so a free lock is a dead server."""
    yield
    folders = [lock.parent for lock in tmp_path_factory.getbasetemp().glob("**/store.lock")]
    assert folders
    assert [folder for folder in folders if not DataFolder(folder).store_is_free()] == []


@pytest.fixture
def config(tmp_path: Path) -> EmbeddedBrokerConfig:
    return EmbeddedBrokerConfig(data_dir=tmp_path / "data")


@pytest.fixture
async def broker(config: EmbeddedBrokerConfig) -> AsyncIterator[EmbeddedBroker]:
    async with EmbeddedBroker(config) as broker:
        yield broker


@asynccontextmanager
async def client_of(broker: EmbeddedBroker) -> AsyncIterator[Client]:
    client = await nats.connect(broker.endpoint, allow_reconnect=False)
    try:
        yield client
    finally:
        await client.close()


@contextmanager
def owner_process(data_dir: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run a program that owns a broker, and give it and what it told about its processes."""
    command = [sys.executable, "-c", OWNER, str(data_dir), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as owner:
        try:
            assert owner.stdout is not None
            yield owner, json.loads(owner.stdout.readline())
        finally:
            with suppress(ProcessLookupError):
                os.killpg(owner.pid, signal.SIGKILL)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait, within a limit, until a condition holds for which there is no signal."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {LIMIT_S:g} s: {what}"
        await asyncio.sleep(0.005)


def gone(*pids: int) -> bool:
    return not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    if sys.platform != "linux":
        return True
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"  # dead, but its new parent has not noticed


def pids_of(broker: EmbeddedBroker) -> tuple[int, int]:
    return broker.pid, broker.guard_pid


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.create_server((host, 0)) as listener:
        yield listener.getsockname()[1]


class TestRunning:
    async def test_a_started_broker_takes_jetstream_requests(self, broker: EmbeddedBroker) -> None:
        async with client_of(broker) as client:
            await client.jetstream().add_stream(name="S", subjects=["s"])
            assert (await client.jetstream().publish("s", b"x")).seq == 1
            assert client.max_payload == 8 * 1024**2

    async def test_two_at_once_have_ports_of_their_own(self, tmp_path: Path) -> None:
        first = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=tmp_path / "1"))
        second = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=tmp_path / "2"))
        async with first, second:
            assert first.port != second.port
            async with client_of(first), client_of(second):
                pass

    async def test_messages_and_endpoint_survive_a_restart(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        async with broker, client_of(broker) as client:
            endpoint = broker.endpoint
            await client.jetstream().add_stream(name="S", subjects=["s"])
            await client.jetstream().publish("s", b"kept")
        async with broker, client_of(broker) as client:
            assert broker.endpoint == endpoint
            assert (await client.jetstream().get_msg("S", 1)).data == b"kept"

    async def test_messages_survive_a_kill(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        async with broker, client_of(broker) as client:
            await client.jetstream().add_stream(name="S", subjects=["s"])
            await client.jetstream().publish("s", b"kept")
            broker.kill()
        async with broker, client_of(broker) as client:
            assert (await client.jetstream().get_msg("S", 1)).data == b"kept"

    async def test_the_data_folder_may_have_any_name(self, tmp_path: Path) -> None:
        data_dir = tmp_path / """it's "a" $folder\\ %s é {x} #"""
        broker = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=data_dir))
        async with broker, client_of(broker) as client:
            await client.jetstream().add_stream(name="S", subjects=["s"])
        assert list(data_dir.glob("jetstream/**/S"))

    async def test_a_relative_data_folder_stays_where_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        broker = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=Path("data")))
        monkeypatch.chdir("/")
        async with broker:
            assert (tmp_path / "data" / "jetstream").is_dir()

    async def test_only_its_user_may_look_into_the_data_folder(self, broker: EmbeddedBroker) -> None:
        data_dir = broker.config.data_dir
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((data_dir / "nats-server.conf").stat().st_mode) == 0o600

    async def test_the_log_goes_to_a_file_and_the_last_one_is_kept(
        self, config: EmbeddedBrokerConfig, capfd: pytest.CaptureFixture[str]
    ) -> None:
        broker = EmbeddedBroker(config)
        pids = []
        for _ in range(2):
            async with broker:
                pids.append(broker.pid)
        for name, pid in zip(("nats-server.log.1", "nats-server.log"), pids, strict=True):
            text = (config.data_dir / name).read_text()
            assert "Server is ready" in text
            assert f"[{pid}]" in text
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("sync_interval", ["always", "10s"])
    async def test_the_sync_interval_can_be_chosen(self, config: EmbeddedBrokerConfig, sync_interval: str) -> None:
        async with EmbeddedBroker(replace(config, sync_interval=sync_interval)):
            assert f'sync_interval: "{sync_interval}"' in (config.data_dir / "nats-server.conf").read_text()

    async def test_a_stream_may_have_over_a_thousand_consumers(self, broker: EmbeddedBroker) -> None:
        async with client_of(broker) as client:
            jetstream = client.jetstream()
            await jetstream.add_stream(name="S", subjects=["s.*"])
            for number in range(1_001):
                await jetstream.add_consumer(
                    "S", ConsumerConfig(name=f"c{number}", mem_storage=True, inactive_threshold=60)
                )
            assert (await jetstream.stream_info("S")).state.consumer_count == 1_001

    async def test_streams_may_reserve_more_than_the_disk_has_free(self, broker: EmbeddedBroker) -> None:
        async with client_of(broker) as client:
            for number in range(64):
                await client.jetstream().add_stream(name=f"S{number}", subjects=[f"s{number}"], max_bytes=8 * 1024**3)

    async def test_a_wildcard_address_is_reached_on_the_loopback_interface(self, config: EmbeddedBrokerConfig) -> None:
        async with EmbeddedBroker(replace(config, host="0.0.0.0")) as broker, client_of(broker):
            assert broker.endpoint == f"nats://127.0.0.1:{broker.port}"


class TestStopping:
    async def test_stop_ends_server_and_guard(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        await broker.start()
        pids = pids_of(broker)
        waiter = asyncio.create_task(broker.wait())
        await asyncio.sleep(0)  # it waits
        await broker.stop()
        assert gone(*pids)
        assert await waiter == 0
        assert "Server Exiting" in (config.data_dir / "nats-server.log").read_text()

    async def test_stop_is_idempotent_and_safe_before_start(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        await broker.stop()
        broker.kill()
        await broker.start()
        await asyncio.gather(broker.stop(), broker.stop())
        await broker.stop()
        broker.kill()

    async def test_a_broker_that_does_not_run_has_no_processes(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        with pytest.raises(BrokerUnavailable, match="start it first"):
            assert broker.endpoint
        async with broker:
            pass
        with pytest.raises(BrokerUnavailable, match="not running"):
            assert broker.pid
        with pytest.raises(BrokerUnavailable, match="not running"):
            await broker.wait()

    async def test_starting_twice_is_an_error_and_does_no_harm(self, broker: EmbeddedBroker) -> None:
        with pytest.raises(RuntimeError, match="started already"):
            await broker.start()
        async with client_of(broker):
            pass

    async def test_a_server_that_does_not_end_is_killed(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(replace(config, stop_timeout_s=0.1))
        await broker.start()
        pids = pids_of(broker)
        os.kill(broker.pid, signal.SIGSTOP)
        waiter = asyncio.create_task(broker.wait())
        await asyncio.sleep(0)  # it waits
        await broker.stop()
        assert gone(*pids)
        assert await waiter == -signal.SIGKILL

    async def test_a_cancelled_stop_leaves_no_process(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        await broker.start()
        pids = pids_of(broker)
        os.kill(broker.pid, signal.SIGSTOP)
        stopping = asyncio.create_task(broker.stop())
        await asyncio.sleep(0)  # it has asked the guard, and waits
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert gone(*pids)

    async def test_stop_in_the_finally_of_a_cancelled_task_leaves_no_process(
        self, config: EmbeddedBrokerConfig
    ) -> None:
        broker = EmbeddedBroker(config)
        started = asyncio.Event()

        async def use() -> None:
            try:
                await broker.start()
                started.set()
                await broker.wait()
            finally:
                await broker.stop()

        task = asyncio.create_task(use())
        await started.wait()
        pids = pids_of(broker)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gone(*pids)

    async def test_a_cancelled_start_leaves_no_process_and_no_lock(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        starting = asyncio.create_task(broker.start())
        await asyncio.sleep(0)
        pid = broker.guard_pid
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert gone(pid)
        async with EmbeddedBroker(config):
            pass

    async def test_a_broker_that_is_stopped_while_it_starts_ends_at_once(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        starting = asyncio.create_task(broker.start())
        await asyncio.sleep(0)
        pid, began = broker.guard_pid, time.monotonic()
        await broker.stop()
        assert time.monotonic() - began < config.stop_timeout_s / 2
        with pytest.raises(BrokerStartFailed, match="stopped while it was starting"):
            await starting
        assert gone(pid)

    def test_a_broker_outlives_the_loop_that_started_it(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        asyncio.run(broker.start())
        pids = pids_of(broker)
        assert not gone(pids[0])
        asyncio.run(broker.stop())
        assert gone(*pids)

    def test_kill_needs_no_loop(self, config: EmbeddedBrokerConfig) -> None:
        broker = EmbeddedBroker(config)
        asyncio.run(broker.start())
        pids = pids_of(broker)
        broker.kill()
        assert gone(*pids)

    async def test_a_data_folder_that_was_removed_does_not_keep_it_from_stopping(
        self, config: EmbeddedBrokerConfig, tmp_path: Path
    ) -> None:
        broker = EmbeddedBroker(config)
        await broker.start()
        pids = pids_of(broker)
        config.data_dir.rename(tmp_path / "moved")
        await broker.stop()
        assert gone(*pids)


class TestKilled:
    @pytest.mark.parametrize("arguments", [(), ("fork",)], ids=["alone", "with a forked child"])
    async def test_nothing_outlives_a_killed_owner(
        self, config: EmbeddedBrokerConfig, arguments: tuple[str, ...]
    ) -> None:
        with owner_process(config.data_dir, *arguments) as (owner, told):
            assert not gone(told["server"], told["guard"])
            owner.kill()
            await until(lambda: gone(told["server"], told["guard"]), "the end of server and guard")
            assert told["child"] is None or not gone(told["child"])

    async def test_a_killed_owner_does_not_block_the_data_folder(self, config: EmbeddedBrokerConfig) -> None:
        with owner_process(config.data_dir) as (owner, told):
            owner.kill()
            owner.wait()
            async with EmbeddedBroker(config) as broker, client_of(broker):
                assert gone(told["server"], told["guard"])

    async def test_a_killed_owners_server_is_waited_for(self, config: EmbeddedBrokerConfig) -> None:
        with owner_process(config.data_dir) as (owner, told):
            os.kill(told["server"], signal.SIGSTOP)
            owner.kill()
            owner.wait()
            with pytest.raises(DataDirInUse, match=rf"still used by process {told['guard']}\b"):
                await EmbeddedBroker(replace(config, ready_timeout_s=0.2)).start()
            successor = EmbeddedBroker(config)
            starting = asyncio.create_task(successor.start())
            os.kill(told["server"], signal.SIGKILL)
            await starting
            await successor.stop()

    async def test_a_killed_guard_takes_the_server_along(self, broker: EmbeddedBroker) -> None:
        pid, guard_pid = pids_of(broker)
        os.kill(guard_pid, signal.SIGKILL)
        assert await asyncio.wait_for(broker.wait(), LIMIT_S) == -signal.SIGKILL
        await until(lambda: gone(pid, guard_pid), "the end of server and guard")

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the owner's watch ends it, not the kernel")
    async def test_a_killed_guard_takes_the_server_along_though_nobody_watches(self, broker: EmbeddedBroker) -> None:
        pid, guard_pid = pids_of(broker)
        os.kill(guard_pid, signal.SIGKILL)
        await until(lambda: gone(pid), "the end of the server")

    async def test_a_stopped_guard_does_not_keep_the_broker_from_ending(self, broker: EmbeddedBroker) -> None:
        pids = pids_of(broker)
        os.kill(broker.guard_pid, signal.SIGSTOP)
        broker.kill()
        assert gone(*pids)

    async def test_a_terminated_guard_ends_the_server_in_order(self, broker: EmbeddedBroker) -> None:
        os.kill(broker.guard_pid, signal.SIGTERM)
        assert await asyncio.wait_for(broker.wait(), LIMIT_S) == 0

    async def test_everybody_who_waits_hears_of_a_killed_server(self, broker: EmbeddedBroker) -> None:
        waiters = [asyncio.create_task(broker.wait()) for _ in range(3)]
        guard_pid = broker.guard_pid
        os.kill(broker.pid, signal.SIGKILL)
        statuses = await asyncio.wait_for(asyncio.gather(*waiters), LIMIT_S)
        assert statuses == [-signal.SIGKILL] * 3
        assert gone(guard_pid)

    async def test_a_broker_whose_server_was_killed_can_be_started_again(self, broker: EmbeddedBroker) -> None:
        endpoint = broker.endpoint
        os.kill(broker.pid, signal.SIGKILL)
        await asyncio.wait_for(broker.wait(), LIMIT_S)
        await broker.start()
        assert broker.endpoint == endpoint
        async with client_of(broker):
            pass

    async def test_ctrl_c_in_the_owners_terminal_does_not_reach_the_server(self, broker: EmbeddedBroker) -> None:
        assert {os.getsid(pid) for pid in pids_of(broker)} == {broker.guard_pid}


class TestConflicts:
    async def test_a_data_folder_in_use_is_refused_at_once(
        self, broker: EmbeddedBroker, config: EmbeddedBrokerConfig
    ) -> None:
        began = time.monotonic()
        with pytest.raises(DataDirInUse, match=rf"{config.data_dir} is used by process {os.getpid()}$"):
            await EmbeddedBroker(config).start()
        assert time.monotonic() - began < 1
        async with client_of(broker):
            pass

    async def test_another_process_in_the_data_folder_is_named(self, config: EmbeddedBrokerConfig) -> None:
        with (
            owner_process(config.data_dir) as (owner, _),
            pytest.raises(DataDirInUse, match=f"used by process {owner.pid}$"),
        ):
            await EmbeddedBroker(config).start()

    async def test_a_port_in_use_is_refused_at_once(self, config: EmbeddedBrokerConfig) -> None:
        began = time.monotonic()
        with (
            listening() as port,
            pytest.raises(PortInUse, match=f"^port {port} on 127.0.0.1 is in use: .*--port"),
        ):
            await EmbeddedBroker(replace(config, port=port)).start()
        assert time.monotonic() - began < 2
        async with EmbeddedBroker(config):
            pass

    async def test_a_port_that_is_taken_at_the_last_moment_is_refused(
        self, config: EmbeddedBrokerConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(EmbeddedBroker, "_check_port", lambda self: None)
        with listening() as port, pytest.raises(PortInUse):
            await EmbeddedBroker(replace(config, port=port)).start()

    async def test_an_address_of_another_machine_is_refused(self, config: EmbeddedBrokerConfig) -> None:
        with pytest.raises(ConfigurationError, match=r"can't listen on port 4222 of 192\.0\.2\.1"):
            await EmbeddedBroker(replace(config, host="192.0.2.1", port=4222)).start()
        with pytest.raises(BrokerStartFailed, match="cannot assign requested address"):
            await EmbeddedBroker(replace(config, host="192.0.2.1")).start()

    async def test_a_file_is_no_data_folder(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        for data_dir in (file, file / "below"):
            with pytest.raises(ConfigurationError, match=f"data folder {data_dir} can't be used"):
                await EmbeddedBroker(EmbeddedBrokerConfig(data_dir=data_dir)).start()

    def test_a_folder_that_can_not_be_written_is_refused(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(ConfigurationError, match=f"data folder {tmp_path} can't be used"):
            asyncio.run(EmbeddedBroker(EmbeddedBrokerConfig(data_dir=tmp_path)).start())

    async def test_a_store_that_can_not_be_opened_shows_the_servers_log(self, config: EmbeddedBrokerConfig) -> None:
        config.data_dir.mkdir()
        (config.data_dir / "jetstream").touch()
        with pytest.raises(BrokerStartFailed, match="ended with status 1") as caught:
            await EmbeddedBroker(config).start()
        assert "Can't start JetStream" in str(caught.value)
        assert DataFolder(config.data_dir).store_is_free()

    async def test_a_server_without_jetstream_is_refused(
        self, config: EmbeddedBrokerConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def without_jetstream(config: EmbeddedBrokerConfig, *, ports_dir: Path, **_: object) -> str:
            return f'port: -1\nports_file_dir: "{ports_dir}"\n'

        monkeypatch.setattr("flame.broker.embedded.broker.server_configuration", without_jetstream)
        with pytest.raises(BrokerStartFailed, match="JetStream is not enabled"):
            await EmbeddedBroker(config).start()

    @pytest.mark.parametrize(
        "wrong",
        [
            {"port": 65536},
            {"port": -1},
            {"host": ""},
            {"max_payload_bytes": 0},
            {"max_payload_bytes": 65 * 1024**2},
            {"max_file_store_bytes": 0},
            {"sync_interval": "2 minutes"},
            {"ready_timeout_s": 0},
            {"stop_timeout_s": -1},
        ],
        ids=lambda wrong: "=".join(map(str, *wrong.items())),
    )
    def test_a_setting_out_of_range_is_named(self, wrong: dict[str, Any], config: EmbeddedBrokerConfig) -> None:
        (name,) = wrong
        with pytest.raises(ConfigurationError, match=f"embedded broker: {name} must be .*, got "):
            replace(config, **wrong)


class TestExecutable:
    @pytest.fixture
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """An interpreter and a PATH without a server, in this folder."""
        monkeypatch.delenv("FLAME_NATS_SERVER", raising=False)
        monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "scripts"))
        monkeypatch.setenv("PATH", str(tmp_path / "path"))
        return tmp_path

    @staticmethod
    def install(path: Path, script: str = "") -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def test_the_variable_comes_first_then_the_interpreters_folders_then_path(
        self, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(BrokerNotInstalled, match=r"flame-engine\[server\].*FLAME_NATS_SERVER"):
            find_nats_server()
        for path in (
            elsewhere / "path" / "nats-server",
            elsewhere / "scripts" / "nats-server",
            elsewhere / "nats-server",
        ):
            self.install(path)
            assert find_nats_server() == path
        monkeypatch.setenv("FLAME_NATS_SERVER", str(self.install(elsewhere / "named")))
        assert find_nats_server() == elsewhere / "named"

    @pytest.mark.parametrize("kind", ["absent", "a folder", "not executable"])
    async def test_a_variable_that_names_no_executable_is_refused(
        self, kind: str, config: EmbeddedBrokerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "nats-server"
        if kind == "a folder":
            path.mkdir()
        elif kind == "not executable":
            path.touch(mode=0o644)
        monkeypatch.setenv("FLAME_NATS_SERVER", str(path))
        with pytest.raises(BrokerNotInstalled, match=f"FLAME_NATS_SERVER is '{path}'"):
            await EmbeddedBroker(config).start()
        assert not config.data_dir.exists()

    async def test_a_program_that_can_not_be_run_is_reported(
        self, config: EmbeddedBrokerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = tmp_path / "nats-server"
        broken.write_bytes(b"\x7fELF")
        broken.chmod(0o755)
        monkeypatch.setenv("FLAME_NATS_SERVER", str(broken))
        with pytest.raises(BrokerStartFailed, match=f"can't run {broken}: Exec format error"):
            await EmbeddedBroker(config).start()

    async def test_a_server_that_never_gets_ready_is_given_up(
        self, config: EmbeddedBrokerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        idle = self.install(tmp_path / "nats-server", "echo sitting about; exec sleep 60")
        monkeypatch.setenv("FLAME_NATS_SERVER", str(idle))
        with pytest.raises(BrokerStartFailed, match=r"waited 0\.3 s for nats-server(.|\n)*sitting about"):
            await EmbeddedBroker(replace(config, ready_timeout_s=0.3)).start()
        assert DataFolder(config.data_dir).store_is_free()
