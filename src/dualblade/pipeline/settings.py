"""What a pipeline is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dualblade.config import EngineConfig, Path
from dualblade.pipeline.copies import MakeCopies, copies_for
from dualblade.pipeline.residence import MemorySource
from dualblade.residency import DoorSpeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSettings:
    """Of a `KVPipeline`.

    layer_count          the offloaded layers only.
    over_tiles           attention works on tiles, and no layer is gathered whole.
    layer_weights_bytes  see `staging_shape`; each of so many sequences as `rows_in_turn` takes the
                         time of one.
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
