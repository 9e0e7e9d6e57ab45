"""Use a cluster from a program without async: one call, many tasks, a few at once, and what happened.

    flmctl up                       # in another terminal
    python examples/sync_client.py

It uses flmping, which every cluster has and which answers with its input.
"""

import concurrent.futures

import flame
import flame.sync


def main() -> None:
    with flame.sync.create_session("flmping", labels={"example": "sync"}) as session:
        # One task, waited for.
        print("one:", session.invoke("hello").output.decode())

        # Futures: what is ready first is taken first.
        handles = session.create_tasks(["red", "green", "blue"])
        for handle in concurrent.futures.as_completed(handles, timeout=60):
            print("as completed:", handle.result().output.decode())

        # Any number of inputs from a generator, with 100 tasks under way, in the order of the inputs.
        total = sum(int(task.output) for task in session.map((str(number) for number in range(1000)), in_flight=100))
        print("the sum of 0..999:", total)

        # Threads may share a session.
        with concurrent.futures.ThreadPoolExecutor() as pool:
            words = [task.output.decode() for task in pool.map(session.invoke, ["a", "b", "c"])]
        print("from threads:", *words)

        # Errors are those of the package.
        try:
            session.get_task("nosuchtask")
        except flame.TaskNotFound as error:
            print("not found:", type(error).__name__)


if __name__ == "__main__":
    main()
