"""Reading behind a process that appends to a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from flame.errors import MalformedMessage
from flame.protocol.supervision import Control, LogChunk
from flame_services.executor_manager import captured_file
from flame_services.executor_manager.captured_file import CHUNK_BYTES, FREED_BYTES, PARTIAL_LINE_S, CapturedFile, cut

KIB = 1024


def test_a_chunk_is_read_as_it_was_written() -> None:
    chunk = LogChunk("stderr", 5.5, b"caf\xc3\xa9 \xff\n")
    assert LogChunk.decode(chunk.encode()) == chunk
    with pytest.raises(MalformedMessage):
        LogChunk.decode(Control().encode())


@pytest.mark.parametrize(
    ("data", "complete", "length"),
    [
        (b"", False, 0),
        (b"a\nb\n", False, 4),
        (b"a\nb", False, 2),
        (b"ab", False, 0),
        (b"ab", True, 2),
        (b"a\nb", True, 3),
        (b"a\n" + b"x" * CHUNK_BYTES, False, 2),
        (b"x" * CHUNK_BYTES, False, CHUNK_BYTES),
    ],
)
def test_whole_lines_are_published(data: bytes, complete: bool, length: int) -> None:
    assert cut(data, complete) == length


@pytest.fixture
def file(tmp_path: Path) -> CapturedFile:
    path = tmp_path / "s1" / "e1.stdout"
    path.parent.mkdir()
    path.touch()
    return CapturedFile(path, "stdout")


def write(file: CapturedFile, data: bytes) -> None:
    with file.path.open("ab") as end:
        end.write(data)


def read_all(file: CapturedFile, now: float = 0.0, ended: bool = True) -> bytes:
    """Publish everything."""
    found = b""
    while chunk := file.next_chunk(now, ended):
        assert len(chunk) <= CHUNK_BYTES
        found += chunk
        file.advance(len(chunk))
    return found


def test_nothing_is_published_twice_and_nothing_left_out(file: CapturedFile) -> None:
    write(file, b"one\ntwo\n")
    assert file.next_chunk(0.0, ended=False) == b"one\ntwo\n"
    assert file.next_chunk(0.0, ended=False) == b"one\ntwo\n", "until it is said to be published"
    file.advance(8)
    assert file.next_chunk(0.0, ended=False) == b""
    write(file, b"three\n")
    assert read_all(file) == b"three\n"
    assert file.unread == 0


def test_the_beginning_of_a_line_waits_for_its_end_but_not_long(file: CapturedFile) -> None:
    write(file, b"half")
    assert file.next_chunk(1.0, ended=False) == b""
    write(file, b" a line")
    assert file.next_chunk(1.1, ended=False) == b""
    assert file.next_chunk(1.2 + PARTIAL_LINE_S, ended=False) == b"half a line"


def test_a_lot_is_read_in_chunks_of_whole_lines(file: CapturedFile) -> None:
    data = b"".join(b"line %d\n" % number for number in range(50_000))
    write(file, data)
    assert read_all(file, ended=False) == data


@pytest.mark.skipif(sys.platform != "linux", reason="the space of an open file can be freed on Linux only")
def test_the_space_of_what_was_read_is_given_back(file: CapturedFile) -> None:
    data = os.urandom(5 * FREED_BYTES)
    write(file, data)
    assert read_all(file) == data
    used = file.path.stat().st_blocks * 512
    assert used <= 2 * FREED_BYTES
    assert file.tail(10_000) == data[-10_000:], "the last of it is kept"
    write(file, b"more\n")
    assert read_all(file) == b"more\n"


def test_what_nobody_reads_is_dropped_beyond_the_quota_and_that_is_known(
    file: CapturedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured_file, "QUOTA_BYTES", 10 * KIB)
    write(file, b"x" * 25 * KIB)
    file.next_chunk(0.0, ended=False)
    write(file, b"y" * 5 * KIB)
    chunk = file.next_chunk(0.0, ended=True)
    assert file.dropped == 20 * KIB
    assert chunk == b"x" * 5 * KIB + b"y" * 5 * KIB
    file.advance(len(chunk))
    assert file.dropped == 0


def test_a_file_that_somebody_emptied_is_read_from_its_beginning(file: CapturedFile) -> None:
    write(file, b"one\n" * 100)
    read_all(file)
    os.truncate(file.path, 0)
    write(file, b"two\n")
    assert read_all(file) == b"two\n"


def test_a_file_that_is_gone_is_empty(file: CapturedFile) -> None:
    file.path.unlink()
    assert file.next_chunk(0.0, ended=True) == b""
    assert file.tail(100) == b""
    file.remove()


def test_the_folder_stays_while_there_is_something_in_it(file: CapturedFile) -> None:
    other = file.path.with_name("e2.stdout")
    other.touch()
    file.remove()
    assert other.exists()
