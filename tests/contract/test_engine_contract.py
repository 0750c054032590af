"""Both engines keep the contract, on files and on a block device, buffered and direct."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualblade.errors import Unsupported
from dualblade.io import Engine, EngineChoice, open_engine
from dualblade.testing.contract import CHUNK_BYTES, QUEUE_DEPTH, DeviceContract, Target
from dualblade.units import MIB
from tests.devices import loop_device

SIZE_BYTES = 8 * MIB


class FileContract(DeviceContract):
    engine_name: EngineChoice
    direct: bool

    def open_engine(self) -> Engine:
        try:
            return open_engine(self.engine_name, queue_depth=QUEUE_DEPTH, chunk_bytes=CHUNK_BYTES)
        except Unsupported as error:
            pytest.skip(str(error))

    @pytest.fixture
    def target(self, tmp_path: Path) -> Iterator[Target]:
        path = tmp_path / "device"
        path.write_bytes(bytes(SIZE_BYTES))
        yield from self.opened(path, block_bytes=512 if self.direct else 1)

    def opened(self, path: Path, block_bytes: int) -> Iterator[Target]:
        fd = os.open(path, os.O_RDWR | (os.O_DIRECT if self.direct else 0))
        yield Target(
            fd=fd,
            path=str(path),
            size_bytes=SIZE_BYTES,
            block_bytes=block_bytes,
            direct=self.direct,
        )
        os.close(fd)


class BlockDeviceContract(FileContract):
    """A loop device: refuses what is not whole sectors."""

    direct = True

    @pytest.fixture(params=[512, 4096])
    def target(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
        with loop_device(tmp_path / "backing", SIZE_BYTES, request.param) as device:
            yield from self.opened(Path(device), block_bytes=request.param)


class TestUringDirect(FileContract):
    engine_name = "io_uring"
    direct = True


class TestUringBuffered(FileContract):
    engine_name = "io_uring"
    direct = False


class TestUringBlockDevice(BlockDeviceContract):
    engine_name = "io_uring"


class TestPosixDirect(FileContract):
    engine_name = "posix"
    direct = True


class TestPosixBuffered(FileContract):
    engine_name = "posix"
    direct = False


class TestPosixBlockDevice(BlockDeviceContract):
    engine_name = "posix"
