"""A language-model head: where a model has it, the formula of its logits, and whether it is nothing but a matrix."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from cggr_core.routing.hooks import has_hooks


@dataclass(frozen=True)
class Head:
    """The language-model head as one matrix: ``logits = softcap * tanh(scale * (h @ W.T + b) / softcap)``.

    Attributes:
        module: The output embedding; its input is what the statistics and losses read.
        scale: Factor on the logits, or ``None``.
        softcap: Bound on the logits, or ``None``.
        fused: Whether the head computes exactly that formula; otherwise the model's own logits are used.
        classes: Number of logits.
    """

    module: nn.Module
    scale: float | None
    softcap: float | None
    fused: bool
    classes: int

    @property
    def linear(self) -> nn.Linear:
        """The module of a fused head, which is one matrix and its bias."""
        assert isinstance(self.module, nn.Linear)
        return self.module


def find_head(base: Any, config: Any) -> Head:
    """The language-model head of a model.

    Args:
        base: A Hugging Face model, without a PEFT wrapper.
        config: Its text config.

    Raises:
        TypeError: If the head has no weight tensor.
        ValueError: If the model has no output embedding.
    """
    module = base.get_output_embeddings()
    if module is None:
        raise ValueError(
            f"model {type(base).__name__} has no output embedding; load it with its language-model head, for example "
            "with AutoModelForCausalLM"
        )
    if next(module.parameters(), None) is None and not isinstance(getattr(module, "weight", None), Tensor):
        raise TypeError(
            f"the head of {type(base).__name__} ({type(module).__name__}) has no weight tensor, as in modules "
            "quantised for inference, so gradients cannot flow through it; load the model unquantised, or with a "
            "quantisation that supports LoRA and leaves the head unquantised"
        )
    scaling, scale = _setting(base, config, "logits_scaling"), _setting(base, config, "logit_scale")
    if scaling is not None:  # Granite divides, Cohere multiplies
        scale = 1.0 / scaling
    softcap = _setting(base, config, "final_logit_softcapping")
    return Head(module, scale, softcap, is_plain_matrix(module), head_rows(base))


def _setting(base: Any, config: Any, name: str) -> float | None:
    # Some models read the config in every forward, others their own copy of it.
    value = base.__dict__.get(name)
    value = getattr(config, name, None) if value is None else value
    return None if value is None else float(value)


def is_plain_matrix(module: nn.Module) -> bool:
    """Whether calling a head only multiplies by its weight.

    Not true for a subclass with another forward (quantised, LoRA), even if it is equivalent now, nor for a module with
    hooks (which may change its output or load an offloaded weight) or with a custom forward.
    """
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and "forward" not in module.__dict__ and not has_hooks(module)


def head_rows(base: Any) -> int:
    """Number of classes of a model's head."""
    head = base.get_output_embeddings()
    if is_parametrized(head, "weight"):  # reading it would compute it
        return head.out_features
    weight = getattr(head, "weight", None)
    if weight is not None and weight.dim() == 2:
        return weight.shape[0]
    return base.config.get_text_config().vocab_size  # a packed weight has another shape
