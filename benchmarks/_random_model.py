"""Models of given sizes with random weights: the time of a step depends on the sizes only."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

SEED = 0
_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def random_model(
    kind: str,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    longest: int,
    dtype: torch.dtype,
    device: str,
    tied: bool = True,
) -> Any:
    """A causal language model in training mode.

    Args:
        kind: ``"llama"`` or ``"qwen2"``.
        layers: Decoder layers.
        hidden: Width of the residual stream.
        intermediate: Width inside the MLP.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        vocab: Size of the vocabulary.
        longest: Most tokens of a row.
        dtype: Of the weights.
        device: Where they are.
        tied: Whether the head shares the embeddings' weights.
    """
    torch.manual_seed(SEED)
    config = _CONFIGS[kind](
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=longest,
        tie_word_embeddings=tied,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()
