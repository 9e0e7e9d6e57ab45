"""What is on the wire, and nothing else: subjects, records, codec, states, topology, error codes.

Everything here is a function of its arguments. No I/O, no clock, no event loop: the import contract in
`pyproject.toml` forbids them, so that every rule can be tested without a broker.
"""
