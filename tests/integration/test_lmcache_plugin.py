"""examples/lmcache: an L2 adapter for LMCache keeps its promises, with LMCache and without it."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dualblade import Closed, ConfigError
from dualblade.io import Arena, Op, open_engine
from dualblade.testing import Fault, FaultyEngine
from dualblade.units import BLOCK_BYTES, KIB, MIB, round_up
from tests import fake_lmcache

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lmcache"
WAIT_MS = 20_000


@dataclass(frozen=True)
class Key:
    """Of an object, as an adapter sees LMCache's: hashable, with a salt."""

    name: int
    cache_salt: str = ""


class Memory:
    """An object in L1: `size_bytes` at `lead` bytes into an arena, `room_bytes` allocated."""

    def __init__(self, content: bytes, *, lead: int = 0, room_bytes: int | None = None) -> None:
        self._room_bytes = room_bytes or round_up(len(content), BLOCK_BYTES)
        self._arena = Arena(lead + self._room_bytes)
        self._lead = lead
        self._size_bytes = len(content)
        self._arena.buffer[lead : lead + len(content)] = content

    @property
    def data_ptr(self) -> int:
        return self._arena.address + self._lead

    def get_size(self) -> int:
        return self._size_bytes

    def get_physical_size(self) -> int:
        return self._room_bytes

    @property
    def content(self) -> bytes:
        return bytes(self._arena.buffer[self._lead : self._lead + self._size_bytes])


def content(name: int, size_bytes: int) -> bytes:
    return random.Random(name).randbytes(size_bytes)


@pytest.fixture(params=["fake", "lmcache"])
def plugin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if request.param == "fake":
        fake_lmcache.install(monkeypatch)
    else:
        pytest.importorskip("lmcache.v1.distributed.l2_adapters.base", reason="no lmcache here")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    ours = ("dualblade_l2", "dualblade_slots")
    for name in ours:
        sys.modules.pop(name, None)
    yield importlib.import_module("dualblade_l2")
    for name in ours:
        sys.modules.pop(name, None)


class Driver:
    """An adapter as LMCache's controllers drive it: submit, wait for the event, ask."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter
        self.accessed: list[Any] = []
        self.deleted: list[Any] = []
        adapter.register_listener(self)

    def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        assert len(keys) == len(sizes)

    def on_l2_keys_accessed(self, keys: list[Any]) -> None:
        self.accessed += keys

    def on_l2_keys_deleted(self, keys: list[Any]) -> None:
        self.deleted += keys

    def store(self, objects: dict[Key, Memory]) -> Any:
        task = self.adapter.submit_store_task(list(objects), list(objects.values()))
        _await(self.adapter.get_store_event_fd())
        (done,) = self.adapter.pop_completed_store_tasks().items()
        assert done[0] == task
        return done[1]

    def lookup(self, *keys: Key) -> list[bool]:
        task = self.adapter.submit_lookup_and_lock_task(list(keys), {})
        _await(self.adapter.get_lookup_and_lock_event_fd())
        return self._bits(self.adapter.query_lookup_and_lock_result, task, len(keys))

    def load(self, objects: dict[Key, Memory]) -> list[bool]:
        task = self.adapter.submit_load_task(list(objects), list(objects.values()))
        _await(self.adapter.get_load_event_fd())
        return self._bits(self.adapter.query_load_result, task, len(objects))

    def used_bytes(self) -> int:
        return self.adapter.get_usage().total_bytes_used

    @staticmethod
    def _bits(query: Callable[[int], Any], task: int, count: int) -> list[bool]:
        bitmap = query(task)
        assert query(task) is None, "a result is given once"
        return [bitmap.test(index) for index in range(count)]


def _await(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(WAIT_MS), "no event"
    os.eventfd_read(fd)


@pytest.fixture
def open_driver(plugin: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Opens adapters on a private store in tmp_path; closes them."""
    opened: list[Any] = []

    def open_one(**parameters: Any) -> Driver:
        config = {"store": str(tmp_path), "capacity_bytes": "64MiB", **parameters}
        adapter = plugin.DualBladeL2Adapter(plugin.DualBladeL2AdapterConfig.from_dict(config))
        opened.append(adapter)
        return Driver(adapter)

    yield open_one
    for adapter in opened:
        adapter.close()


