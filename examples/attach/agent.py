"""A service to set breakpoints in; see README.md."""

import asyncio

import flame


class Agent(flame.FlameService):
    async def on_task_invoke(self, context: flame.TaskContext) -> str:
        question = context.input.decode()
        return question[::-1]


if __name__ == "__main__":
    asyncio.run(flame.run(Agent()))
