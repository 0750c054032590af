"""LMCache's second level (L2) in a dualblade store: a plug-in for `{"type": "plugin"}`.

    LMCache    submit_store_task   submit_load_task   lookup, unlock, delete
                      |                   |                    |
    adapter    a slot for each      the object's slot     the index: key -> slot, pins
                      |                   |
    dualblade  Store.write          Store.read            one ticket for each object
                      |                   |
               a thread waits for the tickets, fills in the index and the bitmaps, signals

Objects of one size share extents of the store, eight slots and more to each. Bytes go between the
drive and LMCache's own memory without a copy, past the page cache. An object is in the index from
the moment that it is whole on the drive; while it is locked or being read it is not deleted. What
is stored is gone when the adapter is closed: a dualblade store does not outlive its user.
"""

from __future__ import annotations

import difflib
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields
from typing import Any

from dualblade_slots import Slot, Slots
from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.platform import create_event_notifier

from dualblade import Closed, ConfigError, DualBladeError, Unsupported
from dualblade.io import EngineChoice, Ticket, open_engine
from dualblade.store import Door, Store, as_places, member_count
from dualblade.units import BLOCK_BYTES, MIB, parse_size, round_up

log = logging.getLogger("dualblade.lmcache")

PATHS = {"direct": Door.DIRECT, "page-cache": Door.PAGE_CACHE}


@dataclass(frozen=True, kw_only=True)
class DualBladeL2AdapterConfig(L2AdapterConfigBase):
    """`adapter_params` of the plug-in.

    store           a folder (a private file in it, gone at close), a file, a formatted device, or
                    a list of them: striped; none: a private file in the cache directory.
    capacity_bytes  most that objects may take; none: all that is free there, less a reserve.
    path            direct, or page-cache.
    io_engine, queue_depth, chunk_bytes  as in dualblade.EngineConfig.
    """

    store: str | Sequence[str] | None = None
    capacity_bytes: int | None = None
    path: str = "direct"
    io_engine: EngineChoice = "auto"
    queue_depth: int = 8
    chunk_bytes: int = MIB

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> DualBladeL2AdapterConfig:
        """Sizes may be words. Raises: ConfigError (a ValueError), for an unknown name too."""
        known = [each.name for each in fields(cls)]
        for name in d:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ConfigError(f"unknown parameter {name!r} of the dualblade plug-in", hint=hint)
        sizes = {
            name: parse_size(value)
            for name, value in d.items()
            if name.endswith("_bytes") and value is not None
        }
        config = cls(**{**d, **sizes})
        if config.path not in PATHS:
            raise ConfigError(f"no such path: {config.path!r}", hint=f"one of {', '.join(PATHS)}")
        return config

    @classmethod
    def help(cls) -> str:
        """What LMCache shows of the parameters."""
        return cls.__doc__ or ""


@dataclass(slots=True, eq=False)
class Stored:
    """An object on the drive. `reads` are under way; `broken`: one failed."""

    slot: Slot
    size_bytes: int
    locks: int = 0
    reads: int = 0
    broken: bool = False

    @property
    def pinned(self) -> bool:
        """Its slot may not go to another object."""
        return self.locks > 0 or self.reads > 0