SIZES = (BLOCK_BYTES, 256 * KIB, MIB, 3 * MIB + BLOCK_BYTES, 5000, 1)


@pytest.mark.parametrize("path", ["direct", "page-cache"])
def test_what_was_stored_comes_back(open_driver: Callable[..., Driver], path: str) -> None:
    driver = open_driver(path=path)
    sizes = dict(enumerate(SIZES * 4))
    stored = {Key(name): Memory(content(name, size)) for name, size in sizes.items()}
    result = driver.store(stored)
    assert result.is_successful()
    assert result.bytes_transferred() == sum(sizes.values())
    loaded = {Key(name): Memory(bytes(size)) for name, size in sizes.items()}
    assert driver.load(loaded) == [True] * len(sizes)
    assert driver.accessed == list(loaded)
    for key, memory in loaded.items():
        assert memory.content == stored[key].content
    status = driver.adapter.report_status()
    blocks = sum(round_up(size, BLOCK_BYTES) for size in sizes.values())
    door = path.replace("-", "_")
    assert status[f"{door}_read_bytes"] == status[f"{door}_write_bytes"] == blocks
    assert driver.used_bytes() == blocks


def test_misses_are_misses_and_touch_nothing(open_driver: Callable[..., Driver]) -> None:
    driver = open_driver()
    driver.store({Key(1): Memory(content(1, MIB))})
    absent, longer = Memory(b"a" * MIB), Memory(b"b" * 2 * MIB)
    salted = Memory(b"c" * MIB)
    assert driver.load({Key(2): absent, Key(1): longer, Key(1, "salt"): salted}) == [False] * 3
    assert driver.accessed == []
    assert absent.content == b"a" * MIB
    assert longer.content == b"b" * 2 * MIB
    assert salted.content == b"c" * MIB
    assert driver.lookup(Key(2), Key(1), Key(1, "salt")) == [False, True, False]
    assert driver.adapter.report_status()["direct_read_bytes"] == 0


def test_a_key_is_stored_once(open_driver: Callable[..., Driver]) -> None:
    driver = open_driver()
    driver.store({Key(1): Memory(content(1, MIB))})
    again = driver.store({Key(1): Memory(content(1, MIB)), Key(2): Memory(content(2, MIB))})
    assert again.is_successful()
    assert again.bytes_transferred() == MIB
    assert driver.adapter.report_status()["direct_write_bytes"] == 2 * MIB
    assert driver.used_bytes() == 2 * MIB


def test_two_stores_of_one_key_at_once_keep_one(open_driver: Callable[..., Driver]) -> None:
    driver = open_driver()
    for _ in range(2):
        driver.adapter.submit_store_task([Key(1)] * 2, [Memory(content(1, MIB)) for _ in range(2)])
    done: dict[int, Any] = {}
    while len(done) < 2:
        _await(driver.adapter.get_store_event_fd())
        done.update(driver.adapter.pop_completed_store_tasks())
    assert all(result.is_successful() for result in done.values())
    assert driver.used_bytes() == MIB
    driver.adapter.delete([Key(1), Key(1)])
    assert driver.deleted == [Key(1)]
    assert driver.adapter.report_status()["store_used_bytes"] == 0


