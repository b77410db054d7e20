"""The description of a model before it runs, and the order of the backward passes of its parts."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import OffloadWrapper, checkpoint_wrapper
from torch.nn.utils.parametrize import register_parametrization

from cggr_core.routing.architectures import default_position_ids, describe, unwrapped
from cggr_core.routing.head_check import _noise, gives_the_logits, large_random_logits, leaves, random_logits
from cggr_core.routing.heads import head_rows, is_plain_matrix
from cggr_core.routing.hooks import has_hooks
from cggr_core.routing.inputs import token_inputs
from cggr_core.routing.loads import count_loads
from cggr_core.routing.ordering import backward_in_turn
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE, VOCAB

IDS = tokens(length=6)[:2]


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input)


class Renamed(nn.Linear):
    pass


class NotToBeRead(nn.Module):
    forward = staticmethod(lambda weight: weight)


class NoMatrix(nn.Module):
    forward = nn.Linear.forward


def nothing(*_):
    return None


def gathers(*_):
    return None


gathers.__module__ = "torch.distributed.fsdp"


def test_a_head_is_a_plain_matrix_or_it_is_not():
    assert is_plain_matrix(nn.Linear(2, 3)) and is_plain_matrix(Renamed(2, 3))
    for other in (OwnForward(2, 3), nn.Identity(), nn.Bilinear(2, 2, 3), nn.Sequential(nn.Linear(2, 3)), NoMatrix()):
        assert not is_plain_matrix(other)
    head = nn.Linear(2, 3)
    head.forward = nothing
    assert not is_plain_matrix(head)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_count_but_for_those_that_gather_weights(register):
    head = nn.Linear(2, 3)
    assert not has_hooks(head)
    getattr(head, register)(gathers)
    assert not has_hooks(head) and is_plain_matrix(head)
    handle = getattr(head, register)(nothing)
    assert has_hooks(head) and not is_plain_matrix(head)
    handle.remove()
    assert is_plain_matrix(head)


def test_classes_of_a_head():
    config = SimpleNamespace(vocab_size=99, get_text_config=lambda: config)

    def rows(head):
        return head_rows(SimpleNamespace(config=config, get_output_embeddings=lambda: head))

    assert rows(nn.Linear(4, 7)) == 7
    packed = nn.Linear(4, 7)
    packed.weight = nn.Parameter(torch.zeros(14))
    assert rows(packed) == rows(nn.Identity()) == 99
    computed = register_parametrization(nn.Linear(4, 7), "weight", NotToBeRead(), unsafe=True)
    NotToBeRead.forward = None
    assert rows(computed) == 7


def test_the_model_inside_a_wrapper():
    inner = nn.Linear(1, 1)
    wrapper = nn.Identity()
    assert unwrapped(wrapper) is wrapper
    wrapper.get_base_model = lambda: inner
    assert unwrapped(wrapper) is inner
    wrapper.get_base_model = "not to be called"
    assert unwrapped(wrapper) is wrapper


def described(**settings):
    model = ROUTABLE["llama"]()
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model, describe(model)


def test_settings_of_a_head_are_those_of_the_model_or_its_config():
    assert (described()[1].head.scale, described()[1].head.softcap) == (None, None)
    assert described(logit_scale=0.5)[1].head.scale == 0.5
    assert described(logits_scaling=4)[1].head.scale == 0.25
    softcap = described(final_logit_softcapping=30)[1].head.softcap
    assert softcap == 30.0 and isinstance(softcap, float)
    model, _ = described(logit_scale=0.5)
    model.logit_scale = 2.0
    assert describe(model).head.scale == 2.0


def test_layers_and_what_stands_around_them():
    model, description = described()
    assert description.layers is model.model.layers and description.head.module is model.lm_head
    assert description.head.fused and description.obstacle is None and description.position_maker is None
    assert description.cache_name in ("past_key_values", "cache") and description.takes_positions
    assert set(description.checkpointing) == {
        part for part in model.modules() if hasattr(part, "gradient_checkpointing")
    }
    assert set(description.configured) == {part for part in model.modules() if hasattr(part, "config")}
    assert description.places == {} and description.checkpoint_wrappers == {} and description.shifted
    assert description.counts_padding and not description.whole_after_layers
    model.config.num_hidden_layers += 1
    assert len(describe(model).layers) == 0 and "were not found" in describe(model).obstacle
    model.config.num_hidden_layers -= 1
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert "has layers without keys and values (linear_attention)" in describe(model).obstacle
    model.config.layer_types, model.config.layers_block_type = None, ["attention", "mamba", "attention"]
    assert "has layers without keys and values (mamba)" in describe(model).obstacle
    for kind in ("recurrent", "conv", "mamba2", "ssm", "rwkv"):
        model.config.layers_block_type = ["attention", kind]
        assert f"has layers without keys and values ({kind})" in describe(model).obstacle


def test_of_two_lists_as_long_as_the_layers_the_outer_one_of_the_decoder_is_meant():
    model, _ = described()
    own = model.model.layers
    model.model.layers[0].experts = nn.ModuleList(nn.Identity() for _ in own)
    model.vision = nn.ModuleList(nn.Identity() for _ in own)
    assert describe(model).layers is own
    model.get_decoder = nothing
    assert describe(model).layers is model.vision


class Plain(nn.Module):
    """A minimal language model, without the extras of transformers' own."""

    def __init__(self, own):
        super().__init__()
        self.config, self.head, self.own = own.config, own.lm_head, nn.ModuleDict({"text": own.model})

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        return self.head(self.own["text"](input_ids)[0])


