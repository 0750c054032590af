"""Which way into attention a cache takes, and lending a model the attention over tiles."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from dualblade.attention import kernel_name
from dualblade.config import check_attention
from dualblade.errors import Unsupported
from dualblade.hf.geometry import caches_latents
from dualblade.hf.tile_attention import NAME


@dataclass(slots=True)
class AttentionChoice:
    """The way in force for one cache, and why. It changes when the model turns out to need it."""

    over_tiles: bool
    reason: str

    @property
    def word(self) -> str:
        """`tiles` or `exact`."""
        return "tiles" if self.over_tiles else "exact"

    def fall_back(self) -> None:
        """The model touched keys or values on their way to attention."""
        if self.over_tiles:
            self.over_tiles = False
            self.reason = "the model's code touches keys or values before attention"


def choose(model: PreTrainedModel, word: str, device: str | None = None) -> AttentionChoice:
    """The way that `word` names for `model`; for `auto` tiles where they hold on a CPU, else exact.
    `device`: None is the model's own.

    Raises: ConfigError; Unsupported when tiles are asked for and cannot be.
    """
    check_attention(word)
    if word == "exact":
        return AttentionChoice(False, "asked for")
    against = _unlendable(model)
    if word == "tiles":
        if against is not None:
            raise Unsupported(against, hint="use attention='exact'")
        return AttentionChoice(True, "asked for")
    if against is not None:
        return AttentionChoice(False, against)
    with MODELS_LOCK:
        implementation = _own_attention(model.config)
    if implementation != "sdpa":
        return AttentionChoice(False, f"the model was loaded with {implementation} attention")
    return _suited(model.config, model.dtype, device or model.device.type)


def _unlendable(model: PreTrainedModel) -> str | None:
    """Why `model` must keep its own attention; None: it may have another."""
    name = type(model).__name__
    if not model._can_set_attn_implementation() or model.config.model_type == "git":
        return f"{name} has attention code of its own that cannot be exchanged"
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if any(_asks_for_sdpa(type(part).__module__) for part in parts) and _heeds_it(model.config):
        return f"{name} does something else where its attention is not called sdpa"
    return None


@functools.cache
def _asks_for_sdpa(module_name: str) -> bool:
    """Whether a model's code compares its attention's name with sdpa. It would take a lent one for
    a kernel that selects tokens by itself, or does without a mask."""
    try:
        code = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return False
    return _COMPARED_WITH_SDPA.search(code) is not None


_COMPARED_WITH_SDPA = re.compile(
    r"_attn_implementation\s*(?:[=!]=|(?:not\s+)?in\b)\s*[(\[{]?[^)\]}\n]*[\"']sdpa[\"']"
)


def _heeds_it(config: PretrainedConfig) -> bool:
    """Gemma 4 asks only for layers that share another's KV, which not all sizes have."""
    text = config.get_text_config(decoder=True)
    is_gemma4 = text.model_type.startswith("gemma4")
    return not is_gemma4 or getattr(text, "num_kv_shared_layers", None) != 0


def _suited(config: PretrainedConfig, dtype: torch.dtype, device: str) -> AttentionChoice:
    """What `auto` takes for a model of this configuration whose attention is sdpa."""
    text = config.get_text_config(decoder=True)
    against = None
    if device != "cpu":
        against = "on a GPU gathering costs next to nothing, and the model's attention is fast"
    elif dtype not in (torch.float32, torch.bfloat16):
        against = f"the kernel does not do {dtype}"
    elif caches_latents(text):
        against = "the model makes keys and values of what it caches (MLA) before attention"
    elif getattr(text, "attn_logit_softcapping", None) is not None:
        against = "the model caps its scores, which the kernel does not do"
    if against is not None:
        return AttentionChoice(False, against)
    return AttentionChoice(True, f"faster on a CPU ({kernel_name()} kernel)")


