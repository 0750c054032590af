"""Passthrough keeps the contract of every engine, with blocks of 512 and of 4096 bytes."""

from __future__ import annotations

import os

import pytest

from dualblade.host.drives import find_drive
from dualblade.io import Arena, Engine, EngineChoice, Namespace, open_engine
from dualblade.testing.contract import CHUNK_BYTES, QUEUE_DEPTH, DeviceContract, Target
from dualblade.units import MIB
from tests.lab.guest.conftest import block_of, find_namespace

SIZE_BYTES = 8 * MIB


class PassthroughContract(DeviceContract):
    serial: str
    number: int

    @pytest.fixture
    def target(self) -> Target:  # type: ignore[override]
        return self._target()

    def _target(self) -> Target:
        # The block device for what is buffered; the namespace's own descriptor for the rest.
        return Target(
            fd=self._fd(),
            path=block_of(self._path()),
            size_bytes=SIZE_BYTES,
            block_bytes=find_drive(self._path()).block_bytes,
            direct=True,
        )

    @classmethod
    def _path(cls) -> str:
        return find_namespace(cls.serial, cls.number)

    @classmethod
    def _fd(cls) -> int:
        """One descriptor for all engines of a class: they learn of it before a target is made."""
        if "_opened" not in cls.__dict__:
            cls._opened = os.open(cls._path(), os.O_RDWR)
        return cls._opened

    choice: EngineChoice = "auto"

    def open_engine(self) -> Engine:
        engine = open_engine(self.choice, queue_depth=QUEUE_DEPTH, chunk_bytes=CHUNK_BYTES)
        self.register(engine)
        assert engine.name == ("nvme-ioctl" if self.choice == "posix" else "uring-cmd")
        return engine

    def register(self, engine: Engine) -> None:
        drive = find_drive(self._path())
        space = Namespace(
            namespace_id=self.number,
            block_bytes=drive.block_bytes,
            begin=0,
            end=SIZE_BYTES,
            command_bytes_max=drive.command_bytes_max,
            scattered_bytes_max=CHUNK_BYTES,
        )
        engine.register_namespace(self._fd(), space)

    def test_registered_files_and_buffers(
        self, target: Target, engine: Engine, arena: Arena
    ) -> None:
        """As for all engines; a descriptor that was forgotten is introduced again."""
        unregister = engine.unregister_file

        def forget(fd: int) -> None:
            unregister(fd)
            self.register(engine)

        engine.unregister_file = forget  # type: ignore[method-assign]
        super().test_registered_files_and_buffers(target, engine, arena)


class TestSmallBlocks(PassthroughContract):
    serial, number = "LABSMALL", 1


class TestByIoctl(PassthroughContract):
    serial, number, choice = "LABSMALL", 1, "posix"


class TestLargeBlocks(PassthroughContract):
    serial, number = "LABTWO", 7
