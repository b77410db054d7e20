"""Layers that mix positions are refused even if a forward at initial weights hides it, or if they are added later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import PreTrainedModel

from cggr_core import CGGRModel, Selection, create_truncated_router, loss_coefficients
from cggr_core.targets import align_labels
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.tiny_models import GPT_NEO, ROUTABLE, VOCAB

ROUTED = [(gradient, engine) for gradient in ("kv", "detached") for engine in ("interleaved", "two_pass")]
REFUSED = "computes different values for kept tokens than a plain forward"


def tokens(length: int = 12) -> Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))


def wrap(model: PreTrainedModel, gradient: str = "kv", engine: str | None = "interleaved") -> CGGRModel:
    return CGGRModel(model, gradient=gradient, engine=engine, selection="random", min_tokens_ratio=0.5)


def hold_to_reference(model: CGGRModel, gradient: str) -> None:
    """Loss and every gradient of chosen tokens against autograd."""
    input_ids = tokens()
    targets = align_labels(input_ids, shifted=True, vocab_size=VOCAB)
    mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    mask[0, 1::3], mask[1, 4::5] = True, True
    mask &= targets.countable
    selection = Selection.from_mask(mask, countable=targets.countable, capacity=4)
    coefficients = torch.zeros(mask.shape).scatter_(1, selection.index, loss_coefficients(selection, targets.countable))
    wanted, _ = reference_loss(
        model.model,
        model._passes.architecture.layers,
        mask,
        coefficients,
        targets.tokens,
        gradient=gradient,
        input_ids=input_ids,
    )
    wanted.backward()
    expected = gradients(model.model)
    loss = model(input_ids, labels=input_ids, selection=selection)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert relative_error(gradients(model.model), expected) <= 2e-6


class Mixing(nn.Module):
    """An MLP after which a convolution over positions is added, that gives 0 until it has learned something."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self.convolution = nn.Conv1d(32, 32, 3, padding=2, groups=32)
        for parameter in self.convolution.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.convolution(hidden.transpose(1, 2))[..., : hidden.shape[1]]
        return self.own(hidden) + mixed.transpose(1, 2)


def mixing_later() -> PreTrainedModel:
    model = ROUTABLE["llama"]()
    for layer in model.model.layers:
        layer.mlp = Mixing(layer.mlp)
    return model.train()


def hidden_by_projections_of_zero() -> PreTrainedModel:
    model = GPT_NEO()
    for block in model.transformer.h:
        for part in (block.attn.attention.out_proj, block.mlp.c_proj):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    return model


class CentredInTraining(nn.Module):
    def __init__(self, own: nn.Module, rate: float) -> None:
        super().__init__()
        self.own, self.dropout = own, nn.Dropout(rate)

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.own(hidden)
        return self.dropout(output - output.mean(1, keepdim=True)) if self.training else output


def mixing_in_training(rate: float) -> PreTrainedModel:
    model = ROUTABLE["llama"]()
    model.model.layers[1].mlp = CentredInTraining(model.model.layers[1].mlp, rate)
    return model.train()


@pytest.mark.parametrize(
    "make",
    [
        mixing_later,
        hidden_by_projections_of_zero,
        pytest.param(lambda: mixing_in_training(0.0), id="in_training"),
        pytest.param(lambda: mixing_in_training(0.1), id="in_training_with_dropout"),
    ],
)
@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_positions_that_will_be_mixed_are_refused(make: Callable[[], PreTrainedModel], engine: str) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=REFUSED):
        wrap(model, engine=engine)(tokens(), labels=tokens())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wrap(model, "exact", None)(tokens(), labels=tokens()).backward()


def test_a_look_at_grown_weights_leaves_graphs_alone() -> None:
    model = ROUTABLE["llama"]()
    nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    waiting = model(input_ids=tokens(), labels=tokens()).loss
    wrap(model)(tokens(), labels=tokens()).backward()
    model.zero_grad()
    waiting.backward()  # of the weights as they were and are
    found = gradients(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert relative_error(found, gradients(model)) == 0.0


def centred(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output - output.mean(1, keepdim=True)


def with_a_hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(centred)


def with_a_hook_on_one_position(model: PreTrainedModel) -> None:
    def steer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :3], output[:, 3:4] + 1.0, output[:, 4:]], dim=1)

    model.model.layers[0].register_forward_hook(steer)


