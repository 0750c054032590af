"""Many query rows, or scores that are changed on the way: tiles are copied together in groups of
fixed size, torch attends to each group, and the results are merged by their log-sum-exp.

Several groups are in fp32 whatever the model is in: torch rounds what a group yields to the type of
its keys, and merging roundings of bfloat16 would double the error. Where one group holds all tokens
it stays in the model's type, unless the processor multiplies that slowly. All of that is a function
of the shapes and the processor alone, so that the result does not depend on how tiles arrive.
"""

from __future__ import annotations

import torch

from dualblade.attention.query import AttentionQuery, Rows
from dualblade.units import MIB

_GROUP_BYTES = 16 * MIB
"""Keys and values of a group in fp32: small against a layer, large enough that what is spent per
operation is small against the products."""

_GROUP_TOKENS_UNIT = 64
"""Groups hold whole tiles, of this many tokens or of a power of two more or less."""

_MATH_ROWS = 256
"""Query rows whose scores are held in fp32 at a time, where torch's fused kernel does not serve."""


def group_tokens(token_elements: int, tile_rows: int) -> int:
    """Tokens in a group, for keys and values of `token_elements` per token of all sequences."""
    unit = max(tile_rows, _GROUP_TOKENS_UNIT)
    return max(_GROUP_BYTES // (4 * token_elements) // unit, 1) * unit


class GroupedAttention:
    """One attention call; `keys` and `values` [batch, kv_heads, group tokens, dim] hold a group, in
    fp32 unless it is the only one."""

    def __init__(self, query: AttentionQuery, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert query.query.shape[1] % keys.shape[1] == 0, "heads come in groups"
        assert keys.dtype == values.dtype
        self._query = query
        self._wide = query.query.to(keys.dtype)
        self._keys = keys
        self._values = values
        self._first = self._end = 0
        self._out: torch.Tensor | None = None
        self._total: torch.Tensor | None = None

    def keys(self, rows: Rows) -> None:
        """See `Running`; a piece never reaches over the edge of a group."""
        if rows.end_token > self._first + self._keys.shape[2]:
            self._attend()
            self._first = rows.first_token
        self._end = max(self._end, rows.end_token)
        self._place(rows, self._keys)

    def values(self, rows: Rows) -> None:
        """See `Running`."""
        self._place(rows, self._values)

    def both(self, keys: Rows, values: Rows) -> None:
        """See `Running`."""
        self.keys(keys)
        self.values(values)

    def finish(self) -> torch.Tensor:
        """See `Running`."""
        self._attend()
        if self._out is None:  # nobody sees anything
            batch, heads, tokens, _ = self._wide.shape
            self._out = self._wide.new_zeros((batch, heads, tokens, self._values.shape[3]))
        elif self._query.sinks is not None and self._total is not None:
            sinks = self._query.sinks.float()[:, None].expand_as(self._total)
            self._out = self._out * torch.sigmoid(self._total - sinks)[..., None]
        return self._out.to(self._query.query.dtype).transpose(1, 2).contiguous()

    def _place(self, rows: Rows, group: torch.Tensor) -> None:
        at, size = rows.first_token - self._first, rows.tiles.shape[3]
        place = group[:, :, at : at + rows.tokens]
        if rows.table is None:
            last = rows.first_sequence + rows.tiles.shape[1]
            place = place[rows.first_sequence : last]
            place.unflatten(2, (-1, size)).copy_(rows.tiles.permute(1, 2, 0, 3, 4))
            return
        for tile, stored in enumerate(rows.table - rows.first_sequence):
            here = torch.from_numpy((stored >= 0) & (stored < rows.tiles.shape[1])).nonzero()[:, 0]
            for logical in here.tolist():
                some = place[logical, :, tile * size : (tile + 1) * size]
                some.copy_(rows.tiles[tile, int(stored[logical])])

    def _attend(self) -> None:
        """Attend to the group held and merge it with those before."""
        held = self._end - self._first
        if held <= 0 or self._is_hidden():
            return
        keys, values = self._keys[:, :, :held], self._values[:, :, :held]
        out, total = _attend_to(self._query, self._wide, keys, values, self._first)
        if self._out is None or self._total is None:
            self._out, self._total = out, total
        else:
            _merge(self._out, self._total, out, total)

    def _is_hidden(self) -> bool:
        starts = self._query.first_visible
        return starts is not None and self._end <= int(starts.min())


def attend_whole(query: AttentionQuery, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention to plain keys and values [batch, kv_heads, tokens, dim], as one group."""
    whole = GroupedAttention(query, keys.float(), values.float())
    whole._end = keys.shape[2]
    return whole.finish()


def _attend_to(
    query: AttentionQuery, wide: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the rows `wide` to one group: out [batch, heads, tokens, dim] and log-sum-exp
    [batch, heads, tokens]. A row that sees nothing has zeros and minus infinity.
    """
    last = first + keys.shape[2]
    plain = query.softcap is None and query.bias is None
    if not plain or keys.device.type != "cpu" or keys.shape[3] != values.shape[3]:
        return _math(query, wide, keys, values, query.visible(first, last), first)
    is_one_part = last <= query.past + 1 or first >= query.past
    if query.is_causal_from(first) and (is_one_part or wide.dtype == torch.float32):
        return _causal(query, wide, keys, values, first)
    seen = query.visible(first, last)
    if seen is None:
        return _all_seen(wide, keys, values, query.scaling)
    added = seen if seen.dtype != torch.bool else torch.where(seen, 0.0, -torch.inf)
    out, total = _by_kv_head(
        wide, keys, values, added.to(wide.dtype), is_causal=False, scaling=query.scaling
    )
    # Of a row that sees nothing the kernel says zeros, and a log-sum-exp of zero.
    hidden = (added == -torch.inf).all(dim=-1).expand(total.shape)
    return out, total.masked_fill(hidden, -torch.inf)


def _causal(
    query: AttentionQuery, wide: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_attend_to` where each row sees itself and all before it: no mask is made, and what no row
    sees is not multiplied. Two parts, what was before the query and its own rows, are merged."""
    if first + keys.shape[2] <= query.past + 1:
        return _all_seen(wide, keys, values, query.scaling)
    before = max(query.past - first, 0)
    hidden = max(first - query.past, 0)  # rows before the group's first
    out, total = _by_kv_head(
        wide[:, :, hidden:],
        keys[:, :, before:],
        values[:, :, before:],
        None,
        is_causal=True,
        scaling=query.scaling,
    )
    if hidden:
        out = torch.nn.functional.pad(out, (0, 0, hidden, 0))
        total = torch.nn.functional.pad(total, (hidden, 0), value=-torch.inf)
    if before:
        earlier = (keys[:, :, :before], values[:, :, :before])
        _merge(out, total, *_all_seen(wide, *earlier, query.scaling))
    return out, total


def _all_seen(
    wide: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_attend_to` where every row sees all keys: the heads of a KV head are rows like others."""
    batch, heads, tokens, _ = wide.shape
    kv_heads = keys.shape[1]
    folded = wide.reshape(batch, kv_heads, heads // kv_heads * tokens, -1)
    out, total = _flash(folded, keys, values, None, is_causal=False, scaling=scaling)
    return out.reshape(batch, heads, tokens, -1), total.reshape(batch, heads, tokens)


def _by_kv_head(
    wide: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    added: torch.Tensor | None,
    *,
    is_causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One KV head at a time: a mask for folded rows would be as many times as large as heads share
    a KV head, and causal order is that of one head's rows."""
    group = wide.shape[1] // keys.shape[1]
    parts = []
    for head in range(keys.shape[1]):
        some = slice(head * group, (head + 1) * group)
        own = added if added is None or added.shape[1] == 1 else added[:, some]
        part = [x[:, head : head + 1].expand(-1, group, -1, -1) for x in (keys, values)]
        parts.append(
            _flash(wide[:, some], part[0], part[1], own, is_causal=is_causal, scaling=scaling)
        )
    out = torch.cat([out for out, _ in parts], dim=1)
    return out, torch.cat([total for _, total in parts], dim=1)


def _merge(
    out: torch.Tensor, total: torch.Tensor, other: torch.Tensor, other_total: torch.Tensor
) -> None:
    """Make `out` and `total`, of one part of the tokens, those of both, in place."""
    assert out.dtype == torch.float32, "parts that are merged are in fp32"
    # A share, not two weights: their roundings would not add up to one. Who sees nothing in the
    # other part has none of it, whatever the first has.
    share = torch.sigmoid(other_total - total).masked_fill(other_total == -torch.inf, 0)
    out += (other - out) * share[..., None]
    torch.logaddexp(total, other_total, out=total)


def _flash(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    # torch's own door to this asks for elements side by side; without, it gives NaN.
    rows, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (rows, keys, values))
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys, values, 0.0, is_causal, attn_mask=mask, scale=scaling
    )
    return out, total


def _math(
    query: AttentionQuery,
    wide: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor | None,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by plain products, some query rows at a time, for what torch's kernel cannot do."""
    batch, heads, tokens, _ = wide.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    wide, keys, values = wide.float(), keys.float(), values.float()
    seen = None if seen is None else seen.expand(-1, -1, tokens, -1)
    out = wide.new_empty((batch, heads, tokens, values.shape[3]))
    totals = out.new_empty((batch, heads, tokens))
    for low in range(0, tokens, _MATH_ROWS):
        some = slice(low, min(low + _MATH_ROWS, tokens))
        rows = wide[:, :, some].unflatten(1, (kv_heads, group)).flatten(2, 3)
        scores = ((rows * query.scaling) @ keys.transpose(2, 3)).unflatten(2, (group, -1))
        scores = scores.flatten(1, 2)  # [batch, heads, some, group's tokens]
        if query.softcap is not None:
            scores = torch.tanh(scores / query.softcap) * query.softcap
        if query.bias is not None:
            bias = query.bias.expand(-1, -1, tokens, -1)
            scores = scores + bias[:, :, some, first : first + keys.shape[2]]
        if seen is not None and seen.dtype == torch.bool:
            scores = scores.masked_fill(~seen[:, :, some], -torch.inf)
        elif seen is not None:
            scores = scores + seen[:, :, some]
        total = torch.logsumexp(scores, dim=-1)
        # Not exp(scores - total): the rounding of a large total would be in every weight.
        weights = torch.softmax(scores, dim=-1).masked_fill((total == -torch.inf)[..., None], 0)
        folded = weights.unflatten(1, (kv_heads, group)).flatten(2, 3) @ values
        out[:, :, some] = folded.unflatten(2, (group, -1)).flatten(1, 2)
        totals[:, :, some] = total
    return out, totals
