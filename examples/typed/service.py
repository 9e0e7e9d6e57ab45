"""A service of Python types: what it takes and returns is what its annotations say."""

import asyncio
from dataclasses import dataclass, field
from typing import Literal

import flame


@dataclass
class Style:
    """What all questions of a session have in common."""

    language: Literal["en", "de"] = "en"
    shout: bool = False


@dataclass
class Order:
    customer: str
    items: dict[str, int]
    note: str | None = None


@dataclass
class Receipt:
    greeting: str
    pieces: int
    task: str
    missing: list[str] = field(default_factory=list)


STOCK = {"apple": 10, "pear": 3}
GREETINGS = {"en": "Thank you", "de": "Danke"}


@flame.entrypoint
async def shop(order: Order, style: flame.CommonData[Style], context: flame.TaskContext) -> Receipt:
    greeting = f"{GREETINGS[style.language]}, {order.customer}"
    return Receipt(
        greeting=greeting.upper() if style.shout else greeting,
        pieces=sum(order.items.values()),
        task=context.task_id,
        missing=[name for name, wanted in order.items.items() if wanted > STOCK.get(name, 0)],
    )


if __name__ == "__main__":
    asyncio.run(flame.run(shop))
