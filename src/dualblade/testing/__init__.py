"""Doubles and contracts that tests of dualblade, and of what is built on it, share.

`dualblade.testing.contract` needs pytest and hypothesis; what is imported here does not.
"""

from dualblade.testing.dma import SimulatedDma
from dualblade.testing.faulty import Fault, FaultyEngine
from dualblade.testing.stall import StalledMemory

__all__ = ["Fault", "FaultyEngine", "SimulatedDma", "StalledMemory"]
