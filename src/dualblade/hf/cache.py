"""`DualBladeCache`: a transformers cache whose full-attention layers are in a store."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from dualblade.config import AttentionWord, EngineConfig, Path
from dualblade.errors import Closed, ConfigError, Unsupported
from dualblade.hf.beside import reset_layer
from dualblade.hf.boundary import rotation_boundary, warn_of_boundary
from dualblade.hf.choice import (
    AttentionChoice,
    choose,
    decoder_of,
    generating,
    give_back,
    lend,
    texts_come_to,
)
from dualblade.hf.continues import watch_generate, watch_texts
from dualblade.hf.geometry import (
    are_alike,
    layer_shapes,
    memory_layers,
    offloadable,
)
from dualblade.hf.layer import MemoryLayer, StoredLayer
from dualblade.hf.linear import rows_in_turn
from dualblade.hf.opening import budget_of, kv_bytes_least, layer_weights_bytes, open_pipeline
from dualblade.hf.plan import PlanRequest
from dualblade.hf.refusals import (
    check_budget,
    check_kinds,
    check_model,
    warn_of_version,
)
from dualblade.hf.whole_steps import WholeSteps
from dualblade.metrics import (
    CacheStats,
    ChecksumTotals,
    MemoryUse,
    PipelineStages,
    SpeedFacts,
    StageSeconds,
    TransferTotals,
    UnitPlacement,
)
from dualblade.pipeline import KVPipeline, KVSettings, MemoryKV
from dualblade.store import Place, Store
from dualblade.units import parse_size


class DualBladeCache(WholeSteps):
    """The KV cache of one model's generations, in a store on a drive.

    Made by `for_model`; a context manager. With `attention="exact"` greedy tokens and logits equal
    `DynamicCache`'s; with tiles they are the same on every path, rounded differently from those.
    It is used by one thread at a time. After an error in the middle of a step it says so at every
    further use; closing it always works and leaves nothing behind.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: ARG004
        """Raises: ConfigError for a model, which most caches of transformers are made with."""
        if args and isinstance(args[0], torch.nn.Module):
            raise ConfigError(
                "a DualBladeCache is not made from a model directly",
                hint="call DualBladeCache.for_model(model, ...)",
            )
        return super().__new__(cls)

    def __init__(
        self,
        layers: list[Any],
        *,
        path: Path,
        attention: AttentionChoice,
        model: PreTrainedModel | None = None,
        pipeline: KVPipeline | MemoryKV | None = None,
        store: Store | None = None,
        speeds: SpeedFacts | None = None,
    ) -> None:
        """`model` has attention over tiles lent to it until close, where `attention` says so."""
        super().__init__(layers)
        self._path = path
        self._attention = attention
        self._pipeline = pipeline
        self._store = store
        self._speeds = speeds
        self._is_closed = False
        # A cache that is dropped without close must leave neither its store open nor the model with
        # its attention.
        self._end = None if pipeline is None else weakref.finalize(self, pipeline.close)
        self._give_back: Callable[[], object] = lambda: None
        self._end_watches: list[Callable[[], object]] = []
        if model is None:
            return
        boundary = rotation_boundary(model.config)
        self._end_watches += watch_texts(texts_come_to(model), self, boundary)
        self._end_watches += watch_generate(generating(model), self)
        self._beside.watch(decoder_of(model), self)
        if attention.over_tiles:  # last: what fails above leaves the model as it was
            self._give_back = weakref.finalize(self, give_back, model, lend(model))

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        store: Place | Sequence[Place] | None = None,
        memory_budget: str | int = "auto",
        path: str | Path = "dual",
        attention: AttentionWord = "auto",
        max_tokens: int | None = None,
        config: EngineConfig | None = None,
    ) -> DualBladeCache:
        """A cache for `model`, to pass as `cache`.

        store          a folder (for a private file, gone at close), a file (made 0600 when
                       missing) or a formatted device, or several: striped. What is no dualblade
                       store is refused. None: a private file in ~/.cache/dualblade.
        memory_budget  host memory for this cache in all: `512MiB`, bytes, or `auto`: what there is
                       less a reserve for everything else (EngineConfig.memory_reserve_bytes). On
                       the `dual` path the plan follows the memory that is there, and a stated
                       budget is a limit that less memory lowers.
        path           `dual` keeps in the page cache what fits under the budget and reads the
                       rest directly, or splits as EngineConfig.cache_percent says; `page-cache`,
                       `direct` and `memory` (no store, no budget) are one way for all.
        attention      `exact`: the model's own attention on gathered tiles, bit-equal to
                       `DynamicCache`. `tiles`: ours on tiles where they lie, in memory that does
                       not grow with the context; rounding differs, as between sdpa and eager. The
                       model has it until close. `auto`: tiles on a CPU where the model allows it,
                       else exact.
        max_tokens     most tokens of a sequence, prompt (and candidates of assisted decoding)
                       included: each unit is then one contiguous extent. None: it grows as needed.
        config         engine settings.

        Raises: ConfigError, for a model too whose generation settings say `use_cache: false`, with
                which `generate` would write wrong text; Unsupported, BudgetError, NotAStore,
                NoSpace, StorageError.
        """
        check_kinds(model, config, max_tokens)
        warn_of_version()
        way, settings = Path.parse(path), config or EngineConfig()
        settings.check_path(way)
        stated = None if memory_budget == "auto" else parse_size(memory_budget)
        layers = memory_layers(model.config)
        stored = offloadable(model.config, layers)
        check_model(model, layers, stored)
        warn_of_boundary(model, max_tokens)
        choice = choose(model, attention)
        made = partial(cls, layers, path=way, attention=choice, model=model)
        if way is Path.MEMORY:
            memory = _memory_kv(model, choice, max_tokens, settings)
            _take_over(layers, stored, memory, max_tokens, choice)
            return made(pipeline=memory)
        budget, source = budget_of(stated, settings)
        check_budget(model.config, _one_token(model, way, choice, budget, settings), max_tokens)
        kv = KVSettings(
            path=way,
            budget_bytes=budget,
            layer_count=sum(stored),
            tokens_max=max_tokens,
            device=model.device,
            config=settings,
            over_tiles=choice.over_tiles,
            layer_weights_bytes=layer_weights_bytes(model, len(layers)),
            rows_in_turn=rows_in_turn(model.dtype),
            layers_alike=are_alike(s for s in layer_shapes(model.config) if s.offloaded),
            memory=source,
        )
        opened, over, speeds = open_pipeline(store, kv, kv_bytes_least(model, max_tokens))
        _take_over(layers, stored, over, max_tokens, choice)
        return made(pipeline=over, store=opened, speeds=speeds)

    # torch.compile would trace the store's arithmetic, with tensors that are none.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See transformers' `Cache`. Raises: as `StoredLayer.update`; ConfigError for a layer that
        the cache's model has not."""
        self._check_layer(layer_idx)
        if layer_idx == self._beside.first:  # of a step
            self.check_usable()
            self._beside.check(self.get_seq_length(layer_idx), key_states.shape[2])
        elif self._is_memory(layer_idx):
            tokens = self.get_seq_length(layer_idx) + key_states.shape[2]
            ours = range(self._beside.first, layer_idx)
            used = filter(None, (self.get_seq_length(n) for n in ours if self._is_memory(n)))
            self._beside.check_along(tokens, next(used, 0))
        together = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._beside.touch()
        return together

    def _is_memory(self, layer_idx: int) -> bool:
        return isinstance(self.layers[layer_idx], MemoryLayer)

    def check_usable(self) -> None:
        """Raises: Closed where the content is lost, and after close; not of plain tensors, which
        lose nothing."""
        if self._pipeline is not None:
            self._pipeline.check_usable()

    def _check_layer(self, layer_idx: int) -> None:
        """Raises: ConfigError, Closed."""
        if layer_idx >= len(self.layers):
            raise ConfigError(
                f"this cache is for a model of {len(self.layers)} layers, and was given to one "
                "with more",
                hint="make one with for_model for each model",
            )
        if self._is_closed:
            raise Closed("this cache is closed", hint="make a new one with for_model")

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> None:
        """Take in rows [batch, kv_heads, n, dim] of a layer without attending to them.

        For KV that exists already: a benchmark's, or another machine's prefill.
        Raises: as `update`; Unsupported for layers that are not full attention.
        """
        self._check_layer(layer_idx)
        layer = self.layers[layer_idx]
        if not isinstance(layer, StoredLayer | MemoryLayer):
            raise Unsupported(f"layer {layer_idx} is a {type(layer).__name__}; it cannot append")
        before = layer.get_seq_length()
        try:
            layer.append(key_states, value_states)
        finally:  # what was refused has changed nothing
            if layer.get_seq_length() != before:
                self.held_text.forget()

    def close(self) -> None:
        """End all transfers, discard the KV, free memory, give the model its attention back. Twice
        is once; after Ctrl-C it goes on where it was."""
        self._is_closed = True
        try:
            self._give_back()  # once
            for end_watch in self._end_watches:
                end_watch()
            self._beside.end_watch()
            for layer in self.layers:
                if not isinstance(layer, StoredLayer):
                    reset_layer(layer)
        finally:
            if self._pipeline is not None and self._end is not None:
                self._pipeline.close()
                self._end.detach()

    def __enter__(self) -> DualBladeCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> DualBladeCache:
        raise Unsupported(
            "a cache in a store cannot be copied", hint="make a second one with for_model"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Unsupported("a cache in a store cannot be saved", hint="save the text and the model")

    def write_trace(self, path: str | os.PathLike[str]) -> int:
        """Write what each stage did when, for Perfetto or chrome://tracing; the number of spans.

        The newest `EngineConfig.trace_events` of them are kept, by default none. Also after close.
        Raises: Unsupported where nothing is kept, OSError.
        """
        if self._pipeline is None:
            raise Unsupported("nothing is traced in memory with the model's own attention")
        return self._pipeline.write_trace(FilePath(path))

    def stats(self) -> CacheStats:
        """Where bytes and time went, and what is in force. Asks the kernel what of the store is in
        the page cache, and how its file lies: 1 to 2 ms for some GiB of KV in 48 units."""
        stored_count = sum(isinstance(layer, StoredLayer) for layer in self.layers)
        memory_bytes = sum(_layer_bytes(layer) for layer in self.layers)
        pipeline, store = self._pipeline, self._store
        if not isinstance(pipeline, KVPipeline) or store is None:
            if pipeline is not None:
                memory_bytes += pipeline.kv_bytes
            return CacheStats(
                path=self._path.value,
                attention=self._attention.word,
                attention_reason=self._attention.reason,
                engine=None,
                store_path=None,
                store_fragments=None,
                tokens=self.get_seq_length(),
                kv_bytes=memory_bytes,
                stored_bytes=0,
                offloaded_layers=0,
                memory_layers=len(self.layers),
                memory=_NO_MEMORY,
                io=TransferTotals(),
                checksums=ChecksumTotals(),
                seconds=StageSeconds() if pipeline is None else pipeline.seconds(),
                stages=PipelineStages() if pipeline is None else pipeline.stages(),
                plan=(),
            )
        return CacheStats(
            path=self._path.value,
            attention=self._attention.word,
            attention_reason=self._attention.reason,
            engine=pipeline.engine_facts(),
            store_path=store.path,
            store_fragments=store.file_fragments(),
            tokens=self.get_seq_length(),
            kv_bytes=pipeline.kv_bytes + memory_bytes,
            stored_bytes=pipeline.stored_bytes,
            offloaded_layers=stored_count,
            memory_layers=len(self.layers) - stored_count,
            memory=pipeline.memory_use(),
            io=pipeline.transfers(),
            checksums=pipeline.checksums.totals(),
            seconds=pipeline.seconds(),
            stages=pipeline.stages(),
            tuning=pipeline.tuning(),
            plan=self._plan(pipeline),
            events=pipeline.events(),
            speeds=self._speeds,
        )

    def _plan(self, pipeline: KVPipeline) -> tuple[UnitPlacement, ...]:
        """The plan in force. The pipeline counts the layers that it has; the model all of them."""
        of_model = [n for n, layer in enumerate(self.layers) if isinstance(layer, StoredLayer)]
        return tuple(
            replace(placed, layer=of_model[placed.layer]) for placed in pipeline.placements()
        )


_NO_MEMORY = MemoryUse(
    budget_bytes=None,
    staging_bytes=0,
    gather_bytes=0,
    tail_bytes=0,
    table_bytes=0,
    page_cache_planned_bytes=0,
    page_cache_bytes=0,
)


def _one_token(
    model: PreTrainedModel, path: Path, choice: AttentionChoice, budget: int, config: EngineConfig
) -> PlanRequest:
    """The least that is to be planned for."""
    return PlanRequest.of(
        model,
        tokens=1,
        batch=1,
        budget_bytes=budget,
        path=path,
        engine=config,
        over_tiles=choice.over_tiles,
    )


def _memory_kv(
    model: PreTrainedModel, choice: AttentionChoice, max_tokens: int | None, config: EngineConfig
) -> MemoryKV | None:
    """Tiles in memory; None where attention is the model's own, for which plain tensors do."""
    if not choice.over_tiles:
        return None
    return MemoryKV(model.device, config.tile_tokens, max_tokens, config.trace_events)


def _take_over(
    layers: list[Any],
    stored: list[bool],
    pipeline: KVPipeline | MemoryKV | None,
    max_tokens: int | None,
    choice: AttentionChoice,
) -> None:
    """Put ours where layers are `stored`: over `pipeline`, or None in plain tensors."""
    ours = [index for index, is_stored in enumerate(stored) if is_stored]
    for number, index in enumerate(ours):
        layers[index] = (
            MemoryLayer(max_tokens)
            if pipeline is None
            else StoredLayer(pipeline, number, max_tokens, choice)
        )


def _layer_bytes(layer: Any) -> int:
    """Bytes of the KV that a layer of plain tensors holds."""
    if isinstance(layer, StoredLayer):
        return 0
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
