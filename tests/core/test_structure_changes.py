"""Changes to a model after wrapping: new embeddings, heads and adapters, copies and files."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm

from cggr_core import CGGRModel, Selection, create_truncated_router
from cggr_core.routing import findings
from tests.support.model_steps import assert_plain_step
from tests.support.tiny_models import ROUTABLE, VOCAB


def tokens(top: int = VOCAB) -> torch.Tensor:
    return torch.randint(3, top, (2, 12), generator=torch.Generator().manual_seed(0))


def resized(model):
    model.resize_token_embeddings(128, pad_to_multiple_of=64)
    return model


def shrunk(model):
    model.resize_token_embeddings(64)
    return model


def with_adapters(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))


def with_saved_modules(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]))


def with_new_head(model):
    model.set_output_embeddings(nn.Linear(32, VOCAB, bias=False))
    return model


def with_biased_head(model):
    model.set_output_embeddings(nn.Linear(32, VOCAB, bias=True))
    return model


def with_new_weight(model):
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 32))
    return model


def with_parametrised_head(model):
    weight_norm(model.lm_head)
    return model


def with_hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    return model


CHANGES = {
    resized: 120,
    shrunk: 60,
    with_adapters: VOCAB,
    with_saved_modules: VOCAB,
    with_new_head: VOCAB,
    with_biased_head: VOCAB,
    with_new_weight: VOCAB,
    with_parametrised_head: VOCAB,
    with_hook: VOCAB,
}


# PEFT asks transformers for a name that is deprecated.
@pytest.mark.filterwarnings("ignore:the head of:UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("gradient", ["exact", "kv"])
@pytest.mark.parametrize("stepped", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_after_wrapping_counts(change, stepped, gradient):
    torch.manual_seed(0)
    model = ROUTABLE["llama"]()
    wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()
    if stepped:
        wrapped(tokens(), labels=tokens())
    changed, input_ids = change(model).train(), tokens(CHANGES[change])
    assert_plain_step(wrapped, changed, input_ids)


def with_fewer_layers(model, wrapped):
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def with_another_layer(model, wrapped):
    model.model.layers[1] = scattered(ROUTABLE["llama"]()).model.layers[1]
    return model


def with_another_norm(model, wrapped):
    model.model.norm = type(model.model.norm)(32, eps=1e-2)
    return model


def with_adapters_in_layers(model, wrapped):
    return scattered(get_peft_model(model, LoraConfig(r=4, target_modules=["k_proj", "down_proj"])))


def with_the_wrapper_of_adapters(model, wrapped):
    wrapped.model = with_adapters_in_layers(model, wrapped)
    return wrapped.model


def another_model(model, wrapped):
    wrapped.model = scattered(ROUTABLE["qwen3"]())
    return wrapped.model


def with_a_hook_that_is_gone(model, wrapped):
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output * 0.5)
    wrapped(tokens(), labels=tokens())
    hook.remove()
    return model


def with_hook_on_a_layer(model, wrapped):
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 0.5)
    return model


def with_other_attention(model, wrapped):
    model.set_attn_implementation("eager")
    return model


def scattered(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


@pytest.mark.filterwarnings("ignore:the head of:UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("gradient", ["exact", "kv"])
@pytest.mark.parametrize("routed", [False, True], ids=["full depth", "truncated"])
@pytest.mark.parametrize(
    "change",
    [
        with_fewer_layers,
        with_another_layer,
        with_another_norm,
        with_adapters_in_layers,
        with_the_wrapper_of_adapters,
        another_model,
        with_a_hook_that_is_gone,
        with_hook_on_a_layer,
        with_other_attention,
    ],
)
def test_a_change_inside_the_model_counts(change, routed, gradient):
    model = scattered(ROUTABLE["llama"]())
    router = create_truncated_router(model, 1) if routed else None
    wrapped = CGGRModel(model, router, gradient=gradient, min_tokens_ratio=0.5).train()
    wrapped(tokens(), labels=tokens())
    changed, input_ids = change(model, wrapped).train(), tokens()
    mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    mask[:, 1::3] = True
    mask[:, -1] = False
    logits = changed(input_ids=input_ids).logits[mask]
    plain = cross_entropy(logits, input_ids.roll(-1, 1)[mask])
    selection = Selection.from_mask(mask, capacity=4, countable=mask)
    loss = wrapped(input_ids, labels=input_ids, selection=selection, num_items=int(mask.sum()))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    wrapped(input_ids, labels=input_ids).backward()  # and it selects by itself
    changed.zero_grad()


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_settings_of_the_head_are_read_as_the_model_reads_them(gradient):
    gemma, cohere = scattered(ROUTABLE["gemma2"]()), scattered(ROUTABLE["cohere"]())
    for model in (gemma, cohere):
        wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()
        wrapped(tokens(), labels=tokens())
        gemma.config.final_logit_softcapping = 2.0
        cohere.logit_scale = 3.0  # not what its config says
        plain = model(input_ids=tokens(), labels=tokens()).loss
        torch.testing.assert_close(wrapped(tokens(), labels=tokens()), plain, rtol=1e-5, atol=1e-6)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_file])
@pytest.mark.parametrize("stepped", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("routed", [False, True], ids=["full depth", "truncated"])
def test_copies_are_models_of_their_own(copied, stepped, routed):
    model = ROUTABLE["llama"]()
    wrapped = CGGRModel(model, create_truncated_router(model, 1) if routed else None).train()
    if stepped:
        wrapped(tokens(), labels=tokens(), draw=0)
    other = copied(wrapped)
    loss = other(tokens(), labels=tokens(), draw=1)
    loss.backward()
    torch.testing.assert_close(loss, wrapped(tokens(), labels=tokens(), draw=1))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert any(parameter.grad is not None for parameter in other.parameters())


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_a_forward_that_is_replaced_after_a_step_is_held_to_the_loss_again(gradient):
    model = ROUTABLE["llama"]()
    wrapped = CGGRModel(model, gradient=gradient).train()
    wrapped(tokens(), labels=tokens())
    own = model.forward

    def thrice(*args, **options):
        output = own(*args, **options)
        output.loss = None if output.loss is None else 3 * output.loss
        return output

    model.forward = thrice
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
        wrapped(tokens(), labels=tokens())


@pytest.mark.parametrize("gradient", ["exact", "kv"])
@pytest.mark.parametrize("in_place", [False, True], ids=["called", "in place"])
def test_a_model_that_stays_as_it_is_is_looked_at_once(gradient, in_place, monkeypatch):
    looks = []

    def counted(*args, **options):
        looks.append(1)
        return look(*args, **options)

    look = findings.probe
    monkeypatch.setattr(findings, "probe", counted)
    model = ROUTABLE["llama"]()
    wrapped = CGGRModel(model, gradient=gradient).train()
    for _ in range(3):
        with wrapped.routed_forward() if in_place else nullcontext():
            (model if in_place else wrapped)(input_ids=tokens(), labels=tokens())
        wrapped(tokens(), labels=tokens())
    assert len(looks) == 1


@pytest.mark.parametrize("gradient", ["exact", "kv"])
@pytest.mark.parametrize("stepped", [False, True], ids=["before", "after"])
def test_parts_that_are_set_on_the_wrapper_are_the_models(gradient, stepped):
    model = ROUTABLE["llama"]()
    wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()
    if stepped:
        wrapped(tokens(), labels=tokens())
    head, config = nn.Linear(32, VOCAB, bias=False), copy.deepcopy(model.config)
    wrapped.lm_head, wrapped.config, wrapped.generation_config = head, config, None
    assert model.lm_head is head and model.config is config and model.generation_config is None
    assert set(dict(wrapped.named_children())) == {"model"}
    own = model(input_ids=tokens(), labels=tokens()).loss
    torch.testing.assert_close(wrapped(tokens(), labels=tokens()), own, rtol=1e-5, atol=1e-6)
    wrapped.note = nn.Linear(1, 1)  # of its own
    assert not hasattr(model, "note") and set(dict(wrapped.named_children())) == {"model", "note"}
    wrapped.model = other = ROUTABLE["gpt2"]()
    assert wrapped.model is other


def epsilon(model):
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


def scale(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9


def window(model):
    model.config.sliding_window = 5


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
@pytest.mark.parametrize(("name", "change"), [("llama", epsilon), ("llama", scale), ("mistral-sliding", window)])
def test_a_setting_of_a_module_that_is_changed_after_a_step_counts(name, change, gradient):
    input_ids = tokens()

    def step(first):
        model = ROUTABLE[name]()
        wrapped = CGGRModel(model, gradient=gradient, selection="random", min_tokens_ratio=0.5).train()
        if first:
            wrapped(input_ids, labels=input_ids, draw=0)
        change(model)
        loss = wrapped(input_ids, labels=input_ids, draw=1)
        loss.backward()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    for found, wanted in zip(step(first=True), step(first=False), strict=True):
        torch.testing.assert_close(found, wanted)


def test_attention_that_sees_later_tokens_from_some_step_on_is_refused():
    model, input_ids = ROUTABLE["llama"](), tokens()
    wrapped = CGGRModel(model, gradient="kv", selection="random").train()
    wrapped(input_ids, labels=input_ids)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="computes different values for kept tokens than a plain forward"):
        wrapped(input_ids, labels=input_ids)


def test_switches_that_say_nothing_of_a_forward_are_no_reason_to_look_again():
    model, input_ids = ROUTABLE["gpt2"](), tokens()
    wrapped = CGGRModel(model, gradient="kv", selection="random").train()
    wrapped(input_ids, labels=input_ids)
    seen = wrapped._passes.seen
    wrapped.eval()
    wrapped.train()
    model.transformer.drop.p = 0.1
    model.config.use_cache = False
    wrapped(input_ids, labels=input_ids)
    assert wrapped._passes.seen == seen


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "eager_attention_forward"])
def test_a_function_that_is_replaced_in_the_models_module_after_a_step_counts(name, gradient, monkeypatch):
    module, input_ids = transformers.models.llama.modeling_llama, tokens()
    own = getattr(module, name)

    def larger(*args, **kwargs):
        first, second = own(*args, **kwargs)
        return first * 1.3, second

    def step(first):
        with monkeypatch.context() as patched:
            model = ROUTABLE["llama"]()
            model.set_attn_implementation("eager")
            wrapped = CGGRModel(model, gradient=gradient, selection="random", min_tokens_ratio=0.5).train()
            if first:
                wrapped(input_ids, labels=input_ids, draw=0)
            patched.setattr(module, name, larger)
            return wrapped(input_ids, labels=input_ids, draw=1)

    torch.testing.assert_close(step(first=True), step(first=False))
