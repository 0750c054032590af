"""Models with random weights, by name or by shape: anything can be measured without a download.

    random:opt-1.3b                          a known model's shape
    random:llama-3-8b?layers=4               the same with fewer layers
    random:llama?layers=4,hidden=256,heads=8,kv_heads=2,vocab=1000,positions=8192
    random:opt-6.7b?unique_layers=1          all of its layers share the weights of the first

Layers that share weights make a large model fit: OPT-6.7B needs 0.8 GiB in place of 12.4. A step
computes and reads as much as before, as long as one layer is larger than the processor's cache.

Weights are seeded. They are a pool of normal numbers laid out again and again at shifted places:
drawing each anew takes 7 s per 1.3 billion on a slow core, and no measurement here can tell.
Such a model never ends a text by itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dualblade.errors import ConfigError

PREFIX = "random:"

_POOL_ELEMENTS = 4_194_301
"""A prime just under 2**22: no row length divides it, so rows of a matrix differ."""

_POOL_SHIFT = 1_000_003
_STD = 0.02

_UNIQUE = "unique_layers"
_UNIQUE_ATTRIBUTE = f"dualblade_{_UNIQUE}"
"""Of a configuration: how many layers have weights of their own; missing where all do."""

_KEYS = (
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "intermediate",
    "vocab",
    "positions",
    "window",
    _UNIQUE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """A model type of transformers, and what our keys are called in its configuration.

    `fixed` is set always; a key that is missing in `names` does not exist there.
    """

    model_type: str
    names: Mapping[str, str]
    fixed: Mapping[str, Any]
    head_dim_is_own: bool = False


_LLAMA_NAMES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
}
_WITH_HEAD_DIM = {**_LLAMA_NAMES, "head_dim": "head_dim"}
_WITH_WINDOW = {**_WITH_HEAD_DIM, "window": "sliding_window"}

FAMILIES: dict[str, _Family] = {
    "llama": _Family(model_type="llama", names=_WITH_HEAD_DIM, fixed={}),
    "opt": _Family(
        model_type="opt",
        names={
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "heads": "num_attention_heads",
            "intermediate": "ffn_dim",
            "vocab": "vocab_size",
            "positions": "max_position_embeddings",
        },
        fixed={},
    ),
    "gpt2": _Family(
        model_type="gpt2",
        names={
            "layers": "n_layer",
            "hidden": "n_embd",
            "heads": "n_head",
            "intermediate": "n_inner",
            "vocab": "vocab_size",
            "positions": "n_positions",
        },
        fixed={},
    ),
    "qwen2": _Family(model_type="qwen2", names=_LLAMA_NAMES, fixed={}),
    "qwen3": _Family(model_type="qwen3", names=_WITH_HEAD_DIM, fixed={}, head_dim_is_own=True),
    "mistral": _Family(model_type="mistral", names=_WITH_WINDOW, fixed={"sliding_window": None}),
    "phi": _Family(model_type="phi", names=_LLAMA_NAMES, fixed={}),
    "gemma2": _Family(model_type="gemma2", names=_WITH_WINDOW, fixed={}, head_dim_is_own=True),
    "gemma3": _Family(model_type="gemma3_text", names=_WITH_WINDOW, fixed={}, head_dim_is_own=True),
}

_DEFAULTS = {"layers": 2, "hidden": 256, "heads": 4, "vocab": 1000, "positions": 4096}

_LLAMA_3_8B = {
    "layers": 32,
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 8,
    "intermediate": 14336,
    "vocab": 128256,
}

PRESETS: dict[str, tuple[str, dict[str, int]]] = {
    "opt-125m": ("opt", {"layers": 12, "hidden": 768, "heads": 12}),
    "opt-1.3b": ("opt", {"layers": 24, "hidden": 2048, "heads": 32}),
    "opt-2.7b": ("opt", {"layers": 32, "hidden": 2560, "heads": 32}),
    "opt-6.7b": ("opt", {"layers": 32, "hidden": 4096, "heads": 32}),
    "opt-13b": ("opt", {"layers": 40, "hidden": 5120, "heads": 40}),
    "gpt2": ("gpt2", {"layers": 12, "hidden": 768, "heads": 12, "vocab": 50257, "positions": 1024}),
    "smollm2-135m": (
        "llama",
        {
            "layers": 30,
            "hidden": 576,
            "heads": 9,
            "kv_heads": 3,
            "intermediate": 1536,
            "vocab": 49152,
            "positions": 8192,
        },
    ),
    "llama-2-7b": (
        "llama",
        {
            "layers": 32,
            "hidden": 4096,
            "heads": 32,
            "intermediate": 11008,
            "vocab": 32000,
            "positions": 4096,
        },
    ),
    "llama-3-8b": ("llama", {**_LLAMA_3_8B, "positions": 8192}),
    "llama-3.1-8b": ("llama", {**_LLAMA_3_8B, "positions": 131072}),
    "llama-3.2-1b": (
        "llama",
        {
            "layers": 16,
            "hidden": 2048,
            "heads": 32,
            "kv_heads": 8,
            "intermediate": 8192,
            "vocab": 128256,
            "positions": 131072,
        },
    ),
    "qwen2-0.5b": (
        "qwen2",
        {
            "layers": 24,
            "hidden": 896,
            "heads": 14,
            "kv_heads": 2,
            "intermediate": 4864,
            "vocab": 151936,
            "positions": 131072,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "layers": 28,
            "hidden": 1024,
            "heads": 16,
            "kv_heads": 8,
            "head_dim": 128,
            "intermediate": 3072,
            "vocab": 151936,
            "positions": 40960,
        },
    ),
    "mistral-7b": (
        "mistral",
        {
            "layers": 32,
            "hidden": 4096,
            "heads": 32,
            "kv_heads": 8,
            "intermediate": 14336,
            "vocab": 32768,
            "positions": 32768,
        },
    ),
    "phi-2": (
        "phi",
        {
            "layers": 32,
            "hidden": 2560,
            "heads": 32,
            "intermediate": 10240,
            "vocab": 51200,
            "positions": 2048,
        },
    ),
}
_OPT_SIZES = {"vocab": 50272, "positions": 2048}
_TIED = frozenset({"smollm2-135m", "llama-3.2-1b", "qwen2-0.5b", "qwen3-0.6b"})
"""Whose head is the embeddings, which their family's configuration does not say by itself."""


