"""Tiles are whole blocks, and as many rows as tails allow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.geometry import TileGeometry, choose_tile_rows
from dualblade.units import BLOCK_BYTES, GIB

LAYER = {"kv_heads": 3, "dims": (64, 64), "item_bytes": 2, "batch": 1}


def test_the_usual_tile_has_64_rows() -> None:
    assert choose_tile_rows(**LAYER, tail_bytes_max=GIB) == 64


def test_a_narrow_layer_takes_more_rows_for_whole_blocks() -> None:
    rows = choose_tile_rows(kv_heads=1, dims=(8, 8), item_bytes=2, batch=1, tail_bytes_max=GIB)
    assert rows == 256  # 1 x 256 x 8 x 2 = 4096


def test_rows_shrink_when_tails_or_slabs_would_be_too_large() -> None:
    tails = 3 * (64 + 64) * 2  # bytes of one row of keys and values
    assert choose_tile_rows(**LAYER, tail_bytes_max=64 * tails) == 64
    assert choose_tile_rows(**LAYER, tail_bytes_max=64 * tails - 1) == 32
    slab = 64 * 3 * 64 * 2
    assert choose_tile_rows(**LAYER, tail_bytes_max=GIB, slab_bytes_max=slab) == 64
    assert choose_tile_rows(**LAYER, tail_bytes_max=GIB, slab_bytes_max=slab - 1) == 32


@given(
    kv_heads=st.integers(1, 40),
    dims=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    item_bytes=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 64),
    tail_bytes_max=st.integers(0, GIB),
)
def test_slabs_are_whole_blocks_whatever_the_shape(
    kv_heads: int, dims: tuple[int, int], item_bytes: int, batch: int, tail_bytes_max: int
) -> None:
    rows = choose_tile_rows(
        kv_heads=kv_heads,
        dims=dims,
        item_bytes=item_bytes,
        batch=batch,
        tail_bytes_max=tail_bytes_max,
    )
    for dim in dims:
        tile = TileGeometry(kv_heads=kv_heads, rows=rows, dim=dim, item_bytes=item_bytes)
        assert tile.slab_bytes % BLOCK_BYTES == 0
        assert 0 <= tile.slab_bytes - tile.slab_payload_bytes < BLOCK_BYTES
        assert tile.tile_bytes(batch) == batch * tile.slab_bytes


@pytest.mark.parametrize("tokens", [0, 63, 64, 65, 128])
def test_stored_bytes_count_whole_tiles(tokens: int) -> None:
    tile = TileGeometry(kv_heads=3, rows=64, dim=64, item_bytes=2)
    assert tile.stored_bytes(2, tokens) == tokens // 64 * 2 * 3 * 64 * 64 * 2
