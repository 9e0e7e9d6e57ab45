"""A run as an SVG: a bar for Flame, one for the floor, a line for the target.

Every figure has a scale of its own, from nothing to the largest of the three.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Final

from benchmarks.figures import Figure, Target
from benchmarks.report.results import Results
from benchmarks.report.table import number

_WIDTH: Final = 1060
_NAMES: Final = 540
"""Where names end and bars begin."""
_BARS: Final = 330
_ROW: Final = 34
_TOP: Final = 64
_BAR: Final = 11
_FLAME: Final = "#d9480f"
_FLOOR: Final = "#adb5bd"
_TARGET: Final = "#1864ab"


def svg(results: Results) -> str:
    """Draw it."""
    shown = [figure for figure in results.figures if figure.flame is not None]
    height = _TOP + _ROW * len(shown) + 16
    body = [part for place, figure in enumerate(shown) for part in _row(figure, _TOP + _ROW * place)]
    size = f'width="{_WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">'
    title = f"Flame {results.versions['flame']} beside the floor, {results.date[:10]}"
    lines = [head, f'<rect {size} fill="white"/>', _text(16, 24, title, size=16), *_legend(), *body]
    return "\n".join([*lines, "</svg>\n"])


def _legend() -> Iterator[str]:
    x = 16
    for colour, name in ((_FLAME, "Flame"), (_FLOOR, "floor: nats-py alone"), (_TARGET, "target")):
        yield _bar(x, 38, 12, 10, colour)
        yield _text(x + 18, 47, name)
        x += 36 + 7 * len(name)
    yield _text(x, 47, "▲ more is better   ▼ less is better   each line has a scale of its own", colour="#868e96")


def _row(figure: Figure, y: int) -> Iterator[str]:
    assert figure.flame is not None
    flame = figure.flame.value
    floor = None if figure.floor is None else figure.floor.value
    bound = _bound(figure.target, floor)
    scale = _BARS / (max(flame, floor or 0.0, bound or 0.0) or 1.0)
    arrow = "▲" if figure.better == "higher" else "▼"
    yield _text(_NAMES - 10, y + 15, f"{figure.name} {arrow}", anchor="end")
    yield _bar(_NAMES, y + 2, flame * scale, _BAR, _FLAME)
    yield _text(_NAMES + flame * scale + 6, y + 12, f"{number(flame)} {figure.unit}")
    if floor is not None:
        yield _bar(_NAMES, y + 3 + _BAR, floor * scale, _BAR, _FLOOR)
        yield _text(_NAMES + floor * scale + 6, y + 13 + _BAR, number(floor), colour="#868e96")
    if bound is not None:
        yield _bar(_NAMES + bound * scale - 1, y, 2, 2 * _BAR + 5, _TARGET)


def _bound(target: Target | None, floor: float | None) -> float | None:
    """Return where the target lies: the harder of its bounds."""
    if target is None:
        return None
    low = [target.at_least, None if floor is None or target.ratio_at_least is None else floor * target.ratio_at_least]
    high = [target.at_most, None if floor is None or target.ratio_at_most is None else floor * target.ratio_at_most]
    lows, highs = [value for value in low if value is not None], [value for value in high if value is not None]
    return max(lows) if lows else min(highs, default=None)


def _bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", colour: str = "#212529") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
    )
