"""Settings: what is not one is refused with what would be."""

from __future__ import annotations

import pytest

from dualblade.config import EngineConfig
from dualblade.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"io_pol": True}, "did you mean 'io_poll'"),
        ({"io_poll": "on"}, "io_poll must be true or false"),
        ({"discard": 1}, "discard must be true or false"),
        ({"keep_store_blocks": "no"}, "keep_store_blocks must be true or false"),
        ({"disk_capacity_bytes": 0}, "disk_capacity_bytes"),
        ({"io_engine": "uring_cmd"}, "use one of: auto, uring-cmd, io_uring, posix"),
    ],
)
def test_wrong_settings(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig.from_mapping(settings)
