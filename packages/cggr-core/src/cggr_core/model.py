"""CGGRModel: a Hugging Face model that runs its backward pass for the kept tokens only."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch._compile import _disable_dynamo

from cggr_core.checks import check_not_compiled
from cggr_core.recording import Outcome, StepCall, StepRecorder
from cggr_core.routers import FullDepthRouter, OwnLayersRouter, TimedRouter, TruncatedRouter, as_router
from cggr_core.schedule import Schedule
from cggr_core.selection import Selection
from cggr_core.settings import SUPERVISED, CudaGraph, RoutingSettings
from cggr_core.step import DeferredErrors, Draws, Router, StepBatch, StepResult, findings, run_step
from cggr_core.step.checks import (
    check_no_transform,
    check_token_ids,
    check_unused,
    drop_inert_arguments,
)
from cggr_core.step.selecting import supervised_slots
from cggr_core.stopwatch import Stopwatch


class CGGRModel(nn.Module):
    """Train a Hugging Face model on the tokens worth learning from.

    In training, ``model(input_ids, labels=labels)`` scores every token, keeps some, and returns a loss whose backward
    pass runs for those alone. Without labels, in ``eval()``, and for ``generate`` and ``save_pretrained`` it behaves as
    the wrapped model. Its ``state_dict()`` is that of any wrapper: names begin with ``model.``;
    ``wrapped.model.state_dict()`` has the model's own names.

    ==============  ==================================================================  ==========================
    gradient        a kept token's gradient reaches                                     cost of a step (forwards F)
    ==============  ==================================================================  ==========================
    ``"exact"``     everything; the selection only picks loss terms                     about 3F - the head's share
    ``"kv"``        kept tokens at every layer, all tokens' key/value projections       F(1 + 2r) or F(1 + 3r)
    ``"detached"``  kept tokens at every layer; other keys and values are constants     F(1 + 2r) or F(1 + 3r)
    ``"sequence"``  whole kept sequences; the rest is not in the step                   scoring + 3rF
    ==============  ==================================================================  ==========================

    ``kv`` and ``detached`` have two engines with the same numbers. *Interleaved* (1 + 2r) runs no token twice; it
    needs the selection before the layers: a router, ``selection="random"`` or ``"supervised"``, or a selection that
    is passed in. *Two passes* (1 + 3r) score at full depth, with the model's own head.

    At a ratio of 1 every token is kept, even those without a label, and the step is ordinary training in every mode.

    ``torch.compile`` of a CGGRModel runs its forward uncompiled; a model that holds compiled modules is refused.

    With dropout, every pass draws its own mask; with two passes, kept tokens are computed twice.

    Args:
        model: A Hugging Face causal or masked language model, or a PEFT wrapper of one.
        router: Scores the tokens before the layers run: :func:`create_truncated_router`, any module that maps the
            model's inputs to logits, or a router of :mod:`cggr_core.experimental`. ``None`` scores at full depth.
        gradient: Gradient mode: what the backward pass reaches, see the table.
        min_tokens_ratio: Keep ratio r in (0, 1], after the warm-up.
        selection: ``"stratified"``, ``"sampled"``, ``"random"``, ``"topk"``, ``"sequence_aware"``, or ``"supervised"``,
            which keeps exactly the countable tokens (at the cost of one host read per step).
        scoring: ``"gradnorm"``, ``"combined"``, ``"loss"``, ``"entropy"``, ``"margin"`` or ``"excess"``.
        num_strata: Score buckets of ``"stratified"``.
        min_tokens_per_sequence: For ``"sequence_aware"``: minimum number of kept tokens per row. If the keep ratio
            already gives that many, the selection equals ``"topk"``.
        block_size: Select blocks of this many neighbouring tokens.
        unbiased: Weight kept tokens by 1 / inclusion probability, so that the loss estimates the full loss.
        warmup_steps: Steps over which the ratio falls linearly from 1 to ``min_tokens_ratio``; call :meth:`step`.
        dynamic_threshold: Adapt the ratio to the batch's confidence, see :class:`Schedule`.
        threshold_sensitivity: How strongly the confidence changes the ratio.
        engine: ``"interleaved"`` or ``"two_pass"``; ``None`` chooses the cheaper one that the scores allow.
        context_precision: ``"fp8"`` runs linear layers in FP8 (e4m3, one scale per row) on tokens that need no
            gradient, and the head's product that scores are made from; keys and values of mode ``"kv"`` and the loss
            stay in the model's precision. Kept tokens attend to the results, with an error of a few per cent. It is
            faster on NVIDIA GPUs from compute capability 9.0 on, and emulated elsewhere. ``None``, the default, is the
            model's own precision.
        score_precision: ``"fp8"`` runs the head's product that scores are made from in FP8, with everything else in the
            model's precision; ``None``, the default, runs it in ``context_precision``.
        reuse_outputs: In two passes, and in the layers of a router that is part of the model: hold the outputs of
            linear layers from the pass over all tokens, so that kept tokens are not multiplied again in their second
            pass. The same results in less time, for memory: every such output of all tokens until the kept ones pass
            its layer. Not with dropout, gradient checkpointing, FSDP2 or ``context_precision``.
        context_margin: For ``selection="supervised"`` in modes ``"kv"`` and ``"detached"``: also keep this many tokens
            before each supervised stretch. They have no loss of their own, but gradients of the supervised tokens' loss
            reach them, so the step misses less of the full gradient.
        seed: Seed of the random selections; the same seed and batch give the same selection on every device.
        ignore_index: Label that is never scored, selected or counted.
        cuda_graph: ``"auto"``, the default, captures steps of equal shapes as CUDA graphs if a replay is faster, and
            logs once why a step runs eagerly; ``False`` runs every step eagerly. No effect on other devices. A capture
            holds the memory of its step, and the backward pass of a replayed step can run only once (for
            ``retain_graph=True``, use ``False``).

    Attributes:
        scoring_stopwatch: A :class:`~cggr_core.stopwatch.Stopwatch` to add up the time spent only on scores (the head's
            statistics and a router's own pass; not the context pass, which the gradient pass uses too); ``None``, the
            default, measures nothing.

    Raises:
        TypeError: If ``model`` is not a Hugging Face model.
        ValueError: If a name, a ratio or a combination is invalid.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4)
        >>> model = CGGRModel(LlamaForCausalLM(config), min_tokens_ratio=0.25).train()
        >>> input_ids = torch.randint(0, 64, (2, 16))
        >>> loss = model(input_ids, labels=input_ids)
        >>> loss.backward()
        >>> model.metrics["kept_tokens"]
        tensor(8)
    """

    def __init__(
        self,
        model: nn.Module,
        router: Callable[..., Any] | Router | None = None,
        *,
        gradient: str = RoutingSettings.gradient,
        scoring: str = RoutingSettings.scoring,
        selection: str = RoutingSettings.selection,
        num_strata: int = RoutingSettings.num_strata,
        min_tokens_per_sequence: int = RoutingSettings.min_tokens_per_sequence,
        dynamic_threshold: bool = RoutingSettings.dynamic_threshold,
        threshold_sensitivity: float = RoutingSettings.threshold_sensitivity,
        min_tokens_ratio: float = RoutingSettings.min_tokens_ratio,
        warmup_steps: int = RoutingSettings.warmup_steps,
        block_size: int = RoutingSettings.block_size,
        unbiased: bool = RoutingSettings.unbiased,
        seed: int = RoutingSettings.seed,
        ignore_index: int = RoutingSettings.ignore_index,
        engine: str | None = RoutingSettings.engine,
        context_precision: str | None = RoutingSettings.context_precision,
        score_precision: str | None = RoutingSettings.score_precision,
        reuse_outputs: bool = RoutingSettings.reuse_outputs,
        context_margin: int = RoutingSettings.context_margin,
        cuda_graph: CudaGraph = RoutingSettings.cuda_graph,
    ) -> None:
        super().__init__()
        from cggr_core.routing import Engine

        if isinstance(model, CGGRModel):
            raise TypeError("model is already a CGGRModel; pass the wrapped model (model.model)")

        self.settings = RoutingSettings(
            gradient=gradient,
            engine=engine,
            context_precision=context_precision,
            score_precision=score_precision,
            reuse_outputs=reuse_outputs,
            context_margin=context_margin,
            scoring=scoring,
            selection=selection,
            num_strata=num_strata,
            min_tokens_per_sequence=min_tokens_per_sequence,
            block_size=block_size,
            unbiased=unbiased,
            min_tokens_ratio=min_tokens_ratio,
            warmup_steps=warmup_steps,
            dynamic_threshold=dynamic_threshold,
            threshold_sensitivity=threshold_sensitivity,
            seed=seed,
            ignore_index=ignore_index,
            cuda_graph=cuda_graph,
        )
        self.schedule = Schedule.of(self.settings)
        self._passes = Engine(model)
        check_not_compiled(model, self._passes.architecture.layers)
        scores_by = as_router(router, self._passes)
        by_head = isinstance(scores_by, FullDepthRouter | OwnLayersRouter)
        self.settings.check_router(router, gives_confidence=scores_by.gives_confidence, by_head=by_head)
        self.model = model
        if isinstance(router, TruncatedRouter) and scores_by.depth is not None:
            self.__dict__["router"] = router  # shared parameters are registered once
        else:
            self.router = router
        self.__dict__["_router"] = scores_by
        self.scoring_stopwatch: Stopwatch | None = None
        self._deferred = DeferredErrors()
        self._draws = Draws(self.schedule)
        self._metrics: dict[str, Any] = {}
        self._recorder: StepRecorder | None = None

    @_disable_dynamo  # torch.compiler.disable, but Dynamo, a second of import, waits until a forward
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        reference_nll: Tensor | None = None,
        num_items: Tensor | float | None = None,
        selection: Selection | None = None,
        draw: int | Tensor | None = None,
        first_row: int | Tensor = 0,
        example_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """The loss of the kept tokens in training with labels; otherwise the wrapped model's own output.

        Args:
            input_ids: int64 ``[B, S]``.
            labels: int64 ``[B, S]`` as for the wrapped model (causal models shift them); ``ignore_index`` is never
                scored, selected or counted.
            token_weight: ``[B, S]``, multiplies the loss of the token predicted at each position.
            reference_nll: ``[B, S]``, a reference model's nll at each position, for ``scoring="excess"``.
            num_items: Countable tokens of the whole optimiser step, under gradient accumulation or on several ranks; by
                default those of this batch.
            selection: Kept tokens chosen by the caller, one row for each row of the batch.
            draw: Number of the random draw, an int or a 0-dim int64 tensor on the device; ``None`` counts up.
            first_row: Number of the batch's first row among the rows of that draw, of the same types. Micro-batches and
                ranks that share a draw and number their rows consecutively keep the same tokens as one batch of all
                rows.
            example_ids: int64 ``[B]`` on the CPU, the example in each row; for ``RememberedScores``.
            **inputs: ``attention_mask`` ``[B, S]``, ``position_ids``, ``inputs_embeds``, ``token_type_ids`` and other
                arguments of the wrapped model. Without an attention mask, position ids that restart mark packed
                documents, which do not attend to each other. ``shift_labels``, int64 ``[B, S]``, replace ``labels`` and
                are already shifted to the positions that predict them, as in transformers.

        Returns:
            A float32 scalar, connected to the graph even if nothing is countable; or the model's output.

        Raises:
            ValueError: If shapes or devices do not match, an argument would be ignored, the model does not support the
                mode, or (one step later, on devices other than the CPU) labels are outside the vocabulary, or logits or
                the loss are NaN.
            TypeError: If a dtype or the type of an argument is wrong.
            RuntimeError: Inside a transform of ``torch.func``.
        """
        if isinstance(input_ids, Mapping):
            raise TypeError(
                f"input_ids must be a tensor, got {type(input_ids).__name__}; unpack a batch: model(**batch)"
            )
        arguments = {name: value for name, value in {"input_ids": input_ids, **inputs}.items() if value is not None}
        if labels is None or not self.training:
            check_unused(
                "labels is None" if labels is None else "this is eval()",
                token_weight=token_weight,
                reference_nll=reference_nll,
                num_items=num_items,
                selection=selection,
                draw=draw,
                first_row=None if isinstance(first_row, int) and not first_row else first_row,
                example_ids=example_ids,
                **(self._passes.loss_arguments(arguments) if labels is None else {}),
            )
            given = {} if labels is None else {"labels": labels}
            return self.model(**arguments, **given)
        check_no_transform()
        # Offloading keeps parameters there too, with hooks that load their values.
        if next(self.model.parameters()).is_meta and not any(
            hasattr(part, "_hf_hook") for part in self.model.modules()
        ):
            raise ValueError(
                "the model is on the meta device and has no values to train; first load its weights, or move it with "
                "to_empty(device=...) and initialise it"
            )
        # The confidence changes the ratio, so the step waits for it: selections must not depend on timing.
        self._raise_deferred_errors(wait=self.schedule.reads_confidence)
        self._follow_model()
        call = StepCall(
            drop_inert_arguments(arguments),
            {
                "labels": labels,
                "token_weight": token_weight,
                "reference_nll": reference_nll,
                "num_items": num_items,
                "selection": selection,
                "draw": draw,
                "first_row": first_row,
                "example_ids": example_ids,
                "slots": None,
            },
        )
        slots = cache(lambda: self._slots(labels, arguments) if selection is None else None)
        replayed = self._replayed(call, slots)
        if replayed is not None:
            self.schedule.note_forward()
            assert replayed.findings is not None  # of every step
            self._deferred.send(replayed.findings)
            self._metrics = replayed.metrics
            return replayed.values[0]
        router: Router = self._router
        if self.scoring_stopwatch is not None:
            router = cast(Router, TimedRouter(router, self.scoring_stopwatch))
        result = self._run(call.with_slots(slots()), router)
        self.schedule.note_forward()
        self._deferred.post(result, self.schedule)
        self._metrics = result.metrics
        if result.observation is not None:
            self._metrics |= router.observe(result.observation)
        return result.loss

    @contextmanager
    def routed_forward(self) -> Iterator[None]:
        """Within the block, calling the wrapped model runs this model's :meth:`forward`.

        For training loops in which a wrapper must see the wrapped model's call: ``DistributedDataParallel``,
        ``fully_shard``, a trainer. The hooks on the wrapped model run once, around all passes.

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            ...                      num_attention_heads=4)
            >>> prepared = torch.nn.Sequential(LlamaForCausalLM(config))
            >>> model = CGGRModel(prepared[0]).train()
            >>> input_ids = torch.randint(0, 64, (2, 16))
            >>> with model.routed_forward():
            ...     loss = prepared[0](input_ids=input_ids, labels=input_ids)
            >>> loss.shape
            torch.Size([])
        """
        from cggr_core.routing import forward_replaced_by

        with forward_replaced_by(self.model, self):
            yield

    @property
    def training(self) -> bool:
        """Whether the wrapped model is in training mode; ``train()`` and ``eval()`` of either set both."""
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        # train() sets this and then the wrapped model's, which takes effect; a separate value could disagree.
        pass

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Called by a Hugging Face Trainer (and each of TRL's) at construction; a CGGRModel cannot be its model.

        Raises:
            TypeError: Always: a Trainer takes the loss from a model output, and TRL's trainers bypass this model's
                forward, so the step would be an ordinary one.
        """
        raise TypeError(
            "a Trainer would not train through a CGGRModel's forward; give it the plain model and put CGGRMixin first: "
            "class RoutedTrainer(CGGRMixin, SFTTrainer): ..., then RoutedTrainer(model, ..., cggr=CGGRConfig(...)) "
            "(from cggr_train; for the plain Trainer, use CGGRTrainer)"
        )

    @property
    def replayed(self) -> bool:
        """Whether the last training forward replayed a CUDA graph; the log says why one did not.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            ...                      num_attention_heads=4)
            >>> CGGRModel(LlamaForCausalLM(config)).replayed  # there was none
            False
        """
        return self._recorder is not None and self._recorder.replayed

    def step(self) -> None:
        """Advance the curriculum by one optimiser step."""
        self.schedule.step()

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the last training forward; tensors stay on their device until they are read.

        ``loss``, ``keep_ratio``, ``kept_tokens``, ``countable_tokens``, ``gradient``, ``engine``; if tokens were
        scored, ``score_kept`` and ``score_dropped`` (means), ``confidence`` if the schedule uses it, and
        ``gradnorm_kept``, the kept tokens' share of the squared logit-gradient norms, if the scores include them,
        ``full_loss``, the mean nll of all countable tokens, if they were scored at full depth by their nll; metrics of
        a router of :mod:`cggr_core.experimental`; ``auxiliary_loss``, the expert routers' balancing loss over the
        tokens of the backward pass, which ``loss`` includes, if the model's config requests it
        (``output_router_logits``).
        """
        return dict(self._metrics)

    def routing_state_dict(self) -> dict[str, Any]:
        """State besides the model that a resumed run needs to make the same selections; waits for the device.

        It does not include the memory of ``RememberedScores``, which its creator saves.
        """
        self._raise_deferred_errors(wait=True)
        state = self.schedule.state_dict()
        state["draws"] = self._draws.count
        learned = self._router.state_dict()
        if learned:
            state["router"] = copy.deepcopy(learned)  # it keeps learning
        return state

    def load_routing_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`routing_state_dict`.

        Raises:
            ValueError: If a key is missing or unknown.
            RuntimeError: If a learned router's state has other sizes.
        """
        schedule = {name: value for name, value in state.items() if name != "router"}
        learns = bool(self._router.state_dict())
        if ("router" in state) != learns:
            raise ValueError(
                "the state is of a learned router, but this model has none; create it with the same router"
                if "router" in state
                else f"the state has nothing for a learned router, but this model has a {type(self.router).__name__}; "
                "load the state of a run with the same router"
            )
        self.schedule.load_state_dict(schedule)
        self._draws.restart()
        if learns:
            self._router.load_state_dict(state["router"])

    def __getstate__(self) -> dict[str, Any]:
        # A recording is bound to these parameters and cannot be copied or pickled; a copy makes its own.
        return {**self.__dict__, "_recorder": None}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def _slots(self, labels: Tensor, arguments: Mapping[str, Any]) -> int | None:
        """Slots of the supervised tokens, counted before the step launches anything; ``None`` for other steps."""
        counted = arguments.get("shift_labels", labels)
        if self.settings.selection != SUPERVISED or not isinstance(counted, Tensor) or counted.dim() != 2:
            return None  # the checks report what is wrong with them
        return supervised_slots(counted, self.settings.ignore_index, margin=self.settings.context_margin)

    def __setattr__(self, name: str, value: Any) -> None:
        # Set these on the wrapped model, or later reads would find them here and the wrapped model would not use them.
        model = self.__dict__.get("_modules", {}).get("model")
        if model is not None and name not in self._modules and _is_part(model, name):
            setattr(model, name, value)
        else:
            super().__setattr__(name, value)

    def _run(self, call: StepCall, router: Router) -> StepResult:
        try:
            batch = StepBatch.checked(self.settings, self._passes, arguments=dict(call.arguments), **call.given)
            router.prepare(batch)
            with self._passes.step():
                return run_step(self.settings, batch, self._passes, router, self.schedule, self._draws)
        except IndexError:
            check_token_ids(call.arguments.get("input_ids"), self._passes.embeddings_count)
            raise

    def _replayed(self, call: StepCall, slots: Callable[[], int | None]) -> Outcome | None:
        """The step by its recording, if there is one or one is due."""
        if not self.settings.cuda_graph:
            return None
        if self._recorder is None:
            self._recorder = StepRecorder(self._outcome, self.settings, self._passes, self.schedule, self._draws)
        return self._recorder.take_step(call, self._router, slots)

    def _outcome(self, call: StepCall) -> Outcome:
        result = self._run(call, self._router)
        return Outcome((result.loss,), result.metrics, findings(result, self.schedule))

    def _follow_model(self) -> None:
        """Detect changes of the wrapped model since the last step, including its replacement."""
        if self._passes.follow(self.model) and self._router is not self.router:
            self.__dict__["_router"] = as_router(self.router, self._passes)

    def _raise_deferred_errors(self, *, wait: bool) -> None:
        self._deferred.raise_deferred_errors(
            self.schedule, vocab_size=self._passes.vocab_size, ignore_index=self.settings.ignore_index, wait=wait
        )


def _is_part(model: nn.Module, name: str) -> bool:
    """Whether a name is one of a model's own modules, parameters, buffers or configs."""
    parts = (model._modules, model._parameters, model._buffers)
    return any(name in part for part in parts) or (name in ("config", "generation_config") and hasattr(model, name))
