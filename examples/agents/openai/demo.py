"""An AI agent on a Flame cluster, from registration to answers, on this machine and by one command.

It starts a cluster, registers the agent of ``main.py``, opens two sessions with different system prompts,
asks each of them the same two questions, and stops everything. With ``DEEPSEEK_API_KEY`` set the agent talks
to DeepSeek, or to what ``DEEPSEEK_BASE_URL`` names; otherwise to a small model that ``model_server.py`` runs.

The exit status is 0 only if every answer came and the two sessions answered differently.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

import flame

HERE = Path(__file__).resolve().parent
APPLICATION = "openai-agent"

SYSTEM_PROMPTS = {"weather": "You are a weather forecaster.", "kitchen": "You are a French chef."}
QUESTIONS = ("Who are you?", "How can you help me?")
COLOURS = {"weather": "cyan", "kitchen": "magenta"}

READY_S = 60.0
"""How long a program may take to say that it is ready."""
ANSWER_S = 120.0
"""How long to wait for one answer; the first one waits for the agent's process too."""
STOP_S = 20.0
"""How long a program may take to stop before it is killed."""

INDENT = 22
"""Where the text after the time and the session's name begins."""

out = Console(highlight=False)
started = time.monotonic()


class DemoError(Exception):
    """Something that the demo needs did not work; the text says what."""


@dataclass(frozen=True)
class Model:
    """Where the agent sends its prompts."""

    base_url: str
    api_key: str
    local: bool


@dataclass
class Conversation:
    """One session and what was said in it."""

    session: flame.Session
    answers: list[str] = field(default_factory=list)
    executors: list[str] = field(default_factory=list)


async def demo() -> None:
    """Run the story; raise `DemoError` or a `flame.FlameError` where it goes wrong."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flame-demo-")))

        step("The model")
        model = await stack.enter_async_context(choose_model(folder))

        step("The cluster: a broker, a scheduler and an executor manager")
        up = [program("flmctl"), "up", "--port", "0", "--data-dir", str(folder / "data")]
        endpoint = await stack.enter_async_context(running(up, "Flame is ready at ", folder / "cluster.log"))
        say(f"flmctl up is ready at {endpoint}")

        step("The agent")
        deployment = await deploy(model, folder)
        await flmctl("register", "-f", str(deployment), endpoint=endpoint)
        await flmctl("list", "-a", endpoint=endpoint)

        step("Two sessions, isolated from each other, asked the same questions at the same time")
        connection = await stack.enter_async_context(await flame.connect(endpoint))
        conversations = await converse(connection)

        step("Who served whom")
        for name, conversation in conversations.items():
            for number, executor in enumerate(conversation.executors, 1):
                say(f"answer {number} of session {conversation.session.id}: executor {executor}", name)
        await flmctl("list", "-s", endpoint=endpoint)
        if model.local:
            written = await tokens_written(model)
            say(f"The model's server wrote {written} tokens.")
            if not written:
                raise DemoError("the answers are not the model's: its server was never asked")
        check(conversations)

        step("Stopping everything")
        for name, conversation in conversations.items():
            await conversation.session.close()
            say("closed", name)
    say("All processes have ended.")


# --- The model


@contextlib.asynccontextmanager
async def choose_model(folder: Path) -> AsyncIterator[Model]:
    """Yield DeepSeek if there is a key for it, else a model that runs here as long as the context lasts."""
    key = os.environ.get("DEEPSEEK_API_KEY")
    if key:
        model = Model(os.environ.get("DEEPSEEK_BASE_URL") or "https://api.deepseek.com", key, local=False)
        say(f"DEEPSEEK_API_KEY is set: the agent will talk to {model.base_url}")
        yield model
        return
    say("DEEPSEEK_API_KEY is not set: starting a small model here instead")
    log = folder / "model.log"
    server = [sys.executable, str(HERE / "model_server.py"), "--log", str(log), "--parent", str(os.getpid())]
    async with running(server, "The model is ready at ", log) as base_url:
        say(f"SmolLM2-135M-Instruct answers at {base_url}")
        yield Model(base_url, "none-needed", local=True)


async def tokens_written(model: Model) -> int:
    """Ask the local model's server how much it has written, which proves that it was asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read() -> str:
        with opener.open(model.base_url.removesuffix("/v1") + "/metrics", timeout=10) as response:
            return str(response.read(), "utf-8")

    for line in (await asyncio.to_thread(read)).splitlines():
        metric, _, value = line.partition(" ")
        if metric == "llamacpp:tokens_predicted_total":
            return int(float(value))
    raise DemoError("the model's server does not say how much it has written")


