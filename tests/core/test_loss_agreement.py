"""The loss of a routed step is the model's own, or the model is refused with both numbers."""

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from cggr_core import CGGRModel
from tests.support.tiny_models import ROUTABLE, VOCAB

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "is_decoder": True,
}
XLM = {"vocab_size": VOCAB, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
XLNET = {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0}


def decoder(name: str):
    return lambda: getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**BART))


# Models that predict the label at its own position.
UNSHIFTED = {
    **{name: decoder(name) for name in ("Bart", "MBart", "Pegasus", "Marian", "Blenderbot", "PLBart", "TrOCR")},
    "XLM": lambda: transformers.XLMWithLMHeadModel(transformers.XLMConfig(**XLM)),
    "Flaubert": lambda: transformers.FlaubertWithLMHeadModel(transformers.FlaubertConfig(**XLM)),
    "XLNet": lambda: transformers.XLNetLMHeadModel(transformers.XLNetConfig(**XLNET)),
}


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def scattered(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.train()


@pytest.mark.parametrize("name", UNSHIFTED)
def test_models_that_do_not_shift_labels_keep_their_alignment(name):
    model, input_ids = scattered(UNSHIFTED[name]()), tokens()
    labels = input_ids.clone()
    labels[0, :3] = -100
    own = model(input_ids=input_ids, labels=labels).loss
    found = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0).train()(input_ids, labels=labels)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_a_replaced_loss_function_is_refused_with_both_numbers(gradient):
    model, input_ids = ROUTABLE["llama"](), tokens()
    model.loss_function = lambda logits, labels, vocab_size, **options: cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.5
    )
    with pytest.raises(ValueError, match=r"own loss is not the mean cross-entropy .* loss_function was replaced"):
        CGGRModel(model, gradient=gradient).train()(input_ids, labels=input_ids)


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_a_loss_that_changes_after_the_first_step_is_seen(gradient):
    model, input_ids = ROUTABLE["llama"](), tokens()
    wrapped = CGGRModel(model, gradient=gradient).train()
    wrapped(input_ids, labels=input_ids)
    model.loss_function = lambda logits, labels, vocab_size, **options: cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.5
    )
    with pytest.raises(ValueError, match="loss_function was replaced"):
        wrapped(input_ids, labels=input_ids)


def test_a_term_in_training_alone_is_seen():
    class Penalised(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **options):
            output = super().forward(input_ids=input_ids, labels=labels, **options)
            if labels is not None and self.training:
                output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
            return output

    model, input_ids = Penalised(ROUTABLE["llama"]().config), tokens()
    with pytest.raises(ValueError, match="it has an additional term"):
        CGGRModel(model, gradient="exact").train()(input_ids, labels=input_ids)


class OwnLoss(transformers.LlamaForCausalLM):
    """A model with a loss of its own, a static method of subclasses."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **options):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        if labels is not None:
            output.loss = self.own(output.logits, labels, attention_mask)
        return output


def shifted_nll(logits, labels, **options):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


class Weighted(OwnLoss):
    """Ends of texts count more."""

    @staticmethod
    def own(logits, labels, attention_mask):
        weight = torch.ones(VOCAB)
        weight[2] = 5.0
        return shifted_nll(logits, labels, weight=weight)


class MeanOfRows(OwnLoss):
    @staticmethod
    def own(logits, labels, attention_mask):
        rows = [shifted_nll(logits[row : row + 1], labels[row : row + 1]) for row in range(len(labels))]
        return torch.stack(rows).mean()


class WithoutPadding(OwnLoss):
    """As Qwen2-Audio's, which reads the mask."""

    @staticmethod
    def own(logits, labels, attention_mask):
        return shifted_nll(logits, labels if attention_mask is None else labels.masked_fill(attention_mask == 0, -100))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", [Weighted, MeanOfRows])
