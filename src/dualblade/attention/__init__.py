"""Attention over tiles where they lie, with a running softmax: a few rows by our own kernel, many
rows by torch, a group of tiles at a time. Tensors in, tensors out; no storage here."""

from dualblade.attention.arithmetic import widening_pays
from dualblade.attention.grouped import GroupedAttention, attend_whole, group_tokens
from dualblade.attention.kernel import BLOCK_TOKENS, KernelAttention, kernel_name
from dualblade.attention.query import AttentionQuery, Rows, Running

__all__ = [
    "BLOCK_TOKENS",
    "AttentionQuery",
    "GroupedAttention",
    "KernelAttention",
    "Rows",
    "Running",
    "attend_whole",
    "group_tokens",
    "kernel_name",
    "widening_pays",
]
