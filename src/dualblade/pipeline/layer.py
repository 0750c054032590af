"""One layer's KV: stored tiles of keys and values, and the newest rows in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from dualblade.errors import BudgetError, ConfigError
from dualblade.geometry import Part, TileGeometry, UnitId
from dualblade.pipeline.division import LayerSizes, group_tiles
from dualblade.pipeline.order import SequenceTable
from dualblade.pipeline.staging import SLOTS_MIN
from dualblade.pipeline.tails import TailLimit, tile_rows
from dualblade.pipeline.unit import Piece, Space, Unit
from dualblade.units import format_size


@dataclass(slots=True, eq=False)
class HalfLayer:
    """Keys or values: the stored unit and its tail [batch, kv_heads, capacity, dim]."""

    unit: Unit
    tail: torch.Tensor

    def tiles_of(self, rows: torch.Tensor, tail_rows: int, tiles: int) -> Iterator[torch.Tensor]:
        """`tiles` whole tiles of the tail's rows followed by `rows`, as at most two runs
        [batch, kv_heads, n x tile_rows, dim]: what the tail begins, and plain slices of `rows`."""
        size = self.unit.geometry.rows
        begun = min(-(-tail_rows // size), tiles)
        taken = begun * size - tail_rows
        if begun:
            head = self.tail[:, :, : min(tail_rows, begun * size)]
            yield torch.cat([head, rows[:, :, : max(taken, 0)]], dim=2)
        if tiles > begun:
            yield rows[:, :, taken : taken + (tiles - begun) * size]

    def keep_newest(self, rows: torch.Tensor, tail_rows: int, left: int) -> None:
        """Make the tail the newest `left` of its `tail_rows` rows followed by `rows`."""
        new = rows.shape[2]
        old = left - new
        if old <= 0:
            self.tail[:, :, :left] = rows[:, :, new - left :]
            return
        if old != tail_rows:
            self.tail[:, :, :old] = self.tail[:, :, tail_rows - old : tail_rows].clone()
        self.tail[:, :, old:left] = rows


@dataclass(slots=True, eq=False)
class Layer:
    """A layer of the cache. All its tokens: `stored_tiles` tiles, then `tail_rows` rows.

    With `recall`, a tile's worth of rows more stays in the tail, so that taking candidate tokens
    back (assisted decoding) meets no stored tile.
    """

    index: int
    keys: HalfLayer
    values: HalfLayer
    batch: int
    dtype: torch.dtype
    tokens_max: int | None
    table: SequenceTable = field(default_factory=SequenceTable)
    stored_tiles: int = 0
    tail_rows: int = 0
    recall: bool = False
    selections: int = 0

    @property
    def halves(self) -> tuple[HalfLayer, HalfLayer]:
        """Keys before values, as attention needs them."""
        return self.keys, self.values

    @property
    def rows(self) -> int:
        """Tokens in a tile."""
        return self.keys.unit.geometry.rows

    @property
    def tokens(self) -> int:
        """Tokens of each sequence."""
        return self.stored_tiles * self.rows + self.tail_rows

    @property
    def group_tiles(self) -> int:
        """Tiles that attention of many rows takes at a time."""
        return group_tiles(self.batch, self.keys.unit.geometry, self.values.unit.geometry)

    @property
    def tail_capacity(self) -> int:
        """Rows that the tails must hold; what is left of a recall goes with the next rows."""
        return self.rows * (2 if self.recall or self.tail_rows > self.rows else 1)

    @property
    def tail_bytes(self) -> int:
        """Memory of both tails."""
        return self.keys.tail.nbytes + self.values.tail.nbytes

    @property
    def table_bytes(self) -> int:
        """Memory of what is kept about tiles: their sequences, and checksums of both halves."""
        sums = [segment.checksums for half in self.halves for segment in half.unit.segments]
        return self.table.size_bytes + sum(len(some) * some.itemsize for some in sums)

    def token_bytes(self) -> int:
        """Bytes of one token of all sequences, keys and values."""
        return sum(
            self.batch * h.unit.geometry.kv_heads * h.unit.geometry.dim * h.tail.element_size()
            for h in self.halves
        )

    @property
    def sizes(self) -> LayerSizes:
        """What a budget's division knows of it."""
        return LayerSizes(
            batch=self.batch,
            keys=self.keys.unit.geometry,
            values=self.values.unit.geometry,
            tail_rows=self.tail_capacity,
        )

    def full_tiles(self, new_rows: int) -> int:
        """Tiles to store once `new_rows` rows are appended."""
        kept = self.rows if self.recall else 0
        return max(0, self.tail_rows + new_rows - kept) // self.rows

    def append(
        self,
        key_rows: torch.Tensor,
        value_rows: torch.Tensor,
        store_tiles: Callable[[Unit, int, torch.Tensor], None],
    ) -> None:
        """Take in rows [batch, kv_heads, n, dim]; `store_tiles(unit, first_tile, rows)` is given
        what fills whole tiles, each tile once."""
        tiles = self.full_tiles(key_rows.shape[2])
        left = self.tail_rows + key_rows.shape[2] - tiles * self.rows
        for half, rows in ((self.keys, key_rows), (self.values, value_rows)):
            tile = self.stored_tiles
            for run in half.tiles_of(rows, self.tail_rows, tiles):
                store_tiles(half.unit, tile, run)
                tile += run.shape[2] // self.rows
            half.keep_newest(rows, self.tail_rows, left)
            half.unit.stored_tiles = self.stored_tiles + tiles
        if tiles:
            self.table.append(tiles, self.batch)
        self.stored_tiles += tiles
        self.tail_rows = left

    def recall_tile(self, half: HalfLayer, piece: Piece, tile: torch.Tensor) -> None:
        """Make the tail of `half` what `piece` holds: one tile [sequences, heads, rows, dim]."""
        for run in self.table.runs(piece.tile, piece.tile + 1):
            if piece.sequence <= run.physical < piece.sequence + piece.sequences:
                rows = tile[run.physical - piece.sequence]
                half.tail[run.logical, :, : self.rows] = rows.to(half.tail.device)

    def select(self, indices: torch.Tensor) -> None:
        """Sequence i becomes what `indices[i]` was; stored tiles stay where they are."""
        self.selections += 1
        tails = [half.tail.index_select(0, indices.to(half.tail.device)) for half in self.halves]
        self.table.select(indices.cpu().numpy())
        self.keys.tail, self.values.tail = tails
        self.batch = len(indices)

    def free(self) -> None:
        """Give all extents back. Raises: StorageError, Closed."""
        for half in self.halves:
            half.unit.free()

    def drop_tails(self) -> None:
        """Free the tails' memory; only to be counted from here on."""
        for half in self.halves:
            half.tail = half.tail.new_empty((*half.tail.shape[:2], 0, half.tail.shape[3]))

    def fit_tails(self) -> None:
        """Have tails of `tail_capacity`; rows are kept."""
        for half in self.halves:
            if half.tail.shape[2] != self.tail_capacity:
                shape = (*half.tail.shape[:2], self.tail_capacity, half.tail.shape[3])
                fitted = half.tail.new_empty(shape)
                fitted[:, :, : self.tail_rows] = half.tail[:, :, : self.tail_rows]
                half.tail = fitted

    def drop_tokens(
        self, count: int, slot_bytes: int, fetch_piece: Callable[[HalfLayer, Piece], None]
    ) -> None:
        """Forget the newest `count` tokens. A stored tile that is cut becomes the tail again:
        `fetch_piece(half, piece)` reads a piece of it, of at most `slot_bytes`, into the tail."""
        left = self.tokens - count
        if count <= self.tail_rows:
            self.tail_rows -= count
            return
        tiles, rest = divmod(left, self.rows)
        for half in self.halves:
            if rest:
                for piece in half.unit.pieces(tiles, tiles + 1, slot_bytes):
                    fetch_piece(half, piece)
            half.unit.crop(tiles)
        self.table.crop(tiles)
        self.stored_tiles = tiles
        self.tail_rows = rest


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMaker:
    """Makes empty layers: where their units are, and what their tiles' rows are chosen by.

    tile_tokens     rows of a tile; None: see `tile_rows`.
    tail_limit      most memory for the tails of one layer; None: as much as they like.
    slot_bytes      of staging, which a slab must fit; None: there is none yet, it is made to fit.
    """

    space: Space
    tokens_max: int | None
    tile_tokens: int | None
    tail_limit: TailLimit | None
    slot_bytes: int | None = None

    def beside(self, staging_bytes: int) -> LayerMaker:
        """One that leaves staging what it has."""
        limit = self.tail_limit
        return replace(self, tail_limit=limit and replace(limit, staging_bytes=staging_bytes))

    def make(
        self, index: int, key_rows: torch.Tensor, value_rows: torch.Tensor, recall: bool
    ) -> Layer:
        """A layer for rows like these, [batch, kv_heads, n, dim]. Raises: BudgetError when its
        slabs are larger than the slots that staging has."""
        batch, heads, _, key_dim = key_rows.shape
        rows = self.tile_tokens or tile_rows(
            self.tail_limit,
            kv_heads=heads,
            dims=(key_dim, value_rows.shape[3]),
            item_bytes=key_rows.element_size(),
            batch=batch,
            slab_bytes_max=self.slot_bytes,
        )
        halves = []
        for part, tensor in ((Part.KEYS, key_rows), (Part.VALUES, value_rows)):
            shape = (batch, tensor.shape[1], rows, tensor.shape[3])
            geometry = TileGeometry(
                kv_heads=shape[1], rows=rows, dim=shape[3], item_bytes=tensor.element_size()
            )
            self._check_slab(geometry)
            unit = Unit(UnitId(index, part), geometry, self.space, tokens_max=self.tokens_max)
            halves.append(HalfLayer(unit, tensor.new_empty(shape)))
        made = Layer(index, halves[0], halves[1], batch, key_rows.dtype, self.tokens_max)
        made.recall = recall
        return made

    def _check_slab(self, geometry: TileGeometry) -> None:
        if self.slot_bytes is not None and geometry.slab_bytes > self.slot_bytes:
            needed = SLOTS_MIN * geometry.slab_bytes
            raise BudgetError(
                f"a tile of {geometry.rows} tokens takes {format_size(geometry.slab_bytes)} of a "
                f"sequence, and staging was made of slots of {format_size(self.slot_bytes)}",
                needed_bytes=needed,
                hint=f"make a new cache for this batch, or with staging_bytes={needed}",
            )


