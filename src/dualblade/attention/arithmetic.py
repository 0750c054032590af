"""What this processor multiplies quickly."""

from __future__ import annotations

import platform

import torch

_QUESTIONS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}
"""The question to oneDNN, which torch's products go through where the answer is yes."""


def widening_pays(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies `dtype`, of 16 bits, faster as float32. Measured on x86
    alone, so elsewhere never."""
    if platform.machine() != "x86_64":
        return False
    question = getattr(torch.ops.mkldnn, _QUESTIONS.get(dtype, ""), None)
    return question is not None and not question()
