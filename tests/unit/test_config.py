"""Where a client connects to: argument, environment, file of contexts, default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flame.config import DEFAULT_ENDPOINT, Security, Target, resolve_target
from flame.errors import ConfigurationError

WORK = """
current-context: work
contexts:
  - name: home
    cluster: {endpoint: "nats://127.0.0.1:4222"}
  - name: work
    cluster:
      endpoint: tls://a.example:4222,tls://b.example:4222
    credentials: work.creds
    tls:
      ca: ca.pem
      certificate: /absolute/me.pem
      key: me.key
"""
ENDPOINT = "tls://a.example:4222,tls://b.example:4222"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / ".flame"
    folder.mkdir()
    for name in ("work.creds", "ca.pem", "me.pem", "me.key"):
        (folder / name).touch()
    return tmp_path


def write(home: Path, text: str) -> Path:
    path = home / ".flame" / "flame.yaml"
    path.write_text(text.replace("/absolute", str(path.parent)))
    return path


def resolve(home: Path, endpoint: str | None = None, **variables: str) -> Target:
    return resolve_target(endpoint, {"HOME": str(home), **variables})


def test_without_anything_it_is_the_local_default(home: Path) -> None:
    assert resolve(home) == Target(DEFAULT_ENDPOINT, Security())
    assert resolve_target(None, {}) == Target(DEFAULT_ENDPOINT, Security())


def test_the_current_context_of_the_file_says_where_and_with_what(home: Path) -> None:
    folder = write(home, WORK).parent
    security = Security(
        credentials=folder / "work.creds",
        tls_ca=folder / "ca.pem",
        tls_certificate=folder / "me.pem",
        tls_key=folder / "me.key",
    )
    assert resolve(home) == Target(ENDPOINT, security)


def test_files_are_where_they_were_named_also_for_who_goes_elsewhere(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(home, WORK).parent
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    security = resolve(home, FLAME_CONFIG=".flame/flame.yaml").security
    assert (security.credentials, security.tls_ca) == (folder / "work.creds", folder / "ca.pem")
    security = resolve(home, FLAME_ENDPOINT=ENDPOINT, FLAME_TLS_CA="ca.pem", FLAME_CREDENTIALS="~/me.creds").security
    assert (security.credentials, security.tls_ca) == (home / "me.creds", home / "ca.pem")


def test_a_context_need_not_be_named_if_it_is_the_only_one(home: Path) -> None:
    write(home, "contexts: [{name: a, cluster: {endpoint: 'nats://h:1'}}]")
    assert resolve(home) == Target("nats://h:1", Security())


def test_another_file_can_be_named(home: Path, tmp_path: Path) -> None:
    write(home, WORK)
    other = tmp_path / "other.yaml"
    other.write_text("contexts: [{name: a, cluster: {endpoint: 'nats://h:1'}}]")
    assert resolve(home, FLAME_CONFIG=str(other)).endpoint == "nats://h:1"
    with pytest.raises(ConfigurationError, match=r"FLAME_CONFIG .*nope\.yaml: expected a file of contexts"):
        resolve(home, FLAME_CONFIG=str(tmp_path / "nope.yaml"))


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_whoever_names_an_endpoint_shows_it_no_credentials_of_the_file(home: Path, by: str) -> None:
    write(home, "not: [even YAML")
    if by == "argument":
        assert resolve(home, "nats://x:1") == Target("nats://x:1", Security())
    else:
        assert resolve(home, FLAME_ENDPOINT="nats://x:1") == Target("nats://x:1", Security())


def test_variables_win_over_what_a_context_says(home: Path) -> None:
    folder = write(home, WORK).parent
    target = resolve(home, FLAME_CREDENTIALS="/else.creds", FLAME_TLS_CERT="/c.pem", FLAME_TLS_KEY="/k.pem")
    assert target.endpoint == ENDPOINT
    assert target.security == Security(
        credentials=Path("/else.creds"),
        tls_ca=folder / "ca.pem",
        tls_certificate=Path("/c.pem"),
        tls_key=Path("/k.pem"),
    )


HEAD = "contexts:\n  - name: a\n    cluster:\n      endpoint: nats://h:1\n"
MISTAKES = {
    "": "contexts: missing, the file is empty",
    "- a": "line 1: expected name: value pairs",
    "context: a": r"line 1: context: unknown field; expected one of current-context, contexts",
    "contexts: []": "line 1: contexts: expected a list of contexts",
    "contexts:\n  - cluster: {}": r"line 2: contexts\[0\]\.name: missing",
    "contexts:\n  - name:\n": r"line 2: contexts\[0\]\.name: expected a text",
    "contexts:\n  - name: a\n": r"line 2: contexts\[0\]\.cluster: missing",
    "contexts:\n  - name: a\n    cluster: {}": r"line 3: contexts\[0\]\.cluster\.endpoint: missing",
    "contexts:\n  - name: a\n    cluster:\n      endpoint: h:1": (
        r"line 4: contexts\[0\]\.cluster\.endpoint: endpoint 'h:1'"
    ),
    HEAD + "  - name: a\n    cluster: {}": r"line 5: contexts\[1\]\.name: there is a context 'a' already",
    HEAD + "  - name: b\n    cluster: {endpoint: nats://h:2}": "current-context: missing; expected one of a, b",
    "current-context: c\n" + HEAD: "line 1: current-context: 'c' is none of the contexts: a",
    HEAD + "    credentials: nope.creds": r"line 5: contexts\[0\]\.credentials: .*nope\.creds: No such file",
    HEAD + "    tls:\n      certificate: me.pem": r"line 6: contexts\[0\]\.tls: certificate and key go together",
    HEAD + "    tls:\n      cert: me.pem": r"line 6: contexts\[0\]\.tls\.cert: unknown field",
    HEAD + "    tls: yes": r"line 5: contexts\[0\]\.tls: expected name: value pairs",
    HEAD + HEAD: "line 5: contexts: given twice",
    "a: [b": r"line 1: not YAML",
    "a: \x07": "not YAML",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_named_with_file_line_and_field(home: Path, text: str) -> None:
    path = write(home, text)
    with pytest.raises(ConfigurationError, match=MISTAKES[text]) as caught:
        resolve(home)
    assert str(caught.value).startswith(str(path))


def test_without_a_parser_for_it_a_file_is_not_silently_ignored(home: Path) -> None:
    write(home, WORK)
    script = (
        "import sys; sys.modules['yaml'] = None\n"
        "import flame, flame.config\n"
        f"variables = {{'HOME': {str(home)!r}}}\n"
        "print(flame.config.resolve_target('nats://x:1', variables).endpoint)\n"
        "try: flame.config.resolve_target(None, variables)\n"
        "except flame.ConfigurationError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[0] == "nats://x:1"
    assert "pip install 'flame-engine[cli]'" in done.stdout
