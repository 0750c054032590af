"""Bytes <-> device: batches of transfers in, tickets out.

    engine.submit([Transfer(fd, Op.READ, address, size_bytes, offset), ...]) -> Ticket

The engine cuts transfers into pieces, keeps a set number of them in flight from its own thread
without Python's lock, and says how far each batch has landed. Two engines, one interface:
`io_uring`, and `posix` threads where io_uring is forbidden. Both send NVMe commands to a namespace:
by URING_CMD, or by ioctl.
"""

from dualblade.config import EngineChoice
from dualblade.io.arena import Arena
from dualblade.io.engine import QUEUE_DEPTH_MAX, Counters, Engine, Ticket, open_engine
from dualblade.io.transfer import Namespace, Op, Transfer

__all__ = [
    "QUEUE_DEPTH_MAX",
    "Arena",
    "Counters",
    "Engine",
    "EngineChoice",
    "Namespace",
    "Op",
    "Ticket",
    "Transfer",
    "open_engine",
]
