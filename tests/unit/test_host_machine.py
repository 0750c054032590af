"""What the kernel says of this machine."""

from __future__ import annotations

import os
from pathlib import Path

from dualblade.host.machine import stolen_seconds


def test_what_a_hypervisor_took_is_read_in_seconds(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    stat = tmp_path / "proc/stat"
    ticks = 7 * os.sysconf("SC_CLK_TCK")
    stat.write_text(f"cpu  90 1 20 500 30 4 5 {ticks} 0 0\ncpu0 45 0 10 250 15 2 2 99 0 0\n")
    assert stolen_seconds(tmp_path) == 7.0
    stat.write_text("cpu  90 1 20 500\n")  # a kernel that does not count it
    assert stolen_seconds(tmp_path) == 0.0
    assert stolen_seconds(tmp_path / "nowhere") == 0.0
    assert stolen_seconds() >= 0.0
