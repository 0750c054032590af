"""One text from one prompt: what `generate` and `demo` do with a loaded model and a cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from dualblade.errors import ConfigError, Unsupported
from dualblade.hf.models import LoadedModel, ModelText

NEW_TOKENS_DEFAULT = 256

END_OF_TEXT, LIMIT = "end of text", "limit"
"""How an answer ended: by itself, or where it was to be no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest. `prompt_lookup` candidates
    are taken from earlier text and verified together; 0: none, a token at a time."""

    max_new_tokens: int
    temperature: float
    seed: int
    prefill_chunk_tokens: int
    prompt_lookup: int = 0


@dataclass(slots=True, kw_only=True)
class Generation:
    """What was generated, and when: seconds since the start, one entry a token. `sweeps` counts
    the forward passes after the prompt's, each a sweep over the KV; `ended` is END_OF_TEXT or
    LIMIT once it has."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sweeps: int = 0
    ended: str | None = None

    @property
    def prefill_seconds(self) -> float | None:
        """Until the first token."""
        return self.seconds[0] if self.seconds else None

    @property
    def decode_seconds_per_token(self) -> float | None:
        """Mean over the tokens after the first."""
        if len(self.seconds) < 2:
            return None
        return (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)

    @property
    def tokens_per_sweep(self) -> float | None:
        """More than one where candidates were accepted."""
        return (len(self.tokens) - 1) / self.sweeps if self.sweeps else None

    def sha256(self) -> str:
        """Over the tokens, as little-endian int64."""
        data = b"".join(token.to_bytes(8, "little", signed=True) for token in self.tokens)
        return hashlib.sha256(data).hexdigest()


class TokenStream:
    """What transformers calls with the prompt once, then with each token.

    `write` is given text as soon as it is whole: a character may be several tokens.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        write: Callable[[str], None],
        on_first: Callable[[], None],
    ) -> None:
        self.generation = Generation()
        self._decode = decode
        self._write = write
        self._on_first = on_first
        self._prompt_seen = False
        self._start = 0
        self._written = 0
        self._began = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Tokens [1, n] of the prompt, or [n] new ones."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        now = time.perf_counter() - self._began
        is_first = not self.generation.tokens
        self.generation.sweeps += not is_first
        for token in value.flatten().tolist():
            self.generation.tokens.append(token)
            self.generation.seconds.append(now)
        if is_first:
            self._on_first()
            self._began += time.perf_counter() - self._began - now  # that was not generating
        self._flush(whole=False)

    def expect_prompt(self) -> None:
        """What comes next is the text so far, given again."""
        self._prompt_seen = False

    def end(self) -> None:
        """Called once after the last token."""
        self._flush(whole=True)

    def _flush(self, *, whole: bool) -> None:
        text = self._decode(self.generation.tokens[self._start :])
        ready = text if whole else text.rstrip("\ufffd")  # the rest of a character is to come
        if len(ready) > self._written:
            self._write(ready[self._written :])
            self._written = len(ready)
        if ready == text and text.endswith("\n"):
            # Decoding all tokens at each one would make long texts slow; lines stand alone, but
            # for the token that ends one: some tokenizers take a space from where a text begins.
            self._start = len(self.generation.tokens) - 1
            self._written = len(self._decode(self.generation.tokens[self._start :]))


class PrefillProgress:
    """Tells how much of the prompt is done, counted in layers, until the first token is there."""

    def __init__(
        self, model: Any, prompt_tokens: int, chunk_tokens: int, tell: Callable[[float], None]
    ) -> None:
        layers = _decoder_layers(model)
        self._total = max(1, len(layers) * math.ceil(prompt_tokens / chunk_tokens))
        self._done = 0
        self._tell = tell
        self._hooks = [layer.register_forward_hook(self._count) for layer in layers]

    def close(self) -> None:
        """Take the hooks away. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> PrefillProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _count(self, *_: Any) -> None:
        self._done += 1
        self._tell(min(1.0, self._done / self._total))


def check_candidates(name: str, model: Any) -> None:
    """Raises: Unsupported for prompt lookup of a `model` that cannot take tokens back."""
    if getattr(model, "_is_stateful", False):
        raise Unsupported(
            f"{name} has layers that cannot take tokens back, which prompt lookup does",
            hint="leave out --prompt-lookup",
        )


