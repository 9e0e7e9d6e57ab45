"""Prints an answer as it comes, and then reads it once more from the start.

flmctl register -f examples/streaming/service.yaml
python examples/streaming/client.py
"""

import asyncio
import sys

import flame


class Bar(flame.TaskInformer):
    def on_progress(self, task: flame.Task, progress: flame.Progress) -> None:  # noqa: ARG002  # there is but one
        print(f"{progress.message}: {progress.done:.0f} of {progress.total:.0f}", file=sys.stderr)


async def main() -> None:
    async with await flame.create_session("model") as session:
        stream = session.stream(b"What is a task?")
        async for chunk in stream:
            if chunk.index == 0:  # the answer begins, or begins anew: after a lost executor, say
                print(f"\n[attempt {chunk.attempt}] ", end="")
            print(chunk.text, end="", flush=True)
        print(f"\n{stream.task.chunks} chunks from {stream.task.executor}")

        late = [chunk.text async for chunk in session.open_stream(stream.task.id)]
        print("Once more:", "".join(late))

        task = await session.invoke(b"What is a task?", Bar())
        print("At once:", task.output.decode())


if __name__ == "__main__":
    asyncio.run(main())
