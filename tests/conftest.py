"""What every test shares: how property tests choose their examples."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_CALM = [HealthCheck.too_slow]  # a busy machine is no reason to fail
settings.register_profile(
    "ci", derandomize=True, max_examples=50, deadline=None, database=None, suppress_health_check=_CALM
)
settings.register_profile("dev", deadline=None, suppress_health_check=_CALM)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
