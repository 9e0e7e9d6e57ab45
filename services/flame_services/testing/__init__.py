"""A whole cluster in one process, over a broker in memory: what `flame.testing.MemoryCluster` is made of.

The scheduler and the control API, the executors' loop, the keeping of leases, the rules of an executor's life and the
writing of its record are those of a real cluster. `node` stands in for what an executor manager does with processes:
its executors are asyncio tasks. `cluster` puts it together.
"""
