"""One tiny model of each family, with random weights, seeded."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

_SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _configs() -> dict[str, PretrainedConfig]:
    grouped = {**_SMALL, "num_key_value_heads": 2}
    return {
        "llama": LlamaConfig(**grouped),
        "qwen2": Qwen2Config(**grouped),
        "qwen3": Qwen3Config(**grouped, head_dim=32),
        "mistral": MistralConfig(**grouped, sliding_window=None),
        "phi": PhiConfig(**_SMALL),
        "gemma2": Gemma2Config(**grouped, head_dim=16, sliding_window=16),
        "gemma3": Gemma3TextConfig(
            **grouped,
            head_dim=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "gpt2": GPT2Config(
            vocab_size=128,
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_positions=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        "opt": OPTConfig(
            vocab_size=128,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            word_embed_proj_dim=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    }


FAMILIES = tuple(_configs())
EAGER_ONLY = frozenset({"gemma2"})
"""transformers has no sdpa for these: their attention caps its scores."""


def tiny_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """A model of `family` with random weights, the same at every call."""
    return model_of(_configs()[family], dtype, attention)


def model_of(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """Likewise, of a configuration."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # sharper than the default, so that tokens differ and vary
                parameter.normal_(0.0, 0.15)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(
    batch: int = 1, tokens: int = 100, pad: int = 0, seed: int = 11
) -> dict[str, torch.Tensor]:
    """Random token ids [batch, tokens]; row i is left-padded by i x `pad` tokens."""
    ids = torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(batch):
        ids[row, : row * pad] = 0
        mask[row, : row * pad] = 0
    return {"input_ids": ids, "attention_mask": mask}