def check_length(
    text: ModelText, prompt_tokens: int, wanted: int | None, candidates: int = 0
) -> int:
    """New tokens that there is room for: `wanted`, or 256 and what the positions leave. The model
    computes up to `candidates` tokens past them.

    Raises: ConfigError when the prompt, or prompt and wanted tokens, pass the model's positions.
    """
    if prompt_tokens == 0:
        raise ConfigError("the prompt is empty", hint="give one with --prompt or --prompt-file")
    positions = text.positions_max
    if positions is None:
        return wanted or NEW_TOKENS_DEFAULT
    room = positions - candidates - prompt_tokens
    beside = f", beside {candidates} of prompt lookup" if candidates else ""
    if room < 1:
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens{beside}; {text.name} has {positions} positions",
            hint="shorten the prompt, or use a model with a longer context",
        )
    if wanted is not None and wanted > room:
        raise ConfigError(
            f"prompt and new tokens ({prompt_tokens} + {wanted}{beside}) pass the {positions} "
            f"positions of {text.name}",
            hint=f"use --max-new-tokens {room} or less",
        )
    return min(wanted or NEW_TOKENS_DEFAULT, room)


def generate_text(
    loaded: LoadedModel,
    prompt: list[int],
    cache: Any,
    sampling: Sampling,
    write: Callable[[str], None],
    progress: Callable[[float], None],
    on_first: Callable[[], None],
) -> Generation:
    """Generate, streaming text to `write`. Called in order: progress ..., on_first, write ...

    Raises: whatever the cache raises; KeyboardInterrupt. What was written stays.
    """
    model: Any = loaded.model
    ids = torch.tensor([prompt], device=model.device)
    chunk = min(sampling.prefill_chunk_tokens, len(prompt))
    torch.manual_seed(sampling.seed)
    with PrefillProgress(model, len(prompt), chunk, progress) as counting:

        def first() -> None:
            counting.close()
            on_first()

        stream = TokenStream(loaded.decode, write, first)

        # A model may come with words that end its texts, which want to be looked up.
        words = {"tokenizer": loaded.tokenizer} if model.generation_config.stop_strings else {}

        def generate(ids: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
            text: torch.Tensor = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                cache=cache,
                max_new_tokens=count,
                **words,
                **{**_choice(sampling.temperature), **options},
            )
            return text

        if not sampling.prompt_lookup:
            generate(ids, sampling.max_new_tokens, prefill_chunk_size=chunk, streamer=stream)
        else:
            # The prompt and the first token as ever, in chunks: with candidates transformers (5.24)
            # takes all of a prompt in one pass, with the memory that this needs.
            started = generate(ids, 1, prefill_chunk_size=chunk)
            stream.put(ids)
            stream.put(started[0, ids.shape[1] :])
            left = sampling.max_new_tokens - 1
            if left and int(started[0, -1]) not in _ends(model):
                stream.expect_prompt()
                with _going_on(model):
                    lookup = {"prompt_lookup_num_tokens": sampling.prompt_lookup}
                    generate(started, left, streamer=stream, **lookup)
            else:
                stream.end()
    made = stream.generation
    is_over = made.tokens[-1] in _ends(model) or len(made.tokens) < sampling.max_new_tokens
    made.ended = END_OF_TEXT if is_over else LIMIT
    return made


@contextlib.contextmanager
def _going_on(model: Any) -> Iterator[None]:
    """Let generation with candidates begin on a cache that has the text but for its last tokens.

    transformers (5.24) gives the model all of the text in the first pass, what is cached too.
    """
    plain = model.prepare_inputs_for_generation

    @functools.wraps(plain)
    def only_new(
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        if next_sequence_length is None and cache is not None:
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        prepared: dict[str, Any] = plain(
            input_ids, next_sequence_length=next_sequence_length, cache=cache, **options
        )
        return prepared

    model.prepare_inputs_for_generation = only_new
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


def _ends(model: Any) -> list[int]:
    """Tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _choice(temperature: float) -> dict[str, Any]:
    """Sampling is only what was asked for: settings that came with the model are put aside."""
    if temperature == 0:
        asked: dict[str, Any] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
    else:
        asked = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    return {**_NEUTRAL, **asked}


_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "penalty_alpha": None,
    "guidance_scale": None,
    "exponential_decay_length_penalty": None,
    "cache_implementation": None,
    "min_length": 0,
    "min_new_tokens": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "renormalize_logits": None,
    "watermarking_config": None,
    "token_healing": None,
    "max_time": None,
    "assistant_early_exit": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "use_mtp": False,
    "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
}
"""Settings of a model that would change which token is taken, or what `generate` returns, at the
value that changes nothing."""


def _decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The modules that run once a forward pass, one a layer; none if the model hides them."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    return []
