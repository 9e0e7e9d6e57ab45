"""Two clients of a typed service: one with its types, one without, and what both are told of mistakes.

flmctl up                                                       # in another terminal
flmctl register --describe -f examples/typed/service.yaml
python examples/typed/client.py
"""

import asyncio

from service import Order, Style, shop

import flame


async def main() -> None:
    async with await flame.create_session("shop", flame.as_json(Style(language="de"))) as session:
        # With the function at hand, everything is typed. session.typed(Order, Receipt) does the same.
        typed = session.typed(shop)
        task = await typed.invoke(Order("Ada", {"apple": 2, "pear": 5}))
        print(f"{task.output.greeting}: {task.output.pieces} pieces, missing: {task.output.missing}")

        # Any number of orders from a generator, 100 under way, in their order. In a terminal a bar says how far it is.
        orders = (Order(f"customer {number}", {"apple": number % 3}) for number in range(500))
        pieces = 0
        with flame.ProgressBar("orders", total=500) as bar:
            async for task in typed.map(orders, in_flight=100, on_progress=bar):
                pieces += task.output.pieces
        print("pieces in 500 orders:", pieces)

        # Created again under the same keys, orders are the same tasks: nothing is charged twice.
        pair = [Order("Eve", {"apple": 1}), Order("Joe", {"pear": 1})]
        handles = await typed.create_tasks(pair, keys=["order of Eve", "order of Joe"])
        again = [task.id async for task in typed.map(pair, key=lambda order: f"order of {order.customer}")]
        print("the same tasks:", again == [handle.id for handle in handles])

        # Without the types: JSON values, checked by the schema that the application publishes.
        plain = await session.typed_as_published()
        answer = await plain.invoke({"customer": "Bob", "items": {"pear": 1}})
        print("without types:", answer.output["greeting"])

        # What does not fit is not sent, and the error names the field.
        try:
            await plain.invoke({"customer": "Bob", "items": {"pear": "many"}})
        except flame.InvalidInput as error:
            print("refused:", error)


if __name__ == "__main__":
    asyncio.run(main())
