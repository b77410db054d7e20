"""Losses that people write: refused if they are not cross-entropy, and followed while they change."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, dropout, kl_div

from cggr_core import CGGRModel
from tests.support.tiny_models import ROUTABLE, VOCAB


def batch(rows=2, length=16):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def nll(logits, labels, **options):
    return cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", **options)


def mean(losses, labels):
    return losses.sum() / (labels[:, 1:] != -100).sum()


class OwnLoss(transformers.LlamaForCausalLM):
    def __init__(self, config, own):
        super().__init__(config)
        self.own = own
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids=None, labels=None, attention_mask=None, **options):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        if labels is not None:
            output.loss = self.own(self, output.logits, labels)
        return output


def model_with(own):
    return OwnLoss(ROUTABLE["llama"]().config, own).train()


def focal(model, logits, labels):
    losses = nll(logits, labels)
    return mean(losses * (1 - (-losses).exp()) ** 2, labels)


LOSSES = {
    "label smoothing": lambda model, logits, labels: mean(nll(logits, labels, label_smoothing=0.1), labels),
    "z-loss": lambda model, logits, labels: (
        mean(nll(logits, labels), labels) + 1e-5 * logits.logsumexp(-1).square().mean()
    ),
    "class weights": lambda model, logits, labels: mean(
        nll(logits, labels, weight=torch.linspace(1, 2, logits.shape[-1])), labels
    ),
    "weights of positions": lambda model, logits, labels: mean(
        nll(logits, labels) * torch.linspace(0.5, 1.5, labels.shape[1] - 1), labels
    ),
    "focal": focal,
    "a sum": lambda model, logits, labels: nll(logits, labels).sum(),
    "a penalty on the head": lambda model, logits, labels: (
        mean(nll(logits, labels), labels) + 1e-3 * model.lm_head.weight.square().mean()
    ),
    "a penalty on a layer": lambda model, logits, labels: (
        mean(nll(logits, labels), labels) + 1e-9 * model.model.layers[0].mlp.up_proj.weight.square().mean()
    ),
    "a penalty on one logit": lambda model, logits, labels: (
        mean(nll(logits, labels), labels) + 0.01 * logits[..., 2].mean()
    ),
    "a confidence term": lambda model, logits, labels: (
        mean(nll(logits, labels), labels) + 0.01 * kl_div(logits.log_softmax(-1), logits.detach().softmax(-1) ** 0.5)
    ),
    "dropout of logits": lambda model, logits, labels: mean(nll(dropout(logits, 0.2, model.training), labels), labels),
    "clamped logits": lambda model, logits, labels: mean(nll(logits.clamp(max=20), labels), labels),
    "another in training with gradients": lambda model, logits, labels: (
        mean(nll(logits, labels), labels) * (1.1 if model.training and torch.is_grad_enabled() else 1.0)
    ),
    "another where there is a graph": lambda model, logits, labels: (
        mean(nll(logits, labels), labels) * (1.0 if logits.grad_fn is None else 1.1)
    ),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_another_loss_is_refused(name):
    with pytest.raises(
        ValueError, match=r"OwnLoss's own loss (is not the mean cross-entropy|trains parameters besides)"
    ):
        CGGRModel(model_with(LOSSES[name]), gradient="exact")(batch(), labels=batch())


def test_cross_entropy_itself_is_trained():
    model = model_with(lambda model, logits, labels: mean(nll(logits, labels), labels))
    found = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)(batch(), labels=batch())
    torch.testing.assert_close(found, model(input_ids=batch(), labels=batch()).loss)


def steps_until_refused(own, advance, steps=20):
    model = model_with(own)
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)
    for step in range(steps):
        try:
            wrapped(batch(), labels=batch())
        except ValueError as error:
            assert "own loss is not the mean cross-entropy" in str(error)
            return step
        advance(model, step)
    return None


@pytest.mark.parametrize(
    ("factor", "refused"),
    [
        (lambda steps: 0.0, None),
        (lambda steps: steps, 1),
        (lambda steps: steps >= 5, 5),
        (lambda steps: steps >= 10, 16),
    ],
    ids=["never", "at once", "fifth step", "tenth step"],
)
def test_a_loss_driven_by_a_counter_is_refused_once_it_is_looked_at(factor, refused):
    """The first eight changes of a value are looked at, then those at powers of two."""

    def own(model, logits, labels):
        return mean(nll(logits, labels), labels) * (1.0 + 0.1 * float(factor(int(model.steps))))

    often = refused is None or refused > 8
    with pytest.warns(UserWarning, match="^steps of the model.* keeps changing") if often else nullcontext():
        assert steps_until_refused(own, lambda model, step: model.steps.add_(1)) == refused


def test_a_temperature_in_the_config_is_followed():
    def own(model, logits, labels):
        return mean(nll(logits / getattr(model.config, "temperature_of_loss", 1.0), labels), labels)

    def advance(model, step):
        if step >= 2:
            model.config.temperature_of_loss = 1.0 + 0.1 * step

    assert steps_until_refused(own, advance) == 3


def test_under_attention_dropout_the_loss_is_that_of_the_same_draws():
    config = transformers.PLBartConfig(
        vocab_size=VOCAB, d_model=32, decoder_layers=2, encoder_layers=2, decoder_attention_heads=4,
        encoder_attention_heads=4, decoder_ffn_dim=48, encoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, is_decoder=True,
    )  # fmt: skip
    model = transformers.PLBartForCausalLM(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)
    wrapped(batch(), labels=batch())
    own, found = [], []
    for seed in range(2):
        for losses, run in (
            (own, lambda: model(input_ids=batch(), labels=batch()).loss),
            (found, lambda: wrapped(batch(), labels=batch())),
        ):
            torch.manual_seed(seed)
            losses.append(run().detach())
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
    assert abs(float(own[0] - own[1])) > 1e-5, "which differ from draw to draw"


def test_num_items_without_a_value_are_refused():
    with pytest.raises(ValueError, match="num_items must be a number, got a tensor on the meta device"):
        CGGRModel(ROUTABLE["llama"](), gradient="exact")(
            batch(), labels=batch(), num_items_in_batch=torch.tensor(100.0, device="meta")
        )
