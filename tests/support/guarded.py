"""A cluster whose broker lets a client and an executor do what docs/protocol.md says that they need, no more."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Final

from tests.support.servers import ServedCluster, Servers, single

ACK_WAIT_S: Final = 2.0


@cache
def document() -> str:
    return (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


class GuardedCluster(ServedCluster):
    """A cluster with short leases, whose broker knows a client and an executor that may do what is documented."""

    def start_scheduler(self) -> None:
        self.scheduler = self._start("flame_services.scheduler", "scheduler", "--ack-wait-s", str(ACK_WAIT_S))

    def endpoint_of(self, user: str) -> str:
        return self.servers.endpoint.replace("://", f"://{user}:secret@")


def guarded_cluster(folder: Path, of_client: str, of_executor: str) -> GuardedCluster:
    """Return a cluster whose users ``client`` and ``executor`` may do what is documented, each with one application."""
    users = [_permissions("client", of_client), _permissions("executor", of_executor)]
    line = "max_payload: 8MB"
    us = '{"user": "us", "password": "secret"}'
    guard = f"authorization {{ users: [{', '.join([*users, us])}] }}\nno_auth_user: us"
    return GuardedCluster(folder, Servers([single(folder, {line: f"{line}\n{guard}"})]))


def violations(cluster: GuardedCluster, *, but: str = "") -> list[str]:
    """What was tried without permission, as the server says, but for a subject where that was meant to be refused."""
    [server] = cluster.servers.servers.values()
    lines = server.log.read_text().splitlines()
    return [line for line in lines if "Permissions Violation" in line and not (but and but in line)]


def _permissions(user: str, application: str) -> str:
    """The permissions of docs/protocol.md, as a server's configuration has them."""
    [listed] = re.findall(rf"<!-- permissions: {user} -->\n```json\n(.+?)\n```", document(), re.DOTALL)
    allowed = json.loads(re.sub(r"<[a-z]+>", "*", listed.replace("<app>", application)))
    return json.dumps({"user": user, "password": "secret", "permissions": allowed})
