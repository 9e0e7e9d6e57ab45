"""A service that squares numbers, and notes each run in the file that the session's common data names."""

import asyncio
import os

import flame


class Tally(flame.FlameService):
    def __init__(self) -> None:
        self._file = -1

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        self._file = os.open(context.common_data, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    async def on_task_invoke(self, context: flame.TaskContext) -> str:
        number = int(context.input)
        os.write(self._file, b"%d\n" % number)
        await asyncio.sleep(0.002)
        return str(number * number)


if __name__ == "__main__":
    asyncio.run(flame.run(Tally()))
