"""What a model's configuration says of its KV: the layers and their shapes, without weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dualblade.errors import Unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """One decoder layer's KV as the configuration tells it; heads and dims count elements.

    `offloaded`: it goes to the store. Other kinds stay in memory in transformers' own classes.
    """

    index: int
    kind: str
    offloaded: bool
    kv_heads: int
    key_dim: int
    value_dim: int


def memory_layers(config: PretrainedConfig) -> list[Any]:
    """transformers' own layers for a model of this configuration, as `DynamicCache` has them.

    Raises: Unsupported naming the layer type that transformers itself cannot hold.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise _encoder_decoder(config)
    text = config.get_text_config(decoder=True)
    if getattr(text, "is_encoder_decoder", False):  # InstructBLIP with T5, which does not say so
        raise _encoder_decoder(config)
    # BLIP puts an image's keys into its layers of text, unless its cache is a DynamicCache.
    if getattr(text, "cross_attention_layers", None) or text.model_type == "blip_text_model":
        # They have an image's tokens or none, are skipped without one, and the model looks into
        # the tensors of every layer's cache.
        raise Unsupported(
            f"{config.model_type} attends to images in layers of their own",
            hint="use transformers' own cache for it",
        )
    try:
        layers = list(DynamicCache(config=config).layers)
    except KeyError as exc:
        raise Unsupported(
            f"{config.model_type} has layers of type {exc.args[0]!r}, which no cache class of "
            "this transformers can hold"
        ) from exc
    except (AttributeError, TypeError) as exc:
        raise Unsupported(
            f"{config.model_type} does not say how many attention layers it has: {exc}"
        ) from exc
    if not layers:
        raise Unsupported(f"{config.model_type} has no KV cache")
    return layers


def _encoder_decoder(config: PretrainedConfig) -> Unsupported:
    return Unsupported(
        f"{config.model_type} is an encoder-decoder model", hint="dualblade serves decoders"
    )


def offloadable(config: PretrainedConfig, layers: list[Any]) -> list[bool]:
    """Which of `layers` may go to the store: full attention, and not read again by later layers.

    A window that is no narrower than all positions (Phi-3.5, Phi-4-mini) is full attention. A layer
    whose KV later layers share is kept by the model beyond its turn, so its tensors cannot live in
    a buffer that the next layer overwrites.
    """
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    sharing = getattr(text, "kv_sharing_modes", None) or [None] * len(layers)
    return [
        (type(layer) is DynamicLayer or _sees_all(layer, positions)) and mode != "store"
        for layer, mode in zip(layers, sharing, strict=True)
    ]


def _sees_all(layer: Any, positions: int | None) -> bool:
    is_window = type(layer) is DynamicSlidingWindowLayer
    return is_window and positions is not None and layer.sliding_window >= positions


def layer_shapes(config: PretrainedConfig) -> list[LayerShape]:
    """The shape of every layer's KV, for plans and early checks; the real one is what arrives.

    Raises: Unsupported (see `memory_layers`).
    """
    layers = memory_layers(config)
    stored = offloadable(config, layers)
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or [type(layer).__name__ for layer in layers]
    per_layer = list(getattr(text, "per_layer_config", None) or [text] * len(layers))
    shapes = []
    for index, (kind, is_stored, one) in enumerate(zip(kinds, stored, per_layer, strict=True)):
        kv_heads, key_dim, value_dim = _cached_shape(one)
        shapes.append(
            LayerShape(
                index=index,
                kind="full_attention" if is_stored or kind == "DynamicLayer" else kind,
                offloaded=is_stored,
                kv_heads=kv_heads,
                key_dim=key_dim,
                value_dim=value_dim,
            )
        )
    return shapes


def caches_latents(config: Any) -> bool:
    """Whether layers of this text configuration cache what keys and values are made of before
    attention (MLA: DeepSeek and others; transformers 5.24, in each family's attention)."""
    return bool(getattr(config, "kv_lora_rank", None) and getattr(config, "qk_rope_head_dim", None))


def are_alike(shapes: Iterable[LayerShape]) -> bool:
    """Whether all have the same heads."""
    return len({(shape.kv_heads, shape.key_dim, shape.value_dim) for shape in shapes}) <= 1


def stated_dtype(config: Any) -> torch.dtype | None:
    """The checkpoint's own, as its configuration says; None: it does not."""
    stated = getattr(config.get_text_config(decoder=True), "dtype", None) or config.dtype
    found: torch.dtype | None = getattr(torch, stated) if isinstance(stated, str) else stated
    return found


def _cached_shape(config: Any) -> tuple[int, int, int]:
    """(KV heads, key's dim, value's dim) of what a layer caches for a token."""
    if caches_latents(config):
        return 1, int(config.kv_lora_rank), int(config.qk_rope_head_dim)
    kv_heads, key_dim = _kv_heads(config), _key_dim(config)
    return kv_heads, key_dim, int(getattr(config, "v_head_dim", None) or key_dim)


def _kv_heads(config: Any) -> int:
    if getattr(config, "new_decoder_architecture", False):  # Falcon's: spread before it caches them
        return int(config.num_attention_heads)
    if getattr(config, "multi_query", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads", "num_attention_heads"):
        if heads := getattr(config, name, None):
            return int(heads)
    raise Unsupported(
        f"{config.model_type} does not say how many attention heads it has",
        hint="use transformers' own cache for it",
    )


def _key_dim(config: Any) -> int:
    nope = getattr(config, "qk_nope_head_dim", None)
    if nope is not None:
        return int(nope + config.qk_rope_head_dim)
    dim = getattr(config, "head_dim", None)
    return int(dim or config.hidden_size // config.num_attention_heads)
