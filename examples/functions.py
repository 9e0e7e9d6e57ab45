"""Run functions of this program in a cluster, without deploying anything: calls, results as arguments, an object.

    pip install 'flame-engine[functions]'
    flmctl up                       # in another terminal
    python examples/functions.py

Executors need the same version of Python. An operator can switch this off: flmctl disable -a flmfunc
"""

import asyncio
import random

import flame


class Tally:
    """Lives in the cluster, and remembers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inside = self.total = 0

    def add(self, inside: int, total: int) -> float:
        self.inside += inside
        self.total += total
        return 4 * self.inside / self.total


async def main() -> None:
    async with flame.functions(max_instances=4, labels={"example": "functions"}) as fs:

        @fs.function
        def throw(darts: int, seed: int) -> int:
            """Return how many of so many darts hit the quarter of a circle."""
            dice = random.Random(seed)
            return sum(dice.random() ** 2 + dice.random() ** 2 < 1 for _ in range(darts))

        @fs.function
        def total(numbers: list[int]) -> int:
            return sum(numbers)

        # A call returns at once; its value is awaited.
        print("one throw:", await throw(1000, seed=1))

        # Calls are arguments of others, at any depth; large values go from executor to executor, not through here.
        throws = [throw(20_000, seed) for seed in range(8)]
        inside = total(throws)
        print("pi, roughly:", 4 * await inside / (8 * 20_000))

        # An object keeps its state in an executor of its own.
        tally = await fs.create(Tally, "pi")
        estimates = [tally.add(hits, 20_000) for hits in throws]
        print("the same, from an object:", await estimates[-1])

        @fs.function
        async def square(x: int) -> int:
            return x * x  # the cheapest kind of call: what is not async runs in a thread

        # As many inputs as you like, with no more than 20 under way.
        print("the sum of the squares:", sum([n async for n in fs.map(square, range(1000), in_flight=20)]))

        # An exception arrives as what it was.
        try:
            await throw("many", seed=1)
        except flame.TaskFailed as failed:
            print("refused:", repr(failed.__cause__))


if __name__ == "__main__":
    asyncio.run(main())