def check_rows(key_rows: torch.Tensor, value_rows: torch.Tensor, device: torch.device) -> None:
    """Refuse rows that are no keys and values of one layer, or not on `device`. Raises:
    ConfigError."""
    if key_rows.ndim != 4 or value_rows.ndim != 4:
        raise ConfigError(
            f"keys and values must be [batch, kv_heads, tokens, dim], not "
            f"{list(key_rows.shape)} and {list(value_rows.shape)}"
        )
    if key_rows.shape[0] != value_rows.shape[0] or key_rows.shape[2] != value_rows.shape[2]:
        raise ConfigError(
            f"keys {list(key_rows.shape)} and values {list(value_rows.shape)} must have the same "
            "batch and tokens"
        )
    if key_rows.dtype != value_rows.dtype:
        raise ConfigError(f"keys are {key_rows.dtype}, values {value_rows.dtype}")
    if key_rows.device.type != device.type:
        raise ConfigError(
            f"keys are on {key_rows.device}, and the cache was made for a model on {device}",
            hint="make it after the model was moved",
        )


def check_length(tokens: int, tokens_max: int | None) -> None:
    """Refuse more than the stated maximum of tokens. Raises: ConfigError."""
    if tokens_max is not None and tokens > tokens_max:
        raise ConfigError(
            f"the context would grow to {tokens} tokens, past max_tokens={tokens_max}",
            hint="give for_model a larger max_tokens, or none",
        )


