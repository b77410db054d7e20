"""LearnedRouter: a small head that predicts the score of every token, trained on observed scores."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cggr_core.checks import check_at_least, check_finite_number
from cggr_core.collectives import sum_over_ranks
from cggr_core.experimental.regression_head import RegressionHead
from cggr_core.step.batch import StepBatch
from cggr_core.step.router import Observation, ScoreRequest, Scores

# Of the running mean and spread of the scores: they follow training within some hundred steps.
_DECAY = 0.99
# Of Adam on what one forward showed: the scores move with the model, and the head has to keep up.
_UPDATES = 4
# Of the averaged weights that predict: some hundred steps back, and from the first steps on no more than there were.
_AVERAGED, _AVERAGED_AT_FIRST = 0.98, 10
# Size of the agreements among the head's inputs. Adam moves all weights alike, so that what is large is learned from
# first: a single agreement ranks tokens already.
_LARGE = 8.0
_TINY = torch.finfo(torch.float32).tiny


class LearnedRouter(nn.Module):
    """Predicts each token's score from the hidden state at layer ``depth`` and the embedding of its target.

    Experimental: late in training it ranks tokens better than an early layer does, yet training with it was
    statistically indistinguishable from training on random tokens.

    Given to :class:`~cggr_core.CGGRModel` as its router. Scoring then costs the first ``depth`` layers, which the
    interleaved engine does not compute again, and no product with the vocabulary. The head is trained online: after
    each training forward, the true scores of some kept tokens are computed from the gradient pass's final hidden
    states, and a few steps of Adam fit the head to them. Kept tokens are weighted by 1 / inclusion probability, so the
    regression targets all tokens, whatever was selected (``topk`` and ``sequence_aware`` have no probabilities: there
    the head learns about the tokens that they keep).

    The prediction is ``mean + std * f(h, e)``, with the running mean and spread of the observed scores and, for
    ``a = A norm(h)`` and ``b = B norm(e)`` of ``width`` numbers each, ``f = c · gelu(M [a, b, a * b, d])``; it is the
    same for all tokens until something has been observed. ``d = D (norm(h) * e)`` are a few numbers, in units of their
    running spread, that start near ``norm(h) · e``: the target's logit if the model ended here with its head tied to
    its embedding. They are omitted if hidden states and embeddings differ in size. The regression uses the Huber loss,
    and predictions use a running mean of the weights.

    The head has its own optimizer and does not affect the model: neither the returned loss, nor the gradients, nor
    their norm for clipping. Its state is part of ``CGGRModel.state_dict()`` and ``routing_state_dict()``. On several
    ranks (an initialised ``torch.distributed``) gradients are summed over the default process group, so every rank has
    to run the same training forwards.

    Args:
        depth: Number of layers below the hidden state that is read, at least 1 and fewer than the model has.
        width: Size of the projections of hidden state and target embedding.
        learning_rate: Learning rate of the head's Adam.
        observed_tokens: Maximum number of kept tokens per forward whose score is observed, but at least one per row;
            they go through the language-model head once more.
        seed: Seed of the head's initial weights and of the choice of observed tokens.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If one is outside its range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from cggr_core import CGGRModel
        >>> from cggr_core.experimental import LearnedRouter
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        ...                      num_attention_heads=4)
        >>> model = CGGRModel(LlamaForCausalLM(config), LearnedRouter(depth=1)).train()
        >>> input_ids = torch.randint(0, 64, (2, 16))
        >>> model(input_ids, labels=input_ids).backward()
        >>> model.metrics["engine"]
        'interleaved'
    """

    depth: int
    reads_hidden: ClassVar[bool] = True
    gives_confidence: ClassVar[bool] = False
    moments: Tensor
    updates: Tensor

    def __init__(
        self,
        depth: int,
        *,
        width: int = 64,
        learning_rate: float = 3e-3,
        observed_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.depth = check_at_least("depth", depth, 1)
        self.width = check_at_least("width", width, 1)
        self.learning_rate = check_finite_number("learning_rate", learning_rate, minimum=0.0)
        self.observed_tokens = check_at_least("observed_tokens", observed_tokens, 1)
        self.seed = check_at_least("seed", seed, 0)
        self.head: RegressionHead | None = None
        self.averaged: RegressionHead | None = None
        self.register_buffer("moments", torch.zeros(4, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._optimizer: torch.optim.Adam | None = None
        self._optimizer_device: torch.device | None = None
        self._optimizer_state: dict[str, Any] | None = None

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"depth={self.depth}, width={self.width}, learning_rate={self.learning_rate:g}"

    def attach(self, *, layers: int, hidden_size: int, embedding_size: int) -> None:
        """Create the head's weights, the same for the same seed; called by CGGRModel.

        Args:
            layers: Layers of the model.
            hidden_size: Length of a hidden state.
            embedding_size: Length of an input embedding.

        Raises:
            ValueError: If the model has too few layers, or the router was built for a model of other sizes.
        """
        if self.depth >= layers:
            raise ValueError(
                f"LearnedRouter(depth={self.depth}) reads the hidden state after {self.depth} layers, with further "
                f"layers above it, but the model has only {layers}; give a smaller depth, or leave the router out to "
                "score at full depth"
            )
        sizes = (hidden_size, embedding_size)
        if self.head is None:
            self.head = RegressionHead(hidden_size, embedding_size, self.width, seed=self.seed)
            self.averaged = RegressionHead(hidden_size, embedding_size, self.width, seed=self.seed)
        elif (self.head.hidden.in_features, self.head.target.in_features) != sizes:
            raise ValueError(
                f"the router was built for hidden size {self.head.hidden.in_features} and embedding size "
                f"{self.head.target.in_features}, but this model has {hidden_size} and {embedding_size}; create one "
                "LearnedRouter per model"
            )

    @torch.no_grad()
    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Predicted scores.

        Args:
            hidden: Hidden states at layer ``depth``, ``[..., H]``.
            target: Embeddings of the targets, ``[..., E]``.

        Returns:
            float32 ``[...]``.

        Raises:
            ValueError: If the router is not part of a CGGRModel, or its weights were cast.
        """
        _, averaged = self._heads_on(hidden.device)
        mean, std, unit = self._scale()
        with torch.autocast(hidden.device.type, enabled=False):
            return mean + std * averaged(hidden, target, unit)

    def prepare(self, batch: StepBatch) -> None:
        """Raise if the batch has example ids, which this router does not use."""
        if batch.example_ids is not None:
            raise ValueError("example_ids is used only by RememberedScores; leave it out")

    def score(self, request: ScoreRequest) -> Scores:
        """The predicted scores of a batch; asked by a step."""
        assert request.hidden is not None  # a step leaves it for a router that reads it
        return Scores(self(request.hidden, request.engine.embeddings(request.batch.embeddable)))

    @torch.no_grad()
    def observe(self, seen: Observation) -> dict[str, Tensor]:
        """Learn from some of a step's kept tokens; see :meth:`learn`."""
        hidden = seen.hidden
        assert hidden is not None  # a step leaves it for a router that reads it
        seen = seen.thinned(self.observed_tokens, seed=self.seed, draw=self.updates)
        return self.learn(
            seen.gather(hidden).flatten(0, 1),
            seen.engine.embeddings(seen.gather(seen.batch.embeddable)).flatten(0, 1),
            seen.scores().flatten(),
            seen.weight.flatten(),
        )

    @torch.no_grad()
    def learn(self, hidden: Tensor, target: Tensor, score: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Learn from tokens with known scores; the host reads nothing.

        Args:
            hidden: Their hidden states at layer ``depth``, ``[N, H]``.
            target: Embeddings of their targets, ``[N, E]``.
            score: Their scores, ``[N]``; non-finite scores are ignored.
            weight: 1 / their probability of being observed, up to a factor, ``[N]``; 0 for ignored tokens.

        Returns:
            ``router_correlation``: correlation between predictions (before the step) and scores over all tokens of this
                rank, estimated with the weights; 0 if either is constant.
        """
        head, averaged = self._heads_on(hidden.device)
        weight = weight.float().masked_fill(~score.isfinite(), 0.0)
        score = score.float().masked_fill(weight == 0.0, 0.0)
        hidden, target = hidden.detach().float(), target.detach().float()
        with torch.autocast(hidden.device.type, enabled=False):
            agreement = averaged.agreement(hidden, target)
            powers = torch.stack([torch.ones_like(score), score, score.square(), agreement.square().mean(-1)])
            totals = sum_over_ranks((weight * powers).sum(1))
            self.moments.mul_(_DECAY).add_(totals)
            mean, std, unit = self._scale()
            correlation = _correlation(averaged(hidden, target, unit), score, weight)
        wanted = (score - mean) / std
        # Of the sum over ranks, so that two halves of a batch make the gradient of the whole.
        share = weight / totals[0].clamp(min=_TINY)
        for _ in range(_UPDATES):
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
                parameters = {name: value.detach().requires_grad_() for name, value in head.named_parameters()}
                prediction = functional_call(head, parameters, (hidden, target, unit))
                loss = (share * nn.functional.huber_loss(prediction, wanted, reduction="none")).sum()
                gradients = torch.autograd.grad(loss, list(parameters.values()))
            self._step(list(head.parameters()), gradients)
        self.updates.add_(1)
        decay = (self.updates / (self.updates + _AVERAGED_AT_FIRST)).clamp(max=_AVERAGED)
        for average, parameter in zip(averaged.parameters(), head.parameters(), strict=True):
            average.lerp_(parameter, 1.0 - decay)
        return {"router_correlation": correlation}

    def _scale(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of the scores seen of late, and the unit of agreements; 0, 1, 1 at first."""
        count, first, second, agreement = self.moments
        mean, square = first / count.clamp(min=_TINY), second / count.clamp(min=_TINY)
        std = torch.where(_varies(square - mean.square(), square), (square - mean.square()).sqrt(), 1.0)
        unit = torch.where(agreement > 0, (agreement / count.clamp(min=_TINY)).sqrt() / _LARGE, 1.0)
        return mean, std, unit

    def _heads_on(self, device: torch.device) -> tuple[RegressionHead, RegressionHead]:
        """The head that learns and the one that predicts."""
        if self.head is None or self.averaged is None:
            raise ValueError("the router has no weights yet: give it to CGGRModel(model, router)")
        if self.moments.dtype != torch.float32:
            raise ValueError(
                f"the LearnedRouter's weights were cast to {self.moments.dtype}, but it learns in float32; cast the "
                "model before passing it to CGGRModel"
            )
        if self.moments.device != device:
            # The model may have been moved without the router.
            self.to(device)
        return self.head, self.averaged

    def _step(self, parameters: list[nn.Parameter], gradients: tuple[Tensor, ...]) -> None:
        summed = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        optimizer = self._optimizer_for(parameters)
        parts = summed.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
        # Hidden from other optimizers and from clipping.
        optimizer.zero_grad(set_to_none=True)

    def _optimizer_for(self, parameters: list[nn.Parameter]) -> torch.optim.Adam:
        """Adam over the head; made at the first step, and again after the head has moved to another device."""
        device = parameters[0].device
        if self._optimizer is not None and self._optimizer_device != device:
            self._optimizer_state, self._optimizer = self._optimizer.state_dict(), None
        if self._optimizer is None:
            # Capturable: its step counter is on the device, so that the whole step can be one CUDA graph.
            self._optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, capturable=device.type != "cpu")
            self._optimizer_device = device
            if self._optimizer_state is not None:
                groups = self._optimizer.state_dict()["param_groups"]
                self._optimizer.load_state_dict({"state": self._optimizer_state["state"], "param_groups": groups})
                self._optimizer_state = None
        return self._optimizer

    def get_extra_state(self) -> dict[str, Any]:
        """State of the head's optimizer."""
        state = self._optimizer_state if self._optimizer is None else self._optimizer.state_dict()
        return {} if state is None else {"state": state["state"]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`get_extra_state`; it takes effect with the next step."""
        self._optimizer, self._optimizer_state = None, state or None


def _varies(variance: Tensor, square: Tensor) -> Tensor:
    """Whether a variance exceeds the rounding error of the mean square it was computed from."""
    return variance > 1e-6 * square


def _correlation(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Weighted Pearson correlation of two ``[N]``."""
    weight = weight / weight.sum().clamp(min=_TINY)
    squares = (weight * a.square()).sum(), (weight * b.square()).sum()
    a, b = a - (weight * a).sum(), b - (weight * b).sum()
    variances = (weight * a.square()).sum(), (weight * b.square()).sum()
    both_vary = _varies(variances[0], squares[0]) & _varies(variances[1], squares[1])
    spread = (variances[0] * variances[1]).sqrt().clamp(min=_TINY)
    return torch.where(both_vary, (weight * a * b).sum() / spread, 0.0)
