"""``flmfunc``: calls the functions that its clients send; see `flame.functions`."""

from __future__ import annotations

import asyncio

import flame
from flame.service.functions import FunctionService


def main() -> None:
    """Run the service; an executor manager starts it."""
    asyncio.run(flame.run(FunctionService()))


if __name__ == "__main__":
    main()
