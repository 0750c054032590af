"""The order in which a benchmark's modes take turns."""

from __future__ import annotations

from dualblade.bench.series import in_turn


def test_modes_take_turns_at_going_first_and_last() -> None:
    modes = ("a", "b", "c")
    orders = ["".join(in_turn(modes, repeat)) for repeat in range(7)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac", "abc"]


def test_one_mode_is_its_own_turn() -> None:
    assert in_turn(("a",), 3) == ("a",)
