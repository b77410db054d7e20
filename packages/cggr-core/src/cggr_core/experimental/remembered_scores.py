"""RememberedScores: stores the last score of every token by example, for the selection of the next epoch."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cggr_core.checks import check_at_least, check_shape
from cggr_core.collectives import gather_from_ranks, largest_over_ranks, world_size
from cggr_core.monitor import Monitor
from cggr_core.step.batch import StepBatch
from cggr_core.step.router import Observation, ScoreRequest, Scores

NEVER = -1


class RememberedScores:
    """Stores the last observed score of every token and returns it when the example recurs.

    Experimental: three epochs of fine-tuning with it did no better than with random tokens, and worse than with
    fresh scores.

    Given to :class:`~cggr_core.CGGRModel` as its router, with ``example_ids`` in every training forward. There is no
    scoring pass: the selection is known before the first layer, and the interleaved engine starts there. After each
    training forward, the scores of the kept tokens are computed from the gradient pass's final hidden states and
    stored.

    A token without a score gets the mean of the stored scores of its batch; if there are none, as in the first epoch,
    all tokens are equal and the selection is random. Sampled selections know each token's probability, so their weights
    stay unbiased however old the scores are; ``topk`` may never return to a token that it dropped.

    An example must have the same tokens at the same positions every time: pad on the right, and do not change the
    packing. The scores are in host memory (6 bytes per token) or in a memory-mapped file. On several ranks each stores
    what all of them observed, so every rank has to run the same training forwards, on batches of any size. Scores
    observed in one forward are used two forwards later, so that the host does not wait for their transfer (on several
    ranks it waits until the device has begun the forward).

    Args:
        scores: float16 ``[E, L]`` on the CPU, for E examples of at most L tokens.
        observed: int32 ``[E, L]``, the training forward that each score was observed in, -1 for none.
        forwards: Training forwards so far.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If the shapes disagree, a tensor is not on the CPU, or ``forwards`` is negative.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from cggr_core import CGGRModel
        >>> from cggr_core.experimental import RememberedScores
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4)
        >>> memory = RememberedScores.empty(examples=100, length=16)
        >>> model = CGGRModel(LlamaForCausalLM(config), memory).train()
        >>> input_ids = torch.randint(0, 64, (2, 16))
        >>> model(input_ids, labels=input_ids, example_ids=torch.tensor([3, 7])).backward()
        >>> int((memory.observed[3] >= 0).sum())
        4
    """

    depth: ClassVar[int | None] = None
    reads_hidden: ClassVar[bool] = False
    gives_confidence: ClassVar[bool] = False

    def __init__(self, scores: Tensor, observed: Tensor, *, forwards: int = 0) -> None:
        for name, tensor, dtype in (("scores", scores, torch.float16), ("observed", observed, torch.int32)):
            if tensor.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
            if tensor.device.type != "cpu" or tensor.dim() != 2:
                raise ValueError(f"{name} must be [E, L] on the CPU, got {list(tensor.shape)} on {tensor.device}")
        check_shape("observed", observed, scores.shape, "that of scores")
        self._score, self._observed = scores, observed
        self._forwards = check_at_least("forwards", forwards, 0)
        self._pending: list[_Observed] = []
        self._largest_batch: Monitor | None = None

    @classmethod
    def empty(cls, *, examples: int, length: int) -> "RememberedScores":
        """An empty memory.

        Args:
            examples: Number of examples; their ids are 0 to ``examples - 1``.
            length: Tokens of the longest example.
        """
        shape = (check_at_least("examples", examples, 1), check_at_least("length", length, 1))
        return cls(torch.zeros(shape, dtype=torch.float16), torch.full(shape, NEVER, dtype=torch.int32))

    def __getstate__(self) -> dict[str, object]:
        # Events cannot be copied or pickled: a copy waits for their data.
        self.flush()
        return dict(self.__dict__)

    def __repr__(self) -> str:
        examples, length = self.shape
        return f"RememberedScores(examples={examples}, length={length}, forwards={self._forwards})"

    @property
    def shape(self) -> tuple[int, int]:
        """``(E, L)``: examples, and tokens of the longest."""
        examples, length = self._score.shape
        return examples, length

    @property
    def scores(self) -> Tensor:
        """float16 ``[E, L]``: the last score of every token, 0 for none; waits for the device."""
        self.flush()
        return self._score

    @property
    def observed(self) -> Tensor:
        """int32 ``[E, L]``: the training forward that each score was observed in, -1 for none."""
        self.flush()
        return self._observed

    @property
    def forwards(self) -> int:
        """Training forwards so far."""
        return self._forwards

    def flush(self) -> None:
        """Wait for all observed scores and store them; every later forward uses them."""
        self._write_pending(0)

    def attach(self, *, layers: int, hidden_size: int, embedding_size: int) -> None:
        """Does not depend on the model."""

    def prepare(self, batch: StepBatch) -> None:
        """Check a batch's example ids, if its kept tokens will be stored; called by a step."""
        if batch.selection is not None:
            return
        self.check_ids(batch.example_ids, batch.shape)
        self._largest_batch = None
        if torch.is_grad_enabled() and world_size() > 1:
            # Asked at the start of the forward, so that the answer is there when its observations are exchanged.
            self._largest_batch = Monitor()
            sizes = [torch.full((), size, device=batch.tokens.position_ids.device) for size in batch.shape]
            self._largest_batch.post(largest_over_ranks(torch.stack(sizes)))

    def score(self, request: ScoreRequest) -> Scores:
        """The scores of a batch; called by a step."""
        assert request.batch.example_ids is not None  # checked
        score, metrics = self.recall(request.batch.example_ids, request.batch.countable)
        return Scores(score, metrics=metrics)

    def observe(self, seen: Observation) -> dict[str, Tensor]:
        """Store the scores of a step's kept tokens."""
        assert seen.batch.example_ids is not None  # checked
        row, *slots = self._padded_to_largest_batch(seen.row, seen.position, seen.scores(), seen.weight > 0)
        self.remember(seen.batch.example_ids, row, *slots)
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Empty: the creator of the memory saves it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def _padded_to_largest_batch(self, row: Tensor, *slots: Tensor) -> list[Tensor]:
        """Rows ``[R]`` and slots ``[R, K]``, with zeros up to the shape of the largest batch of any rank."""
        largest = None if self._largest_batch is None else self._largest_batch.read(wait=True)
        if largest is None:
            return [row, *slots]
        rows, length = (int(size) for size in largest)
        more, longer = rows - row.shape[0], length - slots[0].shape[1]
        return [nn.functional.pad(row, (0, more)), *(nn.functional.pad(slot, (0, longer, 0, more)) for slot in slots)]

    def check_ids(self, example_ids: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Return ``example_ids`` if they name the rows of a batch.

        Args:
            example_ids: int64 ``[B]`` on the CPU.
            shape: ``(B, S)`` of the batch.

        Raises:
            TypeError: If they are not an int64 tensor.
            ValueError: If they are missing, not one per row, out of range or not on the CPU, or the rows are longer
                than the stored examples.
        """
        if example_ids is None:
            raise ValueError("RememberedScores needs example_ids, int64 [B] on the CPU: the example in each row")
        check_shape("example_ids", example_ids, shape[:1], "one for each row of the batch")
        if example_ids.dtype != torch.int64:
            raise TypeError(f"example_ids must be torch.int64, got {example_ids.dtype}")
        if example_ids.device.type != "cpu":
            raise ValueError(
                f"example_ids must be on the CPU, where the scores are stored, got {example_ids.device}; leave them "
                "there when the batch is moved"
            )
        examples, longest = self.shape
        outside = example_ids[(example_ids < 0) | (example_ids >= examples)]
        if outside.numel():
            raise ValueError(
                f"example_ids holds {outside.numel()} value(s) outside [0, {examples}) (the first is "
                f"{int(outside[0])}); this memory holds {examples} examples"
            )
        if shape[1] > longest:
            raise ValueError(f"the rows have {shape[1]} tokens, but the memory holds only {longest} per example")
        return example_ids

    def recall(self, example_ids: Tensor, countable: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores of a batch, and their age.

        Args:
            example_ids: int64 ``[B]``, checked.
            countable: bool ``[B, S]``.

        Returns:
            float32 ``[B, S]`` on the device of ``countable``; and metrics: ``remembered``, the share of countable
            tokens that have a score, ``score_age``, the mean number of training forwards since those were observed,
            and ``score_age_epochs``, the same in passes over the examples.
        """
        batch, length = countable.shape
        score = _on_device(self._score[example_ids, :length], countable).float()
        observed = _on_device(self._observed[example_ids, :length], countable)
        seen = (observed != NEVER) & countable
        count = seen.sum()
        mean = torch.where(count > 0, (score * seen).sum() / count.clamp(min=1), 1.0)
        age = ((self._forwards - observed) * seen).sum() / count.clamp(min=1)
        metrics = {
            "remembered": count / countable.sum().clamp(min=1),
            "score_age": age,
            "score_age_epochs": age * (batch * world_size() / self.shape[0]),
        }
        return torch.where(observed != NEVER, score, mean), metrics

    def remember(self, example_ids: Tensor, row: Tensor, position: Tensor, score: Tensor, kept: Tensor) -> None:
        """Store scores; they are written once they have been copied from the device.

        Args:
            example_ids: int64 ``[B]``, checked.
            row: int64 ``[R]``: rows of the batch that the other arguments refer to.
            position: int64 ``[R, K]``, distinct in each row.
            score: ``[R, K]``; on several ranks R and K are the same on all.
            kept: bool ``[R, K]``; other entries and non-finite scores are not stored.
        """
        largest = torch.finfo(torch.float16).max
        position = torch.where(kept & score.isfinite(), position, NEVER)
        ids = _on_device(example_ids, row)[row]
        # One tensor, so that one copy (and, on several ranks, one collective) moves it; float64 holds every id.
        packed = torch.cat([ids[:, None].double(), position.double(), score.clamp(-largest, largest).double()], dim=1)
        packed = gather_from_ranks(packed)
        arrived = None
        if packed.device.type != "cpu":
            on_host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            on_host.copy_(packed, non_blocking=True)
            arrived = torch.Event(packed.device)
            arrived.record(torch.accelerator.current_stream(packed.device))
            packed = on_host
        self._pending.append(_Observed(packed, self._forwards, arrived))
        self._forwards += 1
        self._write_pending(1)

    def _write_pending(self, newest: int) -> None:
        """Write what was observed, except in the ``newest`` forwards."""
        while len(self._pending) > newest:
            packed, forward, arrived = self._pending.pop(0)
            if arrived is not None:
                arrived.synchronize()
            slots = (packed.shape[1] - 1) // 2
            # Row by row: an example that occurs twice in a batch keeps the later row's scores.
            for example, numbers in zip(packed[:, 0].long().tolist(), packed[:, 1:], strict=True):
                position, score = numbers[:slots].long(), numbers[slots:]
                kept = position != NEVER
                self._score[example, position[kept]] = score[kept].half()
                self._observed[example, position[kept]] = forward


class _Observed(NamedTuple):
    """Scores in transfer from the device: example, positions and scores of each row, ``[R, 1 + 2K]``."""

    packed: Tensor
    forward: int
    arrived: torch.Event | None


def _on_device(value: Tensor, like: Tensor) -> Tensor:
    if like.device.type == "cpu":
        return value
    return value.pin_memory().to(like.device, non_blocking=True)
