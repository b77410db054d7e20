"""Values that depend on a whole row (its length, later tokens, token types) are those of an ordinary forward."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from cggr_core import CGGRModel, Selection
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.tiny_models import grown

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def longrope() -> Any:
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 12.0, 16.0]}
    config = transformers.Phi3Config(
        **_SIZES, max_position_embeddings=128, original_max_position_embeddings=16, rope_scaling=scaling
    )
    return transformers.Phi3ForCausalLM(config)


def dynamic() -> Any:
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, max_position_embeddings=16, rope_scaling=scaling)
    )


def tempered() -> Any:
    """Attention temperature that depends on the position."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 8,
        "max_position_embeddings": 128,
        "llama_4_scaling_beta": 0.5,
    }
    config = transformers.Ministral3Config(
        **_SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rope_parameters=rope
    )
    return transformers.Ministral3ForCausalLM(config)


def sliding_and_full() -> Any:
    """Rotary embeddings and masks by layer type."""
    config = transformers.Gemma3TextConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )
    return transformers.Gemma3ForCausalLM(config)


def alora() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES))
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # PEFT asks by the name that transformers is about to drop
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(base, config)


def alora_checkpointed() -> Any:
    model = alora()
    for layer in model.get_base_model().model.layers:
        layer.gradient_checkpointing = True
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(7, 97, (2, 29))
    ids[0, 14], ids[0, 15] = 5, 6
    ids[1, 20], ids[1, 21] = 5, 6
    return {"input_ids": ids}


def left_padded() -> dict[str, Tensor]:
    given = batch()
    mask = torch.ones_like(given["input_ids"])
    mask[1, :6] = 0
    return {**given, "attention_mask": mask}


def check_exact(model: Any, given: dict[str, Tensor], labels: Tensor, *, gradient: str, engine: str | None) -> None:
    """Loss and gradients of kept tokens against an autograd graph over all tokens."""
    targets = pad(labels[:, 1:], (0, 1), value=-100)
    countable = targets != -100
    kept = countable & (torch.rand(targets.shape) < 0.4)
    kept[:, -8:] = False  # nothing that is kept tells the rows' length
    coefficients = kept / kept.sum()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = base.get_decoder().layers
    checkpointed = [module for module in base.modules() if module.__dict__.get("gradient_checkpointing")]
    for module in checkpointed:
        module.gradient_checkpointing = False
    loss, _ = reference_loss(model, layers, kept, coefficients, targets.clamp(min=0), gradient=gradient, **given)
    loss.backward()
    expected = gradients(model)
    for module in checkpointed:
        module.gradient_checkpointing = True
    selection = Selection.from_mask(kept, capacity=int(kept.sum(1).max()), countable=kept)
    routed = CGGRModel(model, gradient=gradient, engine=engine, selection="random").train()
    value = routed(labels=labels, selection=selection, num_items=int(kept.sum()), **given)
    value.backward()
    torch.testing.assert_close(value, loss.detach(), rtol=1e-5, atol=1e-5)
    assert relative_error(gradients(model), expected) < 1e-5


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize("given", [batch, left_padded])
@pytest.mark.parametrize("make", [longrope, dynamic, tempered, sliding_and_full, alora, alora_checkpointed])
# PEFT itself passes the cache under its old name.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_whole_rows_count(
    make: Callable[[], Any], given: Callable[[], dict[str, Tensor]], gradient: str, engine: str
) -> None:
    inputs = given()
    model = grown(make())
    check_exact(model, inputs, inputs["input_ids"], gradient=gradient, engine=engine)


def dynamic_by_layer_type() -> Any:
    rope: dict[str, Any] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    }
    config = transformers.Gemma3TextConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=rope,
    )
    return transformers.Gemma3ForCausalLM(config)


@pytest.mark.parametrize("gradient", ["exact", "kv", "sequence"])
@pytest.mark.parametrize("make", [dynamic, dynamic_by_layer_type])
def test_frequencies_of_the_longest_row_so_far_are_those_of_the_models_own_steps(
    make: Callable[[], Any], gradient: str
) -> None:
    """Looks run the model on other lengths (a few tokens, unpacked rows) and leave no trace of them."""
    model = grown(make())
    alone = deepcopy(model)
    routed = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0)
    packed = torch.cat([torch.arange(20), torch.arange(8)]).expand(2, -1)
    for length, more in ((40, {}), (30, {}), (12, {}), (28, {"position_ids": packed}), (20, {}), (36, {}), (24, {})):
        ids = torch.randint(7, 97, (2, length))
        expected = alone(input_ids=ids, labels=ids, use_cache=False, **more).loss
        value = routed(ids, labels=ids, **more)
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6, msg=f"rows of {length}")


def with_plain_lora(active: str) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = alora()
    model.add_adapter("plain", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter(active)
    return model


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
@pytest.mark.parametrize("active", ["default", "plain"])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_rows_and_adapters_without_an_invocation(active: str, engine: str) -> None:
    inputs = batch()
    inputs["input_ids"][1, 20] = 7  # the second row invokes nothing
    model = grown(with_plain_lora(active))
    check_exact(model, inputs, inputs["input_ids"], gradient="kv", engine=engine)


def multimodal() -> Any:
    text = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64, "max_position_embeddings": 128}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=96,
        image_token_id=96,
        boi_token_index=94,
        eoi_token_index=95,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize(("image", "start"), [(False, 2), (False, 12), (True, 2), (True, 12)])
def test_images_and_token_types(image: bool, start: int, gradient: str, engine: str) -> None:
    """A block whose tokens see each other, and an image tower's output in the tokens' places."""
    model = grown(multimodal())
    ids = torch.randint(3, 90, (2, 32))
    types = torch.zeros_like(ids)
    types[:, start : start + 4] = 1
    given: dict[str, Tensor] = {"input_ids": ids, "token_type_ids": types}
    if image:
        ids[types == 1] = 96
        given["pixel_values"] = torch.randn(2, 3, 16, 16)
    labels = ids.masked_fill(types == 1, -100)
    check_exact(model, given, labels, gradient=gradient, engine=engine)


def test_positions_from_the_number_of_cached_tokens_are_refused() -> None:
    config = transformers.Llama4TextConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
        moe_layers=[],
        no_rope_layers=[1, 0],
        floor_scale=8,
        attn_temperature_tuning=True,
        use_qk_norm=False,
    )
    model = grown(transformers.Llama4ForCausalLM(config), std=0.1)
    ids = torch.randint(3, 97, (2, 24))
    with pytest.raises(ValueError, match="derives positions from the number of cached tokens"):
        CGGRModel(model, gradient="kv", selection="random").train()(ids, labels=ids)
    CGGRModel(model, gradient="exact", selection="random").train()(ids, labels=ids).backward()
