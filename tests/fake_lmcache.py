"""The part of LMCache that its L2 plug-ins meet, for machines without it.

Names and behaviour as in lmcache 0.5.6, written from its interface: bits, results, event
descriptors, and an adapter's base class that keeps count of bytes and tells listeners.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest


class Bitmap:
    def __init__(self, size: int) -> None:
        self._bits = [False] * size

    def set(self, index: int) -> None:
        self._bits[index] = True

    def test(self, index: int) -> bool:
        return self._bits[index]


class L2StoreResult(int):
    def __new__(cls, success: bool, bytes_transferred: int) -> L2StoreResult:
        return super().__new__(cls, bytes_transferred if success else -1)

    def is_successful(self) -> bool:
        return self >= 0

    def bytes_transferred(self) -> int:
        return max(int(self), 0)


class EventNotifier:
    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def notify(self) -> None:
        os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1


class Usage:
    def __init__(self, used: int, capacity: int) -> None:
        self.total_bytes_used = used
        self.total_capacity_bytes = capacity


class L2AdapterInterface:
    def __init__(self, max_capacity_bytes: int = 0) -> None:
        self._max_capacity_bytes = max_capacity_bytes
        self._used = 0
        self._listeners: list[Any] = []

    def register_listener(self, listener: Any) -> None:
        self._listeners.append(listener)

    def get_usage(self) -> Usage:
        return Usage(self._used, self._max_capacity_bytes)

    def _notify_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self._used += sum(sizes)
        for listener in self._listeners:
            listener.on_l2_keys_stored(keys, sizes)

    def _notify_keys_accessed(self, keys: list[Any]) -> None:
        for listener in self._listeners:
            listener.on_l2_keys_accessed(keys)

    def _notify_keys_deleted(self, keys: list[Any], sizes: list[int]) -> None:
        self._used -= sum(sizes)
        for listener in self._listeners:
            listener.on_l2_keys_deleted(keys)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for lmcache until the test ends."""
    l2 = "lmcache.v1.distributed.l2_adapters"
    names: dict[str, dict[str, Any]] = {
        "lmcache": {},
        "lmcache.lmcache_native": {"Bitmap": Bitmap},
        "lmcache.v1": {},
        "lmcache.v1.distributed": {},
        "lmcache.v1.distributed.api": {"MemoryLayoutDesc": object, "ObjectKey": object},
        "lmcache.v1.distributed.internal_api": {
            "L1MemoryDesc": object,
            "L2StoreResult": L2StoreResult,
        },
        l2: {},
        f"{l2}.base": {"L2AdapterInterface": L2AdapterInterface},
        f"{l2}.config": {"L2AdapterConfigBase": object},
        "lmcache.v1.memory_management": {"MemoryObj": object},
        "lmcache.v1.platform": {"create_event_notifier": EventNotifier},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
