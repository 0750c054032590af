"""Products in float32 on processors without 16-bit arithmetic: what they give, and where they are.

Whether they pay depends on the processor; what they compute is the same on all, and tested on all.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from dualblade.attention import arithmetic, widening_pays
from dualblade.hf import linear
from dualblade.hf.footprint import footprint
from dualblade.hf.linear import WidenedLinear, widen_linears, widening_bytes
from dualblade.hf.models import config_of, load_model
from tests.scripts import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "measure_products.py"

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without 16-bit arithmetic."""
    for module in (linear, "dualblade.hf.footprint"):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{name}.widening_pays", lambda dtype: dtype in HALVES)


def layer(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias=bias).to(dtype)


def widened(plain: torch.nn.Linear) -> torch.nn.Linear:
    made = copy.deepcopy(plain)
    assert widen_linears(made) == 1
    return made


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (12, 64, 48),
        (13, 64, 48),  # a fourth row to the last three
        (513, 64, 48),  # a second turn, of one row
        (40, 8192, 300),  # blocks of 256 output features, the last one shorter
        (1025, 2048, 513),  # both, and one output feature left over
    ],
)
def test_the_product_is_that_of_float32_rounded_once(
    dtype: torch.dtype, bias: bool, shape: tuple[int, int, int]
) -> None:
    rows, inputs, outputs = shape
    plain = layer(inputs, outputs, dtype, bias=bias)
    given = torch.randn(1, rows, inputs).to(dtype)
    with torch.no_grad():
        got = widened(plain)(given)
        wide = torch.nn.functional.linear(
            given.double(), plain.weight.double(), plain.bias.double() if bias else None
        )
    assert got.shape == (1, rows, outputs)
    assert got.dtype == dtype
    # One rounding to 16 bits, half a unit in the last place, and float32's own sums.
    unit = torch.finfo(dtype).eps / 2
    assert ((got.double() - wide).abs() <= 1.01 * unit * wide.abs() + 1e-5).all()


@pytest.mark.usefixtures("pays")
def test_the_product_does_not_depend_on_the_default_dtype() -> None:
    ours = widened(layer(64, 32, torch.bfloat16))
    given = torch.randn(24, 64).bfloat16()
    before = torch.get_default_dtype()
    with torch.no_grad():
        expected = ours(given)
        torch.set_default_dtype(torch.bfloat16)
        try:
            got = ours(given)
        finally:
            torch.set_default_dtype(before)
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("pays")
def test_rows_that_do_not_lie_in_order_are_taken_in_order() -> None:
    plain = layer(64, 32, torch.bfloat16)
    given = torch.randn(64, 24).bfloat16().t()
    with torch.no_grad():
        assert torch.equal(widened(plain)(given), widened(plain)(given.contiguous()))


@pytest.mark.usefixtures("pays")
def test_few_rows_gradients_and_other_dtypes_stay_with_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = widened(layer(64, 32, torch.bfloat16))
    taken: list[tuple[int, ...]] = []
    multiply = WidenedLinear._multiply

    def watched(self: WidenedLinear, given: torch.Tensor, out: torch.Tensor) -> None:
        taken.append(tuple(given.shape))
        multiply(self, given, out)

    monkeypatch.setattr(WidenedLinear, "_multiply", watched)
    rows = torch.randn(12, 64).bfloat16()
    with torch.no_grad():
        ours(rows[:11])
        ours(rows[:0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours(rows)
    assert ours(rows).requires_grad
    assert taken == []
    with torch.no_grad():
        ours(rows)
        assert taken == [(12, 64)]
        copy.deepcopy(ours).float()(rows.float())
    assert taken == [(12, 64)]


@pytest.mark.usefixtures("pays")
def test_only_plain_linear_layers_of_sixteen_bits_change() -> None:
    class Own(torch.nn.Linear):
        pass

    model = torch.nn.ModuleList(
        [Own(4, 4).bfloat16(), torch.nn.Linear(4, 4), layer(4, 4, torch.bfloat16)]
    )
    names = list(model.state_dict())
    assert widen_linears(model) == 1
    assert [type(module) for module in model] == [Own, torch.nn.Linear, WidenedLinear]
    assert list(model.state_dict()) == names
    assert widen_linears(model) == 0


def test_nothing_changes_where_the_processor_has_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "widening_pays", lambda _: False)
    plain = layer(64, 32, torch.bfloat16)
    assert widen_linears(plain) == 0
    assert type(plain) is torch.nn.Linear


def test_the_question_is_asked_on_x86_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processors were not measured."""
    monkeypatch.setattr(arithmetic, "_QUESTIONS", {torch.bfloat16: "_never"})
    monkeypatch.setattr(torch.ops.mkldnn, "_never", lambda: False, raising=False)
    for machine, pays in (("x86_64", True), ("aarch64", False)):
        monkeypatch.setattr(arithmetic.platform, "machine", lambda is_on=machine: is_on)
        assert widening_pays(torch.bfloat16) == pays


def test_the_question_is_about_sixteen_bits_alone() -> None:
    assert not widening_pays(torch.float32)
    assert not widening_pays(torch.float64)


@pytest.mark.usefixtures("pays")
def test_a_loaded_model_computes_what_it_did() -> None:
    spec = "random:llama?layers=2,hidden=64,heads=4,kv_heads=2,vocab=300"
    model = load_model(spec, device="cpu").model
    assert any(isinstance(module, WidenedLinear) for module in model.modules())
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, WidenedLinear):
            module.__class__ = torch.nn.Linear
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, atol=0.02, rtol=0.05)


def test_the_memory_of_a_product_is_bounded() -> None:
    assert widening_bytes(10_000, 4096) == widening_bytes(512, 4096)
    assert widening_bytes(512, 4096) == 4 * (512 * 4096 + 512 * 4096 + 512 * 512)


def test_the_footprint_counts_it_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("random:llama?layers=2,hidden=64,heads=4,kv_heads=2,vocab=300")

    def activations() -> int:
        return footprint(config, torch.bfloat16, rows=100, staging_bytes=0).activation_bytes

    monkeypatch.setattr("dualblade.hf.footprint.widening_pays", lambda _: False)
    without = activations()
    monkeypatch.setattr("dualblade.hf.footprint.widening_pays", lambda _: True)
    assert activations() == without + widening_bytes(100, 256)


@pytest.mark.usefixtures("pays")
def test_the_program_that_times_them_runs() -> None:
    told = load_script(SCRIPT).product((64, 48), 12, 1)
    assert told["multiplications"] == 12 * 64 * 48
    assert set(told["seconds"]) == {"torch", "widened"}


def test_the_program_ends_where_nothing_is_widened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script(SCRIPT)
    monkeypatch.setattr(script, "widening_pays", lambda _: False)
    monkeypatch.setattr("sys.argv", [SCRIPT.name])
    assert script.main() == 1
    assert "nothing is widened" in capsys.readouterr().err


@pytest.mark.usefixtures("pays")
def test_weights_that_are_more_than_plain_tensors_stay_with_torch() -> None:
    """Those of torchao look like bfloat16, and cannot be cut into blocks."""

    class Quantised(torch.Tensor):
        """As its weights: a subclass that says it is a parameter too."""

    made = layer(64, 48, torch.bfloat16)
    made.weight = torch.nn.Parameter(made.weight.detach().as_subclass(Quantised))
    assert type(made.weight) is not torch.nn.Parameter
    assert widen_linears(made) == 0
    assert type(made) is torch.nn.Linear