def test_a_loss_that_is_another_one_on_other_labels_is_refused(kind, rows):
    model = scattered(kind(ROUTABLE["llama"]().config))
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
        CGGRModel(model, gradient="exact")(tokens(rows), labels=tokens(rows))


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached", "sequence"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("padded_first", [False, True])
def test_labels_of_padding_count_as_they_do_in_the_models_own_loss(gradient, dtype, padded_first):
    mask = torch.ones_like(tokens())
    mask[0, -4:] = 0
    for kind in (WithoutPadding, transformers.LlamaForCausalLM):
        model = scattered(kind(ROUTABLE["llama"]().config))
        wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0)
        for given in ({"attention_mask": mask.to(dtype)}, {})[:: 1 if padded_first else -1]:
            own = model(input_ids=tokens(), labels=tokens(), **given).loss
            torch.testing.assert_close(wrapped(tokens(), labels=tokens(), **given), own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_is_seen_at_starting_weights(dtype):
    # All logits are near 0, and every loss near the logarithm of the vocabulary.
    config = transformers.BartConfig(**BART, init_std=1e-5)
    model, input_ids = transformers.BartForCausalLM(config).to(dtype).train(), tokens()
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0).train()
    wrapped(torch.full_like(input_ids, 7), labels=torch.full_like(input_ids, 7))
    scattered(model)
    own = cross_entropy(model(input_ids=input_ids).logits.flatten(0, 1).float(), input_ids.flatten())
    torch.testing.assert_close(wrapped(input_ids, labels=input_ids), own, rtol=1e-5, atol=1e-6)


def test_a_first_batch_of_one_token_says_nothing():
    model, input_ids = scattered(UNSHIFTED["Bart"]()), tokens()
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0).train()
    wrapped(input_ids[:, :1], labels=input_ids[:, :1])
    own = model(input_ids=input_ids, labels=input_ids).loss
    torch.testing.assert_close(wrapped(input_ids, labels=input_ids), own, rtol=1e-5, atol=1e-6)


def test_a_look_at_the_loss_draws_no_random_numbers():
    model, input_ids = ROUTABLE["gpt2"](), tokens()
    model.transformer.drop.p = 0.5
    state = torch.get_rng_state()
    CGGRModel(model, gradient="exact", selection="random", min_tokens_ratio=1.0).train()(input_ids, labels=input_ids)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    model.train()(input_ids=input_ids)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_further_term_is_refused_by_the_name_of_its_setting():
    sizes = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
    config = transformers.BambaConfig(
        vocab_size=VOCAB, num_key_value_heads=2, attn_layer_indices=[1], z_loss_coefficient=0.1, **SIZES, **sizes
    )
    model, input_ids = scattered(transformers.BambaForCausalLM(config)), tokens()
    with pytest.raises(ValueError, match=r"z_loss_coefficient=0\.1"):
        CGGRModel(model, gradient="exact").train()(input_ids, labels=input_ids)


@pytest.mark.parametrize("loss_type", ["ForMaskedLM"])
def test_a_loss_type_in_the_config_is_honoured(loss_type):
    model, input_ids = ROUTABLE["llama"](), tokens()
    model.loss_type = loss_type
    own = model(input_ids=input_ids, labels=input_ids).loss
    found = CGGRModel(model, min_tokens_ratio=1.0).train()(input_ids, labels=input_ids)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
def test_num_items_in_batch_is_num_items(gradient):
    model, input_ids = ROUTABLE["llama"](), tokens()
    own = model(input_ids=input_ids, labels=input_ids, num_items_in_batch=1000).loss
    wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()
    torch.testing.assert_close(wrapped(input_ids, labels=input_ids, num_items_in_batch=1000), own)
    with pytest.raises(ValueError, match="num_items and num_items_in_batch are the same number"):
        wrapped(input_ids, labels=input_ids, num_items=3, num_items_in_batch=3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ignore_index": 0}, r"create it with CGGRModel\(model, ignore_index=0\)"),
        ({"label_smoothing": 0.1}, "label_smoothing is an argument of the model's own loss"),
        ({"class_weights": [1.0] * VOCAB}, "class_weights is an argument of the model's own loss"),
        ({"reduction": "sum"}, "reduction is an argument of the model's own loss"),
    ],
)
def test_arguments_of_the_loss_are_refused_by_name(arguments, said):
    with pytest.raises(ValueError, match=said):
        CGGRModel(ROUTABLE["llama"]()).train()(tokens(), labels=tokens(), **arguments)


