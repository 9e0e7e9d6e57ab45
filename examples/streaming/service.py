"""A language model, as far as its users can tell: it answers word by word, and tells how far it is."""

import asyncio

import flame

ANSWER = "A task is a message. Whoever emits words while it runs is heard at once, and by those who come later."


class Model(flame.FlameService):
    async def on_task_invoke(self, context: flame.TaskContext) -> str:
        words = ANSWER.split()
        for number, word in enumerate(words, 1):
            await asyncio.sleep(0.05)  # it thinks
            await context.emit(f"{word} ")
            context.progress(number, len(words), "thinking")
        return ANSWER


if __name__ == "__main__":
    asyncio.run(flame.run(Model()))
