"""The executor manager: one on each node, it turns bindings into processes and looks after them.

    bindings ──► executors ──► executor ──► process
    (bucket)     (the set)     (one life)   (a process group)
                                  │  ▲
                          record ◄┘  └── reports of the process itself

How an executor comes by its process is the business of `start`: it is forked from a `template`, taken from those that
were started ahead (`warm`), or started fresh in its `berth`. `stock` has what is ready of one application, `stocks`
that of all. A process whose service might be a template is on `trial` until it has shown what it is.

`executors` hears what the scheduler wants of this node. `executor` carries one such wish out; the rules that it
follows are in `life`, which is pure, as `reasons` and the planning in `launch` are. `record` tells the cluster.
`process`, `captured_file` and `work_folder` are where the operating system is.

A process that somebody has started by hand has a manager of its own (`attaching`), in which it is the one executor
(`attached`); all that doesn't depend on what an executor runs in is the same there (`bound`).

What an executor is given of its node is its `share`: GPUs (`gpus`), and what `enforcement` holds it to, by control
groups (`cgroups`) or by looking (`memory_watch`, `processors`). `keeper` keeps the leases of what it holds; `stops`
finds the runs in it that must have ended, and `verdicts` gives their tasks their records when its process was ended
for that.
"""

from __future__ import annotations

from flame_services.executor_manager.program import main

__all__ = ["main"]
