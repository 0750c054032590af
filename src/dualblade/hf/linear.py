"""Products of many rows on processors without 16-bit arithmetic (AVX2: most laptops).

There torch multiplies bfloat16 and float16 row by row, at a sixth of the speed of float32 and less:
a prompt takes most of its time in it. Here a block of the weights is widened to float32 at a time,
in the cache, and multiplied as float32; the result is rounded once, as it is where the processor
has the arithmetic. Few rows stay with torch: reading the weights is their limit, not multiplying.
Measured: docs/performance.md, "Prompts without 16-bit arithmetic".
"""

from __future__ import annotations

import torch

from dualblade.attention import widening_pays

_ROWS_MIN = 12
"""From here on widening pays: 12 rows take 0.65 to 0.8 of torch's time, 16 about half."""

_ROWS_IN_TURN = 7
"""8 rows take 6.5 times as long as one, and the 12 that are widened 7."""

_ROWS_MULTIPLE = 4
"""Of rows that the float32 product is best at: 16 take half the time of 15."""

_ROWS_FEW = 128
"""Up to here weights times rows is faster than rows times weights; twice as fast for 12."""

_ROWS_AT_ONCE = 512
"""Rows that are widened together: enough to make widening the weights a tenth of the work."""

_BLOCK_BYTES = 8 << 20
"""Of weights widened at a time: 4 MiB wake threads twice as often, 64 MiB leave the cache."""

_HALVES = (torch.bfloat16, torch.float16)


class WidenedLinear(torch.nn.Linear):
    """A linear layer that multiplies 12 rows or more in float32, if its weights are of 16 bits.

    Same parameters, same results up to the order of summation. With gradients, on a GPU, and
    under autocast it is torch's own.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input` [..., in_features] times the weights, [..., out_features]."""
        rows = input.numel() // self.in_features
        is_ours = (
            rows >= _ROWS_MIN
            and not torch.is_grad_enabled()
            and input.device.type == "cpu"
            and input.dtype == self.weight.dtype
            and input.dtype in _HALVES
            and not torch.is_autocast_enabled("cpu")
        )
        if not is_ours:
            return super().forward(input)
        flat = input.reshape(rows, self.in_features)
        out = input.new_empty(rows, self.out_features)
        for first in range(0, rows, _ROWS_AT_ONCE):
            until = first + _ROWS_AT_ONCE
            self._multiply(flat[first:until], out[first:until])
        return out.view(*input.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """`out` [rows, out_features] of `rows` [rows, in_features], block by block of weights."""
        count = len(rows)
        padded = -(-count // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        wide = rows.new_zeros(padded, self.in_features, dtype=torch.float32)
        wide[:count] = rows
        step = _block_rows(self.in_features)
        block = wide.new_empty(min(step, self.out_features), self.in_features)
        for first in range(0, self.out_features, step):
            weights = self.weight[first : first + step]
            widened = block[: len(weights)].copy_(weights)
            if count <= _ROWS_FEW:
                product = torch.mm(widened, wide.t()).t()[:count]
            else:
                product = torch.mm(wide, widened.t())[:count]
            if self.bias is not None:
                product += self.bias[first : first + step]
            out[:, first : first + step] = product


def widen_linears(model: torch.nn.Module) -> int:
    """Let the linear layers of `model` multiply in float32 where that is faster; how many do.

    None do where the processor has arithmetic of their dtype, and of other dtypes. Layers that are
    not exactly torch.nn.Linear (quantised ones, adapters), and those whose weights are more than
    plain tensors (torchao's), stay as they are. Weights are neither copied nor changed.
    """
    count = 0
    for module in model.modules():
        if type(module) is not torch.nn.Linear or type(module.weight) is not torch.nn.Parameter:
            continue
        if widening_pays(module.weight.dtype):
            module.__class__ = WidenedLinear
            count += 1
    return count


def rows_in_turn(dtype: torch.dtype) -> int:
    """How many rows of a step the processor multiplies one after another, each for as long as one
    alone; what are more take no longer. Where it has arithmetic of `dtype`, or `dtype` is wide, few
    rows are multiplied while the weights are read, as one is."""
    return _ROWS_IN_TURN if widening_pays(dtype) else 1


def widening_bytes(rows: int, columns: int) -> int:
    """Memory of a product of `rows` with weights of `columns` input features at most, in bytes:
    the rows, a block of weights, and what they give, in float32."""
    at_once = min(rows, _ROWS_AT_ONCE)
    step = _block_rows(columns)
    return 4 * (at_once * columns + step * columns + at_once * step)


def _block_rows(columns: int) -> int:
    """Output features whose widened weights are a block."""
    return max(1, _BLOCK_BYTES // (4 * columns))
