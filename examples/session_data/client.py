"""Orders from the shop of service.py: prices change, an order that is sent twice is one, a wrong key stays secret."""

import asyncio

import flame


async def main() -> None:
    prices = b'{"tea": 2, "cake": 5}'
    async with await flame.create_session("shop", prices, credentials={"till": "till-4711"}) as session:
        print((await session.invoke("tea")).output.decode())
        print((await session.invoke("cake", key="order-17")).output.decode())
        print((await session.invoke("cake", key="order-17")).output.decode(), "(the same order)")
        try:
            await session.invoke("tea", key="order-17")
        except flame.KeyReused:
            print("order-17 was for something else")

        version = await session.update_common_data(b'{"tea": 3, "cake": 5}', expected_version=0)
        print((await session.invoke("tea")).output.decode(), f"(prices of version {version})")
        try:
            await session.update_common_data(b"{}", expected_version=0)
        except flame.StaleVersion:
            print("somebody has changed the prices before")

    async with await flame.create_session("shop", prices, credentials={"till": "crowbar"}) as session:
        try:
            await session.invoke("tea")
        except flame.TaskFailed as error:
            print(str(error).partition("PermissionError: ")[2])


if __name__ == "__main__":
    asyncio.run(main())
