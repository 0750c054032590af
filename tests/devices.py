"""Loop devices of the tests' own: real block devices over sparse files."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root")


@contextlib.contextmanager
def loop_device(image: Path, size_bytes: int, block_bytes: int = 4096) -> Iterator[str]:
    """A loop device over `image`, made sparse if it is missing. Skips where there is none."""
    if not image.exists():
        image.touch()
        os.truncate(image, size_bytes)
    # Without --direct-io the image's own pages would be cached beside the device's.
    options = ["--show", "--partscan", "--direct-io=on", "-b", str(block_bytes)]
    made = subprocess.run(
        ["losetup", "-f", *options, image], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def contents(device: str | Path) -> bytes:
    """All bytes, past the page cache's copy of them."""
    with open(device, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()
