"""The control API: what clients may ask of a scheduler, any scheduler. A module for each noun, and one that serves."""

from __future__ import annotations

from flame_services.scheduler.control_api.service import ControlApi

__all__ = ["ControlApi"]