def test_locked_objects_are_not_deleted(open_driver: Callable[..., Driver]) -> None:
    driver = open_driver()
    keys = [Key(name) for name in range(3)]
    driver.store({key: Memory(content(key.name, MIB)) for key in keys})
    assert driver.lookup(keys[0]) == driver.lookup(keys[0]) == [True]  # two locks on it
    driver.adapter.delete([*keys, Key(9)])
    assert driver.deleted == keys[1:]
    assert driver.lookup(keys[1]) == [False]
    assert driver.used_bytes() == MIB
    driver.adapter.submit_unlock([keys[0], keys[1]])
    driver.adapter.delete(keys)
    memory = Memory(bytes(MIB))
    assert driver.load({keys[0]: memory}) == [True]
    assert memory.content == content(0, MIB)
    driver.adapter.submit_unlock([keys[0]])
    driver.adapter.submit_unlock([keys[0]])  # one too many: nothing happens
    driver.adapter.delete(keys)
    assert sorted(key.name for key in driver.deleted) == [0, 1, 2]
    assert driver.used_bytes() == driver.adapter.report_status()["store_used_bytes"] == 0


def test_a_full_store_fails_the_task_and_keeps_what_fits(
    open_driver: Callable[..., Driver], caplog: pytest.LogCaptureFixture
) -> None:
    driver = open_driver(capacity_bytes=4 * MIB)
    keys = [Key(name) for name in range(6)]
    result = driver.store({key: Memory(content(key.name, MIB)) for key in keys})
    assert not result.is_successful()
    assert "2 of 6 objects refused: the store has no" in caplog.text
    assert driver.used_bytes() == driver.adapter.get_usage().total_capacity_bytes == 4 * MIB
    loaded = {key: Memory(bytes(MIB)) for key in keys}
    assert driver.load(loaded) == [True] * 4 + [False] * 2
    assert all(loaded[key].content == content(key.name, MIB) for key in keys[:4])
    driver.adapter.delete(keys[:2])
    assert driver.store({key: Memory(content(key.name, MIB)) for key in keys[4:]}).is_successful()
    assert driver.load({keys[5]: loaded[keys[5]]}) == [True]
    assert loaded[keys[5]].content == content(5, MIB)