def with_another_forward(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda hidden: centred(mlp, None, own(hidden))


def with_another_forward_of_a_class(model: PreTrainedModel) -> None:
    kind = type(model.model.layers[1].mlp)
    model.model.layers[1].mlp.__class__ = type(kind.__name__, (kind,), {})
    kind = type(model.model.layers[1].mlp)
    kind.forward = lambda self, hidden: centred(self, None, super(kind, self).forward(hidden))


@pytest.mark.parametrize(
    "change", [with_a_hook, with_a_hook_on_one_position, with_another_forward, with_another_forward_of_a_class]
)
@pytest.mark.parametrize(("gradient", "engine"), ROUTED)
def test_what_is_done_to_layers_after_a_step_is_seen(
    change: Callable[[PreTrainedModel], None], gradient: str, engine: str
) -> None:
    model = wrap(ROUTABLE["llama"](), gradient, engine)
    model(tokens(), labels=tokens()).backward()
    change(model.model)
    with pytest.raises(ValueError, match=REFUSED):
        model(tokens(), labels=tokens())


def before_all(model: PreTrainedModel) -> None:
    def louder(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return ((args[0] * 1.3, *args[1:]), kwargs)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(louder, with_kwargs=True)


def before_one(model: PreTrainedModel) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.3, *args[1:]))


def before_the_first(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.3, *args[1:]))


def before_one_without_a_tuple(model: PreTrainedModel) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, args: args[0] * 1.3)


def looking_on(model: PreTrainedModel) -> None:
    """Hooks that change nothing, around one that does."""
    layer, seen = model.model.layers[1], []
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    before_one(model)
    layer.register_forward_hook(lambda module, args, output: output * 0.7)
    layer.register_forward_pre_hook(lambda module, args: seen.append(args))
    layer.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True)


def after_all(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: output * 0.7)


def learning(model: PreTrainedModel) -> None:
    layer = model.model.layers[1]
    layer.before, layer.after = nn.Linear(32, 32), nn.Linear(32, 32)
    layer.register_forward_pre_hook(lambda module, args: (args[0] + module.before(args[0]), *args[1:]))
    layer.register_forward_hook(lambda module, args, kwargs, output: output + module.after(output), with_kwargs=True)


@pytest.mark.parametrize("stepped", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "change",
    [before_all, before_one, before_one_without_a_tuple, before_the_first, looking_on, after_all, learning],
)
@pytest.mark.parametrize(("gradient", "engine"), [("exact", None), *ROUTED])
def test_hooks_on_layers_are_run_on_all_tokens(
    change: Callable[[PreTrainedModel], None], gradient: str, engine: str | None, stepped: bool
) -> None:
    torch.manual_seed(0)
    model = wrap(ROUTABLE["llama"](), gradient, engine)
    if stepped:
        model(tokens(), labels=tokens())
    change(model.model)
    hold_to_reference(model, gradient)


def test_hooks_on_layers_above_a_router() -> None:
    plain = ROUTABLE["llama"]()
    before_all(plain)
    model = CGGRModel(plain, create_truncated_router(plain, 1), gradient="kv", min_tokens_ratio=0.5)
    hold_to_reference(model, "kv")


def without_one(model: PreTrainedModel) -> None:
    layers = model.base_model.layers
    model.base_model.layers = nn.ModuleList([layers[0], layers[2]])
    model.config.num_hidden_layers = 2
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[place] for place in (0, 2)]


def in_another_order(model: PreTrainedModel) -> None:
    layers = model.base_model.layers
    model.base_model.layers = nn.ModuleList([layers[2], layers[0], layers[1]])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("change", [without_one, in_another_order])
@pytest.mark.parametrize(("gradient", "engine"), ROUTED)
def test_layers_that_were_taken_out_or_moved_keep_their_numbers(
    name: str, change: Callable[[PreTrainedModel], None], gradient: str, engine: str
) -> None:
    model = ROUTABLE[name]()
    change(model)
    hold_to_reference(wrap(model, gradient, engine), gradient)


def test_layers_that_run_twice_or_share_a_number_are_named() -> None:
    twice, copied = ROUTABLE["llama"](), ROUTABLE["llama"]()
    twice.model.layers[2] = twice.model.layers[0]
    copied.model.layers[2].self_attn.layer_idx = 1
    with pytest.raises(ValueError, match="layers 0 and 2 of LlamaForCausalLM are one module"):
        wrap(twice)(tokens(), labels=tokens())
    with pytest.raises(ValueError, match=r"layers 1 and 2 of .* share the cache index layer_idx=1 .*every layer"):
        wrap(copied)(tokens(), labels=tokens())


