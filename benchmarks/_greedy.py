"""Greedy answers to many long questions: causal prefill without a mask, then one CUDA graph for every new token.

Questions differ in length, so each row writes its new token at its own position.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, Cache, PreTrainedModel

from cggr_core.routing import Engine

_ATTENTION, _PREFILL = "one_token_folded", "sdpa"
_CHECK_EVERY = 16
_EVEN = 16
"""Slots are a multiple of this: memory-efficient attention copies a mask of any other length."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """One query per row; heads that share keys are queries of one head, so that SDPA reads these once.

    Args:
        module: The attention layer.
        query: ``[R, H, 1, D]``.
        key: ``[R, G, L, D]``.
        value: As ``key``.
        attention_mask: Added to scores, ``[R, 1, 1, L]``.
        **options: As passed by the layer; ``scaling`` is used.
    """
    rows, heads, _, size = query.shape
    folded = query.reshape(rows, key.shape[1], -1, size)
    mask = attention_mask.expand(-1, key.shape[1], folded.shape[2], -1)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        found = functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=mask, scale=options.get("scaling")
        )  # fmt: skip
    return found.reshape(rows, 1, heads, -1), None


class _PlacedCache(Cache):
    """Keys and values ``[R, G, L, D]`` of each layer; each row writes its new token at its own position."""

    def __init__(self, shape: tuple[int, int, int, int], layers: int, like: Tensor) -> None:
        super().__init__(layers=[])
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.row = torch.arange(shape[0], device=like.device)
        self.place = torch.zeros(shape[0], dtype=torch.int64, device=like.device)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self.row, :, self.place] = key_states[:, :, 0]
        values[self.row, :, self.place] = value_states[:, :, 0]
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Greedy:
    """Answers questions.

    Args:
        model: The model; a copy of it answers, in bfloat16 on a GPU; see :meth:`load`.
        end: The token that ends an answer.
        rows: Number of questions answered at a time.
        prompt: Most tokens of a question.
        new: Most tokens of an answer.
        prefill: Number of questions per prefill forward.
    """

    def __init__(
        self, model: PreTrainedModel, *, end: int, rows: int, prompt: int, new: int, prefill: int = 32
    ) -> None:
        AttentionInterface.register(_ATTENTION, attend)
        device = model.device
        self.cuda = device.type == "cuda"
        copied: Any = copy.deepcopy(model)
        self.model = copied.to(torch.bfloat16 if self.cuda else model.dtype).eval()
        self.model.requires_grad_(False)
        self.end, self.rows, self.prompt, self.new, self.prefill = end, rows, prompt, new, prefill
        config = self.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        slots = -(-(prompt + new) // _EVEN) * _EVEN
        shape = (rows, config.num_key_value_heads, slots, size)
        self._cache = _PlacedCache(shape, config.num_hidden_layers, next(self.model.parameters()))
        self._cache_name = Engine(self.model).architecture.cache_name
        self._slots = torch.arange(slots, device=device)
        self._token = torch.zeros(rows, dtype=torch.int64, device=device)
        self._done = torch.zeros(rows, dtype=torch.bool, device=device)
        self._graph: Any = None

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy weights, given by the names of the model's parameters."""
        for name, own in self.model.named_parameters():
            own.copy_(weights[name])

    @torch.no_grad()
    def __call__(self, questions: Sequence[Sequence[int]]) -> list[list[int]]:
        """The answer to each question, including the end token if there is one."""
        found: list[list[int]] = []
        for start in range(0, len(questions), self.rows):
            part = list(questions[start : start + self.rows])
            filled = part + [part[-1]] * (self.rows - len(part))
            found.extend(self._answer(filled)[: len(part)])
        return found

    def _answer(self, questions: list[Sequence[int]]) -> list[list[int]]:
        longest = max(map(len, questions))
        if longest > self.prompt:
            raise ValueError(f"a question has {longest} tokens, more than prompt={self.prompt}")
        self.model.set_attn_implementation(_PREFILL)
        for start in range(0, self.rows, self.prefill):
            self._read(questions[start : start + self.prefill], start)
        self.model.set_attn_implementation(_ATTENTION)
        self._done.copy_(self._token == self.end)
        taken = [self._token.clone()]
        for step in range(1, self.new):
            if step % _CHECK_EVERY == 0 and bool(self._done.all()):
                break
            self._next()
            taken.append(self._token.clone())
        rows = torch.stack(taken, dim=1).tolist()
        return [row[: row.index(self.end) + 1] if self.end in row else row for row in rows]

    def _read(self, questions: Sequence[Sequence[int]], start: int) -> None:
        """Keys and values of questions, and the first token after each."""
        device, longest = self._token.device, max(map(len, questions))
        # Padding after a question is not visible to anything before it, and is overwritten.
        padded = torch.tensor([[*ids, *[self.end] * (longest - len(ids))] for ids in questions], device=device)
        sizes = torch.tensor([len(ids) for ids in questions], device=device)
        rows = slice(start, start + len(questions))
        output = self.model.model(input_ids=padded, use_cache=True)
        for layer, filled in enumerate(output[self._cache_name].layers):
            self._cache.keys[layer][rows, :, :longest] = filled.keys
            self._cache.values[layer][rows, :, :longest] = filled.values
        last = output.last_hidden_state[torch.arange(len(questions), device=device), sizes - 1]
        self._token[rows] = self.model.lm_head(last).argmax(-1)
        self._cache.place[rows] = sizes

    def _next(self) -> None:
        if not self.cuda:
            return self._step()
        if self._graph is None:
            try:
                self._graph = self._capture()
            except RuntimeError as error:
                print(f"decoding is not recorded: {error}", flush=True)
                self.cuda = False
                return self._step()
        self._graph.replay()

    def _capture(self) -> Any:
        """Record a step, and undo the warm-up step before it, which compiles."""
        places = (self._token, self._done, self._cache.place)
        saved = [place.clone() for place in places]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        for place, value in zip(places, saved, strict=True):
            place.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph

    def _step(self) -> None:
        """Write every row's latest token at its position, and choose the next one."""
        place = self._cache.place
        dtype = self._cache.keys[0].dtype
        mask = torch.where(self._slots <= place[:, None], 0.0, torch.finfo(dtype).min).to(dtype)
        output = self.model(
            input_ids=self._token[:, None], position_ids=place[:, None], attention_mask=mask[:, None, None],
            use_cache=True, **{self._cache_name: self._cache},
        )  # fmt: skip
        chosen = torch.where(self._done, self.end, output.logits[:, -1].argmax(-1))
        self._token.copy_(chosen)
        self._done |= chosen == self.end
        place.add_(1)
