"""transformers models with their experts in this package's op: the losses and gradients of their own loop."""

import copy

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cggr_core import CGGRModel
from cggr_moe import register_experts

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(intermediate_size=24, num_local_experts=4, **SIZES)),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(moe_intermediate_size=24, num_experts=4, head_dim=8, **SIZES)),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(intermediate_size=24, num_experts=4, **SIZES)),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            intermediate_size=24, moe_intermediate_size=24, n_routed_experts=4, n_group=1, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=8, **SIZES,
        ),
    ),
}  # fmt: skip


def make_model(kind):
    model_type, config = MODELS[kind]
    torch.manual_seed(0)
    model = model_type(copy.deepcopy(config)).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def loss_and_gradients(model, step, implementation):
    model.zero_grad()
    model.set_experts_implementation(implementation)
    loss = step(model)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def plain(model):
    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    more = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    return model(input_ids=tokens, labels=tokens, **more).loss


def routed(model):
    tokens = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    wrapped = CGGRModel(model, gradient="kv", selection="random", min_tokens_ratio=0.5, seed=3).train()
    return wrapped(tokens, labels=tokens, draw=0)


@pytest.mark.parametrize("step", [plain, routed])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_losses_and_gradients_are_those_of_the_models_own_loop(kind, step):
    model = make_model(kind)
    expected, wanted = loss_and_gradients(model, step, "eager")
    loss, found = loss_and_gradients(model, step, register_experts())
    torch.testing.assert_close(loss, expected)
    for name, gradient in found.items():
        other = wanted[name]
        # Experts that no token chose have no gradient in a loop, and one of zeros here.
        torch.testing.assert_close(
            torch.zeros(()) if gradient is None else gradient.norm(),
            torch.zeros(()) if other is None else other.norm(),
            msg=name,
        )
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6, msg=name)


def test_experts_of_another_kind_are_refused_by_name():
    sizes = {name: value for name, value in SIZES.items() if name != "pad_token_id"}
    config = GptOssConfig(intermediate_size=16, num_local_experts=4, head_dim=8, pad_token_id=0, **sizes)
    model = GptOssForCausalLM(config)
    model.set_experts_implementation(register_experts())
    with pytest.raises(ValueError, match=r"GptOssExperts has has_bias=True.*grouped_mm"):
        model(torch.zeros(1, 4, dtype=torch.long))
