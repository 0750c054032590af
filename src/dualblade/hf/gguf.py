"""Loading GGUF files through transformers, unpacked to dense weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import transformers

from dualblade.errors import Unsupported


def require_gguf(what: str) -> None:
    """Raises: Unsupported naming the packages that reading GGUF needs and that are missing."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unsupported(
            f"{what} is a GGUF file; reading it needs {' and '.join(missing)}",
            hint=f"pip install {' '.join(missing)}",
        )


def gguf_options() -> dict[str, Any]:
    """Arguments of `from_pretrained` that unpack the weights. Packed ones, the default from 5.23
    on, compute in fp32 (2.5 times slower than bf16 here) and cannot be saved."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
