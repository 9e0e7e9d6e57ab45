"""What a service that somebody has started by hand and the manager of its node say to one another.

Each word is one byte on a pair of sockets that the service makes before it starts the manager::

    service                          manager
       │       ◄── READY                │   once: it is a node of the cluster, and reports are answered
       │ LEAVE ──►                      │   it wants to leave; what it runs may finish
       │       ◄── END                  │   it has to end, and a SIGTERM follows
       │ GONE  ──►                      │   it serves nothing any more

Either end is closed with its process, whatever that has died of. Unknown words are ignored.
"""

from __future__ import annotations

from typing import Final

READY: Final = b"r"
LEAVE: Final = b"l"
END: Final = b"e"
GONE: Final = b"g"

ATTACHED: Final = "attached"
"""How the process of such an executor was started, in its record; and how the names of such nodes begin."""
