"""Corrections of the rules for tiny configurations, per model type."""

from typing import Any

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
_ATTENTION_LAST = ["linear_attention", "linear_attention", "full_attention"]
_NARROW_WINDOW = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 7}
# Rows must be whole chunks long, hence of the lengths' common divisor; hashes are random where no seed is given.
_REFORMER = {
    "axial_pos_embds": False,
    "hash_seed": 0,
    "local_attn_chunk_length": 3,
    "lsh_attn_chunk_length": 3,
    "num_buckets": 4,
}
_DOTS3_NOTE = {
    "num_key_value_heads": 4,
    "index_topk": 8,
    "head_dim": 12,
    "sliding_window": 7,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 12,
    "swa_kv_lora_rank": 12,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 3},
    "bamba": {**_MAMBA, "attn_layer_indices": [2]},
    "blt": {
        "patching_mode": "space",
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {"vocab_size": 260},
        "decoder_config": {"vocab_size": 260, "hidden_size_global": 32},
        "vocab_size": 260,
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, **_NARROW_WINDOW},
    "dots3_note": _DOTS3_NOTE,
    "dots3_note_text": _DOTS3_NOTE,
    "esm": {"vocab_size": 160, "mask_token_id": 3, "max_position_embeddings": 160},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": _ATTENTION_LAST},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"]},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4, "num_layers": 3},
    "longformer": {"attention_window": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8},
    "ministral": {"head_dim": 8, **_NARROW_WINDOW},
    "neomme": {"head_dim": 16},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2, "max_position_embeddings": 160},
    "qwen3_next": {"layer_types": _ATTENTION_LAST},
    "qwen3_5": {"layer_types": _ATTENTION_LAST},
    "qwen3_5_moe": {"layer_types": _ATTENTION_LAST},
    "phi4_multimodal": {
        "audio_config": {"nemo_conv_channels": 32},
        "vision_config": {"image_size": 56, "crop_size": 56},
    },
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "layer_types": _ATTENTION_LAST,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 1,
        "make_ngram_vocab_size_divisible_by": 1,
    },
    "ReformerModelWithLMHead": {**_REFORMER, "is_decoder": True},
    "ReformerForMaskedLM": {**_REFORMER, "is_decoder": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_hidden_layers": 6,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"], "use_mamba_kernels": False},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"hidden_size": 64},
}

_ASSISTANT = "a draft model: it attends to the keys and values of another model's layers and has none of its own"
_CODEBOOKS = "a row of its input has several codebooks, and its labels a dimension for them"

# What the tiny models' rows of text cannot be given to, and why.
NOT_TRIED: dict[str, str] = {
    "Gemma3nForConditionalGeneration": "its vision tower needs the package timm; Gemma3nForCausalLM is its text model",
    "Gemma4AssistantForCausalLM": _ASSISTANT,
    "Gemma4UnifiedAssistantForCausalLM": _ASSISTANT,
    "GitForCausalLM": "its own loss takes an image's positions off each row, and fails on text alone",
    "MusicgenForCausalLM": _CODEBOOKS,
    "MusicgenMelodyForCausalLM": _CODEBOOKS,
    "PerceiverForMaskedLM": "its logits, and so its labels, are max_position_embeddings long, whatever the rows are",
}
