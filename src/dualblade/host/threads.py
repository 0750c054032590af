"""How torch's threads wait for each other: decided before torch is imported, by the environment."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from dualblade.host.machine import cpu_model

_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

_SPINS = 1000
_SPINS_AMD = 3000
"""Turns of a wait, a PAUSE each: some 40 us, as long as waking a thread takes. AMD's PAUSE is a
third of Intel's (from Skylake on)."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let threads of this process spin for about as long as waking them would take, then sleep.

    Threads that spin for milliseconds, as OpenMP's do unless told, take the cores that I/O and
    other programs need; threads that sleep at once are woken hundreds of times in each decode step.
    Spinning for the time of a wake-up costs at most twice the better of both. Children inherit it.
    False, and nothing changed, where the user decided. Source: libgomp, GOMP_SPINCOUNT.
    """
    if any(name in environment for name in _VARIABLES):
        return False
    spins = _SPINS_AMD if "AMD" in (cpu_model() or "") else _SPINS
    environment.update(zip(_VARIABLES, ("passive", str(spins)), strict=True))
    return True