# --- The agent


async def deploy(model: Model, folder: Path) -> Path:
    """Write what ``openai-agent.yaml`` says, with this demo's paths and environment, and return its path."""
    deployment = yaml.safe_load((HERE / "openai-agent.yaml").read_text(encoding="utf-8"))
    spec = deployment["spec"]
    spec["working_directory"] = str(HERE)
    spec["environments"] = {"DEEPSEEK_API_KEY": model.api_key, "DEEPSEEK_BASE_URL": model.base_url}
    try:
        spec["environments"] |= await prepare_uv(program("uv"))
        spec["command"] = program("uv")
    except DemoError as error:
        say(f"{error}\nThe agent will run in this environment instead, which has its packages as well.")
        spec["command"], spec["arguments"] = sys.executable, ["main.py"]
    path = folder / "openai-agent.yaml"
    path.write_text(yaml.safe_dump(deployment, sort_keys=False), encoding="utf-8")
    return path


async def prepare_uv(uv: str) -> dict[str, str]:
    """Let uv install what ``main.py`` asks for, and return the variables by which it finds that offline."""
    say("uv installs what main.py asks for, into its cache")
    cache = await captured(uv, "cache", "dir", "--color", "never")
    variables = {"UV_CACHE_DIR": cache, "UV_PYTHON": sys.executable}
    await captured(uv, "sync", "--quiet", "--script", str(HERE / "main.py"), environment=variables)
    return variables | {"UV_OFFLINE": "1"}


# --- The sessions


class Narrator(flame.TaskInformer):
    """Shows what becomes of one question."""

    def __init__(self, name: str, question: str) -> None:
        self.name = name
        self.question = question

    def on_update(self, task: flame.Task) -> None:
        """Show a state that the client has just learned of."""
        where = f" on {task.executor}" if task.executor else ""
        say(f"{task.state.value:9} {self.question}  (task {task.id}{where})", self.name)

    def on_error(self) -> None:
        """Show that no more states will come."""
        say(f"no answer {self.question}", self.name)


async def converse(connection: flame.Connection) -> dict[str, Conversation]:
    """Open a session for each system prompt and ask all of them at once."""
    async with asyncio.TaskGroup() as group:
        asking = {
            name: group.create_task(ask(connection, name, system_prompt))
            for name, system_prompt in SYSTEM_PROMPTS.items()
        }
    return {name: task.result() for name, task in asking.items()}


async def ask(connection: flame.Connection, name: str, system_prompt: str) -> Conversation:
    """Open one session with its system prompt as common data, and ask it one question after the other."""
    session = await connection.create_session(APPLICATION, system_prompt.encode())
    say(f"session {session.id}: {system_prompt}", name)
    conversation = Conversation(session)
    for question in QUESTIONS:
        task = await session.invoke(question.encode(), Narrator(name, question), timeout_s=ANSWER_S)
        answer = task.output.decode()
        conversation.answers.append(answer.strip())
        conversation.executors.append(task.executor)
        out.print(Padding(Text(answer, style=COLOURS[name]), (0, 4, 0, INDENT), expand=False))
    return conversation


def check(conversations: Mapping[str, Conversation]) -> None:
    """Raise `DemoError` unless the answers are what the story promises."""
    for name, talk in conversations.items():
        if len(talk.answers) != len(QUESTIONS) or not all(talk.answers):
            raise DemoError(f"the {name} session gave an empty answer")
    for question, *answers in zip(QUESTIONS, *(talk.answers for talk in conversations.values()), strict=True):
        if len(set(answers)) < len(answers):
            raise DemoError(f"the sessions gave the same answer to {question!r}")
    if set.intersection(*(set(talk.executors) for talk in conversations.values())):
        raise DemoError("the sessions shared an executor")


