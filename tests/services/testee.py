"""A service that is run as a program and in the process of its test, where both must come to the same."""

import asyncio
import contextlib

import flame


class Testee(flame.FlameService):
    __test__ = False

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        self.common_data = context.common_data.decode()
        self.tasks = 0
        if self.common_data == "never":
            raise RuntimeError("I won't")
        if self.common_data == "exit":
            raise SystemExit(3)

    async def on_task_invoke(self, context: flame.TaskContext) -> str | int | None:
        verb, _, argument = context.input.decode().partition(" ")
        self.tasks += 1
        match verb:
            case "echo":
                return f"{self.common_data} {argument}"
            case "fail":
                raise ValueError(argument)
            case "until":  # it is that attempt
                if context.attempt < int(argument):
                    raise KeyError(argument)
                return str(context.attempt)
            case "sleep":
                await asyncio.sleep(float(argument))
                return "slept"
            case "stubborn":
                for _ in range(3):  # a program would have to be killed; in the process of a test that can't be
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(3600)
            case "wrong":
                return 42
            case "exit":
                raise SystemExit(int(argument))
        return None


if __name__ == "__main__":
    asyncio.run(flame.run(Testee()))
