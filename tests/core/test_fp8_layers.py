"""Which linear layers of a decoder layer run in FP8, and in which calls; the others run as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cggr_core.fp8 import product, quantize_rows, quantize_silu_mul
from cggr_core.routing import precision
from cggr_core.routing.precision import LowPrecision
from tests.support.tiny_models import ROUTABLE

pytestmark = pytest.mark.filterwarnings("ignore:context_precision='fp8' is emulated:UserWarning")


@pytest.fixture
def products(monkeypatch) -> list[str]:
    """What was quantised, and the products of it, in their order."""
    seen: list[str] = []

    def noted(name, own):
        return lambda *args: (seen.append(name), own(*args))[1]

    monkeypatch.setattr(precision, "product", noted("product", product))
    monkeypatch.setattr(precision, "quantize_silu_mul", noted("silu_mul", quantize_silu_mul))
    return seen


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int = 32, outputs: int = 32, seed: int = 1) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    made.weight.data.copy_(numbers(outputs, inputs, seed=seed))
    return made


def in_fp8(layer: nn.Linear, x: Tensor) -> Tensor:
    """The product by its definition."""
    rows = quantize_rows(x.detach().flatten(0, -2))
    return product(*rows, *quantize_rows(layer.weight.detach()), layer.bias).to(x.dtype).unflatten(0, x.shape[:-1])


def parts(**named: Any) -> nn.Module:
    """A layer of an attention that holds these."""
    return nn.ModuleDict({"attention": nn.ModuleDict(named)})


def low_precision(layer: nn.Module) -> LowPrecision:
    return LowPrecision(nn.ModuleList([layer]))


def adapted(base: nn.Linear) -> nn.Module:
    return nn.ModuleDict({"base_layer": base, "lora_A": nn.ModuleDict({"default": linear(seed=5)})})


@torch.no_grad()
def test_linear_layers_of_fitting_sizes_but_routers_and_adapters(products):
    base, x = linear(seed=2), numbers(2, 3, 32)
    low = {"o_proj": linear(), "q_proj": base}
    own = {"gate": linear(), "router": linear(), "odd": linear(32, 24), "narrow": nn.Linear(24, 32)}
    layer = parts(**{**low, **own, "q_proj": adapted(base)})
    own["lora_A"] = layer["attention"]["q_proj"]["lora_A"]["default"]
    for name, module in own.items():
        given = x[..., : module.in_features]
        wanted = module(given)
        with low_precision(layer).at(0):
            assert module(given).equal(wanted), name
    assert products == []
    for name, module in low.items():
        with low_precision(layer).at(0):
            assert module(x).equal(in_fp8(module, x)), name
    assert products == ["product"] * len(low)


@pytest.mark.parametrize("wrap", [lambda base: base, adapted])
@pytest.mark.parametrize("beside", [("k_proj", "v_proj"), ("k_proj",), ("v_proj",), ()])
def test_under_autograd_queries_alone_whose_gradient_nobody_reads(wrap, beside, products):
    query, x = linear(), numbers(2, 3, 32)
    layer = parts(q_proj=wrap(query), **{name: linear(seed=3) for name in beside})
    with low_precision(layer).at(0):
        found = query(x)
        if len(beside) == 2:
            assert found.equal(in_fp8(query, x)) and not found.requires_grad
        else:
            assert found.equal(nn.functional.linear(x, query.weight, query.bias)) and found.requires_grad
        for name in beside:
            assert layer["attention"][name](x).requires_grad
    assert len(products) == (len(beside) == 2)


class Sharded(Tensor):
    """A stand-in for weights that are stored elsewhere, or already quantised."""


@torch.no_grad()
@pytest.mark.parametrize("case", ["a vector", "nothing", "float64", "another kind of weight"])
def test_calls_that_are_the_layers_own(case, products):
    module, x = linear(), numbers(2, 3, 32)
    if case == "a vector":
        x = x[0, 0]
    elif case == "nothing":
        x = x[:, :0]
    elif case == "float64":
        module, x = module.double(), x.double()
    else:
        module.weight = nn.Parameter(module.weight.data.as_subclass(Sharded))
    wanted = module(x)
    with low_precision(parts(o_proj=module)).at(0):
        found = module(x)
    assert found.equal(wanted) and found.dtype == wanted.dtype and products == []


@torch.no_grad()
@pytest.mark.parametrize(("rows", "weight"), [(torch.float64, torch.float32), (torch.bfloat16, torch.float32)])
def test_dtypes_that_the_layer_refuses_are_refused(rows, weight):
    module = linear().to(weight)
    with low_precision(parts(o_proj=module)).at(0), pytest.raises(RuntimeError, match="dtype"):
        module(numbers(3, 32).to(rows))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_have_the_dtype_of_the_layers_own(dtype):
    module, x = linear().to(dtype), numbers(3, 32).to(dtype)
    with low_precision(parts(o_proj=module)).at(0):
        found = module(x)
        assert found.dtype == dtype and found.equal(in_fp8(module, x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("inference", [False, True])
def test_rows_that_were_changed_in_place_are_quantised_anew(inference):
    key, value = linear(), linear(seed=2)
    low = low_precision(parts(k_proj=key, v_proj=value))
    with torch.inference_mode(inference), torch.no_grad():
        x = numbers(2, 3, 32)
        with low.everywhere():
            assert key(x).equal(in_fp8(key, x)) and value(x).equal(in_fp8(value, x))
            x.mul_(numbers(32, seed=7))
            assert key(x).equal(in_fp8(key, x)) and value(x).equal(in_fp8(value, x))
        with low.at(0):
            key(x)
    assert low._last is None, "nothing is held after a block"


def test_rows_are_quantised_once_for_all_that_read_them(monkeypatch):
    quantised = []
    monkeypatch.setattr(precision, "quantize_rows", lambda x: (quantised.append(x.shape), quantize_rows(x))[1])
    layer, x = parts(q_proj=linear(), k_proj=linear(), v_proj=linear()), numbers(2, 3, 32)
    with torch.no_grad(), low_precision(layer).at(0):
        for module in layer["attention"].values():
            module(x)
    assert quantised.count((6, 32)) == 1


def llama_mlp() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    return ROUTABLE["llama"](**sizes).model.layers[0].mlp


@torch.no_grad()
def test_a_gated_mlp_quantises_its_product_once(products):
    mlp, x = llama_mlp(), numbers(2, 3, 64)
    gate, up = in_fp8(mlp.gate_proj, x), in_fp8(mlp.up_proj, x)
    wanted = product(*quantize_silu_mul(gate.flatten(0, 1), up.flatten(0, 1)), *quantize_rows(mlp.down_proj.weight))
    with low_precision(mlp).at(0):
        assert mlp(x).equal(wanted.float().unflatten(0, (2, 3)))
    assert products == ["product", "product", "silu_mul", "product"]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_around_the_last_product_are_run(register, products):
    mlp, x, seen = llama_mlp(), numbers(2, 3, 64), []
    getattr(mlp.down_proj, register)(lambda *args: seen.append(args[1][0]))
    gate, up = in_fp8(mlp.gate_proj, x), in_fp8(mlp.up_proj, x)
    with low_precision(mlp).at(0):
        found = mlp(x)
    wanted = nn.functional.silu(gate) * up
    assert len(seen) == 1 and seen[0].equal(wanted) and found.equal(in_fp8(mlp.down_proj, wanted))
    assert "silu_mul" not in products


class Narrow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :1]


class Rounded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


@pytest.mark.parametrize("case", ["under autograd", "a vector", "one column", "two dtypes"])
def test_a_gated_mlp_that_is_called_otherwise_multiplies_as_it_does(case, products):
    mlp, x = llama_mlp(), numbers(2, 3, 64)
    if case == "a vector":
        x = x[0, 0]
    elif case in ("one column", "two dtypes"):
        mlp.up_proj.__class__ = Narrow if case == "one column" else Rounded
    with torch.set_grad_enabled(case == "under autograd"):
        wanted = mlp(x)
        with low_precision(mlp).at(0):
            found = mlp(x)
    assert "silu_mul" not in products
    assert found.requires_grad is (case == "under autograd")
    if case in ("under autograd", "a vector"):
        assert products == [] and found.equal(wanted)
    else:
        assert 0 < (found - wanted).norm() < 0.2 * wanted.norm()