@pytest.mark.parametrize("padded_first", [False, True])
def test_what_happens_without_padding_alone_is_seen(padded_first: bool) -> None:
    model = ROUTABLE["llama"]()
    mlp, whole = model.model.layers[1].mlp, []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: whole.append(kwargs.get("attention_mask") is None), with_kwargs=True
    )
    mlp.register_forward_hook(lambda module, args, output: centred(module, args, output) if whole[-1] else output)
    wrapped, mask = wrap(model), torch.ones(2, 12)
    if padded_first:
        wrapped(tokens(), labels=tokens(), attention_mask=mask).backward()
    with pytest.raises(ValueError, match=REFUSED):
        wrapped(tokens(), labels=tokens())


class Normed(nn.Module):
    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own, self.norm = own, nn.BatchNorm1d(32)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.own(hidden).transpose(1, 2)).transpose(1, 2)


def with_batch_norm(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp = Normed(model.model.layers[1].mlp)


def with_spectral_norm(model: PreTrainedModel) -> None:
    spectral_norm(model.model.layers[1].mlp.up_proj)


def with_spectral_norm_of_the_head(model: PreTrainedModel) -> None:
    spectral_norm(model.lm_head)


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("change", [with_batch_norm, with_spectral_norm, with_spectral_norm_of_the_head])
def test_a_look_leaves_nothing_in_buffers(change: Callable[[PreTrainedModel], None]) -> None:
    torch.manual_seed(0)
    plain, model = ROUTABLE["llama"](), ROUTABLE["llama"]()
    change(plain)
    change(model)
    model.load_state_dict(plain.state_dict())
    own = plain.train()(input_ids=tokens(), labels=tokens()).loss
    loss = CGGRModel(model.train(), gradient="exact", min_tokens_ratio=1.0)(tokens(), labels=tokens())
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize(("gradient", "engine"), [("exact", None), *ROUTED])
def test_classes_that_are_ruled_out_are_no_difference(gradient: str, engine: str | None) -> None:
    model = ROUTABLE["llama"]()
    model.lm_head = nn.Linear(32, VOCAB)
    ruled_out = torch.ones(VOCAB, dtype=torch.bool).scatter(0, tokens().flatten(), False)
    model.lm_head.bias.data.masked_fill_(ruled_out, -torch.inf)
    hold_to_reference(wrap(model, gradient, engine), gradient)


class OfWholeRows(nn.Module):
    """A norm before which something is added that is as long as a row."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self.table = nn.Parameter(torch.randn(12, 32, generator=torch.Generator().manual_seed(2)))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.own(hidden + self.table[None])


def own_head(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(3)
    head = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, VOCAB))
    for parameter in head.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    model.lm_head = head


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("head", [None, own_head], ids=["a matrix", "its own"])
@pytest.mark.parametrize("name", ["llama", "bloom"])  # whose layers return a tensor, and a tuple
@pytest.mark.parametrize(("gradient", "engine"), ROUTED)
def test_what_comes_after_the_layers_may_expect_whole_rows(
    name: str, head: Callable[[PreTrainedModel], None] | None, gradient: str, engine: str
) -> None:
    model = ROUTABLE[name]()
    if name == "llama":
        model.model.norm = OfWholeRows(model.model.norm)
    else:
        model.transformer.ln_f = OfWholeRows(model.transformer.ln_f)
    if head is not None:
        head(model)
    wrapped = wrap(model, gradient, engine)
    hold_to_reference(wrapped, gradient)
    assert wrapped._passes.architecture.whole_after_layers
    assert wrapped._passes.architecture.head.fused is (head is None)


@pytest.mark.parametrize(("gradient", "engine"), ROUTED)
def test_a_config_that_switches_caches_off_does_not_switch_routing_off(gradient: str, engine: str) -> None:
    model = ROUTABLE["llama"]()
    model.config.use_cache = False
    hold_to_reference(wrap(model, gradient, engine), gradient)
    assert model.config.use_cache is False


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layer_that_hands_over_no_keys_is_named(place: int) -> None:
    """Also one that needs none: whether it depends on other tokens is unknown."""
    model = ROUTABLE["llama"]()
    layer = model.model.layers[place]
    layer.forward = lambda hidden, **_: hidden + layer.mlp(hidden)
    with pytest.raises(ValueError, match=rf"layers \[{place}\] did not pass their keys and values through the cache"):
        wrap(model)(tokens(), labels=tokens())
