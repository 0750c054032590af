"""Tensors that stand for others which nobody may ever need whole.

A model's code passes keys, values and masks on to attention without looking at them. What it gets
here has the right shape, dtype and device, and is made real only when an operation touches it: a
model that does something with its keys on the way is computed rightly, only slower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

from dualblade.pipeline import Offer


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Tails outlive the call: made under inference_mode they could not be written outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class LazyTensor(torch.Tensor):
    """`real()` gives the tensor that it stands for."""

    _real: Callable[[], torch.Tensor]

    @staticmethod
    def standing_for(
        kind: type[LazyTensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        real: Callable[[], torch.Tensor],
    ) -> Any:
        """A tensor of `kind` without memory of its own."""
        tensor = torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)
        tensor._real = real
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        return func(*made_real(list(args)), **made_real(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"


class OfferedTensor(LazyTensor):
    """All keys or all values of a layer whose newest rows wait for attention."""

    offer: Offer


class CausalMask(LazyTensor):
    """What query rows see, [batch, 1, query tokens, all tokens] bool: themselves and what is
    before, from `first_visible` [batch] on (None: from the beginning). `touched` has the tensor
    that the model looked into, and may have written to, once it did: attention then goes by that,
    without our kernel, which takes no such mask."""

    first_visible: torch.Tensor | None
    touched: list[torch.Tensor]


def made_real(structure: Any) -> Any:
    """`structure` with what each lazy tensor in it stands for."""
    return tree_map(lambda x: x._real() if isinstance(x, LazyTensor) else x, structure)


def offered_tensors(
    offer: Offer, on_touch: Callable[[], None]
) -> tuple[OfferedTensor, OfferedTensor]:
    """Keys and values of an offer; `on_touch` is called when one has to be made real."""

    def part(index: int, rows: torch.Tensor) -> OfferedTensor:
        made: torch.Tensor | None = None  # once: what the model writes to it is to stay

        def real() -> torch.Tensor:
            nonlocal made
            on_touch()
            with lasting():
                gathered = offer.gather()  # each time: it refuses once another layer's are there
                if made is None:
                    # As the stand-in says that it lies: views of it may be taken.
                    made = gathered[index].contiguous()
            return made

        shape = (*rows.shape[:2], offer.tokens, rows.shape[3])
        lazy: OfferedTensor = LazyTensor.standing_for(
            OfferedTensor, shape, rows.dtype, rows.device, real
        )
        lazy.offer = offer
        return lazy

    return part(0, offer.new.keys), part(1, offer.new.values)
