"""Takes orders for a shop: prices that change while it is open, a count that outlives it, and a key to the till.

Register it as an application and run client.py.
"""

import asyncio
import json

import flame


class Shop(flame.FlameService):
    async def on_session_enter(self, context: flame.SessionContext) -> None:
        self.till = context.credentials["till"]  # a flame.Secret: printed, it is ***
        await self.on_common_data_update(context)

    async def on_common_data_update(self, context: flame.SessionContext) -> None:
        self.prices = json.loads(context.common_data)

    async def on_task_invoke(self, context: flame.TaskContext) -> str:
        what = context.input.decode()
        if not self.till.reveal().startswith("till-"):
            raise PermissionError(f"the till does not open with {self.till.reveal()}")  # the client reads: with ***
        while True:  # other executors of the session count, too
            sold = await context.state.entry("sold")
            try:
                await context.state.put("sold", (sold.value or 0) + 1, expected=sold.revision)
            except flame.StaleVersion:
                continue
            return f"{what} for {self.prices[what]}, number {(sold.value or 0) + 1}"


if __name__ == "__main__":
    asyncio.run(flame.run(Shop()))