def test_a_model_that_names_no_decoder():
    """The cache is passed to the module with the layers, under that module's name for it."""
    own = described()[0]
    found = describe(Plain(own))
    assert found.layers is own.model.layers and found.obstacle is None and found.shifted
    assert found.cache_name == describe(own).cache_name
    for name in ("past_key_values", "cache"):
        own.model.forward = eval(f"lambda input_ids, {name}=None: None")
        assert describe(Plain(own)).cache_name == name
    own.model.forward = lambda input_ids: None
    found = describe(Plain(own))
    assert found.obstacle == "Plain keeps no key/value cache" and found.cache_name == "past_key_values"


def test_what_the_layers_of_a_model_number_themselves():
    model, _ = described()
    first, *rest = model.model.layers
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(rest), 2
    found = describe(model)
    assert found.places == {1: 0, 2: 1} and found.obstacle is None
    model.model.layers[1].self_attn.layer_idx = None  # no number: its place
    assert describe(model).places == {1: 0} and "share the cache index layer_idx=1" in describe(model).obstacle
    model.model.layers[1].mlp.layer_idx, model.model.layers[1].self_attn.layer_idx = 2, 7  # two numbers
    assert "layers 0 and 1 of LlamaForCausalLM share the cache index" in describe(model).obstacle
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList([rest[0], first, first]), 3
    assert describe(model).obstacle == "layers 1 and 2 of LlamaForCausalLM are one module that runs twice in a forward"


class RunningNorm(nn.BatchNorm1d):
    pass


def test_norms_and_linear_layers_are_those_without_parts_or_buffers():
    model, found = described()
    layers = model.model.layers
    assert found.norms == tuple((layer.input_layernorm, layer.post_attention_layernorm) for layer in layers)
    added = {
        "running": RunningNorm(2),
        "wrapped_norm": nn.Sequential(),
        "own": OwnForward(2, 2),
        "more": nn.Linear(2, 2),
    }
    norm_of_parts = type("NormOfParts", (nn.Sequential,), {})(nn.Linear(2, 2))
    for name, part in {**added, "norm_of_parts": norm_of_parts}.items():
        layers[0].add_module(name, part)
    changed = describe(model)
    assert changed.norms == found.norms
    assert changed.linears[0] == (*found.linears[0], added["more"], norm_of_parts[0])
    assert changed.linears[1:] == found.linears[1:] and len(found.linears[1]) == 7


def test_wrappers_of_torchs_checkpointing():
    model, _ = described()
    own = model.model.layers[1]
    model.model.layers[1] = checkpoint_wrapper(own)
    model.model.layers[0] = OffloadWrapper(model.model.layers[0])  # whose part has the same name
    model.model.norm.checkpoint_fn = nothing
    assert describe(model).checkpoint_wrappers == {model.model.layers[1]: own}


def test_heads_that_hold_a_weight_somehow():
    model, _ = described()
    frozen = nn.Identity()
    frozen.register_buffer("weight", torch.randn(VOCAB, 32))
    for head, classes in ((frozen, VOCAB), (nn.Sequential(nn.Linear(32, VOCAB + 1)), VOCAB)):
        model.lm_head = head
        assert describe(model).head.module is head and describe(model).head.classes == classes
        assert not describe(model).head.fused


