"""The progress bar: what it draws, when, and that nothing of it stays."""

from __future__ import annotations

import gc
import io

import pytest

from flame.client.progress_bar import AGAIN_S, ProgressBar


class Screen(io.StringIO):
    """Keeps what a person would see on the last line."""

    def __init__(self, *, terminal: bool = True) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def line(self) -> str:
        line = ""
        for part in self.getvalue().split("\r"):
            line = part + line[len(part) :]
        return line.rstrip()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_it_says_how_much_is_done_how_fast_and_how_long_it_will_take(screen: Screen, clock: Clock) -> None:
    bar = ProgressBar("questions", stream=screen, clock=clock)
    bar(0, 10_000)
    assert screen.line == "questions [....................] 0/10,000"
    clock.now += 2
    bar(2500, 10_000)
    assert screen.line == "questions [#####...............] 2,500/10,000  1,250/s  0:06 left"
    clock.now += 3598
    bar(2501, 10_000)
    assert screen.line == "questions [#####...............] 2,501/10,000  0.7/s  2:59:54 left"
    bar(10_000, 10_000)
    assert screen.line == ""


def test_without_an_end_it_counts(screen: Screen, clock: Clock) -> None:
    bar = ProgressBar(stream=screen, clock=clock)
    clock.now += 1
    bar(42, None)
    assert screen.line == "42  42/s"
    with ProgressBar("tasks", total=84, stream=screen, clock=clock) as known:
        bar.close()
        known(42)
        assert screen.line == "tasks [##########..........] 42/84"
    assert screen.line == ""


def test_it_is_drawn_a_few_times_a_second(screen: Screen, clock: Clock) -> None:
    bar = ProgressBar(stream=screen, clock=clock)
    for done in range(1000):
        bar(done)
        clock.now += AGAIN_S / 100
    assert screen.getvalue().count("\r") == 10


def test_a_shorter_line_leaves_nothing_of_a_longer_one(screen: Screen, clock: Clock) -> None:
    bar = ProgressBar(stream=screen, clock=clock)
    bar(1, 10)
    clock.now += 1
    bar(2)
    assert screen.line == "2  2.0/s"


def test_it_fits_into_a_narrow_terminal(screen: Screen, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    ProgressBar("questions", stream=screen, clock=clock, show=True)(1, 10)
    assert screen.getvalue().startswith("\rquestions [\r")


def test_what_is_written_between_two_drawings_finds_an_empty_line(screen: Screen, clock: Clock) -> None:
    bar = ProgressBar(stream=screen, clock=clock)
    bar(1, 10)
    bar.clear()
    assert screen.line == ""
    bar(2, 10)
    assert "2/10" in screen.line, "at once"
    bar.close()
    bar.close()
    bar(3, 10)
    assert screen.line == ""


def test_one_that_is_dropped_half_way_leaves_nothing(screen: Screen) -> None:
    bar = ProgressBar(stream=screen)
    bar(1, 10)
    assert screen.line
    del bar
    gc.collect()
    assert screen.line == ""


@pytest.mark.parametrize(("show", "drawn"), [(None, False), (True, True)])
def test_into_a_file_it_is_drawn_only_if_asked_for(show: bool | None, drawn: bool) -> None:
    file = Screen(terminal=False)
    bar = ProgressBar(stream=file, show=show)
    bar(1, 10)
    assert bool(file.getvalue()) is drawn
    file.close()
    bar(2, 10)
    bar.close()


def test_a_program_without_standard_error_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with ProgressBar() as bar:
        bar(1, 10)
