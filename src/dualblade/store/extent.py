"""An extent: what a store hands out, and what a caller may ask of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualblade.errors import ConfigError
from dualblade.host.mapped import FileMemory
from dualblade.io import Op, Ticket
from dualblade.store.doors import LEGAL_MOVES, Door
from dualblade.store.extents import Range
from dualblade.units import BLOCK_BYTES


@dataclass(slots=True, eq=False)
class Extent:
    """A contiguous range of the store. All but its size belongs to the store. `tickets` are those
    of its transfers that may not have ended, and what each does; and of the writes that failed the
    first, which `Store.move` tells of."""

    range: Range
    door: Door = Door.FREE
    tickets: dict[Ticket, Op] = field(default_factory=dict)
    memory: FileMemory | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes it can hold."""
        return self.range.size_bytes

    def forget_ended(self) -> None:
        """Keep of `tickets` what they are there for."""
        ended = [ticket for ticket in self.tickets if ticket.done]  # one look: they end meanwhile
        writes = (ticket for ticket in ended if self.tickets[ticket] is Op.WRITE)
        failed = next((ticket for ticket in writes if ticket.failed), None)
        for ticket in ended:
            if ticket is not failed:
                del self.tickets[ticket]

    def check_range(self, offset: int, size_bytes: int) -> None:
        """Raises: ConfigError for what is not all in it."""
        if not 0 <= offset < offset + size_bytes <= self.range.size_bytes:
            raise ConfigError(
                f"{size_bytes} bytes at offset {offset} are not in an extent of {self.size_bytes}"
            )

    def check_transfer(self, offset: int, address: int, size_bytes: int) -> None:
        """Raises: ConfigError for what no transfer through its door may be."""
        self.check_range(offset, size_bytes)
        if (offset | size_bytes) % BLOCK_BYTES:
            raise ConfigError(
                f"{size_bytes} bytes at offset {offset} are not whole blocks of {BLOCK_BYTES}"
            )
        if self.door is Door.DIRECT and address % BLOCK_BYTES:
            raise ConfigError(
                f"memory at {address:#x} does not begin at a multiple of {BLOCK_BYTES}, as the "
                "direct door needs it",
                hint="use memory of an Arena, or the page-cache door",
            )
        if self.door is Door.DEMOTING:
            raise ConfigError(
                "a transfer on an extent whose move to the direct door did not end",
                hint="move it there again, or free it",
            )

    def go(self, door: Door) -> None:
        """Through `door` from now on."""
        assert door in LEGAL_MOVES[self.door], f"{self.door.value} to {door.value}"
        self.door = door

    def unmap(self) -> None:
        """Nothing of it is mapped any more."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None
