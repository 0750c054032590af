"""Shared fixtures: tiny models with random weights, and a cache directory of the test's own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Tiny tensors gain nothing from an OpenMP team, and its spinning threads starve each other when
# the tests share their cores. Set before torch is imported, and for the tests' own processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# In the background, or under nohup, they are ignored, and every child would inherit that. Of a
# handler it does not: in a child there is the default again. Here it does as little as before.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda _number, _frame: None)


@pytest.fixture(autouse=True)
def own_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Private stores go to the test's own directory, so that leaks can be seen."""
    folder = tmp_path / "xdg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))  # no profile of this machine
    return folder / "dualblade"
