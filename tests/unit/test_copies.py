"""What CUDA's copies tell, on streams and events that only take notes: spans, failures, pinning."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualblade.errors import Unsupported
from dualblade.pipeline import copies as copies_module
from dualblade.pipeline.copies import CudaCopies


class Device:
    """The side stream's clock, in ms: what is issued runs at once, at the time it is given."""

    def __init__(self, *, pinned: bool = True) -> None:
        self.now = 0.0
        self.pinned, self.registered = pinned, False
        self.is_lost = False

    def event(self, **_: Any) -> Any:
        made = SimpleNamespace(at=0.0, synchronize=lambda: None, query=lambda: True)
        made.elapsed_time = lambda other: other.at - made.at
        return made

    def record_event(self, event: Any) -> None:
        event.at = self.now

    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: device-side assert triggered")

    def cudaHostRegister(self, *_: int) -> int:
        self.registered = self.pinned
        return 0 if self.pinned else 1

    def cudaHostUnregister(self, _: int) -> int:
        self.registered = False
        return 0

    def cudaGetErrorString(self, status: int) -> str:
        return f"the words of {status}"


class Memory:
    """A slot's, or the model's."""

    def __getitem__(self, _: slice) -> Memory:
        return self

    def to(self, *_: Any, **__: Any) -> Memory:
        return self

    def record_stream(self, _: Any) -> None: ...


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    for name, stand_in in {
        "Stream": lambda _: made,
        "Event": made.event,
        "current_stream": lambda _: made,
        "cudart": lambda: made,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(copies_module, "now_ns", lambda: 0)
    return made


def copies_on() -> CudaCopies:
    arena: Any = SimpleNamespace(address=4096, size_bytes=1 << 20)
    return CudaCopies(torch.device("cpu"), arena)


def test_a_copy_begins_when_it_is_issued_and_not_when_the_last_one_ended(device: Device) -> None:
    """Between two pieces the stream waits for the drive: that is no copying."""
    copies = copies_on()
    slot: Any = SimpleNamespace(memory=Memory(), busy=None)
    spans = []
    for issued, ended in ((100.0, 101.0), (500.0, 502.0)):
        device.now = issued
        copies.land(slot, 4096)
        copies.land(slot, 4096)  # two copies of one slot are one span
        device.now = ended
        copies.landed(slot)
        spans.append(slot.busy.span_ns())
    assert spans == [(100_000_000, 101_000_000), (500_000_000, 502_000_000)]


def test_a_device_that_failed_is_closed(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    copies = copies_on()
    assert device.registered
    device.is_lost = True
    copies.close()
    assert not device.registered
    assert "device-side assert" in caplog.text


def test_memory_that_cannot_be_pinned_is_told_in_words(device: Device) -> None:
    device.pinned = False
    with pytest.raises(Unsupported, match=r"1\.00 MiB cannot be pinned .*: the words of 1"):
        copies_on()
