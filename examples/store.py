"""The storage layer alone, for engines of other kinds: bytes to a drive and back past the page
cache. It imports nothing but Python's standard library and the native core, so that
`pip install --no-deps .` does for it (what it builds is in pyproject.toml).

    python examples/store.py FOLDER

FOLDER is on the drive; the store is a private file in it, and gone at the end. A store file, or a
device that `dualblade store format` was given, may be named instead: it keeps nothing either, all
that it held is given up when it is closed or opened. Checksums are the pipeline's, not the store's.
"""

# ruff: noqa: T201 - it prints
import os
import sys

from dualblade.io import Arena, open_engine
from dualblade.store import Door, Store

if len(sys.argv) != 2:
    sys.exit(__doc__)
BLOCK = 1 << 20  # of KV; offsets, sizes and addresses are multiples of 4096
COUNT = 8

# In this order: the store is closed first, and the arena last, for a transfer may be under way.
with (
    Arena(2 * COUNT * BLOCK) as arena,
    open_engine(queue_depth=8) as engine,
    Store.open(sys.argv[1], engine, capacity_bytes="64MiB") as store,
):
    engine.register_arena(arena)  # spares the kernel its work for each transfer
    sent, got = arena.buffer[: COUNT * BLOCK], arena.buffer[COUNT * BLOCK :]
    sent[:] = os.urandom(len(sent))

    extent = store.allocate(COUNT * BLOCK, Door.DIRECT)
    writes = [
        store.write(extent, at, arena.address + at, BLOCK) for at in range(0, len(sent), BLOCK)
    ]
    for ticket in writes:  # all were under way together
        ticket.wait()

    into = arena.address + len(sent)
    read = store.read(extent, 0, into, len(got))  # one ticket; it is cut to pieces below
    read.wait(BLOCK)  # the first block has landed, and may be used
    read.wait()
    print(f"{len(got) >> 20} MiB came back {'as they were' if got == sent else 'changed'}")

    store.move(extent, Door.PAGE_CACHE)  # from now on through the page cache; no data moves
    store.read(extent, 0, into, BLOCK).wait()
    print(f"{store.cached_bytes(extent) >> 20} MiB of the extent are in the page cache")
    store.free(extent)
    print(f"{engine.name}, {store.path}: {store.counters}")
