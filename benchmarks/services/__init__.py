"""Services that the benchmarks run."""
