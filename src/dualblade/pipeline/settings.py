"""What a pipeline is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dualblade.config import EngineConfig, Path
from dualblade.pipeline.copies import MakeCopies, copies_for
from dualblade.pipeline.memory_watch import MemorySource
from dualblade.residency import DoorSpeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSettings:
    """Of a `KVPipeline`.

    layer_count          the offloaded layers only.
    over_tiles           attention works on tiles, and no layer is gathered whole.
    layer_weights_bytes  what the processor multiplies in a layer; 0 on a GPU.
    rows_in_turn         so many sequences are multiplied one after another, each for as long as
                         one alone.
    layers_alike         all layers have the same heads.
    memory               None: the budget holds, and nobody asks what memory there is.
    speeds               None: not measured.
    """

    path: Path
    budget_bytes: int
    layer_count: int
    tokens_max: int | None
    device: torch.device
    config: EngineConfig
    over_tiles: bool = False
    layer_weights_bytes: int = 0
    rows_in_turn: int = 1
    layers_alike: bool = True
    memory: MemorySource | None = None
    speeds: DoorSpeeds | None = None
    copies: MakeCopies = copies_for

    def multiplied_bytes(self, batch: int) -> int:
        """Bytes of weights that stream through the processor between two layers' attention, once
        for each sequence that is multiplied by itself: how much staging is to keep the drive busy
        meanwhile. On path `direct` alone the sequences count: elsewhere more staging is less page
        cache, and what is left to read is hidden without."""
        turns = min(batch, self.rows_in_turn) if self.path is Path.DIRECT else 1
        return self.layer_weights_bytes * turns
