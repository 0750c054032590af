"""What `generate` finds out before it reads a model's weights: all that would be refused anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dualblade.cli.generation import check_candidates, check_length
from dualblade.cli.store_place import check_store
from dualblade.config import Path as KVPath
from dualblade.hf.choice import choose
from dualblade.hf.footprint import footprint, skeleton, staging_least
from dualblade.hf.models import (
    ModelText,
    default_dtype,
    foreign_errors_in_brief,
    is_packed,
    parse_device,
    parse_dtype,
    text_of,
)
from dualblade.hf.plan import PlanRequest
from dualblade.hf.refusals import check_budget
from dualblade.host.memory import available_memory

if TYPE_CHECKING:
    from dualblade.cli.generate import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is known of a request: the prompt's tokens, and how many there may be after them."""

    text: ModelText
    prompt: list[int]
    new_tokens: int


def prepare(request: Request, tell: Callable[[str], None]) -> Prepared:
    """Look at the store's place, the prompt's length, the memory. Raises: DualBladeError."""
    asked, device = parse_dtype(request.dtype), parse_device(request.device).type
    path = KVPath.parse(request.path)
    if path is not KVPath.MEMORY:
        check_store(request.store, request.engine, direct=path is not KVPath.PAGE_CACHE)
    with foreign_errors_in_brief(request.model):  # what is within need not ask for the hub again
        text = text_of(request.model, tell=tell)
        prompt = text.encode(request.prompt, system=request.system, chat=request.chat)
        new_tokens = check_length(text, len(prompt), request.max_new_tokens, request.prompt_lookup)
        prepared = Prepared(text=text, prompt=prompt, new_tokens=new_tokens)
        config = text.config
        # What quantised weights are, and take, is not known from the configuration.
        if getattr(config, "quantization_config", None) is None:
            dtype = asked or default_dtype(config, device)
            unloaded = skeleton(config, dtype)
            if request.prompt_lookup:
                check_candidates(text.name, unloaded)
            _check_budget(request, prepared, unloaded, device)
            if device == "cpu":  # with a GPU of its own memory the weights need no host memory
                _check_memory(request, len(prompt), config, dtype)
    return prepared


def _check_budget(request: Request, prepared: Prepared, unloaded: Any, device: str) -> None:
    """Of a stated one; what `auto` gives is known once the weights are there."""
    if request.memory_budget == "auto":
        return
    tokens = len(prepared.prompt)
    planned = PlanRequest.of(
        unloaded,
        device=device,
        tokens=tokens,
        batch=1,
        budget_bytes=int(request.memory_budget),
        path=KVPath.parse(request.path),
        engine=request.engine,
        over_tiles=choose(unloaded, request.attention, device).over_tiles,
    )
    most = tokens + prepared.new_tokens + request.prompt_lookup
    check_budget(unloaded.config, planned, most)


def _check_memory(request: Request, prompt_tokens: int, config: Any, dtype: torch.dtype) -> None:
    budget = 0 if request.memory_budget == "auto" else int(request.memory_budget)
    staging = staging_least(config, dtype.itemsize, budget, request.engine)
    needed = footprint(
        config,
        dtype,
        rows=min(request.prefill_chunk_tokens, prompt_tokens),
        staging_bytes=0 if request.path == "memory" else staging,
        is_packed=is_packed(request.model),
    )
    needed.require(request.model, available_memory())
