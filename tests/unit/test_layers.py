"""What a client or a service has to import."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import flame

FOR_PROGRAMS: set[str] = {"typer", "rich", "yaml", "psutil", "uvloop", "numpy", "openai", "structlog"}
"""What comes with an extra, or costs time at every start of an executor."""


@pytest.mark.parametrize("module", ["flame", "flame.broker.embedded"])
def test_a_client_or_a_service_imports_nothing_that_only_programs_need(module: str) -> None:
    script = f"import json, sys\nimport {module}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    modules: list[str] = json.loads(done.stdout)
    packages = {name.partition(".")[0] for name in modules}
    assert packages & {*FOR_PROGRAMS, "flame_services", "flame_cli"} == set()
    assert "flame" in packages


def test_importing_the_package_loads_what_is_used_and_no_more() -> None:
    script = (
        "import sys\n"
        "import flame\n"
        "heavy = {'asyncio', 'nats', 'pydantic', 'msgpack', 'logging'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "flame.run, flame.FlameService, flame.TaskContext\n"
        "assert 'pydantic' not in sys.modules\n"
        "flame.connect\n"
        "assert 'yaml' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


def test_each_name_of_the_package_is_found_where_it_is_said_to_be() -> None:
    tree = ast.parse(Path(str(flame.__file__)).read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == flame._MODULE_OF
    assert sorted([*typed, "__version__"]) == flame.__all__
    for name in flame.__all__:
        assert getattr(flame, name) is not None
        assert name in dir(flame)
    with pytest.raises(AttributeError, match="module 'flame' has no attribute 'nope'"):
        flame.nope  # noqa: B018
    namespace: dict[str, object] = {}
    exec("from flame import *", namespace)
    assert set(flame.__all__) <= set(namespace)


def test_a_library_stays_silent_and_loads_nothing_to_do_so() -> None:
    script = (
        "import sys\n"
        "from flame.logs import get_logger\n"
        "log = get_logger('flame.part')\n"
        "log.debug('nothing', key=1)\n"
        "log.info('nothing', key=1)\n"
        "assert 'structlog' not in sys.modules\n"
        "log.warning('something', key=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    assert "something" in done.stderr
    assert "nothing" not in done.stderr
