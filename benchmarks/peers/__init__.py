"""Programs that measure other systems.

Each imports nothing of Flame, so that it runs in an environment of its own. It prints a map of the fields of
`benchmarks.figures.Peer` as its last line, or ends with status 3 if its system is not installed.
"""
