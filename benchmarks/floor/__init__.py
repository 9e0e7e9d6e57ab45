"""The floor: what nats-py reaches with the guarantees of Flame's design and nothing of Flame.

Tasks wait in a work-queue stream. A result stream refuses a second record for a task and announces stored ones. Tasks
and records are published without waiting for one another, each acknowledged by the broker; an executor acknowledges a
task when its record is acknowledged. Envelopes are MessagePack, streams are files, loops are uvloop's.
"""
