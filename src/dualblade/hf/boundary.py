"""Models whose rotations change where a text passes the context of their first training.

Phi-3 and its like rotate all keys of a pass by one of two sets of factors, by the last position in
it (LongRoPE). Keys that were cached under the one are wrong under the other, so these models leave
out any cache in the step that passes the boundary, and compute the text anew (transformers 5.24,
`prepare_inputs_for_generation`). Of a prompt in chunks they see the chunk alone, and do not notice.
`use_long_rope` has them rotate by the one set from the first token on.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dualblade.errors import Unsupported

log = logging.getLogger("dualblade.hf")

_FORGETFUL = ("phi3", "phi4_multimodal", "phimoe")
_CONTEXT_LOST = "phi4_multimodal"
"""In the step that passes the boundary it is given the newest tokens alone."""


def forgetting_boundary(config: PretrainedConfig) -> int | None:
    """Tokens up to which the model goes on from its cache; None: at any length."""
    text: Any = config.get_text_config(decoder=True)
    boundary: int | None = getattr(text, "original_max_position_embeddings", None)
    most = getattr(text, "max_position_embeddings", None)
    if text.model_type not in _FORGETFUL or not boundary or not most or most <= boundary:
        return None
    return boundary


def rotation_boundary(config: PretrainedConfig) -> int | None:
    """Tokens up to which keys are rotated alike; None: all are, or the model has no such boundary.
    Of the kinds in `_FORGETFUL` some are not LongRoPE (those of .gguf files)."""
    return forgetting_boundary(config) if _is_long_rope(config) else None


def _is_long_rope(config: PretrainedConfig) -> bool:
    text: Any = config.get_text_config(decoder=True)
    return (getattr(text, "rope_parameters", None) or {}).get("rope_type") == "longrope"


def use_long_rope(model: PreTrainedModel) -> bool:
    """Have a Phi-3 model (LongRoPE) rotate every text as one beyond the context of its first
    training; True where that changed it. Keys are then alike at any length, so that a long prompt
    can be computed in chunks and stay in a store. The same as transformers computes for texts
    beyond that context; shorter ones come out a little differently. To be called before a cache is
    made. It is for good, and changes the model's configuration: do not save the model afterwards.
    """
    text: Any = model.config.get_text_config(decoder=True)
    boundary = forgetting_boundary(model.config)
    if boundary is None or text.model_type != "phi3":
        return False
    if _is_long_rope(model.config):
        _rotate_long(model, text, boundary)
    text.original_max_position_embeddings = text.max_position_embeddings
    return True


def _rotate_long(model: PreTrainedModel, text: Any, boundary: int) -> None:
    rotary: list[Any] = [
        module for module in model.modules() if getattr(module, "rope_type", None) == "longrope"
    ]
    for module in rotary:
        factors, _ = ROPE_INIT_FUNCTIONS["longrope"](
            text, module.inv_freq.device, seq_len=boundary + 1
        )
        module.long_inv_freq = factors
        with torch.no_grad():
            for frequencies in (module.inv_freq, module.original_inv_freq):
                frequencies.copy_(factors)


def warn_of_boundary(model: PreTrainedModel, max_tokens: int | None) -> None:
    """Log where `model` drops any cache, if a text of `max_tokens` (None: no end) gets there."""
    boundary = forgetting_boundary(model.config)
    if boundary is not None and (max_tokens is None or max_tokens > boundary):
        log.warning(
            "%s computes a text anew, with its KV in memory, where it passes %d tokens; "
            "dualblade.use_long_rope(model) keeps longer ones of Phi-3 in the store",
            type(model).__name__,
            boundary,
        )


def check_pass(boundary: int | None, past: int, tokens: int) -> None:
    """Before a pass through the cache that comes from `past` to `tokens` in all. `boundary`: see
    `rotation_boundary`. Raises: Unsupported where it would attend to keys that are rotated
    otherwise."""
    if boundary is not None and 0 < past <= boundary < tokens:
        raise Unsupported(
            f"this model rotates keys otherwise where a text passes {boundary} tokens, and the "
            f"cache holds {past} of {tokens}",
            hint="call dualblade.use_long_rope(model) first (Phi-3), or leave prefill_chunk_size "
            "out: all of the text is then computed anew in memory",
        )


def check_text(
    config: PretrainedConfig, past: int, tokens: int, most: int, chunk: int | None
) -> None:
    """Before `generate` computes a text of `tokens`, of which `past` are cached, `chunk` at a time
    (None: at once); it may grow to `most`. Raises: Unsupported, as `check_pass`."""
    if chunk is not None:
        check_pass(rotation_boundary(config), past or min(chunk, tokens), tokens)
    text: Any = config.get_text_config(decoder=True)
    boundary = forgetting_boundary(config)
    if boundary is None or text.model_type != _CONTEXT_LOST or not past <= boundary < most:
        return
    if past or tokens <= boundary:  # else it is computed whole
        room = boundary - tokens + 1  # the last token is not stored
        raise Unsupported(
            f"transformers 5.24 computes this model's step over {boundary} tokens without what was "
            "before",
            hint=f"ask for {room} new tokens at most (max_new_tokens)"
            if room > 0
            else "reset() the cache: a text that is given whole is computed whole",
        )
