"""A tiny forward and backward on a loaded model, which shows that a backend works, not just that it imports."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROWS, _TOKENS = 2, 16
# Tolerated median relative error of tokens against eager attention. Reordered sums in low precision stay below it even
# in deep models, the median ignores a few tokens that change experts, and a different computation exceeds it.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-2}
_HALF_TOLERANCE = 0.2


class TrialError(RuntimeError):
    """A model does not run on trial inputs, or gives wrong numbers."""


def trial(model: PreTrainedModel) -> list[Tensor]:
    """Run the model on a few synthetic tokens, and its image towers on synthetic pixels, forward and backward.

    In evaluation mode, without a cache, with gradients to the inputs only: ``grad`` of parameters, random generators
    and training flags stay unchanged.

    Args:
        model: The model, on its device.

    Returns:
        Outputs and gradients, float32, in the same order in every trial of this model.

    Raises:
        TrialError: If no part of the model takes tokens or pixels, or a result is not finite.
    """
    results: list[Tensor] = []
    with _evaluation(model), torch.inference_mode(False), torch.enable_grad():
        for part in _parts(model):
            run = _run_on_pixels if part.main_input_name == "pixel_values" else _run_on_tokens
            results.extend(result.detach().float() for result in run(part))
    if not results:
        raise TrialError(f"no part of {type(model).__name__} runs on input_ids or sized pixel_values alone")
    if not all(bool(torch.isfinite(result).all()) for result in results):
        raise TrialError("the results of a tiny forward and backward are not finite")
    return results


def describe_difference(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> str:
    """How results differ from eager attention, or ``""`` if only by rounding.

    Args:
        found: Results of :func:`trial`.
        expected: Results of a trial of the same model with eager attention.
        dtype: Dtype of the computation.
    """
    tolerance = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    for result, reference in zip(found, expected, strict=True):
        result, reference = result.flatten(0, -2), reference.to(result.device).flatten(0, -2)
        size = reference.norm(dim=-1)
        error = ((result - reference).norm(dim=-1) / size.clamp(min=1e-3 * float(size.max()) + 1e-30)).median()
        if not error <= tolerance:
            return f"its results differ from eager attention by a relative error of {float(error):.2g}"
    return ""


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _parts(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The outermost models that take tokens, and the outermost image towers inside or beside them."""
    if isinstance(module, PreTrainedModel):
        if _takes_tokens(module) and _embeddings(module):
            yield module
            yield from _towers(module)
            return
        if _is_tower(module):
            yield module
            return
    for child in module.children():
        yield from _parts(child)


def _towers(module: nn.Module) -> Iterator[PreTrainedModel]:
    for child in module.children():
        if _is_tower(child):
            assert isinstance(child, PreTrainedModel)
            yield child
        else:
            yield from _towers(child)


def _is_tower(module: nn.Module) -> bool:
    return (
        isinstance(module, PreTrainedModel)
        and module.main_input_name == "pixel_values"
        and isinstance(getattr(module.config, "image_size", None), int)
        and not any(isinstance(inner, PreTrainedModel) and _takes_tokens(inner) for inner in module.modules())
    )


def _takes_tokens(module: PreTrainedModel) -> bool:
    return module.main_input_name == "input_ids"


def _run_on_tokens(model: PreTrainedModel) -> Iterator[Tensor]:
    leaves: list[Tensor] = []

    def make_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    embeddings = _embeddings(model)
    tokens = _tokens(model.config).to(next(embeddings[0].parameters()).device)
    arguments: dict[str, Any] = {"input_ids": tokens}
    if getattr(model.config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = tokens
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    hooks = [module.register_forward_hook(make_leaf) for module in embeddings]
    try:
        output = model(**arguments)[0]
    finally:
        for hook in hooks:
            hook.remove()
    yield output
    yield from torch.autograd.grad(_loss(output), leaves)


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The embeddings of tokens; an encoder and its decoder have one each."""
    owners: list[Any] = [model]
    if getattr(model.config, "is_encoder_decoder", False):
        owners += [model.get_encoder(), model.get_decoder()]
    found: dict[int, nn.Module] = {}
    for owner in owners:
        with suppress(NotImplementedError):  # raised by models with several, whose parts are asked instead
            module = owner.get_input_embeddings()
            found |= {id(module): module} if isinstance(module, nn.Module) else {}
    return list(found.values())


def _run_on_pixels(model: PreTrainedModel) -> Iterator[Tensor]:
    config: Any = model.config
    shape = (1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
    pixels = _pseudo_random(shape, next(model.parameters()).device).to(model.dtype).requires_grad_()
    output = model(pixel_values=pixels)[0]
    yield output
    yield from torch.autograd.grad(_loss(output), [pixels])


def _tokens(config: Any) -> Tensor:
    """int64 ``[2, 16]`` of ordinary tokens: special ones (padding, images) change the forward."""
    text = config.get_text_config()
    special = {
        value
        for part in (config, text)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    ordinary = [token for token in range(min(text.vocab_size, 64)) if token not in special][:_TOKENS] or [0]
    row = torch.tensor(ordinary).repeat(-(-_TOKENS // len(ordinary)))[:_TOKENS]
    return torch.stack([row, row.flip(0)][:_ROWS])


def _loss(output: Tensor) -> Tensor:
    # Not a plain sum, whose gradient vanishes through a layer norm.
    weights = _pseudo_random(output.shape, output.device) / output.shape[-1] ** 0.5
    return (output.float() * weights).sum()


def _pseudo_random(shape: tuple[int, ...] | torch.Size, device: torch.device) -> Tensor:
    """Fixed pseudo-random numbers in [-1, 1], without using a random generator."""
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, device=device, dtype=torch.float64) ** 2 * 0.37).float().reshape(shape)
