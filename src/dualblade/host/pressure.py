"""Time lost for want of memory, as the kernel counts it (pressure stall information)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dualblade.host.groups import read_file

_LINE = re.compile(r"^(some|full) avg10=([\d.]+) .*total=(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """`some`: at least one task waited for memory; `full`: all of them did. Seconds since boot
    (or since the group was made); `some_percent` is the share of the last ten seconds.

    A page that was evicted and is read again counts: so does a sweep over more than fits.
    """

    some_seconds: float
    full_seconds: float
    some_percent: float


def read_pressure(path: Path) -> Pressure | None:
    """Of /proc/pressure/memory or a group's memory.pressure; None where there is none.

    Source: Documentation/accounting/psi.rst. Reading it fails (EOPNOTSUPP) when it is off.
    """
    try:
        text = read_file(path)
    except OSError:
        return None
    found = {kind: (float(avg10), int(total)) for kind, avg10, total in _LINE.findall(text)}
    if "some" not in found:
        return None
    percent, some_us = found["some"]
    _, full_us = found.get("full", (0.0, 0))
    return Pressure(some_seconds=some_us / 1e6, full_seconds=full_us / 1e6, some_percent=percent)
