"""What users do to a model after it was wrapped: other embeddings, heads and adapters, copies and files of it."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from cggr_core import CGGRModel, create_truncated_router
from tests.support.reference_routing import gradients, relative_error
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
    plain = changed(input_ids=input_ids, labels=input_ids).loss
    plain.backward()
    wanted = gradients(model)
    loss = wrapped(input_ids, labels=input_ids)
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    assert relative_error(gradients(model), wanted) <= 1e-5


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
