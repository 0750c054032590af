"""How torch's threads wait for each other: decided before torch is imported, by the environment."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import MutableMapping

_SETTINGS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
"""Turns of a wait, a PAUSE each: 13 us on AMD's Zen 3, some 45 on Intel from Skylake on."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let threads of this process spin for about as long as waking them would take, then sleep.

    Threads that spin for milliseconds, as OpenMP's do unless told, take the cores that I/O and
    other programs need; threads that sleep at once are woken hundreds of times in each decode step.
    Spinning for the time of a wake-up costs at most twice the better of both. Children inherit it.
    False, and nothing changed, where the user decided. Warns where torch is imported already, which
    has read the environment then: only children heed it. Source: libgomp, GOMP_SPINCOUNT.
    Measured: docs/performance.md, "How threads wait".
    """
    if any(name in environment for name in _SETTINGS):
        return False
    if "torch" in sys.modules:
        warnings.warn(
            "wait_briefly() comes too late: call it before torch is imported", stacklevel=2
        )
    environment.update(_SETTINGS)
    return True
