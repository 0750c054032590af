"""Copies between staging and the model's device: on the CPU plain copies, on CUDA a side stream.

Both have the same order for the caller: `begin` before the copies of a layer, `end` before the
model reads what was copied.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from dualblade.errors import Unsupported
from dualblade.io import Arena
from dualblade.pipeline.staging import Slot

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Stand-ins by size: numpy knows no bfloat16, and a copy needs no arithmetic."""


class HostCopies:
    """The model computes on the CPU: a copy has ended when the call returns."""

    def begin(self) -> None:
        """Nothing to order: the previous layer's attention has ended."""

    def end(self) -> None:
        """Nothing to order: the copies have ended."""

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


class CudaCopies:
    """The model computes on a GPU: staging is pinned, copies run on a stream of their own.

    A copy into the gather buffer follows the attention that last read it (`begin` makes the side
    stream wait for the model's), and the next attention follows the copies (`end`). A slot
    carries the event of its last copy, and is not given to the drive before it has passed.
    """

    def __init__(self, device: torch.device, arena: Arena) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._arena = arena
        status = torch.cuda.cudart().cudaHostRegister(arena.address, arena.size_bytes, 0)
        if int(status) != 0:
            raise Unsupported(
                f"staging of {arena.size_bytes} bytes cannot be pinned for the GPU: {status}",
                hint="give it a smaller memory_budget",
            )

    def begin(self) -> None:
        """Copies from here on wait for what the model's stream has been given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        """The model's stream waits for all copies so far."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def issuing(self) -> AbstractContextManager[object]:
        """What is issued inside runs on the side stream."""
        return torch.cuda.stream(self._stream)

    def land(self, slot: Slot, size_bytes: int) -> torch.Tensor:
        """A device copy of the slot's bytes; call it inside `issuing`."""
        landed = slot.memory[:size_bytes].to(self._device, non_blocking=True)
        # Without this the allocator could reuse it while the model's stream still reads it.
        landed.record_stream(torch.cuda.default_stream(self._device))
        return landed

    def landed(self, slot: Slot) -> None:
        """Mark the slot busy until the copies issued so far have read it."""
        slot.busy = self._stream.record_event()

    def copy(self, place: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy device `rows` to `place` on the device; call it inside `issuing`."""
        place.copy_(rows, non_blocking=True)

    def fill(self, slot: Slot, view: torch.Tensor, rows: torch.Tensor) -> None:
        """Copy device `rows` into `view`, a view of the slot, behind the model's stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Laid out on the device first, so that the way over the bus is one plain copy.
            view.copy_(rows.contiguous(), non_blocking=True)
        # Without this the allocator could reuse the rows while the side stream reads them.
        rows.record_stream(self._stream)
        slot.busy = self._stream.record_event()

    def close(self) -> None:
        """Let the copies end and unpin staging."""
        self._stream.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self._arena.address)


def copies_for(device: torch.device, arena: Arena) -> HostCopies | CudaCopies:
    """The copies for a model on `device`. Raises: Unsupported for devices that are neither."""
    if device.type == "cpu":
        return HostCopies()
    if device.type == "cuda":
        return CudaCopies(device, arena)
    raise Unsupported(
        f"models on {device.type!r} are not supported", hint="move the model to cpu or cuda"
    )
