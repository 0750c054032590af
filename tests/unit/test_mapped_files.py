"""Mode mmap of the benchmarks copies with as many threads as took least."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dualblade.bench import mmap_kv


def counts(
    monkeypatch: pytest.MonkeyPatch, sweeps: int, took: Callable[[int, int], float]
) -> list[int]:
    """Threads of each sweep, where sweep `i` with `count` of them takes `took(i, count)`."""
    now, used = 0.0, []
    monkeypatch.setattr(mmap_kv.time, "perf_counter", lambda: now)
    threads = mmap_kv._Threads()
    for sweep in range(sweeps):
        threads.begin()
        used.append(threads.count)
        now += took(sweep, threads.count)
    return used


@pytest.mark.parametrize("best", [1, 2])
def test_the_faster_number_stays_and_the_first_sweep_is_not_judged(
    monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    used = counts(monkeypatch, 16, lambda sweep, count: 9.0 if not sweep else 1 + (count != best))
    assert used == [2, 2, 1, *[best] * 13]


def test_the_other_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads take 3 s, and less than one from sweep 10 on; one takes 1 s, then 2."""
    took = {1: (1.0, 2.0), 2: (3.0, 1.0)}
    used = counts(monkeypatch, 24, lambda sweep, count: took[count][sweep >= 10])
    assert used == [2, 2, *[1] * 14, *[2] * 8]


def test_a_sweep_that_was_cut_short_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(mmap_kv.time, "perf_counter", lambda: now)
    threads = mmap_kv._Threads()
    for seconds in (5, 2, 3):  # cold; two threads; one
        threads.begin()
        now += seconds
    threads.begin()
    assert threads.count == 2
    threads.forget()
    now += 100
    threads.begin()
    assert threads.count == 2
