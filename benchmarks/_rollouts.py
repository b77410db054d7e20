"""Completions sampled from a Hugging Face model, with each decoding step as one CUDA graph.

A bfloat16 copy of the model decodes over keys and values in fixed buffers, so that every decoding step has the same
shapes: on a GPU it is captured once and replayed. If capturing fails, steps run one by one.
"""

import copy
import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from cggr_core.routing import Engine
from cggr_train.grouped_attention import use_grouped_attention

_CHECK_EVERY = 16  # steps between checks whether all rows have ended


class _FixedCache(Cache):
    """Keys and values, written at ``slots``; attention covers all of them, subject to the mask."""

    def __init__(self, shape: tuple[int, int, int, int], layers: int, like: Tensor) -> None:
        super().__init__(layers=[])
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.slots = torch.zeros(1, dtype=torch.int64, device=like.device)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.slots, key_states)
        values.index_copy_(2, self.slots, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Rollouts:
    """Samples completions.

    Args:
        model: The model whose weights are copied, now and by :meth:`load`.
        tokenizer: Of the model; its end-of-sequence token ends a completion.
        rows: Number of completions sampled at a time.
        prompt: Most tokens of a prompt.
        new: Most tokens of a completion.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rows: int, prompt: int, new: int
    ) -> None:
        device = model.device
        dtype = torch.bfloat16 if device.type == "cuda" else model.dtype
        self.model: Any = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        use_grouped_attention(self.model)
        self.rows, self.prompt, self.new, self.length = rows, prompt, new, prompt + new
        self.end: Any = tokenizer.eos_token_id
        config = self.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, self.length, size)
        like = next(self.model.parameters())
        self._cache = _FixedCache(shape, config.num_hidden_layers, like)
        self._cache_name = Engine(self.model).architecture.cache_name
        self._allowed = torch.zeros((rows, 1, 1, self.length), dtype=torch.bool, device=device)
        self._tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._positions = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self._graph: Any = None
        self._generator = torch.Generator(device)
        self.captured = device.type == "cuda"

    @torch.no_grad()
    def load(self, model: PreTrainedModel) -> None:
        """Copy a model's weights."""
        for own, other in zip(self.model.parameters(), model.parameters(), strict=True):
            own.copy_(other)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], *, temperature: float, seed: int) -> list[list[int]]:
        """A completion of each prompt, including the end token if there is one.

        Args:
            prompts: Token ids.
            temperature: Of the sampling; 0 takes the most likely token.
            seed: Of the sampling.
        """
        self._generator.manual_seed(seed)
        found: list[list[int]] = []
        for start in range(0, len(prompts), self.rows):
            part = list(prompts[start : start + self.rows])
            filled = part + [part[-1]] * (self.rows - len(part))
            found.extend(self._complete(filled, temperature)[: len(part)])
        return found

    def _complete(self, prompts: list[Sequence[int]], temperature: float) -> list[list[int]]:
        device = self._tokens.device
        sizes = torch.tensor([len(ids) for ids in prompts], device=device)
        if int(sizes.max()) > self.prompt:
            raise ValueError(f"a prompt has {int(sizes.max())} tokens, more than prompt={self.prompt}")
        padded = torch.tensor([[self.end] * (self.prompt - len(ids)) + list(ids) for ids in prompts], device=device)
        index = torch.arange(self.prompt, device=device)
        real = index >= self.prompt - sizes[:, None]
        # A padding token attends to itself, so that no row of the softmax is empty.
        causal = (index <= index[:, None]) & (real[:, None] | (index == index[:, None]))
        mask = torch.zeros((self.rows, 1, self.prompt, self.length), dtype=torch.bool, device=device)
        mask[:, 0, :, : self.prompt] = causal
        self._cache.slots = index
        logits = self._forward(padded, (real.cumsum(1) - 1).clamp(min=0), mask)
        self._allowed.zero_()
        self._allowed[:, 0, 0, : self.prompt] = real
        self._cache.slots = torch.zeros(1, dtype=torch.int64, device=device) if self._graph is None else self._slot
        done = torch.zeros(self.rows, dtype=torch.bool, device=device)
        taken = []
        for step in range(self.new):
            chosen = self._sample(logits, temperature)
            taken.append(chosen)
            done |= chosen == self.end
            if step + 1 == self.new or (step % _CHECK_EVERY == 0 and bool(done.all())):
                break
            self._tokens.copy_(chosen[:, None])
            self._positions.copy_((sizes + step)[:, None])
            self._cache.slots.fill_(self.prompt + step)
            self._allowed[:, :, :, self.prompt + step] = True
            logits = self._step()
        rows = torch.stack(taken, dim=1).tolist()
        return [row[: row.index(self.end) + 1] if self.end in row else row for row in rows]

    def _sample(self, logits: Tensor, temperature: float) -> Tensor:
        logits = logits.float()
        if temperature > 0:
            noise = torch.empty_like(logits).exponential_(generator=self._generator)
            logits = logits / temperature - noise.log()
        return logits.argmax(-1)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[rows, V]`` of the last position."""
        output = self.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, logits_to_keep=1, use_cache=True,
            **{self._cache_name: self._cache},
        )  # fmt: skip
        return output.logits[:, -1]

    def _step(self) -> Tensor:
        if self.captured and self._graph is None:
            try:
                self._capture()
            except RuntimeError as error:
                self.captured, self._graph = False, None
                print(f"decoding is not captured as a CUDA graph: {error}", flush=True)
        if self._graph is None:
            return self._forward(self._tokens, self._positions, self._allowed)
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _capture(self) -> None:
        self._slot = self._cache.slots
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(self._tokens, self._positions, self._allowed)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # collecting another graph during the capture would abort it
        # Another thread may pin memory meanwhile, which is not part of the graph.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._forward(self._tokens, self._positions, self._allowed)
        self._graph = graph
