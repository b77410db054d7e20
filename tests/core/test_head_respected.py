"""Whatever happens around the head counts in the loss; otherwise the model's own logits are used, with one warning."""

import warnings
from itertools import product

import pytest
import torch
import transformers

from cggr_core import CGGRModel
from tests.support.model_steps import assert_plain_step
from tests.support.tiny_models import ROUTABLE, VOCAB

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def scaled(head):
    head.register_forward_hook(lambda module, args, output: output * 0.5)


def masked(head):
    head.register_forward_hook(lambda module, args, output: output.masked_fill(torch.arange(VOCAB) >= 90, -1e4))


def fed_twice(head):
    head.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))


def given_a_forward(head):
    own = head.forward
    head.forward = lambda hidden: own(hidden) + 0.25 * torch.arange(VOCAB)


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
@pytest.mark.parametrize("around", [scaled, masked, fed_twice, given_a_forward])
def test_what_is_around_the_head_counts(around, gradient):
    model, input_ids = ROUTABLE["llama"](), tokens()
    around(model.lm_head)
    wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()
    with pytest.warns(UserWarning, match="its own logits are used"):
        assert_plain_step(wrapped, model, input_ids)
    with warnings.catch_warnings(action="error"):
        wrapped(input_ids, labels=input_ids)  # said once


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_kept_rows_go_through_the_hook_too(engine):
    model, input_ids = ROUTABLE["llama"](), tokens()
    masked(model.lm_head)
    hooked = CGGRModel(model, selection="random", engine=engine).train()(input_ids, labels=input_ids, draw=3)
    model.lm_head._forward_hooks.clear()
    bare = CGGRModel(model, selection="random", engine=engine).train()(input_ids, labels=input_ids, draw=3)
    assert hooked < bare  # seven classes less to choose among


class Bounded(transformers.LlamaForCausalLM):
    """Logits bounded by an unknown attribute, which has no effect at initial weights."""

    def forward(self, labels=None, **options):
        output = super().forward(**options)
        output.logits = 5.0 * torch.tanh(output.logits / 5.0)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_what_follows_the_head_is_seen_at_starting_weights(gradient):
    model, input_ids = Bounded(transformers.LlamaConfig(**SIZES, initializer_range=1e-3)), tokens()
    wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()
    wrapped(input_ids, labels=input_ids)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    plain = model(input_ids=input_ids, labels=input_ids).loss
    torch.testing.assert_close(wrapped(input_ids, labels=input_ids), plain, rtol=1e-5, atol=1e-6)


class AfterTheHead(transformers.LlamaForCausalLM):
    """Whatever happens to the logits after the head's module."""

    def __init__(self, config):
        super().__init__(config)
        self.bias = torch.nn.Parameter(torch.zeros(config.vocab_size))
        self.temperature = torch.nn.Parameter(torch.zeros(1))

    def forward(self, labels=None, **options):
        output = super().forward(**options)
        output.logits = self.changed(output.logits)
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
        return output


class InTraining(AfterTheHead):
    def changed(self, logits):
        return logits * 0.5 if self.training else logits


class InPlace(AfterTheHead):
    def changed(self, logits):
        return logits.mul_(0.5) if self.training else logits


class WithABias(AfterTheHead):
    def changed(self, logits):
        return logits + self.bias


class WithAScaledBias(AfterTheHead):
    def changed(self, logits):
        return logits + self.bias * torch.full((), 0.5)


class WithATemperature(AfterTheHead):
    def changed(self, logits):
        return logits * self.temperature.exp()


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize(
    ("kind", "gradient"),
    [
        *product([InTraining, WithABias, WithATemperature], ["exact", "kv", "detached", "sequence"]),
        (WithAScaledBias, "kv"),
        (InPlace, "exact"),
        (InPlace, "sequence"),
    ],
)
def test_what_follows_the_head_in_training_or_learns_counts(kind, gradient):
    model, input_ids = kind(transformers.LlamaConfig(**SIZES, initializer_range=0.2)).train(), tokens()
    wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()
    for _ in range(2):  # with parameters that change nothing at first, and do after a step
        assert_plain_step(wrapped, model, input_ids)
        with torch.no_grad():
            model.bias += torch.linspace(-1.0, 1.0, VOCAB)
            model.temperature += 0.3


