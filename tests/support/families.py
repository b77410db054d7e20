"""Tiny random models of the families on which loading and switching are tested, including those of core's tests."""

from collections.abc import Callable

import torch
from transformers import (
    CLIPVisionConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.support.tiny_models import ROUTABLE

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _scattered(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def phi() -> PreTrainedModel:
    """Phi-2's family."""
    torch.manual_seed(0)
    return _scattered(PhiForCausalLM(PhiConfig(vocab_size=97, max_position_embeddings=64, **_SIZES)))


def t5() -> PreTrainedModel:
    """An encoder-decoder model."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return _scattered(T5ForConditionalGeneration(T5Config(vocab_size=97, dropout_rate=0.0, **sizes)))


def llava() -> PreTrainedModel:
    """A vision tower in front of a language model."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **_SIZES)
    text = LlamaConfig(vocab_size=97, max_position_embeddings=64, **_SIZES)
    return _scattered(
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))
    )


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": ROUTABLE["llama"],
    "mistral": ROUTABLE["mistral-sliding"],
    "qwen3": ROUTABLE["qwen3"],
    "gemma2": ROUTABLE["gemma2"],
    "phi-2": phi,
    "phi-3": ROUTABLE["phi3"],
    "gpt2": ROUTABLE["gpt2"],
    "gptj": ROUTABLE["gptj"],
    "falcon": ROUTABLE["falcon-rotary"],
    "mixtral": ROUTABLE["mixtral"],
    "bert": ROUTABLE["bert-masked"],
    "t5": t5,
    "llava": llava,
}
# GPT-J's attention can be switched since transformers 5.24.
GPTJ_BUILT_IN = () if getattr(GPTJForCausalLM, "_supports_sdpa", False) else ("gptj",)
BUILT_IN = (*GPTJ_BUILT_IN, "falcon")
EAGER_ONLY = ("gemma2", *GPTJ_BUILT_IN)
