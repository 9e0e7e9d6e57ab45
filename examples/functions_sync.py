"""Run functions of this program in a cluster, without deploying anything, and without async; see functions.py.

pip install 'flame-engine[functions]'
flmctl up                       # in another terminal
python examples/functions_sync.py
"""

import concurrent.futures

import flame
import flame.sync


class Stock:
    """Lives in the cluster, and remembers."""

    def __init__(self, **pieces: int) -> None:
        self.pieces = pieces

    def take(self, what: str, number: int = 1) -> int:
        if self.pieces.get(what, 0) < number:
            raise LookupError(f"no {what} left")
        self.pieces[what] -= number
        return self.pieces[what]


def main() -> None:
    with flame.sync.functions(max_instances=4) as fs:

        @fs.function
        def square(x: int) -> int:
            return x * x

        @fs.function
        def add(a: int, b: int) -> int:
            return a + b

        # Calls are futures; and they are arguments of other calls.
        print("3² + 4² =", add(square(3), square(4)).result(timeout=60))
        done = concurrent.futures.as_completed([square(x) for x in range(5)], timeout=60)
        print("as completed:", sorted(future.result() for future in done))
        print("mapped:", list(fs.map(square, range(5))))

        stock = fs.create(Stock, apples=2)
        print("apples left:", stock.take("apples").result(), stock.take("apples").result())
        try:
            stock.take("apples").result()
        except flame.TaskFailed as failed:
            print("and then:", repr(failed.__cause__))


if __name__ == "__main__":
    main()
