"""A program in virtual time: hours of it run in milliseconds, and take the same course every time."""

from flame.testing.clock import run_virtually

__all__ = ["run_virtually"]
