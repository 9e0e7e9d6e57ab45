"""Asks the agent something, and shows on which node it was answered; see README.md."""

import asyncio

import flame


async def main() -> None:
    async with await flame.connect() as connection:
        session = await connection.create_session("debugged-agent")
        task = await session.invoke(b"Do geese see God?")
        executor = await connection.get_executor(task.executor)
        print(task.output.decode(), "from", executor.node)
        await session.close()


if __name__ == "__main__":
    asyncio.run(main())
