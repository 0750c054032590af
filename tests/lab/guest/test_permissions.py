"""Without root: what a group on both nodes is enough for (docs/raw-devices.md)."""

from __future__ import annotations

import codecs
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dualblade.errors import StorageError
from dualblade.io import Arena, EngineChoice, open_engine
from dualblade.store import Door, Store
from dualblade.store.formatting import carry_out_wipe, plan_wipe
from dualblade.testing.contract import pattern
from dualblade.units import MIB, format_size
from tests.lab.guest.conftest import block_of, find_namespace, formatted
from tests.lab.guest.test_store import fill, read_back

_NOBODY, _GROUP = 65534, 4711
_MEMLOCK_BYTES = 8 * MIB  # what Linux gives an ordinary user


@pytest.fixture
def path() -> Iterator[str]:
    """A formatted namespace whose nodes belong to root alone, as they are made."""
    path = formatted(find_namespace("LABTWO", 3))
    nodes = (path, block_of(path))
    modes = [os.stat(node).st_mode & 0o777 for node in nodes]
    for node in nodes:
        os.chmod(node, 0o600)
    yield path
    for node, mode in zip(nodes, modes, strict=True):
        os.chown(node, 0, 0)
        os.chmod(node, mode)
    carry_out_wipe(plan_wipe(path), tell=lambda _: None)


def give_to_group(node: str) -> None:
    """What the udev rule of docs/raw-devices.md does."""
    os.chown(node, 0, _GROUP)
    os.chmod(node, 0o660)


def as_user(
    wanted: Callable[[], None], groups: Sequence[int] = (), memlock_bytes: int = _MEMLOCK_BYTES
) -> None:
    """Call `wanted` in a process of an ordinary user: no capability, little memory to lock."""
    codecs.lookup("ascii")  # Python's own folder may be root's alone: what is imported by need too
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock_bytes, memlock_bytes))
            os.setgroups(groups)
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            assert "CapEff:\t0000000000000000\n" in Path("/proc/self/status").read_text()
            wanted()
            status = 0
        except BaseException:  # noqa: BLE001 - the parent fails the test
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def check_refused(path: str) -> None:
    with (
        open_engine() as engine,
        pytest.raises(StorageError, match=r"Permission denied\n.*group read and write permission"),
    ):
        Store.open(path, engine)


def test_without_permission_the_message_says_what_to_give(path: str) -> None:
    as_user(lambda: check_refused(path))
    give_to_group(path)
    as_user(lambda: check_refused(path), [_GROUP])  # the block device holds the namespace
    give_to_group(block_of(path))
    as_user(lambda: check_refused(path))  # in no group


@pytest.mark.parametrize("choice", ["auto", "posix"])
def test_a_group_may_read_and_write(path: str, choice: EngineChoice) -> None:
    """Commands by a ring and by ioctl, both doors, discards at close: no capability is needed."""
    give_to_group(path)
    give_to_group(block_of(path))

    def use() -> None:
        name = {"auto": "uring-cmd", "posix": "nvme-ioctl"}[choice]
        with open_engine(choice, queue_depth=4) as engine, Store.open(path, engine) as store:
            assert (engine.name, engine.reason) == (name, None)
            for size_bytes in (2 * MIB, 2 * _MEMLOCK_BYTES):
                with Arena(size_bytes) as arena:
                    fits = size_bytes <= _MEMLOCK_BYTES
                    assert engine.register_arena(arena) == (fits and name == "uring-cmd")
                    extent = store.allocate(size_bytes, Door.DIRECT)
                    data = pattern(size_bytes, seed=1)
                    fill(store, extent, arena, data)
                    assert read_back(store, extent, arena, len(data)) == data
                    store.move(extent, Door.PAGE_CACHE)
                    assert read_back(store, extent, arena, len(data)) == data
            note = f"buffers not registered: memlock limit {format_size(_MEMLOCK_BYTES)}"
            assert (note in engine.notes) == (name == "uring-cmd")
        with open(block_of(path), "rb") as raw:
            raw.seek(extent.range.offset)
            assert not any(raw.read(2 * MIB)), "closing did not discard it"

    as_user(use, [_GROUP])


def test_a_higher_limit_registers_more(path: str) -> None:
    give_to_group(path)
    give_to_group(block_of(path))

    def use() -> None:
        with open_engine() as engine, Store.open(path, engine), Arena(2 * _MEMLOCK_BYTES) as arena:
            assert engine.register_arena(arena)

    as_user(use, [_GROUP], memlock_bytes=4 * _MEMLOCK_BYTES)


def test_a_group_may_format_and_wipe(path: str) -> None:
    give_to_group(path)
    give_to_group(block_of(path))

    def wipe_and_format() -> None:
        carry_out_wipe(plan_wipe(path), tell=lambda _: None)
        formatted(path)

    as_user(wipe_and_format, [_GROUP])


def test_a_group_generates(path: str) -> None:
    give_to_group(path)
    give_to_group(block_of(path))

    import torch

    from dualblade import DualBladeCache, EngineConfig
    from tests.integration.tiny_models import tiny_model

    def generate() -> None:
        model, config = tiny_model(), EngineConfig(io_engine="uring-cmd")
        with DualBladeCache.for_model(
            model, store=path, path="direct", memory_budget="16MiB", config=config
        ) as cache:
            ids = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(1))
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                cache=cache,
                max_new_tokens=4,
            )
            assert made.shape == (1, 204)
            assert cache.stats().engine.name == "uring-cmd"
            assert cache.stats().io.direct_read_bytes > 0

    as_user(generate, [_GROUP])


def test_the_block_device_alone_serves_as_itself(path: str) -> None:
    """Wiped, formatted and used by O_DIRECT without the character device."""
    block = block_of(path)
    give_to_group(block)

    def use() -> None:
        check_refused(path)
        carry_out_wipe(plan_wipe(block), tell=lambda _: None)
        formatted(block)
        with (
            open_engine() as engine,
            Store.open(block, engine) as store,
            Arena(2 * MIB) as arena,
        ):
            assert engine.name == "io_uring"
            extent = store.allocate(2 * MIB, Door.DIRECT)
            data = pattern(2 * MIB, seed=1)
            fill(store, extent, arena, data)
            store.move(extent, Door.PAGE_CACHE)
            assert read_back(store, extent, arena, len(data)) == data

    as_user(use, [_GROUP])
