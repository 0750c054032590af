"""Facts about this machine and build, for result files: what a figure was measured on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from dualblade.host.devices import device_facts
from dualblade.host.groups import ROOT
from dualblade.host.memory import available_memory

PACKAGES = ("dualblade", "torch", "transformers", "safetensors", "numpy")

STOLEN_MAX = 0.02
"""Of the processors, while something was timed; with more its figures are the neighbours' as
well, and that is told."""


def machine_facts(path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Kernel, processor, memory, versions and date; with `path`, what it stands on.

    Plain values, ready for JSON. Figures that cannot be found are None.

    Raises: StorageError when `path` cannot be examined; Unsupported without /proc.
    """
    memory = available_memory()
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu_model": cpu_model(),
        "cpu_features": cpu_features(),
        "cpu_count": cpu_count(),
        "cpu_usable_count": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "memory_available_bytes": memory.available_bytes,
        "memory_available_source": memory.source,
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "git": git_state(Path(__file__).resolve().parent),
    }
    if path is not None:
        device = device_facts(path)
        facts["device"] = {**device.to_dict(), "direct": asdict(device.direct_io())}
    return facts


def cpu_model(root: Path = ROOT) -> str | None:
    """`model name` of /proc/cpuinfo (x86), else its `Model` or `Hardware` (ARM boards)."""
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return None
    for name in ("model name", "Model", "Hardware"):
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found[1].strip()
    return None


def cpu_features(root: Path = ROOT) -> list[str]:
    """Instructions that decide how fast products are, in the kernel's words, the widest last. A
    hypervisor's model name does not tell: its machines have one name and are five times apart.
    """
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    has = set(found[1].split()) if found else set()
    return [name for name in _FEATURES if name in has]


_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16", "i8mm")


def cpu_text(facts: Mapping[str, Any]) -> str:
    """The processor of `machine_facts` and the widest of what it can; files of before know less."""
    model = facts["cpu_model"] or facts.get("architecture") or "an unnamed processor"
    features = facts.get("cpu_features")
    return f"{model} with {features[-1]}" if features else model


def cpu_count() -> int:
    """Processors of the machine, in use by us or not."""
    return os.cpu_count() or 1


def stolen_seconds(root: Path = ROOT) -> float:
    """Processor time since the start, of all processors, that a hypervisor gave to others while
    this machine had work for it. 0 where none is counted.

    Source: proc_stat(5), steal.
    """
    try:
        fields = (root / "proc/stat").read_text().split(maxsplit=9)
        return int(fields[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def package_version(name: str) -> str | None:
    """The installed version, found without importing the package; None when not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds `folder`, and whether its code differs from it.

    None outside a checkout, also when an installed package merely lies below someone else's.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or not (Path(top) / "src/dualblade/host/machine.py").exists():
        return None
    changes = _git(Path(top), "status", "--porcelain", "--untracked-files=no", "--", *_CODE)
    return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(changes)}


_CODE = ("src", "native", "scripts", "examples", "pyproject.toml", "CMakeLists.txt")


def command_line() -> str:
    """The command that runs now, as one would type it."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
