"""Copies between staging and the model's device: on the CPU plain copies, on CUDA a side stream.

Two orders are kept. A layer that is gathered: `begin` before its copies, `end` before the model
reads them. Tiles one by one: `land`, `landed`, and `use` of the slot's event before attention. A
slot goes back to the drive when its event has passed (`pipeline/staging.py`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch

from dualblade.errors import Unsupported
from dualblade.io import Arena
from dualblade.pipeline.staging import CopyEvent, Slot
from dualblade.pipeline.timeline import now_ns
from dualblade.units import format_size

log = logging.getLogger("dualblade.pipeline")


class Copies(Protocol):
    """The copy stage. Second implementations: CUDA here, a simulated one in `dualblade.testing`.

    ahead  pieces that are copied before attention has come to them. 0: where the model's thread
           computes on the slot itself, or runs ahead of the device anyway.
    in_place  whether any memory of this process will do in place of a slot's.
    """

    ahead: int
    in_place: bool

    def begin(self) -> None:
        """Copies from here on come after what the model was given to do so far."""

    def end(self) -> None:
        """What the model is given to do from here on comes after all copies so far."""

    def use(self, event: CopyEvent | None) -> None:
        """What the model is given to do from here on comes after the copies up to `event`."""

    def issuing(self) -> AbstractContextManager[object]:
        """Where `land` and `copy` are called."""

    def land(self, slot: Slot, size_bytes: int) -> torch.Tensor:
        """The slot's bytes where the model can read them, once the slot's event has passed."""

    def landed(self, slot: Slot) -> None:
        """Have the slot busy until the copies issued so far have read it."""

    def copy(self, place: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy `rows` to `place`, of the same shape and dtype, both where the model computes."""

    def fill(self, slot: Slot, view: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy the model's `rows` into `view` of the slot, which is busy until that has ended."""

    def close(self) -> None:
        """Let the copies end."""


MakeCopies = Callable[[torch.device, Arena], Copies]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Stand-ins by size: numpy knows no bfloat16, and a copy needs no arithmetic."""


class HostCopies:
    """The model computes on the CPU: a copy has ended when the call returns."""

    ahead = 0
    in_place = True

    def begin(self) -> None:
        """Nothing to order: the previous layer's attention has ended."""

    def end(self) -> None:
        """Nothing to order: the copies have ended."""

    def use(self, event: CopyEvent | None) -> None:
        """Nothing to order."""

    def issuing(self) -> AbstractContextManager[object]:
        """Where copies between staging and the gather buffer are issued."""
        return nullcontext()

    def land(self, slot: Slot, size_bytes: int) -> torch.Tensor:
        """The slot's bytes where the model can read them: the slot itself."""
        return slot.memory[:size_bytes]

    def landed(self, slot: Slot) -> None:
        """The slot's bytes were used."""

    def copy(self, place: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy `rows` to `place`, of the same shape and dtype; both strided as they like.

        By numpy, in this thread alone: torch would split each piece over its OpenMP team, whose
        barriers stand still for milliseconds as soon as another process has one of the cores
        (2 cores, one taken: 0.3 GiB/s against 7), and whose threads spin while reads are waited
        for. Alone, one thread copies 7-11 GiB/s, several times what a drive delivers.
        """
        as_integers = _INTEGERS[place.element_size()]
        np.copyto(place.view(as_integers).numpy(), rows.view(as_integers).numpy())

    def fill(self, slot: Slot, view: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy `rows` into `view`, a view of the slot."""
        self.copy(view, rows)

    def close(self) -> None:
        """Nothing is held."""


class CudaCopyEvent:
    """The end of a copy on the side stream, and when it ran: CUDA's times between two events,
    counted from one whose host time is known."""

    def __init__(self, base: tuple[int, torch.cuda.Event], began: torch.cuda.Event) -> None:
        self._base_ns, self._base = base
        self._began = began
        self.ended = torch.cuda.Event(enable_timing=True)

    def query(self) -> bool:
        """See `CopyEvent`."""
        return bool(self.ended.query())

    def synchronize(self) -> None:
        """See `CopyEvent`."""
        self.ended.synchronize()

    def span_ns(self) -> tuple[int, int]:
        """See `CopyEvent`."""
        # CUDA's float32 milliseconds: since the base they tell 16 us after two minutes, so how
        # long it took is asked for by itself.
        began = self._base_ns + int(self._base.elapsed_time(self._began) * 1e6)
        return began, began + int(self._began.elapsed_time(self.ended) * 1e6)


class CudaCopies:
    """The model computes on a GPU: staging is pinned, copies run on a stream of their own.

    A copy into the gather buffer follows the attention that last read it (`begin` makes the side
    stream wait for the model's), and the next attention follows the copies (`end`). A slot
    carries the event of its last copy, and is not given to the drive before it has passed. Pages
    of the page cache are not pinned, so they are copied to slots as anything else.
    """

    ahead = 0
    in_place = False

    def __init__(self, device: torch.device, arena: Arena) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._models = torch.cuda.current_stream(device)  # as it is when copies are issued
        self._arena = arena
        runtime = torch.cuda.cudart()
        status = runtime.cudaHostRegister(arena.address, arena.size_bytes, 0)
        if int(status) != 0:
            _forget_error(device)
            raise Unsupported(
                f"staging of {format_size(arena.size_bytes)} cannot be pinned for the GPU: "
                f"{runtime.cudaGetErrorString(status)}",
                hint="give it a smaller memory_budget",
            )
        try:
            base = torch.cuda.Event(enable_timing=True)
            self._stream.record_event(base)
            base.synchronize()  # once, when the cache is made: the host time of a device event
        except BaseException:  # the arena goes: it must not stay pinned
            runtime.cudaHostUnregister(arena.address)
            raise
        self._base = (now_ns(), base)
        self._event: CudaCopyEvent | None = None  # of copies issued since the last one that ended

    def begin(self) -> None:
        """Copies from here on wait for what the model's stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        """The model's stream waits for all copies so far."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def use(self, event: CopyEvent | None) -> None:
        """The model's stream waits for that copy alone."""
        if isinstance(event, CudaCopyEvent):
            torch.cuda.current_stream(self._device).wait_event(event.ended)

    def issuing(self) -> AbstractContextManager[object]:
        """What is issued inside runs on the side stream."""
        self._models = torch.cuda.current_stream(self._device)
        return torch.cuda.stream(self._stream)

    def land(self, slot: Slot, size_bytes: int) -> torch.Tensor:
        """A device copy of the slot's bytes; call it inside `issuing`."""
        self._note_begun()
        landed = slot.memory[:size_bytes].to(self._device, non_blocking=True)
        # Without this the allocator could reuse it while the model's stream still reads it.
        landed.record_stream(self._models)
        return landed

    def landed(self, slot: Slot) -> None:
        """Mark the slot busy until the copies issued so far have read it."""
        slot.busy = self._ended()

    def copy(self, place: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy device `rows` to `place` on the device; call it inside `issuing`."""
        place.copy_(rows, non_blocking=True)

    def fill(self, slot: Slot, view: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy device `rows` into `view`, a view of the slot, behind the model's stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._note_begun()
        with torch.cuda.stream(self._stream):
            # Laid out on the device first, so that the way over the bus is one plain copy.
            view.copy_(rows.contiguous(), non_blocking=True)
        # Without this the allocator could reuse the rows while the side stream reads them.
        rows.record_stream(self._stream)
        slot.busy = self._ended()

    def _note_begun(self) -> None:
        """The next copies begin here, and not where the last ones ended: the stream may have waited
        for the drive or the model since."""
        if self._event is None:
            began = torch.cuda.Event(enable_timing=True)
            self._stream.record_event(began)
            self._event = CudaCopyEvent(self._base, began)

    def _ended(self) -> CudaCopyEvent:
        """The event of the copies since the last one."""
        event, self._event = self._event, None
        assert event is not None, "a slot is marked after its copies"
        self._stream.record_event(event.ended)
        return event

    def close(self) -> None:
        """Let the copies end and unpin staging. A device that failed has none that go on."""
        try:
            self._stream.synchronize()
        except RuntimeError as exc:
            log.warning("the GPU failed before the cache was closed: %s", exc)
        torch.cuda.cudart().cudaHostUnregister(self._arena.address)


def _forget_error(device: torch.device) -> None:
    """torch asks for the last error after each launch, and would raise that of another call."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


def shares_host_memory(device: torch.device) -> bool:
    """Whether tensors on `device` are in the host's memory: the CPU, and GPUs that have none of
    their own (Jetson)."""
    if device.type != "cuda":
        return device.type == "cpu"
    return bool(torch.cuda.get_device_properties(device).is_integrated)


def copies_for(device: torch.device, arena: Arena) -> Copies:
    """The copies for a model on `device`. Raises: Unsupported for devices that are neither."""
    if device.type == "cpu":
        return HostCopies()
    if device.type == "cuda":
        return CudaCopies(device, arena)
    raise Unsupported(
        f"models on {device.type!r} are not supported", hint="move the model to cpu or cuda"
    )
