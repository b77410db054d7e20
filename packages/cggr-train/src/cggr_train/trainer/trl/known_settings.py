"""The settings of TRL's trainers with which routed losses were tested, so that newer ones are noticed."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

from transformers import TrainingArguments

_MODEL = "model_init_kwargs trust_remote_code pad_to_multiple_of"
_LABELLED = f"{_MODEL} router_aux_loss_coef dataset_num_proc max_length activation_offloading"
_REFERENCE = "disable_dropout sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
_PREFERENCE = f"{_LABELLED} {_REFERENCE} precompute_ref_log_probs precompute_ref_batch_size beta loss_type"
_SFT = (
    f"{_LABELLED} loss_type assistant_only_loss completion_only_loss packing packing_strategy padding_free "
    "eval_packing truncation_mode shuffle_dataset chat_template_path dataset_kwargs dataset_text_field eos_token "
    "pad_token"
)
_GENERATION = (
    f"{_MODEL} temperature top_p top_k min_p repetition_penalty generation_kwargs cache_implementation "
    "chat_template_kwargs max_completion_length ds3_gather_for_generation shuffle_dataset disable_dropout beta "
    "log_completions log_unique_prompts num_completions_to_print use_vllm vllm_mode vllm_model_impl "
    "vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port "
    "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size"
)
_POLICY = (
    f"{_GENERATION} {_REFERENCE} router_aux_loss_coef epsilon epsilon_high num_iterations num_generations "
    "num_generations_eval generation_batch_size steps_per_generation reward_weights mask_truncated_completions "
    "log_multimodal use_transformers_paged use_transformers_continuous_batching transformers_continuous_batching_config"
)

# By configuration class, what it adds to the TrainingArguments.
_KNOWN = {
    "SFTConfig": _SFT,
    "DPOConfig": (
        f"{_PREFERENCE} discopop_tau f_alpha_divergence_coef f_divergence_type label_smoothing ld_alpha loss_weights "
        "pad_token padding_free truncation_mode use_weighting"
    ),
    "KTOConfig": f"{_PREFERENCE} desirable_weight undesirable_weight",
    "GRPOConfig": (
        f"{_POLICY} cast_lm_head_to_fp32 delta entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min "
        "entropy_target use_adaptive_entropy importance_sampling_level loss_type log_completions_hub_repo "
        "max_tool_calling_iterations multi_objective_aggregation off_policy_mask_threshold sapo_temperature_neg "
        "sapo_temperature_pos scale_rewards top_entropy_quantile use_bias_correction_kl vespo_k_neg vespo_k_pos "
        "vespo_lambda_neg vespo_lambda_pos vllm_importance_sampling_cap vllm_importance_sampling_clip_max "
        "vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode"
    ),
    "RLOOConfig": f"{_POLICY} normalize_advantages reward_clip_range",
    "DistillationConfig": (
        f"{_GENERATION} max_tool_calling_iterations teacher_model_init_kwargs teacher_model_name_or_path "
        "teacher_model_revision"
    ),
    "GKDConfig": (
        f"{_SFT} beta disable_dropout lmbda max_new_tokens seq_kd teacher_model_init_kwargs "
        "teacher_model_name_or_path temperature"
    ),
}
KNOWN_SETTINGS = {name: frozenset(fields.split()) for name, fields in _KNOWN.items()}


def unknown_settings(arguments: Any) -> dict[str, Any]:
    """Settings of a TRL configuration that are not known here and not at their defaults.

    Args:
        arguments: Of a trainer. Fields that a subclass of TRL's own class adds are its author's.

    Returns:
        Values by name.
    """
    for kind in type(arguments).__mro__:
        known = KNOWN_SETTINGS.get(kind.__name__)
        if known is None or kind.__module__.split(".")[0] != "trl":
            continue
        known |= {field.name for field in dataclasses.fields(TrainingArguments)}
        found = {}
        for field in dataclasses.fields(kind):
            value = getattr(arguments, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if field.name not in known and value != default:
                found[field.name] = value
        return found
    return {}


def unknown_settings_message(arguments: Any) -> str | None:
    """A warning that names :func:`unknown_settings`; None without any."""
    found = unknown_settings(arguments)
    if not found:
        return None
    named = ", ".join(f"{name}={value!r}" for name, value in found.items())
    return (
        f"{named}: TRL {version('trl')} has settings that CGGR does not know. TRL's loss applies them, but tokens and "
        "rows that CGGR skips may matter to them: compare with gradient='exact' and skip_zero_advantage=False"
    )