def chosen_sequences(indices: torch.Tensor, batch: int) -> torch.Tensor:
    """Which of a batch's sequences `indices` name: numbers (negative: from the end), or a mask with
    a bool for each. Returns int64 [n], none negative. Raises: ConfigError."""
    is_mask = indices.dtype == torch.bool
    if indices.ndim != 1 or not (is_mask or indices.dtype in _NUMBERS):
        raise ConfigError(
            f"sequences are chosen by a list of numbers or bools, not by {indices.dtype} "
            f"{list(indices.shape)}",
            hint="such as torch.tensor([0, 2])",
        )
    if is_mask:
        chosen, fits = indices.nonzero().squeeze(1), len(indices) == batch
    else:
        chosen = indices.long()
        chosen = torch.where(chosen < 0, chosen + batch, chosen)
        fits = bool(((chosen >= 0) & (chosen < batch)).all())
    if not fits or not len(chosen):
        raise ConfigError(
            f"{indices.tolist()} are no sequences of a batch of {batch}",
            hint=f"name some of 0 to {batch - 1}",
        )
    return chosen


_NUMBERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def check_removal(count: int, tokens: int) -> None:
    """Refuse to take back more tokens than there are. Raises: ConfigError."""
    if count > tokens:
        raise ConfigError(f"cannot take back {count} tokens of {tokens}")


def check_continues(layer: Layer, key_rows: torch.Tensor, value_rows: torch.Tensor) -> None:
    """Refuse rows that do not continue the layer. Raises: ConfigError."""
    for name, half, rows in (("keys", layer.keys, key_rows), ("values", layer.values, value_rows)):
        was = [layer.batch, half.unit.geometry.kv_heads, half.unit.geometry.dim]
        now = [rows.shape[0], rows.shape[1], rows.shape[3]]
        if was != now or rows.dtype != layer.dtype:
            raise ConfigError(
                f"{name} of layer {layer.index} changed: [batch, kv_heads, dim] was {was} of "
                f"{layer.dtype}, now {now} of {rows.dtype}",
                hint="reset the cache before another prompt or batch",
            )
    check_length(layer.tokens + key_rows.shape[2], layer.tokens_max)
