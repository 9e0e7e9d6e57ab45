"""A run as Markdown, which is what a terminal shows too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from benchmarks.figures import Figure, Measured, Peer
from benchmarks.report.results import Results

_PARTS: Final = ("client", "broker", "executors", "control")
_NONE: Final = "—"


def markdown(results: Results, chart: str = "") -> str:
    """Write the whole report; ``chart`` is the chart's file."""
    blocks = [f"# Flame's benchmarks, {results.date.replace('T', ' ')[:16]} UTC"]
    if results.quick:
        blocks.append("A quick run: that it works is what it shows, not how fast it is.")
    blocks += [conditions(results), figures(results.figures)]
    if any(figure.flame is not None and figure.flame.cpu_us for figure in results.figures):
        blocks += ["## Processor time for each task, microseconds: Flame / floor", processor(results.figures)]
    if results.peers:
        blocks += ["## Others, with a task that does nothing and one executor", peers(results.peers)]
    if results.failed:
        blocks.append("Did not work: " + "; ".join(results.failed))
    if chart:
        blocks.append(f"![Flame beside the floor]({chart})")
    return "\n\n".join(blocks) + "\n"


def conditions(results: Results) -> str:
    """List versions and conditions."""
    return "\n".join(f"- {name}: {value}" for name, value in {**results.versions, **results.conditions}.items())


def figures(lines: Iterable[Figure]) -> str:
    """Write the table of figures."""
    rows = [
        (
            line.name,
            line.unit,
            spread(line.flame),
            spread(line.floor),
            _NONE if line.ratio is None else f"{line.ratio:.2f}",
            _NONE if line.target is None else line.target.text(),
            {True: "yes", False: "**no**", None: _NONE}[line.met],
            line.note,
        )
        for line in lines
    ]
    return _table(("figure", "unit", "Flame", "floor", "ratio", "target", "met", "note"), rows, "llrrrlll")


def processor(lines: Iterable[Figure]) -> str:
    """Write what the processor was used for, once for each measurement."""
    rows, seen = [], set[int]()
    for line in lines:
        if line.flame is None or not line.flame.cpu_us:
            continue
        floor = {} if line.floor is None else line.floor.cpu_us
        row = tuple(f"{_cpu(line.flame.cpu_us, part)} / {_cpu(floor, part)}" for part in _PARTS)
        if hash(row) not in seen:  # several figures of one measurement
            seen.add(hash(row))
            rows.append((line.name, *row))
    return _table(("figure", *_PARTS), rows, "lrrrr")


def peers(lines: Iterable[Peer]) -> str:
    """Write the table of other systems."""
    rows = [
        (
            f"{line.name} {line.version}".strip(),
            number(line.invoke_p50_ms),
            number(line.invoke_p99_ms),
            number(line.tasks_per_s),
            number(line.first_result_ms),
            line.note,
        )
        for line in lines
    ]
    head = ("system", "invoke p50, ms", "p99, ms", "tasks/s", "first result, ms", "note")
    return _table(head, rows, "lrrrrl")


def spread(measured: Measured | None) -> str:
    """Write a value, with the lowest and highest of its rounds if they differ."""
    if measured is None:
        return _NONE
    low, value, high = map(number, (measured.lowest, measured.value, measured.highest))
    return value if low == high else f"{value} ({low}…{high})"


def number(value: float | None) -> str:
    """Write a value with as many digits as mean something."""
    if value is None:
        return _NONE
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _cpu(used: Mapping[str, float], part: str) -> str:
    return f"{used[part]:.0f}" if part in used else _NONE


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], sides: str) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    rule = [f"{'-' * (width - 1)}{':' if side == 'r' else '-'}" for width, side in zip(widths, sides, strict=True)]
    return "\n".join(_row(line, widths, sides) for line in (head, tuple(rule), *rows))


def _row(cells: tuple[str, ...], widths: list[int], sides: str) -> str:
    padded = (
        cell.rjust(width) if side == "r" else cell.ljust(width)
        for cell, width, side in zip(cells, widths, sides, strict=True)
    )
    return f"| {' | '.join(padded)} |"
