"""What `for_model` refuses before it opens anything, and what it warns of."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from dualblade.config import EngineConfig
from dualblade.errors import ConfigError, Unsupported
from dualblade.hf.continues import check_methods
from dualblade.hf.plan import PlanRequest, budget_shares, refusal

log = logging.getLogger("dualblade.hf")

TESTED_TRANSFORMERS = (5, 24)
"""The newest that the tests were run with. Caches lean on much that it does not promise."""


def check_kinds(model: object, config: object, max_tokens: object) -> None:
    """What a type checker would have said."""
    is_model = isinstance(model, torch.nn.Module) and hasattr(model, "config")
    if not is_model or not callable(getattr(model, "can_generate", None)):
        raise ConfigError(
            f"for_model is given a loaded model, not a {type(model).__name__}",
            hint="AutoModelForCausalLM.from_pretrained(...) makes one",
        )
    if config is not None and not isinstance(config, EngineConfig):
        raise ConfigError(
            f"config is an EngineConfig, not a {type(config).__name__}",
            hint="such as dualblade.EngineConfig(queue_depth=4)",
        )
    if max_tokens is None:
        return
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise ConfigError(f"max_tokens must be a positive number, not {max_tokens!r}")


def check_model(model: PreTrainedModel, layers: list[Any], stored: list[bool]) -> None:
    """Whether `model`, of whose cache's `layers` some are `stored`, can have its KV in a store.
    Raises: ConfigError where it is set to use no cache; Unsupported."""
    check_methods()
    name = type(model).__name__
    if getattr(getattr(model, "generation_config", None), "use_cache", None) is False:
        # generate() would give it the whole text at each step, as what is new.
        raise ConfigError(
            f"{name} is set to use no cache",
            hint="set model.generation_config.use_cache = True",
        )
    if not model.can_generate():
        raise Unsupported(f"{name} does not generate", hint="load it as AutoModelForCausalLM")
    takes_one: Any = getattr(model, "_supports_default_dynamic_cache", None)
    if callable(takes_one) and not takes_one():
        raise Unsupported(f"{name} has a cache of its own", hint="use that: leave `cache` out")
    if not any(stored):
        kinds = sorted({type(layer).__name__ for layer in layers})
        bounded = all(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)
        raise Unsupported(
            f"{name} has no full-attention layers to store (its layers: {', '.join(kinds)})",
            hint="its KV is bounded by the window; use transformers' DynamicCache"
            if bounded
            else "use transformers' own cache for it",
        )
    if model.device.type == "meta":
        raise Unsupported(f"{name} has no weights on a device", hint="load it on one device")
    devices = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise Unsupported(
            f"{name} is spread over devices {', '.join(sorted(devices))}",
            hint="load it on one device",
        )


@functools.cache  # once is enough
def warn_of_version(installed: str = transformers.__version__) -> None:
    """Log that a newer transformers than the tested one is in use."""
    if tuple(map(int, installed.split(".")[:2])) > TESTED_TRANSFORMERS:
        log.warning(
            "dualblade was tested with transformers up to %d.%d, and this is %s: compare some "
            "answers with path='memory' or transformers' own cache before you rely on them",
            *TESTED_TRANSFORMERS,
            installed,
        )


_TOKENS_ADVISED = 2048
"""Where nobody says how many there will be: a prompt's chunk, with which buffers of attention over
tiles are as large as they get."""


def check_budget(config: PretrainedConfig, request: PlanRequest, tokens_max: int | None) -> None:
    """Refuse at once a budget that the tokens of `request`, which are certain, do not fit in.
    Raises: BudgetError, with the bytes that `tokens_max` (None: not known) would do with."""
    shares = budget_shares(config, request)
    if shares is not None and not shares.fits:
        tokens = max(request.tokens, tokens_max or _TOKENS_ADVISED)
        raise refusal(config, replace(request, tokens=tokens), shares)
