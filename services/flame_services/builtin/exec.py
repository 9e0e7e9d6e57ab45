"""``flmexec``: runs a given script; see `flame.scripts` for what it takes and returns."""

from __future__ import annotations

import asyncio

import flame
from flame.scripts import ScriptFailed, encode_result, read_script
from flame_services.builtin.script_process import run_script


class Exec(flame.FlameService):
    """Runs scripts."""

    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        """Run one; a task whose script fails is failed, and its error carries what the script wrote."""
        script, as_json = read_script(context.input)
        result = await run_script(script)
        if not result.succeeded:
            raise ScriptFailed(script, result)
        return encode_result(result, as_json=as_json)


def main() -> None:
    """Run the service; an executor manager starts it."""
    asyncio.run(flame.run(Exec()))


if __name__ == "__main__":
    main()
