"""Small disks for tests, on loop devices: one that is honest, one whose writeback fails."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@contextlib.contextmanager
def ext4_disk(place: Path, image: Path, size_bytes: int) -> Iterator[Path]:
    """A sparse ext4 file system of `size_bytes` in `image`, mounted at `place`."""
    image.touch()
    os.truncate(image, size_bytes)
    place.mkdir()
    command = ["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", image]
    subprocess.run(command, check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def disk_with_failing_writeback(
    tmp_path: Path, *, real_bytes: int, size_bytes: int
) -> Iterator[Path]:
    """An ext4 file system that says it has `size_bytes` and really has about `real_bytes`.

    Its image is a sparse file on a smaller disk: blocks can be allocated, pages can be dirtied,
    and writing them back fails with EIO once the smaller disk is full.
    """
    with (
        ext4_disk(tmp_path / "outer", tmp_path / "outer.img", real_bytes) as outer,
        ext4_disk(tmp_path / "inner", outer / "inner.img", size_bytes) as inner,
    ):
        yield inner
