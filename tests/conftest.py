"""Shared fixtures: tiny models with random weights, and a cache directory of the test's own."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Tiny tensors gain nothing from an OpenMP team, and its spinning threads starve each other when
# the tests share their cores. Set before torch is imported, and for the tests' own processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# In the background, or under nohup, they are ignored, and every child would inherit that. Of a
# handler it does not: in a child there is the default again. Here it does as little as before.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda _number, _frame: None)


# What CI's machine cannot do, or what no machine does. All else that is skipped there has lost what
# it needs, and nobody would see.
_SKIPPED_IN_CI = re.compile(
    "no CUDA GPU|no lmcache here|names no checkout|names none|has no (amx|avx2|avx512)|"
    "one queue for both doors|the model's own tensors in memory|there is a GPU|"
    "cannot be throttled"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Under CI a test that is skipped for want of something has failed."""
    report: Any = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2]
        if not _SKIPPED_IN_CI.search(reason):
            report.outcome, report.longrepr = "failed", f"not skipped in CI: {reason}"
    return report


@pytest.fixture(scope="session", autouse=True)
def not_the_users_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For fixtures that live longer than a test."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        yield


@pytest.fixture(autouse=True)
def own_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Private stores go to the test's own directory, so that leaks can be seen."""
    folder = tmp_path / "xdg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))  # no profile of this machine
    return folder / "dualblade"