@pytest.fixture
def engine(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FaultyEngine:
    """The engine that the next adapter gets."""
    faulty = FaultyEngine(open_engine())
    monkeypatch.setattr(plugin, "open_engine", lambda *_args, **_settings: faulty)
    return faulty


def test_a_failed_write_is_not_found(
    engine: FaultyEngine, open_driver: Callable[..., Driver], caplog: pytest.LogCaptureFixture
) -> None:
    driver = open_driver()
    engine.inject(Fault(op=Op.WRITE, nth=1))
    stored = {Key(name): Memory(content(name, MIB)) for name in range(3)}
    assert not driver.store(stored).is_successful()
    assert os.strerror(errno.EIO) in caplog.text
    assert driver.lookup(*stored) == [True, False, True]
    assert driver.used_bytes() == 2 * MIB
    assert driver.store({Key(1): stored[Key(1)]}).is_successful()
    memory = Memory(bytes(MIB))
    assert driver.load({Key(1): memory}) == [True]
    assert memory.content == content(1, MIB)


def test_a_failed_read_is_a_miss_and_forgotten_when_unlocked(
    engine: FaultyEngine, open_driver: Callable[..., Driver]
) -> None:
    driver = open_driver()
    stored = {Key(name): Memory(content(name, MIB)) for name in range(2)}
    driver.store(stored)
    assert driver.lookup(*stored) == [True, True]
    engine.inject(Fault(op=Op.READ, nth=0))
    assert driver.load({key: Memory(bytes(MIB)) for key in stored}) == [False, True]
    assert driver.lookup(Key(0)) == [False]
    assert driver.deleted == []
    driver.adapter.submit_unlock(list(stored))
    assert driver.deleted == [Key(0)]
    assert driver.used_bytes() == MIB
    assert driver.store({Key(0): stored[Key(0)]}).is_successful()
    assert driver.load({Key(0): Memory(bytes(MIB))}) == [True]


def test_an_object_that_is_being_read_keeps_its_slot(
    engine: FaultyEngine, open_driver: Callable[..., Driver]
) -> None:
    driver = open_driver()
    driver.store({Key(1): Memory(content(1, MIB))})
    engine.hold(Op.READ)
    memory = Memory(bytes(MIB))
    task = driver.adapter.submit_load_task([Key(1)], [memory])
    driver.adapter.submit_unlock([Key(1)])  # of a lock that nobody took
    driver.adapter.delete([Key(1)])
    assert driver.deleted == []
    assert driver.adapter.query_load_result(task) is None
    engine.release()
    _await(driver.adapter.get_load_event_fd())
    assert driver.adapter.query_load_result(task).test(0)
    assert memory.content == content(1, MIB)
    driver.adapter.delete([Key(1)])
    assert driver.deleted == [Key(1)]


def test_memory_that_direct_io_cannot_use_is_refused(
    plugin: ModuleType, open_driver: Callable[..., Driver], caplog: pytest.LogCaptureFixture
) -> None:
    driver = open_driver()
    unaligned = Memory(content(1, MIB), lead=512)
    assert not driver.store({Key(1): unaligned}).is_successful()
    assert "is not aligned to 4096 bytes" in caplog.text
    bare = Memory(content(2, 5000), room_bytes=5000)
    assert not driver.store({Key(2): bare}).is_successful()
    assert "5000 bytes without padding to 8192" in caplog.text
    assert driver.store({Key(1): Memory(content(1, MIB))}).is_successful()
    assert driver.load({Key(1): unaligned}) == [False]
    config = plugin.DualBladeL2AdapterConfig()
    with pytest.raises(ConfigError, match="aligned to 1 bytes") as caught:
        plugin.DualBladeL2Adapter(config, l1_memory_desc=SimpleNamespace(align_bytes=1))
    assert "--l1-align-bytes 4096" in (caught.value.hint or "")


def test_parameters_are_checked(plugin: ModuleType) -> None:
    read = plugin.DualBladeL2AdapterConfig.from_dict
    assert read({"capacity_bytes": "1GiB"}).capacity_bytes == 1 << 30
    for parameters, said in (
        ({"que_depth": 8}, "did you mean 'queue_depth'"),
        ({"path": "dual"}, "no such path"),
        ({"capacity_bytes": "much"}, "not a size"),
    ):
        with pytest.raises(ConfigError, match=said):
            read(parameters)


def test_closing_leaves_nothing(plugin: ModuleType, tmp_path: Path) -> None:
    named = tmp_path / "kv.store"
    gc.collect()  # what other tests left is not to go in between
    before = set(os.listdir("/proc/self/fd"))
    config = plugin.DualBladeL2AdapterConfig.from_dict({"store": str(named)})
    adapter = plugin.DualBladeL2Adapter(config)
    events = (
        adapter.get_store_event_fd(),
        adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    )
    assert len(set(events)) == 3
    memory = Memory(content(1, 8 * MIB))
    adapter.submit_store_task([Key(1)], [memory])  # close waits for it
    adapter.close()
    adapter.close()
    assert named.stat().st_size < 4 * MIB
    assert memory.content[:BLOCK_BYTES] not in named.read_bytes()
    assert not adapter.report_status()["is_healthy"]
    for submit in (adapter.submit_store_task, adapter.submit_load_task):
        with pytest.raises(Closed):
            submit([Key(1)], [memory])
    assert "dualblade-l2" not in {thread.name for thread in threading.enumerate()}
    del adapter, submit
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_adapter_that_cannot_open_leaves_nothing(plugin: ModuleType, tmp_path: Path) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_text("not a store")
    gc.collect()  # what other tests left is not to go in between
    before = set(os.listdir("/proc/self/fd"))
    config = plugin.DualBladeL2AdapterConfig.from_dict({"store": str(foreign)})
    with pytest.raises(Exception, match="not a dualblade store"):
        plugin.DualBladeL2Adapter(config)
    assert set(os.listdir("/proc/self/fd")) == before
    assert foreign.read_text() == "not a store"


def test_two_controllers_at_once(open_driver: Callable[..., Driver]) -> None:
    """One stores and evicts, the other looks up and loads, as LMCache's threads do: what is found
    is what was stored, to the byte, and in the end no room is lost."""
    driver = open_driver(capacity_bytes=8 * MIB)
    adapter, stop, hits = driver.adapter, threading.Event(), 0
    sizes = {Key(name): (64 + 64 * (name % 3)) * KIB for name in range(96)}
    contents = {key: content(key.name, size) for key, size in sizes.items()}

    def store_and_evict() -> None:
        chance = random.Random(1)
        for _ in range(150):
            keys = chance.sample(list(sizes), 8)
            driver.store({key: Memory(contents[key]) for key in keys})
            adapter.delete(chance.sample(list(sizes), 24))
        stop.set()

    storing = threading.Thread(target=store_and_evict)
    storing.start()
    chance = random.Random(2)
    while not stop.is_set():
        keys = chance.sample(list(sizes), 8)
        found = [key for key, hit in zip(keys, driver.lookup(*keys), strict=True) if hit]
        loaded = {key: Memory(bytes(sizes[key])) for key in found}
        if found:
            assert all(driver.load(loaded)), "a locked object was lost"
        assert all(memory.content == contents[key] for key, memory in loaded.items())
        adapter.submit_unlock(found)
        hits += len(found)
    storing.join()
    assert hits > 0
    adapter.delete(list(sizes))
    assert driver.used_bytes() == adapter.report_status()["store_used_bytes"] == 0


def test_lmcache_bench_verifies_it(tmp_path: Path) -> None:
    """LMCache's own benchmark stores, finds, loads and compares."""
    pytest.importorskip("lmcache.v1.distributed.l2_adapters.base", reason="no lmcache here")
    program = shutil.which("lmcache", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program is not None
    spec = {
        "type": "plugin",
        "module_path": "dualblade_l2",
        "class_name": "DualBladeL2Adapter",
        "adapter_params": {"store": str(tmp_path)},
    }
    sizes = ("--num-keys", "8", "--in-flight", "2", "--rounds", "2", "--l1-align-bytes", "4096")
    run = subprocess.run(
        [program, "bench", "l2", "--l2-adapter", json.dumps(spec), *sizes, "--no-skip-verify"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE), "LMCACHE_TRACK_USAGE": "false"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "All 16 keys data verified OK" in run.stdout
    assert list(tmp_path.iterdir()) == [], "a private store leaves nothing"


@pytest.mark.parametrize("plugin", ["lmcache"], indirect=True)
def test_lmcache_evicts_from_it(open_driver: Callable[..., Driver]) -> None:
    """LMCache's own controller, at its watermark, takes the least recently used that it may."""
    controllers = "lmcache.v1.distributed.storage_controllers.eviction_controller"
    eviction = pytest.importorskip(controllers, reason="no lmcache here")
    config = importlib.import_module("lmcache.v1.distributed.config").EvictionConfig
    driver = open_driver(capacity_bytes=8 * MIB)
    settings = config(eviction_policy="LRU", trigger_watermark=0.9, eviction_ratio=0.5)
    state = eviction.L2AdapterEvictionState(0, driver.adapter, settings)
    controller = eviction.L2EvictionController([state])
    keys = [Key(name) for name in range(8)]
    driver.store({key: Memory(content(key.name, MIB)) for key in keys})
    assert driver.lookup(keys[7]) == [True]
    assert driver.load({keys[6]: Memory(bytes(MIB))}) == [True]
    evicted = threading.Event()
    driver.adapter.register_listener(
        SimpleNamespace(on_l2_keys_deleted=lambda _keys: evicted.set())
    )
    controller.start()
    assert evicted.wait(WAIT_MS / 1000)
    controller.stop()
    # Of one batch LMCache gives up the last first, so 7, 5, 4, 3: 6 was read since, 7 is locked.
    assert [key.name for key in driver.deleted] == [5, 4, 3]
    assert driver.used_bytes() == 5 * MIB
