"""A model during the forwards that check it: nothing random, nothing hidden by initial weights, nothing left behind."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

# Attribute names of noise rates in training.
_NOISE = re.compile(r"drop|jitter").search
_SMALL = 0.1


@contextmanager
def nothing_left(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo the side effects of forwards in the block: running statistics, power iterations, advanced random generators.

    A module that replaces a buffer (rotary frequencies that depend on the longest row so far) keeps the reason in its
    attributes, which are restored with it.

    Scope: the existing buffers of this model, the public attributes of modules that replace some, and the random
    generators.

    Args:
        model: The model.
        device: Where it runs.
    """
    before = [
        (
            module,
            {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()},
            {name: value for name, value in module.__dict__.items() if not name.startswith("_")},
        )
        for module in model.modules()
        if module._buffers
    ]
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield
    finally:
        for module, buffers, attributes in before:
            if any(module._buffers.get(name) is not buffer for name, (buffer, _) in buffers.items()):
                for name in [name for name in module.__dict__ if not (name.startswith("_") or name in attributes)]:
                    del module.__dict__[name]
                module.__dict__.update(attributes)
            for name, (buffer, values) in buffers.items():
                module._buffers[name] = buffer
                if buffer is not None and values is not None:
                    buffer.data.copy_(values)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode.

    Scope: its modules, each of which gets its own flag back.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def is_noise_rate(holder: Any, name: str) -> bool:
    """Whether an attribute of a module or a config is, by its name, the rate of dropout or jitter."""
    return name == "p" if isinstance(holder, _DropoutNd) else _NOISE(name) is not None


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Make a model in training mode deterministic: dropout and jitter rates are 0.

    Scope: the rates that its modules hold; rates read from a config are unchanged.
    """
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in module.__dict__.items()
        if isinstance(value, float) and value and is_noise_rate(module, name)
    ]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)


@contextmanager
def grown_parameters(model: nn.Module) -> Iterator[bool]:
    """Replace parameters that hold one small value throughout, as many do at the start of training, by random numbers.

    A zero projection hides everything before it. Sharded and offloaded parameters are unchanged.

    Scope: the values of these parameters. Their version counters do not change, since a backward pass may be pending.

    Yields:
        Whether there are any.
    """
    constant = {
        parameter: float(first)
        for parameter in model.parameters()
        if type(parameter.data) is Tensor
        and parameter.is_floating_point()
        and not parameter.is_meta
        and parameter.numel() > 1
        and abs(float(first := parameter.data.flatten()[0])) < _SMALL
        and bool((parameter.data == first).all())
    }
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in constant:
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * scale)
        yield bool(constant)
    finally:
        for parameter, value in constant.items():
            parameter.data.fill_(value)


@contextmanager
def smaller_vocabulary(configured: Iterable[nn.Module], classes: int, fewer: int) -> Iterator[None]:
    """Let models and configs report a smaller vocabulary to their losses.

    Scope: these modules and their configs, and so any other model that shares one of the config objects.

    Args:
        configured: The modules that hold a config.
        classes: Size of the vocabulary.
        fewer: The size to report.
    """
    holders: dict[int, Any] = {}
    for module in configured:
        config: Any = module.config
        for holder in (module, config, config.get_text_config() if hasattr(config, "get_text_config") else config):
            holders[id(holder)] = holder
    said = [
        (holder.__dict__, name)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if "vocab_size" in name and type(value) is int and value == classes
    ]
    try:
        # Written to ``__dict__``, since configs validate attributes when they are set.
        for values, name in said:
            values[name] = fewer
        yield
    finally:
        for values, name in said:
            values[name] = classes


@contextmanager
def attention_of_any_mask() -> Iterator[None]:
    """Let SDPA fall back to its math backend even if the user allows flash attention only, since probes pass masks.

    Scope: all of torch, on CPUs too, despite the switch's name.
    """
    allowed = torch.backends.cuda.math_sdp_enabled()
    torch.backends.cuda.enable_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_math_sdp(allowed)