# --- Programs


def search_path() -> str:
    """Return PATH with this interpreter's programs first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def program(name: str) -> str:
    """Return the path of a program of this environment, or of PATH."""
    path = shutil.which(name, path=search_path())
    if path is None:
        raise DemoError(f"there is no {name}: run 'make demo', which installs what it needs")
    return path


@contextlib.asynccontextmanager
async def running(command: Sequence[str], ready: str, log: Path) -> AsyncIterator[str]:
    """Start a program, yield what its ready line says after ``ready``, and stop it when the context ends.

    It gets a session of its own, so that Ctrl-C reaches the demo alone, which then stops it in order.
    """
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"PATH": search_path()},
            start_new_session=True,
        )
    try:
        yield await announced(process, ready, log)
    finally:
        await stop(process)


async def announced(process: asyncio.subprocess.Process, ready: str, log: Path) -> str:
    """Wait for the line that begins with ``ready`` and return the rest of it."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_S):
            async for line in process.stdout:
                if line.decode().startswith(ready):
                    return line.decode().removeprefix(ready).strip()
            status = await process.wait()
    except TimeoutError:
        failure = f"no {ready.strip()!r} within {READY_S:g} s"
    else:
        failure = f"it ended with status {status} before {ready.strip()!r}"
    raise DemoError(f"{failure}; the end of its log:\n{tail(log)}")


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a program by SIGTERM, and what is left of its group by SIGKILL."""
    if process.returncode is None:
        process.terminate()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def tail(log: Path) -> str:
    """Return the end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


async def flmctl(*arguments: str, endpoint: str) -> None:
    """Run flmctl against the demo's cluster, showing the command and what it prints."""
    out.print(Text(f"\n$ flmctl {' '.join(arguments)}", style="bold"), soft_wrap=True)
    environment = os.environ | {"PATH": search_path(), "FLAME_ENDPOINT": endpoint}
    process = await asyncio.create_subprocess_exec(program("flmctl"), *arguments, env=environment)
    if await process.wait() != 0:
        raise DemoError(f"flmctl {arguments[0]} ended with status {process.returncode}")


async def captured(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | (environment or {}),
    )
    output, errors = await process.communicate()
    if process.returncode != 0:
        raise DemoError(f"{' '.join(command)} ended with status {process.returncode}:\n{errors.decode()}")
    return output.decode().strip()


# --- Telling


def step(title: str) -> None:
    """Begin a part of the story."""
    out.print(Text(f"\n{title}", style="bold"), soft_wrap=True)


def say(text: str, name: str = "") -> None:
    """Show what has just happened, when, and in which session."""
    line = Text().append(f"{time.monotonic() - started:8.2f} s  ", style="dim")
    line.append(f"{name:8}  ", style=COLOURS.get(name, "")).append(text)
    out.print(line, soft_wrap=True)


async def guarded() -> int:
    """Run the demo so that a signal ends it in order; return the exit status."""
    task = asyncio.create_task(demo())
    received: list[signal.Signals] = []

    def interrupt(number: signal.Signals) -> None:
        if not received:
            task.cancel()
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, interrupt, number)
    try:
        await task
    except asyncio.CancelledError:
        print(f"demo: stopped by {received[0].name}", file=sys.stderr)
        return 128 + received[0]
    except (DemoError, flame.FlameError, OSError, ExceptionGroup) as error:
        for cause in causes(error):
            print(f"demo: {cause}", file=sys.stderr)
        return 1
    return 0


def causes(error: BaseException) -> list[BaseException]:
    """Return the errors that a group holds, however deep, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        return [cause for member in error.exceptions for cause in causes(member)]
    return [error]


if __name__ == "__main__":
    sys.exit(asyncio.run(guarded()))