def test_positions_that_a_model_makes_up_itself():
    padding = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
    embedded, ids = torch.randn(2, 4, 32), torch.tensor([[0, 5, 6, 7], [5, 6, 0, 7]])

    def made(name, input_ids, mask, **settings):
        model = ROUTABLE[name](**settings)
        return default_position_ids(model, describe(model), input_ids, embedded, mask).tolist()

    counted = [[0, 1, 2, 3]] * 2
    assert made("llama", ids, padding) == made("llama", None, None) == made("opt", ids, None) == counted
    assert made("opt", ids, padding) == [[-1, 0, 1, 2], [0, 1, -1, 2]]
    model = ROUTABLE["opt"]()
    assert default_position_ids(model, describe(model), ids, embedded, padding.float()).dtype == torch.int64
    assert made("roberta-masked", None, padding, pad_token_id=5) == [[6, 7, 8, 9]] * 2
    # RoBERTa's padding is the token 0 here, and what is not a token counts as none.
    assert made("roberta-masked", ids, padding) == [[0, 1, 2, 3], [1, 2, 0, 3]]
    assert made("roberta-masked", None, padding) == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize(
    "change", ["no config", "other config", "no heads", "encoder-decoder", "no head", "packed head"]
)
def test_models_that_cannot_be_described(change, monkeypatch):
    model, _ = described()
    error, message = ValueError, "is an encoder-decoder model"
    if change == "no config":
        model, error, message = nn.Linear(2, 2), TypeError, "got Linear$"
    elif change == "other config":
        model.config, error, message = SimpleNamespace(), TypeError, "got LlamaForCausalLM$"
    elif change == "no heads":
        error, message = TypeError, "got Holder$"
        model = type("Holder", (nn.Module,), {"config": model.config})()
    elif change == "encoder-decoder":
        model.config.is_encoder_decoder = True
    else:
        head = None if change == "no head" else nn.Identity()
        monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
        if change == "no head":
            message = "has no output embedding"
        else:
            error, message = TypeError, r"\(Identity\) has no weight tensor"
    with pytest.raises(error, match=message):
        describe(model)


def test_loads_are_counted_once_for_a_model():
    model = nn.Linear(2, 3)
    model.register_load_state_dict_post_hook(nothing)
    counter = count_loads(model)
    assert counter.count == 0 and count_loads(model) is counter
    model.load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict())
    assert counter.count == 2
    assert count_loads(nn.Linear(2, 3)) is not counter


def test_a_backward_pass_in_turn():
    order = []
    weight = torch.randn(3, requires_grad=True)
    values = [weight * 2, torch.randn(3), weight.exp()]
    values[0].register_hook(lambda grad: order.append("values"))
    hidden = torch.randn(3, requires_grad=True)
    before = hidden * 3
    before.register_hook(lambda grad: order.append("before"))
    found = backward_in_turn(values, before=before)
    assert all(torch.equal(a, b) for a, b in zip(found, values, strict=True))
    assert [part.requires_grad for part in found] == [True, False, True] and found[1] is values[1]
    loss = (found[0] * before + found[2] * 5 + found[1]).sum()
    loss.backward()
    wanted = 2 * before + 5 * weight.exp()
    torch.testing.assert_close(weight.grad, wanted.detach())
    torch.testing.assert_close(hidden.grad, (3 * values[0]).detach())
    assert order == ["values", "before"]
    constants = (torch.randn(3), torch.randn(3))
    assert backward_in_turn(constants, before=before) == constants


def test_a_head_gives_large_logits_for_the_length_of_a_block():
    head, hidden = nn.Linear(8, 500), torch.randn(3, 8)
    own = head(hidden)
    with large_random_logits(head) as given:
        first, second = head(hidden), head(hidden)
    assert torch.equal(given[0], first) and torch.equal(given[1], second) and not torch.equal(first, second)
    assert abs(first.std().item() - 8.0) < 0.6 and first.dtype == own.dtype
    assert torch.equal(head(hidden), own)
    with large_random_logits(head) as given:
        head(hidden)
        assert torch.is_grad_enabled() and not given[0].requires_grad
    with torch.no_grad():
        with large_random_logits(head, traced=True) as given:
            assert not torch.is_grad_enabled()
            assert head(hidden).requires_grad and given[0].is_leaf and torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
    with large_random_logits(head):
        assert torch.equal(head(hidden), first)
        assert head.to(torch.bfloat16)(hidden.bfloat16()).dtype == torch.bfloat16


class Sharded(torch.Tensor):
    pass


def test_a_head_that_is_sharded_gives_its_own_logits():
    model = ROUTABLE["llama"]().eval()
    head, hidden = model.lm_head, torch.randn(2, 3, 32)
    own = head(hidden)
    head.forward = lambda hidden: nn.Linear.forward(head, hidden).as_subclass(Sharded)
    with large_random_logits(head) as given:
        assert type(head(hidden)) is Sharded and torch.equal(head(hidden), own) and given == []
    assert gives_the_logits(model, describe(model), few_tokens(model))


