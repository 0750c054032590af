"""A store striped over namespaces of two drives: each gets the commands for its stripes alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from dualblade.errors import NotAStore
from dualblade.io import Arena, Engine, open_engine
from dualblade.store import Door, Extent, Store
from dualblade.store.formatting import carry_out_format, carry_out_wipe, plan_formats, plan_wipes
from dualblade.store.inspect import inspect_store, store_problem
from dualblade.testing.contract import pattern
from dualblade.units import KIB, MIB
from tests.lab.guest.conftest import block_of, find_namespace, reads_of, writes_of
from tests.lab.guest.test_store import fill, read_back

SMALL = ("LABSMALL", 1, "small")
PAIRS = {
    "512 and 512": (SMALL, ("LABTWO", 3, "three")),
    "512 and 4096": (SMALL, ("LABTWO", 7, "four")),
}
CHUNK_BYTES = 256 * KIB
COMMAND_BYTES = {"small": 128 * KIB, "three": CHUNK_BYTES, "four": CHUNK_BYTES}
"""One limit is the drive's, two are ours. All of a transfer is cut by the least that it meets."""


@pytest.fixture(params=PAIRS)
def members(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The image behind each of two namespaces, formatted as one store; wiped afterwards."""
    pair = {find_namespace(serial, number): node for serial, number, node in PAIRS[request.param]}
    carry_out_format(*plan_formats(list(pair)))
    yield pair
    carry_out_wipe(*plan_wipes(list(pair)), tell=lambda _: None)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine(queue_depth=4, chunk_bytes=CHUNK_BYTES) as opened:
        yield opened


def test_each_drive_gets_the_commands_for_its_stripes(
    members: dict[str, str], engine: Engine, arena: Arena
) -> None:
    """Counted by the drives: whole rows, a range that begins and ends within stripes, and one
    stripe alone, which the other drive knows nothing of."""
    nodes = members.values()
    with Store.open(list(members), engine) as store:
        assert (engine.name, engine.reason) == ("uring-cmd", None)
        engine.register_arena(arena)
        extent = store.allocate(4 * MIB, Door.DIRECT)
        data = pattern(4 * MIB, seed=1)
        whole = dict.fromkeys(nodes, 2 * MIB // COMMAND_BYTES["small"])
        assert commands(store, extent, 0, 4 * MIB, members) == whole
        before = {node: writes_of(node) for node in nodes}
        fill(store, extent, arena, data)
        assert {node: writes_of(node) - before[node] for node in nodes} == whole
        stripes = [(stripe * MIB, MIB) for stripe in range(4)]
        for at, size in [(0, 4 * MIB), (64 * KIB, 3 * MIB), *stripes]:
            before = {node: reads_of(node) for node in nodes}
            arena.buffer[:size] = bytes(size)
            store.read(extent, at, arena.address, size).wait()
            assert arena.buffer[:size] == data[at : at + size]
            counted = {node: reads_of(node) - before[node] for node in nodes}
            assert counted == commands(store, extent, at, size, members)
            if size == MIB:
                assert sorted(counted.values()) in ([0, 4], [0, 8])
        assert store.page_cache_bytes() == 0


def commands(
    store: Store, extent: Extent, at: int, size_bytes: int, members: dict[str, str]
) -> dict[str, int]:
    """How many each drive needs for a range, by the table of docs/format.md."""
    count = dict.fromkeys(members.values(), 0)
    parts = list(store._members.stripes.parts(extent.range.offset + at, size_bytes))
    named = [members[store._members.backings[part.member].path] for part in parts]
    limit = min(COMMAND_BYTES[node] for node in named)
    for node, part in zip(named, parts, strict=True):
        count[node] += -(-part.size_bytes // limit)
    return count


def test_both_doors_see_the_same_bytes(
    members: dict[str, str], engine: Engine, arena: Arena
) -> None:
    """And so do the block devices of the same store, named in another order."""
    with Store.open(list(members), engine, keep_blocks=True) as store:
        extent = store.allocate(4 * MIB, Door.DIRECT)
        for turn, door in enumerate([Door.PAGE_CACHE, Door.DIRECT] * 2):
            data = pattern(4 * MIB, seed=turn)
            fill(store, extent, arena, data)
            store.move(extent, door)
            assert read_back(store, extent, arena, len(data)) == data
            assert store.page_cache_bytes() == (4 * MIB if door is Door.PAGE_CACHE else 0)
    with (
        open_engine(queue_depth=4) as other,
        Store.open([block_of(path) for path in reversed(members)], other) as store,
    ):
        assert other.name == "io_uring"
        assert [backing.path for backing in store._members.backings] == [
            block_of(path) for path in members
        ]
        extent = store.allocate(4 * MIB, Door.DIRECT)
        assert read_back(store, extent, arena, len(data)) == data


def test_both_drives_are_held_and_both_are_needed(members: dict[str, str], engine: Engine) -> None:
    first, second = members
    with Store.open([second, first], engine) as store:
        assert store.path == f"{first} + {second}"
        for path in members:
            with pytest.raises(OSError, match="busy") as caught:
                os.open(block_of(path), os.O_RDONLY | os.O_EXCL)
            assert caught.value.errno == errno.EBUSY
            refused([first, second], "is in use")
            with pytest.raises(NotAStore):
                plan_formats([path])
    refused([first], f"{first} is member 1 of 2 of a striped store\nname all 2 members")
    refused([second], f"{second} is member 2 of 2 of a striped store")
    refused([first, "/dev/ng99n1"], "/dev/ng99n1 does not exist, and other members")
    refused([first, block_of(first)], "in use")
    assert not os.path.exists("/dev/ng99n1")
    assert store_problem([inspect_store(path) for path in members]) is None


def refused(paths: list[str], why: str) -> None:
    with open_engine() as engine, pytest.raises(NotAStore) as caught:
        Store.open(paths, engine)
    assert why in str(caught.value)


@pytest.mark.parametrize("members", ["512 and 4096"], indirect=True)
def test_the_same_tokens_as_in_memory(members: dict[str, str]) -> None:
    import torch
    from transformers import DynamicCache

    from dualblade import DualBladeCache
    from tests.integration.tiny_models import tiny_model
    from tests.lab.guest.test_generation import generate

    model = tiny_model()
    expected = generate(model, DynamicCache(), max_new_tokens=4)
    for path in ("direct", "dual"):
        before = {node: reads_of(node) for node in members.values()}
        with DualBladeCache.for_model(
            model, store=list(members), path=path, memory_budget="16MiB"
        ) as cache:
            assert torch.equal(generate(model, cache, max_new_tokens=4), expected)
            stats = cache.stats()
            assert stats.engine.name == "uring-cmd"
            assert stats.store_path == " + ".join(members)
            assert stats.stored_bytes > 0
            if path == "direct":
                read = sum(reads_of(node) - before[node] for node in members.values())
                assert stats.io.direct_read_bytes > 0
                assert all(reads_of(node) > count for node, count in before.items())
                assert read >= stats.io.direct_read_bytes // COMMAND_BYTES["small"]
                assert stats.memory.page_cache_bytes == 0
