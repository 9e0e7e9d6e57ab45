"""Values of many megabytes: the calls are the same, and nothing has to be set up or cleaned away.

    flmctl up                       # in another terminal
    python examples/large_values.py

It uses what every cluster has: flmping, which answers with its input, and flmexec, which runs a script.
"""

import asyncio
import gzip

import flame
from flame import scripts


async def main() -> None:
    lines = b"".join(b"%d;%d\n" % (number, number % 97) for number in range(600_000))
    print(f"sending {len(lines) / 1e6:.0f} MB")

    # An executor needs memory for what it is given, and for what it makes of that.
    async with await flame.create_session("flmping", lines, resources="cpu=0.1,mem=512m") as session:
        task = await session.invoke(lines)
        print("it came back as it was:", task.output == lines)

        # Lists don't bring large outputs, they tell their size; get_task brings them.
        [listed] = await session.list_tasks()
        print("in a list:", len(listed.output), "of", listed.output_size, "bytes")
        print("looked up:", (await session.get_task(listed.id)).output == lines)

    async with await flame.create_session("flmexec", resources="cpu=0.1,mem=512m") as session:
        task = await session.invoke(scripts.encode("gzip -c", input=lines))
        packed = scripts.decode(task.output).stdout
        print("packed in the cluster:", gzip.decompress(packed) == lines)

    # What went in was removed with its session; an output is kept as long as its task's result, a day.


if __name__ == "__main__":
    asyncio.run(main())
