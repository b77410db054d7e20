"""The layers that the benchmarks of token-routed MLPs compare: a block of transformers, and its equivalents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks._kernels import Call

TOKENS = 16384
CONTROL = "grouped_mm"
COMPILED = "grouped_mm, compiled"
LIGER = "Liger"
LOOP = "loop"
OURS = "cggr"
CANDIDATES = (CONTROL, COMPILED, LIGER, LOOP, OURS)
PASSES = ("forward", "forward + backward")
KEPT = 0.25  # share of the tokens that the token mask keeps


class Shape(NamedTuple):
    """Sizes of a layer."""

    H: int
    I: int
    E: int
    K: int

    def __str__(self) -> str:
        return f"H{self.H} I{self.I} E{self.E} K{self.K}"


SHAPES = (Shape(1024, 4096, 8, 2), Shape(2048, 4096, 8, 2), Shape(2048, 768, 128, 8), Shape(2048, 1024, 64, 8))
DISTRIBUTIONS = ("balanced", "Zipf", "half empty", "one expert")


def logit_offsets(distribution: str, E: int) -> Tensor:
    """The offset of each expert, added to the router's standard normal logits.

    ``one expert``: every token's first choice is expert 0; its other choices are random.
    """
    offset = torch.zeros(E)
    if distribution == "Zipf":
        offset = -1.2 * torch.arange(1, E + 1).log()
    elif distribution == "half empty":
        offset[E // 2 :] = -30.0
    elif distribution == "one expert":
        offset[0] = 30.0
    return offset


class Problem:
    """One block of transformers and the layers that share its parameters."""

    def __init__(self, shape: Shape, device: str, tokens: int = TOKENS) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        from cggr_moe import PersistentTRMLP

        self.shape = shape
        config = Qwen3MoeConfig(
            hidden_size=shape.H,
            moe_intermediate_size=shape.I,
            num_experts=shape.E,
            num_experts_per_tok=shape.K,
            norm_topk_prob=True,
            experts_implementation="grouped_mm",
        )
        with torch.device(device):
            self.block = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16)
            for weight in self.block.parameters():
                torch.nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))
            x = torch.randn(1, tokens, shape.H, dtype=torch.bfloat16)
            # A constant input: its column of the router's weight shifts the logits in the same way for all candidates.
            x[..., 0] = 1
            self.x = x.requires_grad_()
            self.upstream = torch.randn_like(x)
        self.layer = PersistentTRMLP.from_hf(self.block)
        self.leaves = [self.x, *self.block.parameters()]

    def spread(self, distribution: str) -> None:
        """Set the router's offsets to a distribution of the load."""
        with torch.no_grad():
            self.block.gate.weight[:, 0] = logit_offsets(distribution, self.shape.E)

    def with_experts(self, implementation: str, compiled: bool = False) -> Callable[[Tensor], Tensor]:
        """The block, computing its experts with one of transformers' implementations, compiled or not."""
        block = torch.compile(self.block, dynamic=False) if compiled else self.block

        def call(x: Tensor) -> Tensor:
            self.block.experts.config._experts_implementation = implementation
            return block(x)

        return call

    def with_liger(self) -> Callable[[Tensor], Tensor]:
        """The block's router before Liger's fused experts."""
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        experts = self.block.experts

        def call(x: Tensor) -> Tensor:
            rows = x.view(-1, x.shape[-1])
            _, weight, index = self.block.gate(rows)
            projections = (experts.gate_up_proj, experts.down_proj)
            return LigerFusedMoEFunction.apply(rows, *projections, index.int(), weight).view(x.shape)

        return call

    def candidates(self, names: Sequence[str] = CANDIDATES) -> dict[str, Callable[[Tensor], Tensor]]:
        """Name → layer, the control first; libraries that are not installed are left out."""
        made: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
            CONTROL: lambda: self.with_experts("grouped_mm"),
            COMPILED: lambda: self.with_experts("grouped_mm", compiled=True),
            LIGER: self.with_liger,
            LOOP: lambda: self.with_experts("eager"),
            OURS: lambda: lambda x: self.layer(x)[0],
        }
        found = {}
        for name in made:
            if name in names:
                try:
                    found[name] = made[name]()
                except ImportError as error:
                    print(f"   {name}: cannot run here: {error}", flush=True)
        return found

    def masked(self) -> Callable[[Tensor], Tensor]:
        """This project's layer with a token mask."""
        mask = torch.rand(self.x.shape[:2], device=self.x.device) < KEPT
        return lambda x: self.layer(x, mask)[0]

    def calls(self, layer: Callable[[Tensor], Tensor]) -> tuple[Call, Call]:
        """The layer's forward alone, and with its backward for the input and all parameters."""
        frozen = self.x.detach()

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(frozen)

        return forward, lambda: torch.autograd.grad(layer(self.x), self.leaves, self.upstream)

    def dense_calls(self) -> tuple[Call, Call]:
        """The products of as many rows with a single expert: two forward, and four more backward."""
        rows = self.x.shape[1] * self.shape.K
        a_RH, h_RI, z_RJ = (
            torch.randn(rows, size, dtype=torch.bfloat16, device=self.x.device)
            for size in (self.shape.H, self.shape.I, 2 * self.shape.I)
        )
        up, down = self.layer.gate_up_proj.detach()[0], self.layer.down_proj.detach()[0]

        def forward() -> None:
            a_RH @ up.t()
            h_RI @ down.t()

        def both() -> None:
            forward()
            a_RH @ down
            a_RH.t() @ h_RI
            z_RJ @ up
            z_RJ.t() @ a_RH

        return forward, both

    def flop(self, backward: bool) -> int:
        """Floating-point operations of the experts' products."""
        forward = self.x.shape[1] * self.shape.K * 6 * self.shape.H * self.shape.I
        return 3 * forward if backward else forward
