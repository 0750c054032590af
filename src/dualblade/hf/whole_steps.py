"""What a cache does to all of its layers at once, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from dualblade.errors import ConfigError, Unsupported
from dualblade.hf.beside import Beside, batch_of, reset_layer, select_sequences
from dualblade.hf.held_text import HeldText
from dualblade.hf.layer import removed_count
from dualblade.hf.lazy import lasting
from dualblade.hf.tile_attention import refuse_gradients
from dualblade.pipeline.layer import check_removal, chosen_sequences


class WholeSteps(Cache):
    """A cache that goes on from whole steps alone, whichever layer a failure or Ctrl-C left out."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
        self._beside = Beside(layers)
        self.held_text = HeldText()
        self.is_watched = False
        """Whether what `generate` brings it is checked: see `hf.continues`."""
        self.has_candidates = False
        """Whether decoding with candidates had layers record, and nobody ended that."""

    def check_usable(self) -> None:
        """Raises: Closed where the content is lost."""

    def get_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """See transformers' `Cache`; a model may write to what it gets."""
        return self._given(super().get_conv_state(*args, **kwargs))

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """See transformers' `Cache`; a model may write to what it gets."""
        return self._given(super().get_recurrent_state(*args, **kwargs))

    def _given(self, state: torch.Tensor | None) -> torch.Tensor | None:
        if state is not None:
            self._beside.touch()
        return state

    def update_conv_state(
        self, conv_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """See transformers' `Cache`. What it makes under inference_mode is written outside it."""
        refuse_gradients(conv_states)
        self._beside.touch()
        with lasting():
            if conv_states.is_inference() and self._recording():  # then layers keep what they get
                conv_states = conv_states.clone()
            return super().update_conv_state(conv_states, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As `update_conv_state`."""
        refuse_gradients(recurrent_states)
        self._beside.touch()
        with lasting():
            return super().update_recurrent_state(recurrent_states, *args, **kwargs)

    def reset(self) -> None:
        """Forget all tokens, for another prompt. Raises: DeviceError, Closed."""
        self.held_text.forget()
        self._beside.change(self.layers, reset_layer)
        self._beside.forget()
        self.stop_recording()

    def end_recording(self) -> None:
        """Candidates are over: keep what a layer needs. transformers leaves its layers recording,
        and they grow with each token."""
        self.crop(0)
        self.stop_recording()

    def stop_recording(self) -> None:
        """Layers keep from here on what they need."""
        self.has_candidates = False
        for layer in self._recording():
            layer.record_past = False

    def _recording(self) -> list[Any]:
        return [layer for layer in self.layers if getattr(layer, "record_past", False)]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove`; 0: only what was kept to go back to. Raises:
        DeviceError, Closed; before anything changed ConfigError, and Unsupported where layers with
        windows or states keep nothing to go back to."""
        count = removed_count(tokens_to_remove)
        if not count:
            self._beside.change(self._recording(), lambda layer: layer.crop(0))
            return
        self.check_usable()
        past = self.get_seq_length()
        if not past:
            return
        check_removal(count, past)
        if not all(_goes_back(layer, count) for layer in self.layers):
            raise Unsupported(
                "layers with windows or states keep nothing of tokens to go back to",
                hint="reset() it, and give it the text that is to stay",
            )
        self._beside.change(self.layers, lambda layer: _crop(layer, tokens_to_remove))
        self.held_text.crop(past, self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence i becomes what `beam_idx[i]` was. Raises: ConfigError, Closed."""
        self._choose(beam_idx, lambda layer, numbers: layer.reorder_cache(numbers))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence, copies side by side. Raises: ConfigError, Closed."""
        if repeats < 1:
            raise ConfigError(f"sequences cannot be repeated {repeats} times")
        self._choose(torch.arange(self._batch()).repeat_interleave(repeats), select_sequences)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences that `indices` name (numbers, or a mask), in that order. Raises:
        ConfigError, Closed."""
        self._choose(indices, select_sequences)

    def _choose(self, indices: torch.Tensor, change: Callable[[Any, torch.Tensor], object]) -> None:
        """`change` all layers to the sequences that `indices` name. What is refused has changed
        nothing, nor what is known of the text."""
        self.check_usable()
        batch = self._batch()
        if batch:
            indices = chosen_sequences(indices, batch)
            self.held_text.forget()
        self._beside.change(self.layers, lambda layer: change(layer, indices))

    def _batch(self) -> int:
        return next(filter(None, map(batch_of, self.layers)), 0)


def _crop(layer: Any, tokens_to_remove: int) -> None:
    """One with a window that no token has come to (half a step left it so) fails in transformers
    5.24; the next step refuses to go on from there."""
    if not isinstance(layer, DynamicSlidingWindowLayer) or layer.is_initialized:
        layer.crop(tokens_to_remove)


def _goes_back(layer: Any, count: int) -> bool:
    """Whether `layer` can forget its newest `count` tokens (transformers 5.24, their `crop`): it
    has them all, or nothing of its own, or what its convolutions and window need was kept."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        if any(layer.is_recurrent_states_initialized.values()):
            return False  # a sum over all tokens
        kept = zip(layer.conv_states.values(), layer.conv_kernel_size.values(), strict=True)
        if not layer.record_past or any(
            state is not None and size is not None and state.shape[-1] - count < size
            for state, size in kept
        ):
            return False
    window = getattr(layer, "sliding_window", None)
    if window is None or layer.get_seq_length() < window:
        return True
    needed = min(window - 1, layer.get_seq_length() - count)
    return bool(layer.record_past and layer.keys.shape[-2] - count >= needed)