@dataclass(slots=True, eq=False)
class Move:
    """One object on its way; `memory` is held until the kernel is done with it."""

    index: int
    key: ObjectKey
    stored: Stored
    memory: MemoryObj
    ticket: Ticket
    landed: bool = False

    def wait(self) -> None:
        """Until it has ended; `landed` then says how."""
        try:
            self.ticket.wait()
            self.landed = True
        except DualBladeError as error:
            log.error("%s: %s", self.key, error)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A submitted batch; `refused`: some of its moves could not even be started."""

    id: int
    key_count: int
    moves: list[Move]
    refused: bool
    end: Callable[[Task], None]


Gone = tuple[ObjectKey, int]
"""A key that is no more, and the bytes that it took."""


class DualBladeL2Adapter(L2AdapterInterface):
    """See the head of this file; the contract of each method is LMCache's L2AdapterInterface.

    A load whose read fails is a miss, and the object is forgotten once it is unlocked. A store
    of a key that is there already does nothing: keys are hashes of content. A store that does
    not fit fails as a whole, though what did fit is kept; LMCache evicts by `delete`, on usage.

    Raises: ConfigError, NotAStore, NoSpace, StorageError, Unsupported.
    """

    def __init__(
        self, config: DualBladeL2AdapterConfig, l1_memory_desc: L1MemoryDesc | None = None
    ) -> None:
        self._door = PATHS[config.path]
        direct = self._door is Door.DIRECT
        if direct and l1_memory_desc is not None and l1_memory_desc.align_bytes % BLOCK_BYTES:
            raise ConfigError(
                f"L1 memory is aligned to {l1_memory_desc.align_bytes} bytes: direct I/O needs "
                f"{BLOCK_BYTES}",
                hint=f"use --l1-align-bytes {BLOCK_BYTES}, or path page-cache",
            )
        places = as_places(config.store)
        with ExitStack() as opened:
            self._engine = opened.enter_context(
                open_engine(
                    config.io_engine,
                    queue_depth=config.queue_depth * member_count(places),
                    chunk_bytes=config.chunk_bytes,
                )
            )
            self._store = opened.enter_context(
                Store.open(
                    places,
                    self._engine,
                    direct=direct,
                    capacity_bytes=config.capacity_bytes,
                )
            )
            super().__init__(max_capacity_bytes=self._store.capacity_bytes)
            self._store_event, self._lookup_event, self._load_event = (
                opened.enter_context(closing(create_event_notifier())) for _ in range(3)
            )
            self._opened = opened.pop_all()
        # The store is used by one thread at a time: whoever holds the lock. Listeners are called
        # without it, since they may call us.
        self._lock = threading.Lock()
        self._slots = Slots(self._store, self._door)
        self._objects: dict[ObjectKey, Stored] = {}
        self._stores_done: dict[int, L2StoreResult] = {}
        self._lookups_done: dict[int, Bitmap] = {}
        self._loads_done: dict[int, Bitmap] = {}
        self._last_task_id = 0
        self._closed = False
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._end_tasks, name="dualblade-l2", daemon=True)
        self._thread.start()

    def get_store_event_fd(self) -> int:
        return self._store_event.fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        return self._lookup_event.fileno()

    def get_load_event_fd(self) -> int:
        return self._load_event.fileno()

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        with self._lock:
            return self._start(keys, objects, self._start_write, self._end_store)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._lock:
            done, self._stores_done = self._stores_done, {}
        return done

    def submit_lookup_and_lock_task(
        self,
        keys: list[ObjectKey],
        group_layout_descs: dict[int, MemoryLayoutDesc],  # noqa: ARG002 - LMCache's signature
    ) -> int:
        found = Bitmap(len(keys))
        with self._lock:
            self._check_open()
            task_id = self._next_task_id()
            for index, key in enumerate(keys):
                stored = self._objects.get(key)
                if stored is not None and not stored.broken:
                    stored.locks += 1
                    found.set(index)
            self._lookups_done[task_id] = found
        self._lookup_event.notify()
        return task_id

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._lookups_done.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        with self._lock:
            locked = [(key, self._objects[key]) for key in keys if key in self._objects]
            for _, stored in locked:
                stored.locks = max(stored.locks - 1, 0)
            gone = self._forget_broken(locked)
        self._tell_deleted(gone)

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        with self._lock:
            return self._start(keys, objects, self._start_read, self._end_load)

    def query_load_result(self, task_id: int) -> Bitmap | None:
        with self._lock:
            return self._loads_done.pop(task_id, None)

    def delete(self, keys: list[ObjectKey]) -> None:
        with self._lock:
            self._check_open()
            gone = [
                self._forget(key)
                for key in dict.fromkeys(keys)
                if key in self._objects and not self._objects[key].pinned
            ]
        self._tell_deleted(gone)

    def report_status(self) -> dict[str, Any]:
        with self._lock:
            return {
                "is_healthy": not self._closed and self._thread.is_alive(),
                "type": type(self).__name__,
                "store": self._store.path,
                "path": self._door.value,
                "engine": self._engine.name,
                "engine_reason": self._engine.reason,
                "objects": len(self._objects),
                "pinned_objects": sum(stored.pinned for stored in self._objects.values()),
                "store_used_bytes": self._store.used_bytes,
                "store_capacity_bytes": self._store.capacity_bytes,
                **asdict(self._store.counters),
            }

    def close(self) -> None:
        """Wait for what is under way, discard what is stored. Twice is once.

        Raises: StorageError when a named store could not be marked clean; all is released anyway.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._tasks.put(None)
        self._thread.join()
        self._opened.close()

    def _start(
        self,
        keys: list[ObjectKey],
        objects: list[MemoryObj],
        start: Callable[[int, ObjectKey, MemoryObj], Move | None],
        end: Callable[[Task], None],
    ) -> int:
        """Start a move for each key where there is one to make; the lock is held."""
        self._check_open()
        if len(keys) != len(objects):
            raise ConfigError(f"{len(keys)} keys, but {len(objects)} objects")
        moves: list[Move] = []
        refusals: list[DualBladeError] = []
        for index, (key, memory) in enumerate(zip(keys, objects, strict=True)):
            try:
                move = start(index, key, memory)
            except DualBladeError as error:
                refusals.append(error)
            else:
                moves += [move] if move is not None else []
        if refusals:
            log.error("%d of %d objects refused: %s", len(refusals), len(keys), refusals[0])
        task = Task(self._next_task_id(), len(keys), moves, bool(refusals), end)
        self._tasks.put(task)
        return task.id

    def _start_write(self, index: int, key: ObjectKey, memory: MemoryObj) -> Move | None:
        if key in self._objects:
            return None
        address, span_bytes = self._span(memory)
        slot = self._slots.take(span_bytes)
        ticket = self._store.write(slot.shelf.extent, slot.offset, address, span_bytes)
        return Move(index, key, Stored(slot, memory.get_size()), memory, ticket)

    def _start_read(self, index: int, key: ObjectKey, memory: MemoryObj) -> Move | None:
        stored = self._objects.get(key)
        if stored is None or stored.broken or stored.size_bytes != memory.get_size():
            return None
        address, span_bytes = self._span(memory)
        slot = stored.slot
        ticket = self._store.read(slot.shelf.extent, slot.offset, address, span_bytes)
        stored.reads += 1
        return Move(index, key, stored, memory, ticket)

    def _span(self, memory: MemoryObj) -> tuple[int, int]:
        """Address of `memory` and its bytes in whole blocks; the last may reach into the padding
        of its allocation. Raises: Unsupported.
        """
        address, span_bytes = memory.data_ptr, round_up(memory.get_size(), BLOCK_BYTES)
        if span_bytes > max(memory.get_physical_size(), memory.get_size()):
            raise Unsupported(
                f"an object of {memory.get_size()} bytes without padding to {span_bytes}",
                hint=f"align L1 memory to {BLOCK_BYTES} bytes, or use chunks of whole blocks",
            )
        if self._door is Door.DIRECT and address % BLOCK_BYTES:
            raise Unsupported(
                f"an object at {address:#x} is not aligned to {BLOCK_BYTES} bytes",
                hint=f"align L1 memory to {BLOCK_BYTES} bytes, or use path page-cache",
            )
        return address, span_bytes

    def _end_tasks(self) -> None:
        """The thread: tasks end in the order in which they were submitted, as their I/O does."""
        while (task := self._tasks.get()) is not None:
            for move in task.moves:
                move.wait()
            task.end(task)

    def _end_store(self, task: Task) -> None:
        fresh: dict[ObjectKey, Stored] = {}
        with self._lock:
            for move in task.moves:
                if move.landed and move.key not in self._objects and move.key not in fresh:
                    fresh[move.key] = move.stored
                else:
                    self._slots.give_back(move.stored.slot)
        # Told before anyone can find them: a deletion cannot be told of first.
        sizes = [stored.slot.size_bytes for stored in fresh.values()]
        self._tell(self._notify_keys_stored, list(fresh), sizes)
        whole = not task.refused and all(move.landed for move in task.moves)
        written_bytes = sum(move.stored.size_bytes for move in task.moves if move.landed)
        with self._lock:
            self._objects.update(fresh)
            self._stores_done[task.id] = L2StoreResult(whole, written_bytes)
        self._store_event.notify()

    def _end_load(self, task: Task) -> None:
        loaded = Bitmap(task.key_count)
        with self._lock:
            for move in task.moves:
                move.stored.reads -= 1
                if move.landed:
                    loaded.set(move.index)
                else:
                    move.stored.broken = True
            gone = self._forget_broken((move.key, move.stored) for move in task.moves)
        self._tell_deleted(gone)
        self._tell(self._notify_keys_accessed, [move.key for move in task.moves if move.landed])
        with self._lock:
            self._loads_done[task.id] = loaded
        self._load_event.notify()

    def _forget_broken(self, released: Iterable[tuple[ObjectKey, Stored]]) -> list[Gone]:
        """Drop those of `released` that could not be read and that nobody holds any more."""
        return [
            self._forget(key)
            for key, stored in released
            if stored.broken and not stored.pinned and self._objects.get(key) is stored
        ]

    def _forget(self, key: ObjectKey) -> Gone:
        stored = self._objects.pop(key)
        self._slots.give_back(stored.slot)
        return key, stored.slot.size_bytes

    def _tell_deleted(self, gone: list[Gone]) -> None:
        self._tell(self._notify_keys_deleted, [key for key, _ in gone], [size for _, size in gone])

    @staticmethod
    def _tell(notify: Callable[..., None], keys: list[ObjectKey], *sizes: list[int]) -> None:
        if not keys:
            return
        try:
            notify(keys, *sizes)
        except Exception:  # a listener's: the tasks of others must still end
            log.exception("a listener failed")

    def _next_task_id(self) -> int:
        self._last_task_id += 1
        return self._last_task_id

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the adapter is closed")
