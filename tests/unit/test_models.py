"""Models by name: what each spec gives, and what each mistake says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers import modeling_gguf_pytorch_utils as gguf_utils

from dualblade.errors import ConfigError, DualBladeError, Unsupported
from dualblade.hf import models, progress
from dualblade.hf.footprint import footprint
from dualblade.hf.geometry import layer_shapes
from dualblade.hf.models import (
    LoadedModel,
    config_of,
    default_dtype,
    foreign_errors_in_brief,
    load_model,
    parse_dtype,
    text_of,
)
from dualblade.hf.random_models import FAMILIES, PRESETS, ByteTokenizer, random_config

TINY = "layers=2,hidden=64,heads=4,vocab=300,positions=128"


def greedy(loaded: LoadedModel, prompt: str, count: int = 6) -> list[int]:
    ids = torch.tensor([loaded.encode(prompt)])
    out = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_generates(family: str) -> None:
    loaded = load_model(f"random:{family}?{TINY}", dtype=torch.float32, device="cpu")
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.positions_max == 128
    tokens = greedy(loaded, "some text")
    assert len(tokens) == 6
    assert all(torch.isfinite(p).all() for p in loaded.model.parameters())


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_has_a_configuration(preset: str) -> None:
    config = random_config(f"random:{preset}")
    assert config.num_hidden_layers >= 12


def test_a_preset_takes_overrides() -> None:
    config = config_of("random:llama-3-8b?layers=3,vocab=100")
    assert (config.num_hidden_layers, config.vocab_size) == (3, 100)
    assert (config.num_key_value_heads, config.hidden_size) == (8, 4096)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_share_weights_when_asked(family: str) -> None:
    """Six layers with the weights of two: first, second, first, ... the rest is as ever."""
    model = load_model(f"random:{family}?{TINY},layers=6,unique_layers=2").model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    of_layer = [
        {
            name.replace(f".{number}.", "."): p
            for name, p in parameters.items()
            if f".{number}." in name
        }
        for number in range(6)
    ]
    assert of_layer[0]
    assert all(of_layer[0][name] is p for name, p in of_layer[4].items())
    assert all(of_layer[1][name] is p for name, p in of_layer[5].items())
    matrices = {name: p for name, p in of_layer[0].items() if p.ndim > 1}
    assert not any(torch.equal(p, of_layer[1][name]) for name, p in matrices.items())
    alone = load_model(f"random:{family}?{TINY},layers=2").model
    assert {n: p.shape for n, p in alone.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


def test_shared_layers_are_attended_to_one_by_one() -> None:
    """They have the weights in common, not the KV."""
    model = load_model(f"random:llama?{TINY},unique_layers=1", dtype=torch.float32).model
    with torch.no_grad():
        layers = model(torch.tensor([[5, 7, 9]]), use_cache=True).past_key_values.layers
    assert len(layers) == model.config.num_hidden_layers > 1
    assert not torch.equal(layers[0].keys, layers[1].keys)


def test_the_seed_decides_the_weights() -> None:
    spec = f"random:llama?{TINY}"

    def first_weights(seed: int) -> torch.Tensor:
        return next(load_model(spec, seed=seed).model.parameters())

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


def test_rows_and_layers_differ() -> None:
    """The pool that weights are laid out from must not make two rows or two matrices alike."""
    model = load_model("random:llama?layers=2,hidden=256,heads=4", dtype=torch.float32).model
    first, second = (layer.mlp.up_proj.weight for layer in model.model.layers)
    assert len(torch.unique(first, dim=0)) == len(first)
    assert not torch.equal(first, second)


def test_tied_weights_stay_tied() -> None:
    model = load_model(f"random:gpt2?{TINY}").model
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def test_gemma_keeps_its_window() -> None:
    config = random_config("random:gemma3?layers=6,hidden=64,heads=4,window=32")
    assert config.sliding_window == 32
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize(
    ("spec", "said", "hint"),
    [
        ("random:lama", "unknown random model 'lama'", "did you mean 'llama'?"),
        ("random:", "unknown random model ''", "known:"),
        ("random:llama?layer=2", "unknown size 'layer'", "did you mean 'layers'?"),
        ("random:gpt2?kv_heads=3", "no 'kv_heads'", "they have: layers"),
        ("random:llama?layers=none", "must be a number", None),
        ("random:llama?layers", "must be a number", None),
        ("random:llama?layers=0", "must be a number", None),
        ("random:llama?layers=2,unique_layers=3", "at most layers=2", "unique_layers=1 lets"),
        ("random:llama?hidden=100,heads=8", "multiple of heads=8", None),
        ("random:llama?heads=4,kv_heads=3", "multiple of kv_heads=3", None),
        ("./missing", "no model at ./missing", "name a folder"),
        ("missing.gguf", "no model at missing.gguf", "name a folder"),
        ("two words", "no model at two words", "name a folder"),
        ("", "no model is named", "name a folder"),
        ("x" * 300, "cannot be looked into", "name a folder"),
        ("~nosuchuser/x", "cannot be looked into", "name a folder"),
    ],
)
def test_a_wrong_spec_says_what_to_do(spec: str, said: str, hint: str | None) -> None:
    for ask in (load_model, config_of):
        with pytest.raises(ConfigError) as caught:
            ask(spec)
        assert said in caught.value.message
        assert hint is None or hint in (caught.value.hint or "")


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        load_model(str(tmp_path))
    (tmp_path / "readme.txt").write_text("not a model")
    with pytest.raises(ConfigError, match=r"not a \.gguf one"):
        load_model(str(tmp_path / "readme.txt"))
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds 2 \.gguf files"):
        load_model(str(tmp_path))


def test_a_damaged_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(Unsupported, match="cannot be loaded"):
        load_model(str(tmp_path / "a.gguf"))


def test_no_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(Unsupported, match="needs gguf and accelerate") as caught:
        load_model(str(tmp_path))
    assert caught.value.hint == "pip install gguf accelerate"


def saved(tmp_path: Path) -> Path:
    load_model(f"random:llama?{TINY}").model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "cannot be loaded"),
        ("config.json", b'{"model_type": "frobnicator"}', "does not know"),
        ("config.json", b'{"model_type": "bert", "hidden_size": "many"}', "cannot be loaded"),
        ("config.json", b'{"model_type": "t5"}', "not a decoder"),
        ("model.safetensors", b"short", "cannot be loaded"),
        ("tokenizer.json", b'{"version": "9", "model": {"type": "none"}}', "cannot be loaded"),
        (
            "config.json",
            b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}',
            "needs code of its own",
        ),
    ],
)
def test_a_damaged_or_foreign_folder(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (saved(tmp_path) / name).write_bytes(content)
    with pytest.raises(Unsupported) as caught:
        load_model(str(tmp_path))
    assert said in caught.value.message
    assert str(caught.value).count("\n") <= 1


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DualBladeError):
        load_model(str(saved(tmp_path)))


def test_half_precision_is_widened_on_a_cpu(tmp_path: Path) -> None:
    saved(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "dtype": "float16"}))
    config = config_of(str(tmp_path))
    assert default_dtype(config, "cpu") == torch.bfloat16
    assert default_dtype(config, "cuda") == torch.float16
    assert default_dtype(config_of(f"random:llama?{TINY}"), "cpu") == torch.bfloat16


def test_no_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_hub_reachable", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(Unsupported, match="no model hub can be reached") as caught:
        load_model("some-org/some-model")
    assert "random:" in (caught.value.hint or "")
    assert models.hub.HF_HUB_OFFLINE is False


def test_what_is_no_hub_id_does_not_ask_for_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Behind a firewall the question takes seconds."""
    monkeypatch.setattr(models, "_hub_reachable", lambda: pytest.fail("the hub was asked"))
    for spec in ("demo", f"random:llama?{TINY}", str(tmp_path)):
        refused = pytest.raises(Unsupported, match="cannot be loaded: no such thing")
        with refused as caught, models.foreign_errors_in_brief(spec):
            raise ValueError("no such thing")
        assert "hub" not in (caught.value.hint or "")


