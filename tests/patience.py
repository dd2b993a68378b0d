"""Bounds in seconds, as they are on a quiet machine, for a machine that others use too."""

from __future__ import annotations

import os


def patience(quiet_s: float) -> float:
    """`quiet_s`, longer in proportion where more processes want to run than there are cores."""
    return quiet_s * max(1.0, max(os.getloadavg()[:2]) / (os.cpu_count() or 1))
