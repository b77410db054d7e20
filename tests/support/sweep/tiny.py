"""Any language-model class of transformers as a tiny random model, configured by rules over its fields."""

import dataclasses
import inspect
import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from tests.support.sweep.overrides import NOT_TRIED, OVERRIDES

VOCAB = 160
# Ids that texts are made of; those above stand for images and the like, those below start, end and pad.
FIRST_ID, LAST_ID = 5, 99
_LARGEST = 5_000_000  # parameters

# The first rule whose pattern is found in a field's name decides; only integers are shrunk.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"^(conv_|short_)?(conv_kernel|kernel_size|conv_size|d_conv|mamba_d_conv|linear_conv_kernel_dim|conv_L_cache)", 3),
    (r"type_vocab_size", 2),
    (r"vocab_size", VOCAB),
    (r"(qk_rope_head_dim|rotary_dim)$", 4),
    (r"(qk_nope_head_dim|v_head_dim|head_dim|head_size|d_kv|kv_channels|dim_head)$", 8),
    (r"qk_head_dim$", 12),
    (r"lora_rank|low_rank|rank$", 12),
    (r"(moe|expert)\w*intermediate_size|(moe|expert)\w*ffn\w*size|expert_dim", 24),
    (r"(num_key_value_heads|n_kv_heads|num_kv_heads|key_value_heads|num_query_groups|kv_heads)$", 2),
    (r"(attention_heads|n_heads?|num_heads|nhead|num_v_heads|num_k_heads|key_heads|value_heads|query_heads)$", 4),
    (r"(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner|hidden_dim|dim_ff|hidden_mlp)$", 48),
    (r"(num_hidden_layers|n_layers?|num_layers|decoder_layers|layers)$", 3),
    (r"(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|dim_model|^dim|width|embedding_dim|proj_dim)$", 32),
    (r"(max_\w*position\w*|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|max_seq_length)$", 160),
    (r"(num|n)_(local_|routed_|total_)?experts$|moe_num_experts$|^num_local_experts$", 4),
    (r"(experts_per_tok|experts_per_token|moe_k|top_k|topk|moe_topk|n_activated_experts)$", 2),
    (r"num_shared_experts|n_shared_experts|num_expert_group|n_group|topk_group|n_groups|first_k_dense_replace", 1),
    (r"(sliding_window|attention_window|window_size|local_window)\w*$", 7),
    (r"chunk_size$|attention_chunk_size", 8),
    (r"^pad_index$", 0),
    (r"^(decoder_start_token_id|cls_token_id)$", 1),
    (r"^sep_token_id$", 2),
    (r"^mask_(token_)?(id|index)$", 3),
)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SWITCHED_OFF = re.compile(r"drop|jitter|pdrop")


def language_model_classes() -> dict[str, str]:
    """Every causal and masked language-model class of the installed transformers, with its model type."""
    found: dict[str, str] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES):
        for model_type, name in mapping.items():
            found.setdefault(name, model_type)
    return dict(sorted(found.items()))


def tiny_config(
    config_class: type[PreTrainedConfig], like: PreTrainedConfig | None = None, **settings: Any
) -> PreTrainedConfig:
    """A small configuration of a class, its sizes shrunk by the rules, with ``settings`` over them.

    Args:
        config_class: The class.
        like: One of full size; its switches and names are kept where they are not the class's defaults.
        **settings: Fields that the rules get wrong; a mapping for one that is a configuration itself.
    """
    arguments: dict[str, Any] = {}
    parts = _parts(config_class)
    for name, default in _defaults(config_class).items():
        if name in parts:
            continue
        own = default if like is None else vars(like).get(name, default)
        if isinstance(own, bool | str) and own != default:
            arguments[name] = own
        if (value := _shrunk(name, default)) is not None:
            arguments[name] = value
    if "kv_lora_rank" in arguments:  # its keys and values are made for every head
        arguments["num_key_value_heads"] = 4
    for name, part in parts.items():
        given = settings.pop(name, {})
        if given is not None:
            arguments[name] = tiny_config(type(part), part, **given)
    return config_class(**arguments | settings)


def _parts(config_class: type[PreTrainedConfig]) -> dict[str, PreTrainedConfig]:
    """The configurations in a configuration, at full size; what a class says of their types varies by version."""
    names = getattr(config_class, "sub_configs", {})
    full = config_class() if names else None
    return {name: part for name in names if isinstance(part := getattr(full, name, None), PreTrainedConfig)}


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    if not dataclasses.is_dataclass(config_class):
        return {name: parameter.default for name, parameter in inspect.signature(config_class).parameters.items()}
    found = {}
    for field in dataclasses.fields(config_class):
        made = field.default_factory
        found[field.name] = made() if made is not dataclasses.MISSING else field.default
    return found


def _shrunk(name: str, default: Any) -> Any:
    if isinstance(default, float | int) and _SWITCHED_OFF.search(name) and not isinstance(default, bool):
        return type(default)(0)
    if name in _SPECIAL:  # some have none by default
        return _SPECIAL[name]
    if isinstance(default, bool) or not isinstance(default, int):
        return None
    for pattern, size in _SIZES:
        if re.search(pattern, name):
            return size if default > 0 else None
    if re.search(r"(token_id|token_index)$", name):
        return VOCAB - 20 + sum(map(ord, name)) % 20
    return None


def tiny_model(name: str, model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny model with random weights, larger than an initialisation makes them, in training mode without dropout.

    Args:
        name: Its class.
        model_type: Its type, as transformers' mappings have it.
        seed: Of its weights.
    """
    model_class = getattr(transformers, name)
    config_class = model_class.config_class or CONFIG_MAPPING[model_type]
    if name in NOT_TRIED:
        raise ValueError(NOT_TRIED[name])
    settings = OVERRIDES.get(name, OVERRIDES.get(model_type, {}))
    config = tiny_config(config_class, **settings)
    if missing := _layers_of_every_kind(config_class, config, settings):
        config = tiny_config(config_class, **settings, **missing)
    with torch.device("meta"):
        size = model_class(config).num_parameters()
    if size > _LARGEST:
        raise ValueError(f"the rules make no small configuration of it ({size / 1e6:.0f}M parameters)")
    torch.manual_seed(seed)
    model = model_class(config)
    for module in model.modules():
        # With a cache, which is made even in training where this is not said, transformers does not look for packing.
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config.use_cache = False
    scale_up(model)
    without_dropout(model)
    return model.train()


def _layers_of_every_kind(
    config_class: type[PreTrainedConfig], config: PreTrainedConfig, settings: dict[str, Any]
) -> dict[str, list[str]]:
    # A pattern such as "every sixth layer sees all" leaves kinds out of three layers, and the class would be judged by
    # the others.
    if getattr(config_class, "sub_configs", {}):
        return {}
    full, found = config_class(), {}
    for field in ("layer_types", "mlp_layer_types"):
        kinds, there = ({*(getattr(part, field, None) or ())} for part in (full, config))
        if field not in settings and kinds - there:
            found[field] = [sorted(kinds)[number % len(kinds)] for number in range(config.num_hidden_layers)]
    return found


@torch.no_grad()
def scale_up(model: PreTrainedModel) -> None:
    """Make attention, norms and gates far from trivial, as after long training."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.8 / min(parameter.shape[-1], 64) ** 0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def without_dropout(model: PreTrainedModel) -> None:
    """Set what is left of dropout to 0, in modules and in the numbers that some keep of it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if isinstance(value, float) and "drop" in attribute:
                setattr(module, attribute, 0.0)
