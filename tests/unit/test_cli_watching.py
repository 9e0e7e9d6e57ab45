"""`--watch`: what is written when, with time that passes at once."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Sequence

import pytest

from flame.errors import BrokerUnavailable
from flame_cli import watching
from flame_cli.formats import Format
from flame_cli.listing import Kind
from flame_cli.rendering import Column

KIND: Kind[str] = Kind("things", (Column("Name"),), lambda item: [item], lambda item: {"name": item})


class Enough(Exception):
    """Whoever watches has seen enough."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


async def watch(
    monkeypatch: pytest.MonkeyPatch, looks: Sequence[list[str] | Exception], form: Format, stdout: io.StringIO
) -> str:
    """Watch things change, then stop."""
    left = list(looks)

    async def fetch() -> list[str]:
        if not left:
            raise Enough
        look = left.pop(0)
        if isinstance(look, Exception):
            raise look
        return look

    monkeypatch.setattr(watching, "REFRESH_S", 0)
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(Enough):
        await asyncio.wait_for(watching.watch(form, KIND, fetch), 10)
    return stdout.getvalue()


async def test_a_program_gets_a_document_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    said = await watch(monkeypatch, [[], [], ["a"], ["a"], ["a", "b"], []], Format.JSON, io.StringIO())
    assert said.splitlines() == ["[]", '[{"name":"a"}]', '[{"name":"a"},{"name":"b"}]', "[]"]


async def test_yaml_documents_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    said = await watch(monkeypatch, [[], ["a"]], Format.YAML, io.StringIO())
    assert said == "---\n[]\n---\n- name: a\n"


async def test_tables_behind_a_pipe_have_a_blank_line_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await watch(monkeypatch, [["a"], ["a"], ["b"]], Format.TABLE, io.StringIO()) == "Name\na\n\nName\nb\n\n"


async def test_in_a_terminal_each_look_takes_the_place_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    said = await watch(monkeypatch, [["a"], ["a", "b"], ["a", "b"]], Format.TABLE, Terminal())
    frames = said.split("\x1b[?7l")[1:]
    assert len(frames) == 3
    assert not frames[0].startswith("\x1b[")
    assert [frame.partition("F")[0] for frame in frames[1:]] == ["\x1b[3", "\x1b[4"]
    assert all(frame.endswith("\x1b[J\x1b[?7h") for frame in frames)


async def test_what_does_not_fit_in_the_terminal_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    said = await watch(monkeypatch, [[str(number) for number in range(100)]], Format.TABLE, Terminal())
    assert said.count("\n") == 9
    assert "\n5\x1b[K\n(94 more: no room in 10 lines" in said


async def test_a_dumb_terminal_gets_what_a_pipe_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in await watch(monkeypatch, [["a"], ["b"]], Format.TABLE, Terminal())


@pytest.mark.parametrize("stdout", [io.StringIO, Terminal])
async def test_a_cluster_that_is_gone_may_come_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdout: type[io.StringIO]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    gone = BrokerUnavailable("nobody answers")
    said = await watch(monkeypatch, [["a"], gone, gone, ["b"]], Format.TABLE, stdout())
    assert "b" in said
    if stdout is Terminal:
        assert said.count("things: nobody answers") == 2
    else:
        assert capsys.readouterr().err == "(nobody answers; trying again)\n"
