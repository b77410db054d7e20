"""Reading a mixture-of-experts block of Hugging Face Transformers 5, and building one from the same parameters."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from cggr_core.checks import check_choice


class _Kind(NamedTuple):
    """The module of a block's class, and the names of the sizes in its configuration."""

    folder: str
    prefix: str
    experts: str
    intermediate: str
    always_normalised: bool = False


_KINDS = {
    "mixtral": _Kind("mixtral", "Mixtral", "num_local_experts", "intermediate_size", always_normalised=True),
    "qwen3_moe": _Kind("qwen3_moe", "Qwen3Moe", "num_experts", "moe_intermediate_size"),
    "olmoe": _Kind("olmoe", "Olmoe", "num_experts", "intermediate_size"),
}


class Block(NamedTuple):
    """Sizes, settings and parameters of a block or of the equivalent layer."""

    hidden_dim: int
    intermediate_dim: int
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    gate_EH: nn.Parameter
    gate_up_E2IH: nn.Parameter
    down_EHI: nn.Parameter
    training: bool


def read_block(block: nn.Module) -> Block:
    """Sizes, settings and parameters of ``block``, without copying.

    Args:
        block: A ``MixtralSparseMoeBlock``, ``Qwen3MoeSparseMoeBlock`` or ``OlmoeSparseMoeBlock``.

    Raises:
        ValueError: If the block is of another class, its activation is not SiLU, or it adds jitter to its input.
    """
    blocks: Any = block
    kind = next((kind for kind in _KINDS.values() if type(block).__name__ == f"{kind.prefix}SparseMoeBlock"), None)
    if kind is None:
        names = ", ".join(f"{known.prefix}SparseMoeBlock" for known in _KINDS.values())
        raise ValueError(f"block must be one of {names}, got {type(block).__name__}")
    if not isinstance(blocks.experts.act_fn, nn.SiLU) and type(blocks.experts.act_fn).__name__ != "SiLUActivation":
        raise ValueError(f"the activation of block must be SiLU, got {type(blocks.experts.act_fn).__name__}")
    if getattr(blocks, "jitter_noise", 0.0):
        raise ValueError(f"jitter_noise of block must be 0, got {blocks.jitter_noise}; the layer has no jitter")
    experts, gate = blocks.experts, blocks.gate
    num_experts, double, hidden_dim = experts.gate_up_proj.shape
    normalised = kind.always_normalised or gate.norm_topk_prob
    sizes = (hidden_dim, double // 2, num_experts, gate.top_k, normalised)
    return Block(*sizes, gate.weight, experts.gate_up_proj, experts.down_proj, block.training)


def make_block(parts: Block, kind: str) -> nn.Module:
    """Build a Hugging Face block from these parts, in the same training mode.

    Args:
        parts: Sizes, settings and parameters.
        kind: ``"mixtral"``, ``"qwen3_moe"`` or ``"olmoe"``.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the kind is unknown, or it is Mixtral, which always normalises the weights, but the parts do not.
    """
    chosen = _KINDS[check_choice("kind", kind, tuple(_KINDS))]
    if chosen.always_normalised and not parts.norm_topk_prob:
        raise ValueError(
            "kind='mixtral' always normalises the weights, but the layer has norm_topk_prob=False; use kind='qwen3_moe'"
        )
    try:
        transformers = import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError(
            "a Hugging Face block needs transformers >= 5.17: python -m pip install 'transformers>=5.17'"
        ) from error
    module: Any = import_module(f"transformers.models.{chosen.folder}.modeling_{chosen.folder}")
    config = getattr(transformers, f"{chosen.prefix}Config")(
        hidden_size=parts.hidden_dim,
        num_experts_per_tok=parts.top_k,
        hidden_act="silu",
        experts_implementation="eager",
        **{chosen.experts: parts.num_experts, chosen.intermediate: parts.intermediate_dim},
        **({} if chosen.always_normalised else {"norm_topk_prob": parts.norm_topk_prob}),
    )
    with torch.device("meta"):
        block = getattr(module, f"{chosen.prefix}SparseMoeBlock")(config)
    block.gate.weight = parts.gate_EH
    block.experts.gate_up_proj, block.experts.down_proj = parts.gate_up_E2IH, parts.down_EHI
    return block.train(parts.training)