def test_what_the_hub_answers() -> None:
    class GatedRepoError(OSError):
        pass

    class RepositoryNotFoundError(OSError):
        pass

    def explained(cause: Exception) -> DualBladeError:
        error = OSError("a long\nmessage")
        error.__cause__ = cause
        return models._explained("org/name", error, is_hub_id=True, offline=False)

    assert "gated" in explained(GatedRepoError()).message
    assert isinstance(explained(RepositoryNotFoundError()), ConfigError)
    assert explained(OSError()).message == "org/name cannot be loaded: a long message"


def test_words_for_dtypes_and_devices() -> None:
    assert parse_dtype("auto") is None
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        parse_dtype("int8")
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        load_model(f"random:llama?{TINY}", device="gpu")
    with pytest.raises(ConfigError, match="models on meta are not served"):
        load_model(f"random:llama?{TINY}", device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(Unsupported, match="no CUDA GPU"):
            load_model(f"random:llama?{TINY}", device="cuda")


def test_a_template_that_refuses_is_told() -> None:
    """Gemma 2's takes no system text."""

    class Refusing(ByteTokenizer):
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise RuntimeError("System role not supported")  # jinja2's own is one

    loaded = load_model(f"random:llama?{TINY}")
    chatty = replace(loaded, tokenizer=Refusing(300), chat=True)
    with pytest.raises(ConfigError, match="refuses: System role not supported"):
        chatty.encode("hi", system="be nice")


def test_a_checkpoint_of_a_training_uses_its_cache_and_gives_one_answer(tmp_path: Path) -> None:
    """Training with checkpointed gradients leaves use_cache off in what it saves."""
    model = load_model(f"random:llama?{TINY}").model
    model.generation_config.use_cache = model.config.use_cache = False
    model.generation_config.num_return_sequences = 2
    model.generation_config.do_sample = True  # it is not saved without
    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    settings = load_model(str(tmp_path)).model.generation_config
    assert (settings.use_cache, settings.num_return_sequences) == (True, 1)


def test_bytes_stand_in_for_a_tokenizer() -> None:
    loaded = load_model("random:llama?layers=1,hidden=64,heads=4,vocab=100")
    assert loaded.encode("Aé") == [65, 195 % 100, 169 % 100]
    assert loaded.decode([0, 93, 94]) == "!~!"
    assert not loaded.chat
    with pytest.raises(ConfigError, match="no chat template"):
        loaded.encode("text", system="be kind")


def test_random_models_are_built_without_a_second_copy() -> None:
    """Half a billion weights in bfloat16 (0.9 GiB) must not need twice that."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_model("random:llama?layers=8,hidden=2048,heads=16,intermediate=8192").model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert weights > 800 << 20
    assert grown < 1.2 * weights


def test_a_model_that_is_no_decoder_is_told_before_it_is_loaded(tmp_path: Path) -> None:
    """By `plan` too, which asks transformers for its shape alone."""
    AutoConfig.for_model("vit", num_hidden_layers=2, hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="not a decoder"), foreign_errors_in_brief(str(tmp_path)):
        footprint(config_of(str(tmp_path)), torch.float32, rows=1, staging_bytes=0)


def test_a_model_with_layers_of_images_is_refused() -> None:
    """Llama 3.2's vision models: in the second step it would be too late."""
    config = AutoConfig.for_model("mllama_text_model", num_hidden_layers=4)
    with pytest.raises(Unsupported, match="attends to images in layers of their own"):
        layer_shapes(config)


def test_a_decoder_that_puts_other_keys_into_its_layers_is_refused() -> None:
    """Both attend to an image's tokens through the layer of the cache that their text has."""
    with pytest.raises(Unsupported, match="attends to images in layers of their own"):
        layer_shapes(AutoConfig.for_model("blip"))
    text = AutoConfig.for_model("t5", num_layers=2).to_dict()
    with pytest.raises(Unsupported, match="is an encoder-decoder model"):
        layer_shapes(AutoConfig.for_model("instructblip", text_config=text))


def test_a_model_without_attention_heads_is_told() -> None:
    config = AutoConfig.for_model("mamba", num_hidden_layers=2, hidden_size=64, vocab_size=99)
    with pytest.raises(Unsupported, match="does not say how many attention heads"):
        layer_shapes(config)


def test_a_download_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub makes bars of the class that it is given, of bytes and of files."""
    given: dict[str, Any] = {}
    plain = models.AutoModelForCausalLM.from_pretrained

    def noted(*arguments: Any, **options: Any) -> Any:
        given.update(options)
        return plain(*arguments, **options)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", noted)
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.0)
    told: list[str] = []
    text = text_of(f"random:llama?{TINY}")
    load_model(str(saved(tmp_path)), device="cpu", text=text, tell=told.append)
    assert told == []
    bar = given["tqdm_class"](total=4 << 20, initial=0, unit="B", unit_scale=True, desc="model")
    with bar:
        bar.update(1 << 20)
    assert told[0] == "fetching the model: 1.00 MiB of 4.00 MiB"
    with given["tqdm_class"](total=3, desc="Fetching 3 files") as files:
        files.update(2)
    assert all("MiB" in line for line in told)


def test_what_was_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a GGUF file the configuration takes seconds."""

    def refuse(_: object) -> None:
        raise AssertionError("read again")

    folder, text = saved(tmp_path), text_of(f"random:llama?{TINY}")
    monkeypatch.setattr(models._Source, "config", refuse)
    assert load_model(str(folder), device="cpu", text=text).config is text.config


def test_unpacking_draws_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    bar = gguf_utils.tqdm
    with progress.unpacking(told.append):
        assert list(gguf_utils.tqdm([1, 2], desc="Converting")) == [1, 2]
    assert gguf_utils.tqdm is bar
    assert told == ["unpacking the weights"]
    assert capsys.readouterr().err == ""