@pytest.mark.parametrize("name", ["num_items_in_batch", "shift_labels", "ignore_index", "label_smoothing"])
def test_arguments_of_the_loss_are_refused_without_labels(name):
    with pytest.raises(ValueError, match=f"{name}: used only in training with labels, and labels is None"):
        CGGRModel(ROUTABLE["llama"]()).train()(tokens(), **{name: 1})


@pytest.mark.parametrize("shift_labels", [[[3, 4]], 3, True])
def test_shift_labels_that_are_no_tensor(shift_labels):
    with pytest.raises(TypeError, match=f"shift_labels must be a tensor, got {type(shift_labels).__name__}"):
        CGGRModel(ROUTABLE["llama"]()).train()(tokens(), labels=tokens(), shift_labels=shift_labels)


class Reads(transformers.LlamaForCausalLM):
    """Reads ``num_items_in_batch`` or ``shift_labels`` in a way of its own."""

    how = "as a routed step does"

    def forward(
        self, input_ids=None, labels=None, attention_mask=None, num_items_in_batch=None, shift_labels=None, **options
    ):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
        if labels is None:
            return output
        if "padding" in self.how and attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        loss = shifted_nll(output.logits, labels)
        given = num_items_in_batch if shift_labels is None else shift_labels
        if given is None or "ignores" in self.how:
            output.loss = loss
        elif "raises" in self.how:
            raise TypeError("not in this model")
        elif "gives nothing" in self.how:
            output.loss = None
        elif "gives rows" in self.how:
            output.loss = torch.stack([loss, loss])
        elif shift_labels is None:
            output.loss = shifted_nll(output.logits, labels, reduction="sum") / num_items_in_batch
        else:
            output.loss = cross_entropy(output.logits.flatten(0, 1), shift_labels.flatten())
        return output


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("how", ["as a routed step does", "without padding, as a routed step does"])
def test_num_items_in_batch_of_a_model_whose_loss_reads_it(how, padded):
    model, mask = scattered(Reads(ROUTABLE["llama"]().config)), torch.ones_like(tokens())
    model.how, mask[0, -4:] = how, 0 if padded else 1
    given = {"labels": tokens(), "attention_mask": mask, "num_items_in_batch": 37}
    own = model(input_ids=tokens(), **given).loss
    found = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)(tokens(), **given)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "num_items_in_batch",
            "is not a sum divided by it; pass num_items instead, if cross-entropy is to be divided by it",
        ),
        ("shift_labels", "does not use them; pass labels instead, in the model's own convention"),
    ],
)
@pytest.mark.parametrize("how", ["ignores it", "raises with it", "gives nothing with it", "gives rows with it"])
def test_an_argument_that_the_models_loss_reads_in_another_way_is_refused(how, name, said):
    model, input_ids = scattered(Reads(ROUTABLE["llama"]().config)), tokens()
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)
    value = 37 if name == "num_items_in_batch" else input_ids.roll(-1, 1)
    wrapped(input_ids, labels=input_ids, **{name: value})
    wrapped.model = other = scattered(Reads(model.config))
    other.how = how
    wrapped(input_ids, labels=input_ids)
    with pytest.raises(ValueError, match=rf"^{name}: the loss of Reads {said}$"):
        wrapped(input_ids, labels=input_ids, **{name: value})


def test_alignment_is_seen_at_starting_weights_of_a_model_without_logits_in_training():
    class WithoutLogits(transformers.BartForCausalLM):
        def forward(self, *args, labels=None, **options):
            output = super().forward(*args, labels=labels, **options)
            if self.training and labels is not None:
                output.logits = None
            return output

    model, input_ids = WithoutLogits(transformers.BartConfig(**BART, init_std=1e-5)).train(), tokens()
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)
    wrapped(torch.full_like(input_ids, 7), labels=torch.full_like(input_ids, 7))
    scattered(model)
    own = cross_entropy(model(input_ids=input_ids).logits.flatten(0, 1), input_ids.flatten())
    torch.testing.assert_close(wrapped(input_ids, labels=input_ids), own, rtol=1e-5, atol=1e-6)


