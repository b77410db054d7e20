"""Tiny random models, one for every architecture on which gradient routing is tested."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


def _build(
    architecture: str, head: str = "ForCausalLM", *, config: str | None = None, **settings: Any
) -> Callable[..., PreTrainedModel]:
    def build(**more: Any) -> PreTrainedModel:
        model_config = getattr(transformers, config or f"{architecture}Config")(**{**settings, **more})
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}{head}")(model_config)
        # Larger than the default initialisation, so that attention and norms are far from trivial.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.train()

    return build


_NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_NO_DROPOUT_GPT2,
}
_BERT = {**_COMMON, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MOE = {"num_experts_per_tok": 2}
_SLIDING_PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]

ROUTABLE: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _build("Llama", **_COMMON, **_GROUPED),
    "mistral-sliding": _build("Mistral", **_COMMON, **_GROUPED, sliding_window=5),
    "qwen3": _build("Qwen3", **_COMMON, **_GROUPED),
    "qwen3-sliding": _build(
        "Qwen3", **_COMMON, **_GROUPED, use_sliding_window=True, sliding_window=4, layer_types=_SLIDING_PATTERN
    ),
    "gemma": _build("Gemma", **_COMMON, **_GROUPED),
    "gemma2": _build("Gemma2", **_COMMON, **_GROUPED, sliding_window=5, layer_types=_SLIDING_PATTERN),
    "gemma3": _build(
        "Gemma3", config="Gemma3TextConfig", **_COMMON, **_GROUPED, sliding_window=5, layer_types=_SLIDING_PATTERN
    ),
    "phi3": _build("Phi3", **_COMMON, num_key_value_heads=2, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt2": _build("GPT2", "LMHeadModel", **_GPT),
    "gptj": _build("GPTJ", **_GPT, rotary_dim=4),
    "gpt-neox": _build("GPTNeoX", **_COMMON, rotary_pct=0.5, hidden_dropout=0.0, attention_dropout=0.0),
    "falcon-rotary": _build(
        "Falcon",
        **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
        alibi=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "falcon-alibi": _build(
        "Falcon",
        **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "bloom": _build(
        "Bloom",
        vocab_size=VOCAB,
        hidden_size=32,
        n_layer=3,
        n_head=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": _build(
        "OPT",
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "stablelm": _build("StableLm", **_COMMON, num_key_value_heads=2, partial_rotary_factor=0.5),
    "olmo2": _build("Olmo2", **_COMMON, num_key_value_heads=2),
    "granite": _build(
        "Granite",
        **_COMMON,
        num_key_value_heads=2,
        logits_scaling=3.0,
        residual_multiplier=0.7,
        embedding_multiplier=2.0,
        attention_multiplier=0.2,
    ),
    "cohere": _build("Cohere", **_COMMON, num_key_value_heads=2, logit_scale=0.3),
    "cohere2": _build(
        "Cohere2",
        **_COMMON,
        num_key_value_heads=2,
        head_dim=8,
        logit_scale=0.3,
        sliding_window=5,
        layer_types=_SLIDING_PATTERN,
    ),
    "gpt-oss": _build(
        "GptOss", **_COMMON, **_GROUPED, **_MOE, num_local_experts=4, sliding_window=5, layer_types=_SLIDING_PATTERN
    ),
    "mixtral": _build("Mixtral", **_COMMON, **_GROUPED, **_MOE, num_local_experts=4),
    "qwen3-moe": _build(
        "Qwen3Moe", **_COMMON, **_GROUPED, **_MOE, num_experts=4, moe_intermediate_size=24, decoder_sparse_step=1
    ),
    "bert-decoder": _build("Bert", "LMHeadModel", **_BERT, is_decoder=True),
    "bert-masked": _build("Bert", "ForMaskedLM", **_BERT),
    "roberta-decoder": _build("Roberta", **_BERT, is_decoder=True),
    "roberta-masked": _build("Roberta", "ForMaskedLM", **_BERT),
}

_MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0, "state_size": 8}

UNROUTABLE: dict[str, Callable[..., PreTrainedModel]] = {
    "mamba": _build("Mamba", **_MAMBA),
    "mamba2": _build("Mamba2", **_MAMBA, num_heads=4, head_dim=16, expand=2, n_groups=1, chunk_size=8),
    "qwen3-next": _build(
        "Qwen3Next",
        **_COMMON,
        **_GROUPED,
        num_experts=4,
        **_MOE,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    ),
    "jamba": _build(
        "Jamba",
        **_COMMON,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
}

# Takes its queries for the last tokens of a row.
GPT_NEO = _build(
    "GPTNeo",
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    window_size=4,
    attention_types=[[["global", "local"], 1]],
    bos_token_id=1,
    eos_token_id=2,
)


def grown(model: torch.nn.Module, std: float = 0.3) -> Any:
    """The model with weights that make its positions and masks matter, in training mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()
