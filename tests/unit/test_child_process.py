"""What is made of a child's output and status."""

from __future__ import annotations

import pytest

from dualblade.bench.child_process import _outcome


@pytest.mark.parametrize("noise", ["", "WARNING: closing\n", "3\n", "[]\n"])
def test_a_library_may_print_after_the_result(noise: str) -> None:
    assert _outcome(0, f'{{"steps": 3}}\n{noise}', "", None).result == {"steps": 3}
    assert _outcome(1, f'{{"error": "no space"}}\n{noise}', "", None).error == "no space"


@pytest.mark.parametrize(
    ("status", "out", "said"),
    [
        (0, "", "the run ended with status 0: last words"),
        (0, "no result\n", "the run ended with status 0: last words"),
        (1, '{"steps": 3}\n', "the run ended with status 1: last words"),
        (-11, "", "the run ended with signal 11: last words"),
    ],
)
def test_an_end_without_a_result_is_told_by_its_last_words(
    status: int, out: str, said: str
) -> None:
    outcome = _outcome(status, out, "Traceback\nlast words\n", None)
    assert (outcome.result, outcome.error, outcome.oom_killed) == ({}, said, False)
