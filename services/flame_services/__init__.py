"""The programs of a cluster: the scheduler, the executor manager and the built-in applications."""
