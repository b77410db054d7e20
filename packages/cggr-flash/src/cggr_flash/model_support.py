"""Which attention backends a model supports, and which one it uses."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as transformers_flash

from cggr_flash.capabilities import is_flash

_SOFTCAP = "attn_logit_softcapping"
# Names of the dropout of attention probabilities in configurations.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
_WITHOUT_DROPOUT = ("flash_attention_3", "flash_attention_4", "flash-attn3", "flash-attn4", "flex_attention")


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a PEFT wrapper, or ``model`` itself.

    Raises:
        TypeError: If it is neither.
    """
    get_base_model = getattr(model, "get_base_model", None)
    base = get_base_model() if callable(get_base_model) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel or a PEFT wrapper of one, got {type(model).__name__}"
        )
    return base


def current(model: PreTrainedModel) -> str:
    """The backend of the model's text part."""
    config: Any = model.config.get_text_config()
    return config._attn_implementation


def is_switchable(model: PreTrainedModel) -> bool:
    """Whether every part looks up its backend when it runs, rather than when it was built."""
    return all(part._can_set_attn_implementation() for part in _models(model))


def model_obstacle(model: PreTrainedModel, backend: str) -> tuple[str, str] | None:
    """Why a model cannot use a backend on any machine.

    Args:
        model: The model.
        backend: Name of the backend.

    Returns:
        The reason and what to do, or ``None``. Image and audio towers do not count: they keep their backend if they do
        not support the new one (:func:`set_backend`).
    """
    for part in _text_models(model):
        reason = _class_obstacle(type(part), backend)
        if reason is not None:
            return reason
    if not is_switchable(model) and backend != current(model):
        built = next(type(part).__name__ for part in _models(model) if not part._can_set_attn_implementation())
        return (
            f"{built} fixes its attention backend when it is built, here {current(model)!r}",
            f"load it again: load_model_with_flash_attention(path, backend={backend!r})",
        )
    return _config_obstacle(model.config, backend)


def _class_obstacle(model_class: type[PreTrainedModel], backend: str) -> tuple[str, str] | None:
    name: Any = model_class.__name__
    other = "use backend='auto', which finds a supported one"
    if is_flash(backend):
        supported, what = model_class._supports_flash_attn, "flash attention"
        compatible = getattr(model_class, "_compatible_flash_implementations", None)
        if supported and compatible and backend not in compatible:
            listed = ", ".join(repr(each) for each in compatible)
            return f"{name} supports only {listed} of the flash backends", f"use one of these, or {other[4:]}"
    elif backend == "sdpa":
        supported, what = model_class._supports_sdpa, "sdpa"
    elif backend == "flex_attention":
        supported, what = model_class._supports_flex_attn, "flex_attention"
    else:
        return None
    return None if supported else (f"{name} does not support {what} in transformers", other)


def class_obstacle(model_class: type[PreTrainedModel], config: Any, backend: str) -> tuple[str, str] | None:
    """Like :func:`model_obstacle`, for a model that is not built yet."""
    return _class_obstacle(model_class, backend) or _config_obstacle(config, backend)


def _config_obstacle(config: Any, backend: str) -> tuple[str, str] | None:
    """Computations of the model that a backend would silently leave out, or fail at in training."""
    text = config.get_text_config()
    cap = getattr(text, _SOFTCAP, None)
    if backend == "sdpa" and cap is not None:
        return f"it has no softcap, but the model's configuration has {_SOFTCAP}={cap}", "use backend='eager'"
    if not any(backend.endswith(name) for name in _WITHOUT_DROPOUT):
        return None
    for name in _DROPOUTS:
        value = getattr(text, name, None)
        if isinstance(value, float) and value > 0.0:
            return (
                f"it has no dropout, but the model's configuration has {name}={value}",
                f"load the model with {name}=0.0, or use backend='sdpa'",
            )
    return None


def set_backend(model: PreTrainedModel, backend: str) -> list[str]:
    """Switch a model to a backend; towers that do not support it keep theirs.

    Args:
        model: A model whose backend can be switched.
        backend: Backend for its text part.

    Returns:
        Human-readable list of the parts that keep their backend.

    Raises:
        Exception: Whatever transformers, a library it imports, or the hub raises.
    """
    wanted, kept = _request(model, backend)
    model.set_attn_implementation(wanted)
    for part in _models(model):
        # transformers 5.17 skips an encoder and a decoder that have copies of the whole configuration.
        if type(part.config) is type(model.config) and part.config._attn_implementation != backend:
            part.set_attn_implementation(backend)
    return kept


def _request(model: PreTrainedModel, backend: str) -> tuple[str | dict[str, str], list[str]]:
    """The request to transformers (the backend, or one per part of the configuration), and which parts keep theirs."""
    config: Any = model.config
    text = config.get_text_config()
    wanted, kept = {"": backend}, []
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is None:
            continue
        wanted[key] = backend
        owners = [each for each in _models(model) if each.config is part]
        reasons = [reason for owner in owners if (reason := _class_obstacle(type(owner), backend)) is not None]
        if part is not text and reasons:
            wanted[key] = part._attn_implementation
            kept.append(f"{key} stays on {part._attn_implementation!r} ({reasons[0][0]})")
    return (wanted, kept) if len(wanted) > 1 else (backend, kept)


class Implementations:
    """Snapshot of the backends of all (sub)configurations of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        found = {id(part.config): part.config for part in _models(model)}
        waiting: list[Any] = [model.config]
        while waiting:
            config = waiting.pop()
            found[id(config)] = config
            waiting.extend(part for key in config.sub_configs if (part := getattr(config, key, None)) is not None)
        self._before = [(config, config._attn_implementation_internal) for config in found.values()]
        self._loaded = transformers_flash._loaded_implementation

    def restore(self) -> None:
        """Restore the snapshot."""
        for config, name in self._before:
            # The internal attribute: the public setter visits the sub-configurations, and may refuse.
            config._attn_implementation_internal = name
        # transformers holds the functions of one flash library at a time, in 5.17 even if its import failed: reload
        # them.
        if transformers_flash._loaded_implementation != self._loaded:
            transformers_flash._loaded_implementation = None


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _text_models(model: PreTrainedModel) -> list[PreTrainedModel]:
    text = model.config.get_text_config()
    return [model, *(part for part in _models(model) if part.config is text and part is not model)]
