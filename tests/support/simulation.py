"""A cluster in virtual time with nothing real in it: plans are carried out, tasks take as long as they are said to.

Whatever a plan may never do is checked with each one: more than a node has or a limit allows, another plan than one
made from scratch, a change of the view.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from flame.protocol import subjects
from flame.protocol.records import (
    ApplicationRecord,
    ApplicationSpec,
    BindingRecord,
    ExecutorRecord,
    NodeRecord,
    SessionOptions,
    SessionRecord,
)
from flame.protocol.resources import Resources
from flame.protocol.states import CloseMode, ExecutorState, SessionState
from flame_services.scheduler.plan import Plan, Step, plan
from flame_services.scheduler.view import Node, Session, View

START_S = 0.05
"""From a binding to an executor that takes tasks."""
CARRY_S = 0.01
"""From a plan to what it says being written."""
CHECKED = 5
"""Every so many rounds a plan is compared with one from scratch."""


BESIDE = {known.name for known in fields(Session)} - {"record", "revision", "bindings", "promised", "standing"}
"""What is known of a session that isn't in a record."""


def rebuilt(known: View) -> View:
    """Return a view made from scratch from what another one knows; all of its indexes are new."""
    view = View(known.max_executors)
    view.wall_ahead_s = known.wall_ahead_s
    view.applications.update(known.applications)
    for name, node in known.nodes.items():
        view.nodes[name] = Node(node.record, node.seen_at, node.state)
    for key, executor in known.executors.items():
        view.executors[key] = copy.copy(executor)
    for name, session in known.sessions.items():
        made = view.put_session(name, session.record, session.revision)
        assert made is not None
        for beside in BESIDE:
            setattr(made, beside, getattr(session, beside))
    for key, binding in known.bindings.items():
        view.put_binding(key, binding)
    for name, session in known.sessions.items():
        if session.promised:
            view.begin(view.sessions[name], session.promised)
        view.touch(view.sessions[name])
    return view


@dataclass
class Load:
    """What a session has to do."""

    tasks: float = 0.0
    """That wait; may be infinite."""
    task_s: float = 1.0
    done: int = 0
    busy_s: float = 0.0
    """What its tasks took together."""
    fails: int = 0
    """So many executors of it fail to start, first."""


@dataclass
class Living:
    """An executor."""

    binding: BindingRecord
    record: ExecutorRecord
    begun: float | None = None


