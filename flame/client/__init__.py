"""The client side of the SDK: connections, sessions, tasks."""
