"""Host memory that a model needs before any KV: known before its weights are loaded, so that what
cannot fit is refused in words and not by the kernel's killer in the middle of loading."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dualblade.attention import widening_pays
from dualblade.config import EngineConfig
from dualblade.errors import BudgetError
from dualblade.geometry import TILE_ROWS_DEFAULT
from dualblade.hf.geometry import layer_shapes, stated_dtype
from dualblade.hf.linear import widening_bytes
from dualblade.hf.random_models import share_layers
from dualblade.host.memory import MemoryReading
from dualblade.pipeline.staging import staging_shape
from dualblade.units import format_size

_UNPACKED_ITEM_BYTES = 4
"""A GGUF file is unpacked whole to fp32, and then cast (transformers 5.23)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of host memory. `loading_bytes` come on top of the weights only while they are loaded;
    activations and staging only afterwards, and both are the least that will do."""

    dtype: torch.dtype
    weights_bytes: int
    loading_bytes: int
    activation_bytes: int
    staging_bytes: int

    @property
    def running_bytes(self) -> int:
        """Needed all the time once the model is loaded."""
        return self.weights_bytes + self.activation_bytes + self.staging_bytes

    @property
    def needed_bytes(self) -> int:
        """The most that is needed at once."""
        return max(self.running_bytes, self.weights_bytes + self.loading_bytes)

    def require(self, name: str, there: MemoryReading) -> None:
        """Raises: BudgetError with the numbers when it does not fit the memory there is."""
        if self.needed_bytes <= there.available_bytes:
            return
        dtype = str(self.dtype).removeprefix("torch.")
        peak = format_size(self.weights_bytes + self.loading_bytes)
        raise BudgetError(
            f"{name} needs {format_size(self.needed_bytes)} of memory before any KV: weights "
            f"{format_size(self.weights_bytes)} in {dtype} ({peak} while they are loaded), "
            f"activations {format_size(self.activation_bytes)}, staging "
            f"{format_size(self.staging_bytes)}; there are {format_size(there.available_bytes)} "
            f"({there.source})",
            needed_bytes=self.needed_bytes,
            hint="give this process more memory, or use a smaller model"
            + (" or dtype bfloat16" if self.dtype == torch.float32 else ""),
        )


def footprint(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    rows: int,
    staging_bytes: int,
    is_packed: bool = False,
) -> Footprint:
    """Of a model of this configuration that computes at most `rows` tokens at once, on the CPU.

    The parameters are counted on a model without memory. `is_packed`: the weights are unpacked
    from a GGUF file.
    """
    parameters = list(skeleton(config, dtype).parameters())  # tied weights come once
    sizes = [parameter.nbytes for parameter in parameters]
    unpacked = sum(parameter.numel() for parameter in parameters) * _UNPACKED_ITEM_BYTES
    stored = stated_dtype(config)
    cast = max(sizes) if stored not in (None, dtype) else 0  # a tensor beside the one it was
    return Footprint(
        dtype=dtype,
        weights_bytes=sum(sizes),
        loading_bytes=unpacked if is_packed else cast,
        activation_bytes=rows * _row_bytes(config, dtype) + _widened_bytes(config, dtype, rows),
        staging_bytes=staging_bytes,
    )


def weights_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that one token goes through: without the embeddings, of which it takes a
    row, and of several experts with those that it is sent to."""
    text = model.config.get_text_config(decoder=True)
    experts = _most(text, "num_local_experts", "num_experts") or 1
    chosen = min(_most(text, "num_experts_per_tok", "top_k_experts") or experts, experts)
    total = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # Under each of its names: layers that share weights all read them, a head that shares the
        # embeddings' reads those.
        module, _, _ = name.rpartition(".")
        if isinstance(model.get_submodule(module), torch.nn.Embedding):
            continue
        share = chosen / experts if ".experts." in name else 1
        total += int(parameter.nbytes * share)
    return total


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        # A copy: it is told the dtype, and who asks may want the checkpoint's own.
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype, trust_remote_code=False
        )
    share_layers(made)
    return made


def staging_least(
    config: PretrainedConfig, item_bytes: int, budget_bytes: int, engine: EngineConfig
) -> int:
    """The least staging of one sequence under a budget, in bytes."""
    shapes = [shape for shape in layer_shapes(config) if shape.offloaded]
    row_bytes = [s.kv_heads * (s.key_dim + s.value_dim) * item_bytes for s in shapes]
    rows = engine.tile_tokens or TILE_ROWS_DEFAULT
    return staging_shape(engine, budget_bytes, max(row_bytes, default=0) * rows // 2).total_bytes


def _row_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What one token has in memory in the widest part of a layer: the residual, its norm and the
    MLP's two halves with their product."""
    hidden, inner = _widths(config)
    return (2 * hidden + 3 * inner) * dtype.itemsize


def _widened_bytes(config: PretrainedConfig, dtype: torch.dtype, rows: int) -> int:
    """What products in float32 take beside that, where they pay."""
    return widening_bytes(rows, max(_widths(config))) if widening_pays(dtype) else 0


def _widths(config: PretrainedConfig) -> tuple[int, int]:
    """(of the residual, of the MLP), in numbers a token."""
    text = config.get_text_config(decoder=True)
    hidden = int(text.hidden_size)
    return hidden, _most(text, "intermediate_size") or 4 * hidden


def _most(config: PretrainedConfig, *names: str) -> int | None:
    """The first of these that the configuration has; of one for each layer, the largest."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(max(value) if isinstance(value, list | tuple) else value)
    return None