@dataclass
class Simulation:
    """See the module."""

    view: View = field(default_factory=View)
    seed: int = 0
    now: float = 1000.0
    checked: bool = True
    """Compare plans with those from scratch, too."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.loads: dict[str, Load] = {}
        self.living: dict[str, Living] = {}
        self.told_to_leave = 0
        self.bound = 0
        self.rounds = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._steps_under_way = 0

    # ---- what there is

    def node(self, name: str, cpu: float = 4.0, memory: int = 2**40, gpu: int = 0, **fields: Any) -> None:
        record = NodeRecord(
            name=name, hostname=name, arch="x", os="y", capacity=Resources(cpu, memory, gpu), started=1.0, **fields
        )
        self.view.put_node(name, record, self.now)

    def application(self, name: str, **spec: Any) -> None:
        fields = {"command": "x", "delay_release_s": 5.0, "max_instances": 1000, "idle_timeout_s": 0, **spec}
        self.view.put_application(
            name, ApplicationRecord(name=name, spec=ApplicationSpec.model_validate(fields), created=1.0)
        )

    def session(
        self, name: str, tasks: float = 0.0, *, task_s: float = 1.0, fails: int = 0, app: str = "app", **options: Any
    ) -> None:
        asks = SessionOptions.model_validate({"resources": Resources(1.0, 0, 0), **options})
        self.loads[name] = Load(tasks, task_s, fails=fails)
        record = SessionRecord(id=name, application=app, options=asks, created=self.now)
        self.view.put_session(name, record, 1)
        self._demand(name)

    def submit(self, name: str, tasks: float) -> None:
        self.loads[name].tasks += tasks
        self._demand(name)
        for key, living in list(self.living.items()):
            if living.binding.session == name:
                self._work(key)

    def close(self, name: str, mode: CloseMode = CloseMode.CLOSE) -> None:
        self._change(name, state=SessionState.CLOSING, close_mode=mode)

    def _change(self, name: str, **fields: Any) -> None:
        session = self.view.sessions[name]
        self.view.put_session(name, session.record.changed(**fields), session.revision + 1)

    # ---- reading

    def count(self, name: str) -> int:
        """Return how many executors of a session take tasks."""
        return sum(
            1
            for living in self.living.values()
            if living.binding.session == name and living.record.state is ExecutorState.BOUND
        )

    # ---- going on

    def run(self, for_s: float) -> None:
        """Let so much time pass."""
        until = self.now + for_s
        self._plan()
        while self._events and self._events[0][0] <= until:
            self.now = self._events[0][0]
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self._plan()
        self.now = until

    def _at(self, at: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._serial), action))

    def _plan(self) -> None:
        view, now = self.view, self.now
        for node in view.nodes.values():
            node.seen_at = now
        before = copy.deepcopy(vars(view)) if self.checked and self.rounds % CHECKED == 0 else None
        made = plan(view, now)
        self.rounds += 1
        if before is not None:
            assert vars(view) == before
            scratch = plan(rebuilt(view), now)
            assert (made.steps, made.look_again_at) == (scratch.steps, scratch.look_again_at)
        self._check(made)
        view.planned(made)
        for step in made.steps:
            self._steps_under_way += 1
            self._at(now + self.random.uniform(0, CARRY_S), lambda step=step: self._carry_out(step))  # type: ignore[misc]
        if made.look_again_at < math.inf:
            self._at(max(made.look_again_at, now + 1e-6), lambda: None)
        if before is not None and not self._steps_under_way:
            again = plan(view, now)
            assert not again.steps, "nothing changed, but there is something to do"

    def _check(self, made: Plan) -> None:
        view = self.view
        binds = [(step.session, name) for step in made.steps for name in step.bind]
        for name, node in view.nodes.items():
            if node.record.application:
                placed = [view.sessions[bound].record.application for bound, place in binds if place == name]
                assert set(placed) <= {node.record.application}
                taken = len(node.bindings) + len(view.promised_on.get(name, ()))
                assert not placed or taken + len(placed) <= node.record.max_executors
                continue
            used = node.used
            for uses in view.promised_on.get(name, ()):
                used = used.plus(uses)
            for bound, place in binds:
                used = used.plus(view.request_of(bound)) if place == name else used
            assert used.fits_in(node.record.capacity), name
        for step in made.steps:
            session = view.sessions[step.session]
            assert not session.busy
            if step.bind:
                assert len(session.bindings) - len(step.reap) + len(step.bind) <= view.most(session)
        for name, record in view.applications.items():
            new = sum(1 for bound, _ in binds if view.sessions[bound].record.application == name)
            limit = record.spec.max_executors
            assert not new or limit is None or view.executors_of.get(name, 0) + new <= limit
        if binds and view.max_executors is not None:
            assert len(view.bindings) + view.executors_promised + len(binds) <= view.max_executors

    def _carry_out(self, step: Step) -> None:
        self._steps_under_way -= 1
        session = self.view.sessions[step.session]
        for key in step.reap:
            ended = self.living.pop(key)
            if ended.record.clean:
                session.crashes = 0
            else:
                session.crashes += 1
                session.retry_at = self.now + min(5.0, 0.1 * 2**session.crashes)
                self._change(step.session, bind_failures=session.record.bind_failures + 1)
            self.view.put_binding(key, None)
            self.view.put_executor(key, None, self.now)
        for key in step.leave:
            self.told_to_leave += 1
            binding = self.view.bindings[key].changed(leave=True, force=step.force)
            self.living[key].binding = binding
            self.view.put_binding(key, binding)
            self._work(key)
        for name in step.bind:
            self._bind(step.session, name)
        if step.look and not self.loads[step.session].tasks:
            session.drained = True
        if step.settle:
            self.loads[step.session].tasks = 0
            self._change(step.session, settled=True, state=SessionState.CLOSED)
        if step.close_idle:
            self.close(step.session)
        self._demand(step.session)
        self.view.done(step.session)

    def _demand(self, name: str) -> None:
        session = self.view.sessions[name]
        served = any(not binding.leave for binding in session.bindings.values())
        session.demand = bool(self.loads[name].tasks) and not served
        self.view.touch(session)

    # ---- executors

    def _bind(self, session_id: str, node: str) -> None:
        record = self.view.sessions[session_id].record
        self.bound += 1
        executor = f"x{self.bound:06}"
        key = subjects.executor_key(node, executor)
        binding = BindingRecord(
            executor=executor, node=node, application=record.application, session=session_id, epoch=1,
            consumer=subjects.consumer(session_id, 1), resources=record.options.resources, created=self.now,
        )  # fmt: skip
        reported = ExecutorRecord(
            id=executor, node=node, application=record.application, session=session_id, epoch=1,
            state=ExecutorState.BINDING, created=self.now, updated=self.now,
        )  # fmt: skip
        self.living[key] = Living(binding, reported)
        self.view.put_binding(key, binding)
        self._at(self.now + START_S, lambda: self._start(key))

    def _start(self, key: str) -> None:
        load = self.loads[self.living[key].binding.session]
        if load.fails:
            load.fails -= 1
            self._report(key, state=ExecutorState.RELEASED, clean=False)
        else:
            self._report(key, state=ExecutorState.BOUND, entered=True)
            self._work(key)

    def _work(self, key: str) -> None:
        living = self.living[key]
        if living.begun is not None or living.record.state is not ExecutorState.BOUND:
            return
        load = self.loads[living.binding.session]
        if living.binding.leave:
            self._report(key, state=ExecutorState.RELEASED, idle=False)
        elif load.tasks:
            load.tasks -= 1
            living.begun = self.now
            self._report(key, idle=False, running=1)
            self._at(self.now + load.task_s * self.random.uniform(0.8, 1.2), lambda: self._finish(key))
        else:
            self._report(key, idle=True, running=0)

    def _finish(self, key: str) -> None:
        living = self.living[key]
        load = self.loads[living.binding.session]
        assert living.begun is not None
        load.busy_s += self.now - living.begun
        load.done += 1
        living.begun = None
        living.record = living.record.changed(succeeded=living.record.succeeded + 1)
        self._work(key)

    def _report(self, key: str, **fields: Any) -> None:
        living = self.living[key]
        tasks = self.loads[living.binding.session].tasks
        living.record = living.record.changed(pending=int(min(tasks, 10_000)), **fields)
        if living.record.state is not ExecutorState.BOUND:
            self.living[key].begun = None
        self.view.put_executor(key, living.record, self.now)
