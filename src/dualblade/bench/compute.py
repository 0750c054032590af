"""What computing a token costs on this processor: what `dualblade tune` saves beside the drive's
speeds, so that `plan` can tell the time of a whole step.

A token of a decode step reads every weight once and attends to all KV once; on a CPU both are
bound by memory, so each is a rate: bytes of weights, and bytes of KV, per second. Both are taken
over more memory than the processor's caches hold for long. And each layer costs something that is
not bytes: the model's own code, some twenty calls into torch. Of a small model that is most of a
step. Medians.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from dualblade.bench.attention import DTYPES, AttentionLayer, AttentionShape, seconds_of_call
from dualblade.hf.cache import DualBladeCache
from dualblade.hf.models import load_model
from dualblade.host.memory import available_memory
from dualblade.host.profile import ComputeSpeeds
from dualblade.units import MIB

_ROWS, _COLUMNS = 8192, 4096
_WEIGHTS_BYTES_MAX = 512 * MIB
_MEMORY_SHARE = 8
_LAYER = AttentionShape(batch=1, query_heads=32, kv_heads=8, tokens=16384, dim=128)
"""Llama's heads: 64 MiB in bfloat16. Groups of four are what the model's own attention repeats."""

_NARROW_LAYERS = 16
_NARROW = (
    f"random:llama?layers={_NARROW_LAYERS},hidden=64,heads=2,kv_heads=1,intermediate=64,vocab=64,"
    "positions=100000"
)
"""Next to no weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """Matrices that one row goes through in turn."""

    matrices: tuple[torch.Tensor, ...]
    row: torch.Tensor

    @classmethod
    def make(cls, dtype: torch.dtype, size_bytes: int) -> _Weights:
        count = max(1, size_bytes // (_ROWS * _COLUMNS * dtype.itemsize))
        return cls(
            matrices=tuple(torch.ones(_ROWS, _COLUMNS, dtype=dtype) for _ in range(count)),
            row=torch.ones(1, _COLUMNS, dtype=dtype),
        )

    def __call__(self, turn: int) -> torch.Tensor:
        matrix = self.matrices[turn % len(self.matrices)]
        return torch.nn.functional.linear(self.row, matrix)


def measure_compute(repeats: int) -> dict[str, ComputeSpeeds]:
    """By dtype, with as many threads as torch has. Blocks for seconds.

    Raises: Unsupported without /proc.
    """
    room = available_memory().available_bytes // _MEMORY_SHARE
    size = min(_WEIGHTS_BYTES_MAX, room)
    with torch.inference_mode():
        return {name: _speeds(dtype, size, repeats) for name, dtype in DTYPES.items()}


def _speeds(dtype: torch.dtype, size_bytes: int, repeats: int) -> ComputeSpeeds:
    weights = _Weights.make(dtype, size_bytes)
    product = [seconds_of_call(weights) for _ in range(repeats)]
    matrix_bytes = weights.matrices[0].nbytes
    del weights
    layers = [AttentionLayer(_LAYER, dtype, query_tokens=1) for _ in range(2)]
    tiles = [seconds_of_call(lambda turn: layers[turn % 2].tiles()) for _ in range(repeats)]
    exact = [seconds_of_call(lambda turn: layers[turn % 2].exact()) for _ in range(repeats)]
    return ComputeSpeeds(
        weights_bytes_per_s=matrix_bytes / statistics.median(product),
        tiles_bytes_per_s=layers[0].kv_bytes / statistics.median(tiles),
        exact_bytes_per_s=layers[0].kv_bytes / statistics.median(exact),
        layer_seconds=_layer_seconds(dtype, repeats),
    )


def _layer_seconds(dtype: torch.dtype, repeats: int) -> float:
    """Of a layer of next to no weights that attends to a few tokens."""
    model = load_model(_NARROW, dtype=dtype, device="cpu").model
    token = torch.zeros(1, 1, dtype=torch.long)
    with DualBladeCache.for_model(model, path="memory", attention="tiles") as cache:
        took = [seconds_of_call(lambda _: model(token, cache=cache)) for _ in range(repeats)]
    return statistics.median(took) / _NARROW_LAYERS
