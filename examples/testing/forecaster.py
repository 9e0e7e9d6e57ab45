"""A service with what makes testing worthwhile: state, failures that pass, a time limit and a last step."""

import asyncio

import flame


class SourceUnavailable(Exception):
    pass


class WeatherStation:
    """Stands for something out there."""

    def __init__(self, *, failures: int = 0, takes_s: float = 0.0) -> None:
        self.failures = failures
        self.takes_s = takes_s

    async def ask(self, city: str) -> str:
        await asyncio.sleep(self.takes_s)
        if self.failures:
            self.failures -= 1
            raise SourceUnavailable(f"no line to {city}")
        return f"{city}: sunny"


class Forecaster(flame.FlameService):
    def __init__(self, station: WeatherStation | None = None) -> None:
        self.station = station or WeatherStation()
        self.asked: list[str] = []
        self.archived = False

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        self.greeting = context.common_data.decode()

    async def on_task_invoke(self, context: flame.TaskContext) -> flame.TaskOutput:
        city = context.input.decode()
        if not city:
            raise ValueError("which city?")
        self.asked.append(city)
        return flame.TaskOutput(f"{self.greeting} {await self.station.ask(city)}".encode())

    async def on_session_leave(self) -> None:
        self.archived = True


if __name__ == "__main__":
    asyncio.run(flame.run(Forecaster()))
