"""The claims of docs/compatibility.md: each case works, or is refused with the reason."""

import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cggr_core import CGGRLinearLoss, CGGRModel, create_truncated_router
from cggr_core.step import selecting

IDS = torch.arange(32).view(2, 16) % 30


def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))


def step(wrapped, gradient="kv"):
    """Loss and a gradient of one routed step."""
    loss = CGGRModel(wrapped, gradient=gradient, min_tokens_ratio=0.5).train()(IDS, labels=IDS)
    loss.backward()
    return loss.item(), next(p.grad for p in wrapped.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore")  # Dynamo looks at attributes that warn
def test_a_compiled_model_is_refused_and_its_parts_make_the_same_step():
    with pytest.raises(ValueError, match="was compiled"):
        step(torch.compile(model(), backend="eager"))
    expected, gradients = step(model())
    made = model()
    for name, part in made.named_modules():
        if name.endswith(("norm", ".mlp")):
            part.compile(backend="eager", dynamic=False)
    found, its = step(made)
    assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(its, gradients)


@pytest.mark.filterwarnings("ignore:the head of LlamaForCausalLM is more than one matrix:UserWarning")  # it has hooks
def test_a_model_dispatched_by_a_device_map_or_offloaded_makes_the_same_step():
    from accelerate import cpu_offload, dispatch_model

    expected, _ = step(model())
    assert step(dispatch_model(model(), {"": "cpu"}))[0] == pytest.approx(expected)
    offloaded = CGGRModel(cpu_offload(model(), execution_device=torch.device("cpu")), min_tokens_ratio=0.5).train()
    assert offloaded(IDS, labels=IDS).item() == pytest.approx(expected)


def test_data_parallel_is_refused():
    with pytest.raises(TypeError, match=r"must be a Hugging Face transformers language model.*got DataParallel"):
        CGGRModel(torch.nn.DataParallel(model()))


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        empty = model()
    with pytest.raises(ValueError, match="is on the meta device and has no values to train"):
        CGGRModel(empty).train()(IDS, labels=IDS)


def test_a_head_quantised_for_inference_is_refused():
    class Packed(torch.nn.Module):
        def weight(self):
            return torch.zeros(64, 32)

        def forward(self, hidden):
            return hidden @ self.weight().T

    quantised = model()
    quantised.lm_head = Packed()
    with pytest.raises(TypeError, match=r"the head of LlamaForCausalLM \(Packed\) has no weight tensor"):
        CGGRModel(quantised)


def test_sequence_mode_says_that_a_single_row_is_kept_whole(caplog):
    selecting._warn_of_single_row.cache_clear()
    routed = CGGRModel(model(), gradient="sequence", min_tokens_ratio=0.5).train()
    positions = torch.cat([torch.arange(8), torch.arange(8)])[None]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            routed(IDS[:1], labels=IDS[:1], position_ids=positions)
    (record,) = caplog.records
    assert "this one has a single row, so all of it is kept" in record.getMessage()
    assert routed.metrics["keep_ratio"] == 1.0


def test_gpt2_is_used_as_llama_is():
    made = gpt2()
    assert torch.isfinite(torch.tensor(step(made)[0]))
    CGGRModel(made, router=create_truncated_router(made, num_layers=1), min_tokens_ratio=0.5)
    hidden = made.get_decoder()(IDS).last_hidden_state[:, :-1]
    loss = CGGRLinearLoss(min_tokens_ratio=0.25)(hidden, made.get_output_embeddings().weight, IDS[:, 1:])
    loss.backward()
    assert made.transformer.wte.weight.grad.abs().sum() > 0
