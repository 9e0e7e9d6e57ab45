"""Draws the diagrams and tables of ``lifecycles.md`` from the tables in `flame.protocol.states`: ``make docs``."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from flame.protocol import states
from flame.protocol.states import StateTable

DOCUMENT: Final = Path(__file__).with_name("lifecycles.md")
TABLES: Final[dict[str, StateTable[Any, Any]]] = {
    table.noun: table for table in vars(states).values() if isinstance(table, StateTable)
}
_BLOCK = re.compile(r"(<!-- drawn: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def drawn(document: str) -> str:
    """Return the document with every drawn part made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{picture(TABLES[found[2]])}\n{found[3]}", document)


def picture(table: StateTable[Any, Any]) -> str:
    """Return a Mermaid diagram of a table, and its moves as rows."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {_name(table.initial)}"]
    lines += [
        f"    {_name(before)} --> {_name(after)}: {event.value}" for (before, event), after in table.moves.items()
    ]
    ends = set(table.moves.values()) - {before for before, _ in table.moves}
    lines += [f"    {_name(state)} --> [*]" for state in sorted(ends)]
    lines += ["```", "", "| state | what happens | next state |", "| --- | --- | --- |"]
    lines += [f"| {before.value} | {event.value} | {after.value} |" for (before, event), after in table.moves.items()]
    return "\n".join(lines)


def _name(state: StrEnum) -> str:
    return state.value.replace(" ", "_")


if __name__ == "__main__":
    DOCUMENT.write_text(drawn(DOCUMENT.read_text()))
