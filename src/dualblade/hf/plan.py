"""The residency plan of a model that is not loaded: what `for_model` would do, from its
configuration alone. A test holds both to the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dualblade.config import EngineConfig, Path
from dualblade.errors import BudgetError, ConfigError
from dualblade.geometry import Part, TileGeometry, UnitId
from dualblade.hf.footprint import weights_per_token
from dualblade.hf.geometry import LayerShape, are_alike, layer_shapes
from dualblade.hf.linear import rows_in_turn
from dualblade.host.profile import ComputeSpeeds
from dualblade.metrics import UnitPlacement
from dualblade.pipeline.copies import shares_host_memory
from dualblade.pipeline.division import (
    CAPACITY_STEP_TOKENS,
    Division,
    LayerSizes,
    least_budget,
    too_small,
)
from dualblade.pipeline.residence import describe
from dualblade.residency import (
    BudgetShares,
    DoorSpeeds,
    PlanInputs,
    ResidencyPlan,
    StepTime,
    UnitDemand,
    decide,
    plan_fixed,
    predict,
)
from dualblade.units import round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What to plan for: `tokens` in each of `batch` sequences, elements of `item_bytes`.

    `gather_on_host` is False for a GPU with memory of its own. `over_tiles`: attention works on
    tiles, and a group of them is gathered at most. `speeds`, `compute` None: not measured.
    `weights_bytes` are what the processor multiplies for each token (0 on a GPU), `rows_in_turn` as
    in `KVSettings`: with both staging grows. How fast it is does not change where units go, which a
    cache decides before it has computed anything; only the time that is predicted.
    """

    tokens: int
    batch: int
    item_bytes: int
    budget_bytes: int
    path: Path
    engine: EngineConfig
    gather_on_host: bool = True
    over_tiles: bool = False
    speeds: DoorSpeeds | None = None
    compute: ComputeSpeeds | None = None
    weights_bytes: int = 0
    rows_in_turn: int = 1

    @classmethod
    def of(cls, model: PreTrainedModel, *, device: str | None = None, **asked: Any) -> PlanRequest:
        """What is `asked`, for `model`, whose weights need not be there, on `device` (cpu or cuda;
        None: its own)."""
        place = device or model.device.type
        return cls(
            item_bytes=model.dtype.itemsize,
            gather_on_host=gathers_on_host(place),
            weights_bytes=weights_per_token(model) if place == "cpu" else 0,
            rows_in_turn=rows_in_turn(model.dtype),
            **asked,
        )

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.batch < 1:
            raise ConfigError("context and batch must be at least 1")
        self.engine.check_path(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """The plan of one cache. `tile_rows` and `kv_bytes` cover the layers that are stored;
    placements cover all layers. `step` is the predicted time of a step; None where the drive's
    speeds are not known."""

    placements: tuple[UnitPlacement, ...]
    shares: BudgetShares | None
    tile_rows: tuple[int, ...]
    token_bytes: int
    kv_bytes: int
    step: StepTime | None = None

    def bytes_on(self, path: Path) -> int:
        """Bytes of all units on `path`, as far as they are known."""
        if path is Path.PAGE_CACHE:
            return sum(p.cached_bytes for p in self.placements)
        if path is Path.DIRECT:
            stored = (p for p in self.placements if p.path != Path.MEMORY.value)
            return sum((p.bytes or 0) - p.cached_bytes for p in stored)
        return sum(p.bytes or 0 for p in self.placements if p.path == path.value)


def gathers_on_host(device: str) -> bool:
    """Whether the gather buffers of a model on `device`, cpu or cuda, are in the host's memory. A
    GPU that is not here has its own."""
    is_here = device == "cpu" or torch.cuda.is_available()
    return is_here and shares_host_memory(torch.device(device))


def plan_cache(config: PretrainedConfig, request: PlanRequest) -> CachePlan:
    """The plan for a model of this configuration.

    Raises: Unsupported (see layer_shapes); BudgetError with the bytes needed.
    """
    shapes = layer_shapes(config)
    stored = [shape for shape in shapes if shape.offloaded]
    token_bytes = request.batch * sum(_row_bytes(shape, request.item_bytes) for shape in stored)
    kept = [_kept(shape, config, request) for shape in shapes if not shape.offloaded]
    if request.path is Path.MEMORY or not stored:
        whole = [
            UnitPlacement(
                layer=shape.index,
                part=part.value,
                path=Path.MEMORY.value,
                bytes=request.tokens * request.batch * shape.kv_heads * dim * request.item_bytes,
                cached_bytes=0,
                reason="path memory",
            )
            for shape in stored
            for part, dim in zip(Part, (shape.key_dim, shape.value_dim), strict=True)
        ]
        return _plan([*whole, *kept], None, [], token_bytes, request)
    division = _division(stored, request)
    shares = _shares(division, request, len(shapes))
    if not shares.fits:
        raise refusal(config, request, shares)
    rows = [layer.rows for layer in division.layers]
    placed = _residency(stored, division, shares, request)
    made = _plan([*map(describe, placed.placements), *kept], shares, rows, token_bytes, request)
    return replace(made, step=_step(placed, shares, made.kv_bytes, len(shapes), request))


def budget_shares(config: PretrainedConfig, request: PlanRequest) -> BudgetShares | None:
    """How the budget is divided, enough or not; None: nothing is stored. Raises: Unsupported."""
    shapes = layer_shapes(config)
    stored = [shape for shape in shapes if shape.offloaded]
    if request.path is Path.MEMORY or not stored:
        return None
    return _shares(_division(stored, request), request, len(shapes))


def refusal(config: PretrainedConfig, request: PlanRequest, shares: BudgetShares) -> BudgetError:
    """That `shares` pass a budget, with the least, in whole MiB, that `request` fits in."""

    def anew(budget_bytes: int) -> BudgetShares:
        told = budget_shares(config, replace(request, budget_bytes=budget_bytes))
        assert told is not None, "there are shares of it"
        return told

    return too_small(
        shares,
        least_budget(shares.budget_bytes, anew),
        batch=request.batch,
        tokens=request.tokens,
        over_tiles=request.over_tiles,
    )


def _layer_weights(request: PlanRequest, layer_count: int) -> int:
    """What is multiplied between two layers' attention."""
    turns = min(request.batch, request.rows_in_turn) if request.path is Path.DIRECT else 1
    return request.weights_bytes // layer_count * turns


def _plan(
    placements: list[UnitPlacement],
    shares: BudgetShares | None,
    rows: list[int],
    token_bytes: int,
    request: PlanRequest,
) -> CachePlan:
    ordered = sorted(placements, key=lambda placement: placement.layer)
    return CachePlan(
        placements=tuple(ordered),
        shares=shares,
        tile_rows=tuple(rows),
        token_bytes=token_bytes,
        kv_bytes=token_bytes * request.tokens,
    )


def _row_bytes(shape: LayerShape, item_bytes: int) -> int:
    return _elements(shape) * item_bytes


def _elements(shape: LayerShape) -> int:
    """Of a token of one sequence, keys and values."""
    return shape.kv_heads * (shape.key_dim + shape.value_dim)


def _division(stored: Sequence[LayerShape], request: PlanRequest) -> Division:
    known = Division(
        budget_bytes=request.budget_bytes,
        layers=[_sizes(shape, request) for shape in stored],
        layer_count=len(stored),
        are_alike=are_alike(stored),
        over_tiles=request.over_tiles,
        gather_on_host=request.gather_on_host,
    )
    return known.under(request.budget_bytes, request.engine.tile_tokens)


def _sizes(shape: LayerShape, request: PlanRequest) -> LayerSizes:
    """Of a layer whose tiles are still to be chosen."""
    keys, values = (
        TileGeometry(kv_heads=shape.kv_heads, rows=1, dim=dim, item_bytes=request.item_bytes)
        for dim in (shape.key_dim, shape.value_dim)
    )
    return LayerSizes(batch=request.batch, keys=keys, values=values, tail_rows=0)


def _shares(division: Division, request: PlanRequest, layer_count: int) -> BudgetShares:
    staging = division.staging(
        request.engine,
        multiplied_bytes=_layer_weights(request, layer_count),
        fitting_tokens=request.tokens if request.engine.has_choice(request.path) else None,
        speeds=request.speeds,
    )
    capacity = round_up(request.tokens, CAPACITY_STEP_TOKENS)
    return division.shares(capacity, staging_bytes=staging.total_bytes)


def _residency(
    stored: Sequence[LayerShape], division: Division, shares: BudgetShares, request: PlanRequest
) -> ResidencyPlan:
    demands = tuple(
        UnitDemand(
            unit=UnitId(shape.index, part),
            size_bytes=geometry.planned_bytes(request.batch, request.tokens),
            grain_bytes=geometry.grain_bytes(request.batch),
        )
        for shape, layer in zip(stored, division.layers, strict=True)
        for part, geometry in zip(Part, layer.halves, strict=True)
    )
    if request.path is not Path.DUAL:
        return plan_fixed(demands, request.path)
    room = shares.page_cache_bytes
    return decide(
        PlanInputs(
            demands=demands,
            page_cache_bytes=room,
            speeds=request.speeds,
            cache_percent=request.engine.cache_percent,
        )
    )


def _step(
    plan: ResidencyPlan, shares: BudgetShares, kv_bytes: int, layers: int, request: PlanRequest
) -> StepTime | None:
    """What reading and computing take. On the page-cache path what does not fit gets no hits."""
    speeds, compute, cached = request.speeds, request.compute, plan.cached_bytes
    if speeds is None:
        return None
    return predict(
        cached + plan.direct_bytes,
        cached,
        shares.page_cache_bytes,
        speeds,
        compute_seconds=0.0
        if compute is None
        else compute.seconds(
            request.weights_bytes, kv_bytes, layers=layers, over_tiles=request.over_tiles
        ),
    )


def _kept(shape: LayerShape, config: PretrainedConfig, request: PlanRequest) -> UnitPlacement:
    """A layer that transformers' own class holds in memory; a window bounds a sliding one."""
    window = getattr(config.get_text_config(decoder=True), "sliding_window", None)
    size = None
    if shape.kind == "sliding_attention" and window is not None:
        row = request.batch * _row_bytes(shape, request.item_bytes)
        size = min(request.tokens, int(window)) * row
    return UnitPlacement(
        layer=shape.index,
        part="all",
        path=Path.MEMORY.value,
        bytes=size,
        cached_bytes=0,
        reason=f"{shape.kind} stays in memory",
    )
