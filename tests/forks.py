"""A forked child that does nothing, as a worker that never looks at its parent's store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from dualblade.testing.contract import fork


@contextlib.contextmanager
def waiting_child() -> Iterator[None]:
    """It runs within."""
    come, go = os.pipe(), os.pipe()
    child = fork()
    if child == 0:
        try:
            os.write(come[1], b"x")
            os.read(go[0], 1)
        finally:
            os._exit(0)
    os.read(come[0], 1)
    try:
        yield
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)
        for fd in (*come, *go):
            os.close(fd)
