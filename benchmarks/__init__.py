"""What Flame costs beside the broker that it stands on, measured in one run: ``python -m benchmarks``."""
