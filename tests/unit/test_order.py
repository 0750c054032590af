"""The sequence table follows any mixture of reorder, repeat, select, append and crop."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dualblade.pipeline.order import SequenceTable

moves = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 5)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 7), min_size=1, max_size=6)),
        st.tuples(st.just("crop"), st.integers(0, 8)),
    ),
    max_size=12,
)


@given(moves)
def test_table_against_a_list_of_tiles(steps: list[tuple[str, object]]) -> None:
    table, model, batch = SequenceTable(), [], 3
    for move, value in steps:
        if move == "append":
            table.append(value, batch)
            model += [list(range(batch)) for _ in range(value)]
        elif move == "select":
            indices = [i % batch for i in value]
            table.select(np.array(indices, dtype=np.int64))
            model = [[tile[i] for i in indices] for tile in model]
            batch = len(indices)
        else:
            table.crop(value)
            model = model[:value]
        check(table, model)


def check(table: SequenceTable, model: list[list[int]]) -> None:
    if table.is_identity:
        assert all(tile == list(range(len(tile))) for tile in model)
    found = [[-1] * len(tile) for tile in model]
    for run in table.runs(0, len(model)) if model else ():
        for tile in range(run.start, run.stop):
            assert found[tile][run.logical] == -1
            found[tile][run.logical] = run.physical
    assert found == model
    physical = 8
    if model and not table.is_identity:
        dead = sum(physical - len(set(tile)) for tile in model)
        assert table.dead_sequences(0, len(model), physical) == dead
