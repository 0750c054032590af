"""Errors go between processes: a pool's workers send theirs to its parent by pickle."""

from __future__ import annotations

import copy
import pickle

import pytest

from dualblade import errors
from dualblade.errors import DualBladeError

PLAIN = [DualBladeError, errors.ConfigError, errors.Unsupported, errors.Closed]
OF_STORAGE = [errors.StorageError, errors.NoSpace, errors.CorruptExtent, errors.NotAStore]
ALL = [
    *(kind("what", hint="do this") for kind in PLAIN),
    *(kind("what", operation="read", path="/x", offset=1, size_bytes=2) for kind in OF_STORAGE),
    errors.BudgetError("what", needed_bytes=7),
    errors.DeviceError(
        errno=5, operation="read", path="/x", offset=1, size_bytes=2, nvme_status=0x281
    ),
]


def test_all_kinds_are_here() -> None:
    def below(kind: type[DualBladeError]) -> set[type[DualBladeError]]:
        return {kind}.union(*(below(one) for one in kind.__subclasses__()))

    ours = {kind for kind in below(DualBladeError) if kind.__module__ == "dualblade.errors"}
    assert {type(error) for error in ALL} == ours


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_elsewhere(error: DualBladeError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert (str(other), vars(other)) == (str(error), vars(error))
        assert other.retryable == error.retryable