class NotingShapes(AfterTheHead):
    def changed(self, logits):
        self.shapes.append(tuple(logits.shape))
        return logits + self.bias


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("engine", ["two_pass", "interleaved"])
def test_what_follows_the_head_sees_logits_of_the_right_shape_in_every_pass(engine):
    """Also in a context pass whose logits nobody reads."""
    model, input_ids = NotingShapes(transformers.LlamaConfig(**SIZES)).train(), tokens()
    model.__dict__["shapes"] = shapes = []
    wrapped = CGGRModel(model, selection="random", engine=engine, min_tokens_ratio=0.5).train()
    for _ in range(2):  # a model with code of others is compared at powers of two
        wrapped(input_ids, labels=input_ids, draw=1)
        shapes.clear()  # else it would count as a setting that has changed
    wrapped(input_ids, labels=input_ids, draw=1)
    kept = int(wrapped.metrics["kept_tokens"])
    whole = (*input_ids.shape, VOCAB)
    assert len(shapes) == (2 if engine == "two_pass" else 1)
    assert all(shape[0] == whole[0] and shape[2] == VOCAB for shape in shapes)
    assert (shapes[0] == whole) is (engine == "two_pass")
    assert kept / whole[0] <= shapes[-1][1] < whole[1]


class MixedLogits(AfterTheHead):
    """Every position's logits depend on those of the others."""

    def changed(self, logits):
        return logits + logits.mean(1, keepdim=True)


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
def test_logits_that_mix_positions_are_refused_where_only_some_are_made():
    model, input_ids = MixedLogits(transformers.LlamaConfig(**SIZES, initializer_range=0.2)).train(), tokens()
    plain = model(input_ids=input_ids, labels=input_ids).loss
    exact = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0).train()
    torch.testing.assert_close(exact(input_ids, labels=input_ids), plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="different values for kept tokens than a plain forward"):
        CGGRModel(model, gradient="kv").train()(input_ids, labels=input_ids)


def mlp_head() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, VOCAB))


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("gradient", ["exact", "kv", "detached", "sequence"])
def test_a_head_of_several_layers_is_run_as_it_is(gradient):
    model, input_ids = ROUTABLE["llama"](), tokens()
    torch.manual_seed(0)
    model.lm_head = mlp_head()
    assert_plain_step(CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train(), model, input_ids)


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
def test_a_head_that_is_never_called():
    sizes = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}
    nothing = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.MobileBertConfig(**SIZES, **sizes, **nothing)
    model, input_ids = transformers.MobileBertForMaskedLM(config).train(), tokens()
    plain = model(input_ids=input_ids, labels=input_ids).loss
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0).train()
    torch.testing.assert_close(wrapped(input_ids, labels=input_ids), plain, rtol=1e-5, atol=1e-6)


def test_a_gradient_hook_on_the_weight_of_the_head_is_run():
    model, input_ids = ROUTABLE["llama"](), tokens()
    model.lm_head.weight.register_hook(lambda grad: grad.masked_fill(torch.arange(VOCAB)[:, None] < 50, 0.0))
    CGGRModel(model, gradient="kv").train()(input_ids, labels=input_ids).backward()
    assert not model.lm_head.weight.grad[:50].any() and model.lm_head.weight.grad[50:].any()


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("gradient", ["exact", "kv"])
@pytest.mark.parametrize("stepped", [False, True], ids=["before", "after"])
def test_a_hook_on_all_modules_counts(stepped, gradient):
    model, input_ids = ROUTABLE["llama"](), tokens()
    wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()
    if stepped:
        wrapped(input_ids, labels=input_ids)
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 0.5 if module is model.lm_head else None
    )
    try:
        plain = model(input_ids=input_ids, labels=input_ids).loss
        torch.testing.assert_close(wrapped(input_ids, labels=input_ids), plain, rtol=1e-5, atol=1e-6)
    finally:
        hook.remove()
    plain = model(input_ids=input_ids, labels=input_ids).loss
    torch.testing.assert_close(wrapped(input_ids, labels=input_ids), plain, rtol=1e-5, atol=1e-6)