def random_config(spec: str) -> PretrainedConfig:
    """The configuration that `spec` (with its `random:`) describes.

    Raises: ConfigError naming the unknown family, preset or key and the nearest known one.
    """
    name, _, text = spec.removeprefix(PREFIX).partition("?")
    if name in PRESETS:
        family_name, preset = PRESETS[name]
        sizes = {**(_OPT_SIZES if family_name == "opt" else {}), **preset}
    elif name in FAMILIES:
        family_name, sizes = name, dict(_DEFAULTS)
    else:
        raise _unknown("random model", name, [*PRESETS, *FAMILIES])
    family = FAMILIES[family_name]
    sizes |= _parse_sizes(text, spec, family_name, family)
    unique = sizes.pop(_UNIQUE, None)
    config = AutoConfig.for_model(family.model_type, **_attributes(family, sizes, spec))
    if name in _TIED:
        config.tie_word_embeddings = True
    if unique is not None:
        if unique > sizes["layers"]:
            raise ConfigError(
                f"{_UNIQUE} must be at most layers={sizes['layers']} (in {spec!r})",
                hint=f"{_UNIQUE}=1 lets all layers share the weights of one",
            )
        setattr(config, _UNIQUE_ATTRIBUTE, unique)
    return config


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """A model of this configuration with seeded weights, ready to generate.

    Its matrices are filled in place in `dtype`; norms, biases and position tables are the
    architecture's own. Memory: the weights once, of layers that share them too.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shared = share_layers(skeleton)
    pool = torch.empty(_POOL_ELEMENTS, dtype=dtype)
    pool.normal_(0.0, _STD, generator=torch.Generator().manual_seed(seed))
    weights = {}
    for index, (name, parameter) in enumerate(skeleton.named_parameters()):
        if parameter.ndim > 1:
            weights[name] = torch.empty(parameter.shape, dtype=dtype)
            _fill(weights[name].view(-1), pool, index * _POOL_SHIFT % _POOL_ELEMENTS)
    # Weights that are given are taken as they are, without a copy; the rest is initialised.
    weights |= {name: weights[of] for name, of in shared.items() if of in weights}
    model: PreTrainedModel = type(skeleton).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype
    )
    share_layers(model)  # parameters, not memory alone: one that moves to a GPU moves once
    model.to(device)  # type: ignore[arg-type]  # its stubs lack the overload for a device
    model.eval()
    return model


def share_layers(model: PreTrainedModel) -> dict[str, str]:
    """Let layers of `model` share parameters as its configuration says; {its name: whose it is}.

    Empty, and nothing done, for every model but those with `unique_layers`.
    """
    unique = getattr(model.config, _UNIQUE_ATTRIBUTE, None)
    if unique is None:
        return {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shared = {}
    for name in parameters:
        of = _LAYER.sub(lambda number: f".{int(number[1]) % unique}.", name, count=1)
        if of != name:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameters[of])
            shared[name] = of
    return shared


_LAYER = re.compile(r"\.(\d+)\.")
"""The layer's number in a parameter's name, which comes first of all numbers there."""


def _fill(flat: torch.Tensor, pool: torch.Tensor, shift: int) -> None:
    """Lay `pool` out over `flat` [n], beginning at its element `shift`."""
    first = min(len(pool) - shift, len(flat))
    flat[:first] = pool[shift : shift + first]
    for start in range(first, len(flat), len(pool)):
        count = min(len(pool), len(flat) - start)
        flat[start : start + count] = pool[:count]


def _parse_sizes(text: str, spec: str, family_name: str, family: _Family) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        known = [key for key in _KEYS if key in family.names or key == _UNIQUE]
        if key not in _KEYS:
            raise _unknown("size", key, known)
        if key not in known:
            raise ConfigError(
                f"{family_name} models have no {key!r} (in {spec!r})",
                hint=f"they have: {', '.join(known)}",
            )
        if not equals or not value.isdigit() or int(value) < 1:
            raise ConfigError(f"{key} must be a number of at least 1 (in {spec!r})")
        sizes[key] = int(value)
    return sizes


def _attributes(family: _Family, sizes: dict[str, int], spec: str) -> dict[str, Any]:
    """The configuration's own names and values. Raises: ConfigError for sizes that clash."""
    hidden, heads = sizes["hidden"], sizes["heads"]
    kv_heads = sizes.get("kv_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"heads={heads} must be a multiple of kv_heads={kv_heads} (in {spec!r})")
    if hidden % heads and "head_dim" not in sizes:
        raise ConfigError(f"hidden={hidden} must be a multiple of heads={heads} (in {spec!r})")
    complete = {"intermediate": 4 * hidden, **sizes}
    if "kv_heads" in family.names:
        complete["kv_heads"] = kv_heads
    if family.head_dim_is_own:
        complete.setdefault("head_dim", hidden // heads)
    values: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **family.fixed,
        **{family.names[key]: value for key, value in complete.items()},
    }
    if family.model_type == "opt":
        values["word_embed_proj_dim"] = hidden
    return values


def _unknown(what: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return ConfigError(f"unknown {what} {name!r}", hint=hint)


class ByteTokenizer:
    """Text for models without a vocabulary: byte b of UTF-8 is token b, modulo the vocabulary.

    Decoding gives printable ASCII, one character a token, so that random tokens cannot move a
    terminal's cursor; it does not undo encoding.
    """

    eos_token_id: int | None = None
    chat_template: str | None = None

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab

    def encode(self, text: str, **_: Any) -> list[int]:
        """One token a byte."""
        return [byte % self._vocab for byte in text.encode()]

    def decode(self, tokens: list[int], **_: Any) -> str:
        """One printable character a token."""
        return "".join(chr(ord("!") + token % 94) for token in tokens)
