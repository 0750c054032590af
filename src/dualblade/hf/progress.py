"""Progress of what libraries do while a model is loaded, told in lines in place of their bars."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from dualblade.units import format_size

_EVERY_SECONDS = 5.0

_UNPACKING = threading.Lock()


def download_bars(tell: Callable[[str], None]) -> type[Any]:
    """Bars for the hub's downloads (`tqdm_class`) that `tell` how many bytes are there."""

    class Told(tqdm):  # type: ignore[misc]  # it has no types
        monitor_interval = 0  # no thread of its own

        def __init__(self, *arguments: Any, **options: Any) -> None:
            ours = {"file": io.StringIO(), "mininterval": _EVERY_SECONDS, "disable": False}
            super().__init__(*arguments, **{**options, **ours})

        def display(self, *_: Any, **__: Any) -> bool:
            if self.unit == "B" and self.n:  # others count files
                of = f" of {format_size(self.total)}" if self.total else ""
                tell(f"fetching the model: {format_size(self.n)}{of}")
            return True

    return Told


@contextlib.contextmanager
def unpacking(tell: Callable[[str], None]) -> Iterator[None]:
    """While a GGUF file is unpacked transformers (5.24) draws a bar that no setting silences."""

    def told(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        tell("unpacking the weights")
        yield from tensors

    module: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    with _UNPACKING:  # two at a time would leave one's bar to the other
        bar, module.tqdm = module.tqdm, told
        try:
            yield
        finally:
            module.tqdm = bar
