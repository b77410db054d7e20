"""What was learned about a model holds while its structure stays the same; checked every step, so it must be cheap."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks

from cggr_core.routing.architectures import is_plain_matrix, unwrapped

# Attributes of a model or its config that a description reads, or that change its own loss.
_OF_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")
_OF_THE_CONFIG = (*_OF_THE_HEAD, "output_router_logits", "_attn_implementation", "num_hidden_layers", "decoder_layers")
_OF_THE_MODEL = (*_OF_THE_HEAD, "loss_function", "_loss_function", "loss_type")
_LOSSES = ("loss_function", "_loss_function")
_PLAIN = frozenset((bool, int, float, str))


def structure(model: nn.Module) -> list[Any]:
    """The modules of a model, their forwards and hooks, its head, and the settings that a description and a loss read.

    Structures are compared with ``==``, which is identity for modules. Modules are held, so that a new one cannot reuse
    the id of one that was replaced. Half a microsecond per module.
    """
    base = unwrapped(model)
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    own = base.__dict__
    found: list[Any] = [
        head,
        head is not None and is_plain_matrix(head),
        base.get_input_embeddings(),
        *(getattr(config, name, None) for name in _OF_THE_CONFIG),
        *(own.get(name) for name in _OF_THE_MODEL),
        # As bound methods: a step that replaces them restores equal ones, if not the same.
        base.forward,
        model.forward,
        *_of_others(module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks),
    ]
    waiting: list[nn.Module | None] = [model]
    seen: set[int] = set()
    forwards: dict[type[nn.Module], Any] = {}
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            waiting.extend(module._modules.values())
            if module._forward_pre_hooks or module._forward_hooks:
                found.extend(_of_others(module._forward_pre_hooks, module._forward_hooks))
            kind = type(module)
            if kind not in forwards:
                forwards[kind] = kind.forward
            forward = module.__dict__.get("forward")
            if forward is not None and module is not base and module is not model:
                found.append(forward)
    return [*found, *forwards.values()]


def of_the_loss(model: nn.Module) -> list[Any]:
    """The numbers, names and switches that a model's own loss may read: of the model, its config and its loss."""
    base = unwrapped(model)
    holders = [base.__dict__, vars(base.config), vars(base.config.get_text_config())]
    holders += [part.__dict__ for part in base._modules.values() if part is not None and not part._modules]
    holders += [vars(loss) for name in _LOSSES if hasattr(loss := base.__dict__.get(name), "__dict__")]
    return [value for holder in holders for value in holder.values() if type(value) in _PLAIN]


def _of_others(*registered: Mapping[int, Any]) -> list[Any]:
    # Hooks of torch and transformers themselves only observe (a FLOP counter, a collector of hidden states) or load
    # weights, and come and go.
    return [
        hook
        for hooks in registered
        for hook in hooks.values()
        if not str(getattr(hook, "__module__", "")).startswith(("torch.", "transformers."))
    ]