@pytest.mark.parametrize("shape", [(2, 3, 32), (6, 32)])
def test_a_head_gives_random_logits_over_other_classes(shape):
    head, hidden, called = nn.Linear(32, 7).bfloat16(), torch.randn(shape).bfloat16(), []
    own = head.forward
    head.forward = lambda hidden: (called.append(hidden.shape), own(hidden))[1]
    with random_logits(head, 5, lambda noise: noise * 3):
        first, second = head(hidden), head(hidden)
    assert not torch.equal(first, second)
    assert first.shape == (*shape[:-1], 5) and first.dtype == torch.bfloat16
    assert called == [torch.Size([1] * (len(shape) - 1) + [32])] * 2, "a row is enough to know the kind of its logits"
    drawn = torch.randn(30, generator=torch.Generator().manual_seed(0)).view(first.shape)
    assert torch.equal(first, (drawn * 3).bfloat16())
    head.forward = lambda hidden: own(hidden).as_subclass(Sharded)
    with random_logits(head, 5, lambda noise: noise), pytest.raises(TypeError, match="the head gives a Sharded"):
        head(hidden)


@pytest.mark.parametrize("traced", [False, True])
def test_random_logits_have_a_graph_where_one_is_traced(traced):
    head, hidden = nn.Linear(32, 7), torch.randn(2, 32)
    with torch.no_grad():
        with random_logits(head, 5, lambda noise: noise, traced=traced):
            logits = head(hidden)
            assert torch.is_grad_enabled() is logits.requires_grad is traced
            logits += 1  # as some models scale theirs
        assert not torch.is_grad_enabled()
        with random_logits(head, 5, lambda noise: noise):
            assert not head(hidden).requires_grad
        with large_random_logits(head, change=lambda noise: 3 * noise.sign()):
            assert head(hidden).unique().tolist() == [-3, 3]


def test_random_logits_are_repeated_where_there_are_many(monkeypatch):
    monkeypatch.setattr("cggr_core.routing.head_check._MOST_DRAWN", 4)
    drawn = torch.randn(4, generator=torch.Generator().manual_seed(3)).tolist()
    assert _noise(torch.Size((2, 5)), torch.device("cpu"), 3).flatten().tolist() == (drawn * 3)[:10]
    assert _noise(torch.Size((2, 0)), torch.device("cpu"), 3).shape == (2, 0)


def test_the_leaves_of_a_graph():
    a, b, c = (torch.randn(3, requires_grad=True) for _ in range(3))
    constant, doubled = torch.randn(3), 2 * a
    assert leaves((a + 1) * constant) == {a}
    assert leaves(constant * (doubled * b) + doubled * constant) == {a, b}
    assert leaves((c.exp() * constant).sum() + constant.sum()) == {c} and leaves(constant) == set()


def few_tokens(model):
    names = ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
    return token_inputs(model, describe(model), input_ids=IDS, **dict.fromkeys(names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "softcap"), [("llama", None), ("gemma2", 30.0), ("granite", None)])
def test_logits_that_are_those_of_the_head(name, softcap, dtype):
    model = ROUTABLE[name]().eval().to(dtype)
    description = describe(model)
    assert (description.head.softcap is None) is (softcap is None)
    few = few_tokens(model)
    assert gives_the_logits(model, description, few)
    own = model.forward

    def with_logits(change):
        def forward(*args, **kwargs):
            output = own(*args, **kwargs)
            output.logits = change(output.logits)
            return output

        model.forward = forward
        found = gives_the_logits(model, description, few)
        model.forward = own
        return found

    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert with_logits(lambda logits: logits * (1 + 0.7 * tolerance))
    assert with_logits(lambda logits: logits + 4 * tolerance)
    assert not with_logits(lambda logits: logits * (1 + 5 * tolerance))
    assert not with_logits(lambda logits: logits + torch.eye(VOCAB, dtype=dtype)[3] * 5)
    assert not with_logits(lambda logits: logits[:, :-1])
    # Neither a head that is called twice nor a parameter that changes nothing yet.
    assert not with_logits(lambda logits: (logits, model.lm_head(torch.randn(2, 6, 32).to(dtype)))[0])
    assert not with_logits(lambda logits: logits + nn.Parameter(torch.zeros(VOCAB, dtype=dtype)))
    model.final_logits_bias = torch.zeros(VOCAB)
    assert not gives_the_logits(model, description, few)


@pytest.mark.parametrize("encoder_layers", [1, 3, 6])
def test_a_decoder_is_found_whatever_its_encoder_would_have(encoder_layers):
    sizes = {"vocab_size": 97, "d_model": 16, "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "is_decoder": True}
    config = transformers.BartConfig(**sizes, decoder_layers=3, encoder_layers=encoder_layers)
    found = describe(transformers.BartForCausalLM(config))
    assert len(found.layers) == 3 and found.obstacle is None
