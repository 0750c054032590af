"""The drive's queue reads ahead as it is told for a while, and then as it did."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualblade.errors import Unsupported
from dualblade.host import read_ahead
from dualblade.host.read_ahead import reading_ahead
from dualblade.units import MIB


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    queue = tmp_path / "sda" / "queue"
    queue.mkdir(parents=True)
    monkeypatch.setattr(read_ahead, "whole_drive", lambda _: queue.parent)
    (queue / "read_ahead_kb").write_text("128\n", encoding="ascii")
    return queue / "read_ahead_kb"


def test_it_is_put_back_whatever_happens(setting: Path) -> None:
    with reading_ahead(Path(), MIB):
        assert setting.read_text(encoding="ascii") == "1024"
    assert setting.read_text(encoding="ascii") == "128\n"
    with pytest.raises(KeyboardInterrupt), reading_ahead(Path(), 8 * MIB):
        raise KeyboardInterrupt
    assert setting.read_text(encoding="ascii") == "128\n"


def test_where_it_cannot_be_set_a_line_says_why(
    setting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting.unlink()
    with pytest.raises(Unsupported, match=r"read_ahead_kb: No such file"), reading_ahead(Path(), 1):
        pass
    monkeypatch.setattr(read_ahead, "whole_drive", lambda _: None)
    with pytest.raises(Unsupported, match="no single block device"), reading_ahead(Path(), 1):
        pass
