"""Runs the services of a compose file as processes, where there is no Docker engine.

What a container would have of its own, and a process has not, is replaced in words and in mounted configuration files:
paths, host names and ports, each by a rule that the test states. Everything else is taken from the file as it stands.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.cluster import eventually

SHELL = ("/bin/sh", "-c")
STOP_S = 30.0


class Service:
    """One service of the file, and its process."""

    def __init__(self, name: str, spec: Mapping[str, Any], folder: Path, rules: Mapping[str, str]) -> None:
        self.name = name
        self.spec = spec
        self.log = folder / f"{name}.log"
        self._rules = rules
        self._process: subprocess.Popen[bytes] | None = None
        self.environment = {
            # What the image and the engine give every container.
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.defpath)),
            "HOME": str(folder),
            "HOSTNAME": os.uname().nodename,
            **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
            **{key: self._here(value) for key, value in spec.get("environment", {}).items()},
        }

    @property
    def command(self) -> list[str]:
        return [self._here(word) for word in self.spec["command"]]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                executable=shutil.which(self.command[0], path=self.environment["PATH"]),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def healthy(self) -> None:
        """Return when the file's own check is content."""
        kind, *test = self.spec["healthcheck"]["test"]
        assert kind in ("CMD", "CMD-SHELL")
        words = [self._here(word) for word in (test if kind == "CMD" else [*SHELL, *test])]

        async def check() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"{self.name} has ended:\n{self.log.read_text()[-3000:]}"
            checking = await asyncio.create_subprocess_exec(
                shutil.which(words[0], path=self.environment["PATH"]) or words[0],
                *words[1:],
                env=self.environment,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            return await checking.wait() == 0

        await eventually(check, f"{self.name} is healthy")

    def stop(self) -> int:
        """End the process as the engine does and return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def _here(self, word: str) -> str:
        return replaced(str(word).replace("$$", "$"), self._rules)


class Compose:
    """The services of a compose file, started in the order that it asks for."""

    def __init__(self, file: Path, folder: Path, rules: Mapping[str, str]) -> None:
        self.spec: dict[str, Any] = yaml.safe_load(file.read_text())
        self.rules = dict(rules)
        for service in self.spec["services"].values():
            for volume in service.get("volumes", ()):
                source, target, *_ = volume.split(":")
                self.rules[target] = str(self._mount(file.parent, folder, source))
        self._replace_in_configuration()
        self.services = {name: Service(name, spec, folder, self.rules) for name, spec in self.spec["services"].items()}

    def _mount(self, base: Path, folder: Path, source: str) -> Path:
        """Return what is mounted: a copy of a folder of the checkout, or a volume's folder."""
        target = folder / "mounts" / Path(source).name
        if source.startswith("."):
            shutil.copytree(base / source, target)
        else:
            assert source in self.spec["volumes"], f"volume {source} is not declared"
            target.mkdir(parents=True)
        return target

    def _replace_in_configuration(self) -> None:
        for folder in self.rules.values():
            for file in Path(folder).glob("*.conf"):
                file.write_text(replaced(file.read_text(), self.rules))

    async def up(self) -> None:
        for name in self.order():
            self.services[name].start()
            await self.services[name].healthy()

    def down(self) -> dict[str, int]:
        """Stop everything, those first that depend on others, and return the exit statuses."""
        return {name: self.services[name].stop() for name in reversed(self.order())}

    def order(self) -> list[str]:
        """Return the services so that each follows what it depends on."""
        ordered: list[str] = []

        def add(name: str) -> None:
            for other, how in self.spec["services"][name].get("depends_on", {}).items():
                assert how == {"condition": "service_healthy"}
                add(other)
            if name not in ordered:
                ordered.append(name)

        for name in self.spec["services"]:
            add(name)
        return ordered


def replaced(text: str, rules: Mapping[str, str]) -> str:
    """Replace whole words, the longest first, each once."""
    words = sorted(rules, key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w.-]){re.escape(word)}(?![\w-])" for word in words)
    return re.sub(pattern, lambda match: rules[match[0]], text)