def test_labels_are_given_by_name():
    # The second argument of a model's own forward is its attention mask.
    with pytest.raises(TypeError, match="positional argument"):
        CGGRModel(ROUTABLE["llama"]()).train()(tokens(), torch.ones_like(tokens()))


def test_labels_of_another_head_are_refused_by_name():
    with pytest.raises(ValueError, match="mc_labels is an argument of the model's own loss"):
        CGGRModel(ROUTABLE["gpt2"]()).train()(tokens(), labels=tokens(), mc_labels=tokens())


def test_the_ignored_label_that_is_in_force_may_be_said():
    wrapped, input_ids = CGGRModel(ROUTABLE["llama"](), min_tokens_ratio=1.0).train(), tokens()
    torch.testing.assert_close(
        wrapped(input_ids, labels=input_ids, ignore_index=-100), wrapped(input_ids, labels=input_ids)
    )


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached", "sequence"])
def test_encoder_decoder_models_are_refused_at_construction(gradient):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        CGGRModel(model, gradient=gradient)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_balancing_losses_are_weighted_as_the_model_weights_them(name, gradient):
    model, input_ids = ROUTABLE[name](), tokens()
    model.config.output_router_logits = True
    model.router_aux_loss_coef = 0.37  # not what the config says: the model reads its own attribute
    own = model(input_ids=input_ids, labels=input_ids).loss
    found = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()(input_ids, labels=input_ids)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_router_logits_are_asked_for_by_argument_or_config(engine, padded):
    input_ids, mask = tokens(), torch.ones_like(tokens())
    if padded:
        mask[1, 8:] = 0

    def loss(configured, **asked):
        model = ROUTABLE["mixtral"]()
        model.config.output_router_logits = configured
        wrapped = CGGRModel(model, engine=engine, selection="random").train()
        found = wrapped(input_ids, labels=input_ids.where(mask.bool(), -100), attention_mask=mask, draw=1, **asked)
        return found.item()

    with_balancing, without = loss(True), loss(False)
    assert with_balancing > without + 1e-4
    assert loss(False, output_router_logits=True) == with_balancing
    assert loss(True, output_router_logits=False) == without


def test_models_of_several_tasks_are_refused():
    sizes = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": 64}
    model, input_ids = transformers.BertForPreTraining(transformers.BertConfig(**sizes)), tokens()
    with pytest.raises(ValueError, match="BertForPreTraining returns no logits"):
        CGGRModel(model, gradient="exact").train()(input_ids, labels=input_ids)


def test_a_model_without_a_loss_for_its_labels_is_refused():
    class Silent(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **options):
            return super().forward(input_ids=input_ids, **options)

    model, input_ids = Silent(ROUTABLE["llama"]().config), tokens()
    with pytest.raises(ValueError, match="Silent returns no loss for labels alone"):
        CGGRModel(model, gradient="exact").train()(input_ids, labels=input_ids)


def test_a_model_without_labels_is_looked_at_once():
    calls = []

    class Bare(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, use_cache=None):
            calls.append(input_ids.shape)
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    model, input_ids = Bare(ROUTABLE["llama"]().config), tokens()
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0).train()
    found = wrapped(input_ids, labels=input_ids)
    calls.clear()
    wrapped(input_ids, labels=input_ids)
    assert len(calls) == 1
    logits = model(input_ids=input_ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(found, cross_entropy(logits, input_ids[:, 1:].flatten()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", ["exact", "sequence"])
@pytest.mark.parametrize("chunk", [6, 12])
def test_a_model_whose_rows_must_be_whole_chunks_long(gradient, chunk):
    config = transformers.ReformerConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_attention_heads=4,
        attention_head_size=8,
        attn_layers=["local"],
        feed_forward_size=48,
        axial_pos_embds=False,
        max_position_embeddings=64,
        local_attn_chunk_length=chunk,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
    )
    model, input_ids = scattered(transformers.ReformerModelWithLMHead(config)), tokens()
    plain = model(input_ids=input_ids, labels=input_ids).loss
    found = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()(input_ids, labels=input_ids)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