@dataclass(slots=True)
class _Loan:
    config: PretrainedConfig
    original: dict[str, Any]
    text: str  # the original one of the text model
    count: int = 1


_LOANS: dict[int, _Loan] = {}
"""By the id of the configuration, where the attention's name is: wrappers have that of the model
that they wrap, and models made of one configuration share it. Configurations have no hash."""

MODELS_LOCK = threading.RLock()
"""Models are changed by one thread at a time. A finalizer may come in the middle, of this thread's
collector."""


def _innermost(model: PreTrainedModel) -> torch.nn.Module:
    """The transformers model in a wrapper (PEFT's, torch.compile's)."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """What passes go through however they are begun: by a wrapper, with a head or without."""
    decoder: torch.nn.Module = getattr(_innermost(model), "base_model", model)
    return decoder


_HOLD_MORE_THAN_TEXT = ("git", "cpmant")
"""Their caches hold tokens of an image, or of a task, that masks and texts leave out."""


def generating(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Models in it that may be asked to generate: BLIP-2 has its language model do it."""
    if model.config.model_type in _HOLD_MORE_THAN_TEXT:
        return []
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in parts if part.can_generate() and isinstance(part, GenerationMixin)]


def texts_come_to(model: PreTrainedModel) -> set[torch.nn.Module]:
    """Modules to whose passes texts are given: some heads (OPT's) pass by their `base_model`."""
    if model.config.model_type in _HOLD_MORE_THAN_TEXT:
        return set()
    return {_innermost(model), decoder_of(model)}


def lend(model: PreTrainedModel) -> PretrainedConfig:
    """Give `model` the attention over tiles until `give_back` was called as often, with what this
    returns: the model may be given another configuration meanwhile."""
    config = model.config
    key = id(config)
    with MODELS_LOCK:
        try:  # in one step: a finalizer that comes between two would end the loan
            _LOANS[key].count += 1
        except KeyError:
            original = _attentions_of(config)
            loan = _Loan(config, original, _plain(_text_attention(config)))
            _LOANS[key] = loan
            try:
                model.set_attn_implementation(NAME)
            except BaseException:  # Ctrl-C too
                model.set_attn_implementation(original)
                del _LOANS[key]
                raise
    return config


def give_back(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """The model's own attention, once nobody uses ours; kept when someone set another meanwhile."""
    key = id(config)
    with MODELS_LOCK:
        loan = _LOANS.get(key)
        if loan is None:
            return
        loan.count -= 1
        if loan.count == 0:
            del _LOANS[key]
            is_lent_again = model.config is not config and id(model.config) in _LOANS
            if model.config._attn_implementation == NAME and not is_lent_again:
                model.set_attn_implementation(loan.original)
            if config._attn_implementation == NAME:  # the model has another, its modules this one
                _set_attentions(config, loan.original)


def _attentions_of(config: PretrainedConfig) -> dict[str, Any]:
    """The attention's name, at "", and those of the configurations within, to any depth: as
    `set_attn_implementation` takes them."""
    subs = ((name, getattr(config, name, None)) for name in config.sub_configs)
    within = {name: _attentions_of(sub) for name, sub in subs if sub is not None}
    return {"": _plain(config._attn_implementation), **within}


def _set_attentions(config: PretrainedConfig, names: dict[str, Any]) -> None:
    """What `_attentions_of` told."""
    config._attn_implementation = names[""]
    for name, within in names.items():
        if name:
            _set_attentions(getattr(config, name), within)


def _own_attention(config: PretrainedConfig) -> str:
    """The name of the text model's attention, as it is where ours is not lent."""
    loan = _LOANS.get(id(config))
    return _plain(_text_attention(config)) if loan is None else loan.text


def _text_attention(config: PretrainedConfig) -> str:
    return str(config.get_text_config(decoder=True)._attn_implementation)


def _plain(name: Any) -> Any:
    """Of a model that was copied or saved while ours was lent: it is lent for sdpa."""
    return "sdpa" if name == NAME else name
