"""`attn_implementation="dualblade"`: attention over tiles, through transformers' interfaces.

Source: transformers, AttentionInterface and AttentionMaskInterface.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from dualblade.attention import AttentionQuery, attend_whole
from dualblade.errors import ConfigError, Unsupported
from dualblade.hf.lazy import CausalMask, LazyTensor, OfferedTensor, lasting, made_real
from dualblade.pipeline import Offer

NAME = "dualblade"

_SELECTIONS = ("indices", "block_indices")
"""What models with sparse layers give to kernels that attend to some tokens alone."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tile_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` [batch, heads, tokens, dim]: to an offer's tiles where `key` and `value`
    stand for them, else as sdpa does it. Returns [batch, tokens, heads, value_dim] and no weights.
    """
    for name in _SELECTIONS:
        if kwargs.get(name) is not None:
            raise Unsupported(
                f"attention over tiles has no {name}", hint="use attention='exact' for this model"
            )
    sees_ahead = is_causal is False and attention_mask is None and query.shape[2] > 1
    offer = _offer_of(key, value)
    if offer is None or dropout or sees_ahead:
        key, value, mask = made_real([key, value, attention_mask])
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                position_bias=position_bias,
                **kwargs,
            )
        if sees_ahead:  # no mask would mean a causal one
            mask = query.new_ones((1, 1, query.shape[2], key.shape[2]), dtype=torch.bool)
        # transformers' sdpa has no place for these.
        asked = _question(query, key.shape[2], mask, scaling, softcap, position_bias, s_aux)
        with _without_autocast(query.device):
            return attend_whole(asked, key, value), None
    if torch.is_grad_enabled():
        refuse_gradients(query)  # of keys and values the layer did
    tokens = key.shape[2]
    query = query.to(key.dtype)  # under autocast it may be wider
    asked = _question(query, tokens, attention_mask, scaling, softcap, position_bias, s_aux)
    with lasting(), _without_autocast(query.device):
        return offer.attend(asked), None


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products that are made in float32 stay so."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def refuse_gradients(*rows: torch.Tensor) -> None:
    """Raises: Unsupported where training would miss what of a gradient went through here."""
    if any(some.requires_grad for some in rows):
        raise Unsupported(
            "stored KV carries no gradients",
            hint="call the model inside torch.no_grad(), as generate does",
        )


def _offer_of(key: torch.Tensor, value: torch.Tensor) -> Offer | None:
    """The offer that both stand for, whole, and that nobody looked into on the way."""
    if isinstance(key, OfferedTensor) and isinstance(value, OfferedTensor):
        offer = key.offer if key.offer is value.offer else None
        return offer if offer is not None and offer.is_open else None
    return None


def _question(
    query: torch.Tensor,
    tokens: int,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> AttentionQuery:
    first_visible = None
    if isinstance(mask, CausalMask):
        if not mask.touched:
            first_visible = mask.first_visible
        mask = next(iter(mask.touched), None)
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ConfigError(
            f"an attention mask of {mask.dtype} tells neither what is seen nor what to add",
            hint="make it bool (True is seen), or of the model's floating type",
        )
    return AttentionQuery(
        query=query,
        past=tokens - query.shape[2],
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        first_visible=first_visible,
        mask=mask,
        softcap=softcap,
        bias=bias,
        sinks=sinks,
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tile_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """As `sdpa_mask`; a causal mask with nothing but left padding stays a `CausalMask`."""
    dense = partial(
        sdpa_mask,
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        device=device,
        **kwargs,
    )
    # A window that is wider than all there is hides nothing; transformers says whether anything
    # else was laid over it.
    window, is_plain = kwargs.get("local_size"), kwargs.get("allow_is_causal_skip", True)
    is_causal = mask_function is causal_mask_function or (
        window is not None and kv_length < window and is_plain
    )
    if not is_causal or kv_offset or q_offset + q_length != kv_length:
        return dense()
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    starts = None
    padding = (
        None if padding is None else padding[:, :kv_length].bool()
    )  # may cover what is to come
    if padding is not None and padding.shape[0] != batch_size:
        return dense()  # of another batch: transformers' to judge
    if padding is not None and not padding.all():
        starts = _left_padding(padding)
        if starts is None:
            return dense()
    if starts is None and (q_length == 1 or q_length == kv_length):
        return dense()  # None: attention knows what is seen
    shape = (batch_size, 1, q_length, kv_length)

    touched: list[torch.Tensor] = []  # once: what the model writes to it is to stay

    def real() -> torch.Tensor:
        if not touched:
            made = dense()
            assert made is not None, "what may be left out is left out above"
            touched.append(made)
        return touched[0]

    mask: CausalMask = LazyTensor.standing_for(
        CausalMask, shape, torch.bool, torch.device(device), real
    )
    mask.first_visible, mask.touched = starts, touched
    return mask


def _left_padding(padding: torch.Tensor) -> torch.Tensor | None:
    """First true column of each row [batch] int64 on the CPU; None when a row has false ones after
    it, or no true one."""
    count = padding.sum(dim=1)
    starts = padding.shape[1] - count
    columns = torch.arange(padding.shape[1], device=padding.device)
    is_left = bool(((columns >= starts[:, None]) == padding).all()) and bool((count > 0).all())
    return starts.to("cpu", torch.int64).contiguous() if is_left else None


AttentionInterface.register(NAME, tile_attention)
AttentionMaskInterface.register(NAME, tile_mask)
