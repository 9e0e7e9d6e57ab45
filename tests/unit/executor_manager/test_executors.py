"""The set of a node's executors."""

from __future__ import annotations

from typing import Any, cast

from flame.broker.seam import Entry
from flame.protocol import subjects
from flame.protocol.records import BindingRecord
from flame_services.executor_manager.executor import Executor
from flame_services.executor_manager.executors import Executors
from flame_services.executor_manager.place import Place

BINDING = BindingRecord(executor="e1", node="n1", application="a", session="s", epoch=1, consumer="s-1", created=1.0)


class Deletions:
    """A broker that notes what is deleted."""

    connected = True

    def __init__(self) -> None:
        self.node = "n1"
        self.broker = self
        self.keys: list[str] = []

    def bucket(self, name: str) -> Deletions:
        assert name == subjects.EXECUTORS
        return self

    async def delete(self, key: str, revision: int | None = None) -> None:
        self.keys.append(key)


def never(binding: BindingRecord) -> Executor:
    raise AssertionError(f"{binding} was to start nothing")


async def settle(executors: Executors) -> None:
    for errand in tuple(executors._errands):
        await errand


async def test_what_ended_before_is_forgotten_if_its_binding_went_while_nobody_listened() -> None:
    place: Any = Deletions()
    executors = Executors(cast(Place, place), never, {"e1", "e2"})
    executors.on_binding(Entry("n1.e1", BINDING.encode(), 1))
    executors.on_first_reading()
    await settle(executors)
    assert place.keys == ["n1.e2"]
    executors.on_binding(Entry("n1.e1", None, 2))
    await settle(executors)
    assert place.keys == ["n1.e2", "n1.e1"]
    assert executors._executors == {}


async def test_a_binding_that_can_not_be_one_starts_nothing() -> None:
    executors = Executors(cast(Place, Deletions()), never)
    foreign = [
        b"?",
        BINDING.changed(node="n2").encode(),
        BINDING.changed(executor="e2").encode(),
    ]
    for value in foreign:
        executors.on_binding(Entry("n1.e1", value, 1))
    executors.on_binding(Entry("n1.a/b", BINDING.changed(executor="a/b").encode(), 1))
    assert executors._executors == {}
