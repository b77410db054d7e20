"""What was seen of a model holds while its structure is the same; looked at in every step, so it must cost nothing."""

from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks

from cggr_core.routing.architectures import is_plain_matrix, unwrapped

# What a description reads of a model or its config, and what changes a model's own loss.
_OF_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")
_OF_THE_CONFIG = (*_OF_THE_HEAD, "output_router_logits", "_attn_implementation", "num_hidden_layers")
_OF_THE_MODEL = (*_OF_THE_HEAD, "loss_function", "_loss_function", "loss_type")


def structure(model: nn.Module) -> list[Any]:
    """The modules of a model, its head as it stands, and the settings that a description and a loss read.

    Two structures are compared with ``==``, which is identity for modules; they are held, so that no other module can
    take the place of one that was replaced. A fifth of a microsecond for each module.
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
        base.forward,  # as a bound method, which a step that stands in for it puts back: equal, if not the same
        *base._forward_hooks.values(),
        *_hooks_on_all_modules(),
    ]
    waiting: list[nn.Module | None] = [model]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            waiting.extend(module._modules.values())
    return found


def _hooks_on_all_modules() -> list[Any]:
    # torch's own observe (its flop counter and module tracker), and come and go.
    hooks = (*module_hooks._global_forward_hooks.values(), *module_hooks._global_forward_pre_hooks.values())
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.")]
