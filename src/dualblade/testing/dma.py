"""A DMA engine in a thread: the copy stage of a GPU, without one.

What a device does to copies, seen from the host:

1. They run in the order that they were issued, one at a time, while the host goes on.
2. Each takes `latency_seconds`, and its bytes at `bytes_per_second`.
3. Memory that a copy will fill holds anything until its event has passed: here, bytes that are no
   number in any float type, so that reading them early shows.
4. A copy that fails is told when somebody waits for it, and every later one fails too.

The model computes on the CPU, in the caller's thread: waiting for a copy on its behalf blocks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from dualblade.io import Arena
from dualblade.pipeline.staging import CopyEvent, Slot

_NOT_A_NUMBER = 0xFF


@dataclass(slots=True, eq=False)
class _Copy:
    """One copy; also the event of its end."""

    work: Callable[[], object]
    size_bytes: int
    began_ns: int = 0
    ended_ns: int = 0
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def query(self) -> bool:
        return self.ended.is_set()

    def synchronize(self) -> None:
        self.ended.wait()
        if self.error is not None:
            raise self.error

    def span_ns(self) -> tuple[int, int]:
        return self.began_ns, self.ended_ns


class SimulatedDma:
    """A copy stage (`pipeline.copies.Copies`) with a speed. `fail_nth`: the copy that fails, from
    0. Give `KVSettings.copies` a function that makes one."""

    ahead = 2
    in_place = False

    def __init__(
        self,
        *,
        bytes_per_second: float = float("inf"),
        latency_seconds: float = 0.0,
        fail_nth: int | None = None,
    ) -> None:
        self.count = 0
        self._bytes_per_second = bytes_per_second
        self._latency_seconds = latency_seconds
        self._fail_nth = fail_nth
        self._last: _Copy | None = None
        self._queue: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="simulated-dma", daemon=True)
        self._thread.start()

    def __call__(self, device: torch.device, arena: Arena) -> SimulatedDma:  # noqa: ARG002
        """Itself, as `KVSettings.copies` asks for it."""
        return self

    def begin(self) -> None:
        """What the model was given to do has been done."""

    def end(self) -> None:
        self.use(self._last)

    def use(self, event: CopyEvent | None) -> None:
        if event is not None:
            event.synchronize()

    def issuing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def land(self, slot: Slot, size_bytes: int) -> torch.Tensor:
        landed = torch.full((size_bytes,), _NOT_A_NUMBER, dtype=torch.uint8)
        staged = slot.memory[:size_bytes]
        self._issue(lambda: landed.copy_(staged), size_bytes)
        return landed

    def landed(self, slot: Slot) -> None:
        slot.busy = self._last

    def copy(self, place: torch.Tensor, rows: torch.Tensor) -> None:
        self._issue(lambda: place.copy_(rows), 0)  # on the device itself: no way over the bus

    def fill(self, slot: Slot, view: torch.Tensor, rows: torch.Tensor) -> None:
        self._issue(lambda: view.copy_(rows), rows.nbytes)
        slot.busy = self._last

    def close(self) -> None:
        """End the thread after what was issued. Idempotent."""
        self._queue.put(None)
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def _issue(self, work: Callable[[], object], size_bytes: int) -> None:
        self._last = _Copy(work, size_bytes)
        self._queue.put(self._last)

    def _run(self) -> None:
        failed: Exception | None = None
        while (copy := self._queue.get()) is not None:
            copy.began_ns = time.monotonic_ns()
            seconds = self._latency_seconds + copy.size_bytes / self._bytes_per_second
            if seconds:
                time.sleep(seconds)
            if self.count == self._fail_nth:
                failed = RuntimeError(f"simulated DMA: copy {self.count} failed")
            self.count += 1
            if failed is None:
                try:
                    copy.work()
                except (RuntimeError, ValueError, TypeError) as problem:  # told as a device's
                    failed = problem
            copy.error = failed
            copy.ended_ns = time.monotonic_ns()
            copy.ended.set()
