"""CGGR as a mixin for the Hugging Face Trainer and its subclasses."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from cggr_core.stopwatch import Stopwatch
from cggr_train.trainer.batch import STEP_COLUMNS, evaluation_batch, routed_batch
from cggr_train.trainer.callback import CGGRCallback
from cggr_train.trainer.config import CGGRConfig
from cggr_train.trainer.metrics import MetricsWindow
from cggr_train.trainer.supported import check_class, check_supported
from cggr_train.trainer.trl import TokenCount, kind_of, take_router_coefficient, task_loss, trains_by_task

if TYPE_CHECKING:
    from collections.abc import Callable

    from cggr_core import CGGRModel

    _Base = Trainer
else:
    _Base = object


class CGGRMixin(_Base):
    """Trains a Trainer's model on the tokens worth learning from: ``class MyTrainer(CGGRMixin, SFTTrainer)``.

    The Trainer keeps its model, wrappers, data and checkpoints; only the training forward changes. Evaluation is the
    Trainer's own and uses the full loss, and checkpoints hold the plain model.

    The loss is divided by the Trainer's ``num_items_in_batch``, the countable tokens of all micro-batches (and of all
    ranks under ``average_tokens_across_devices``, the default), and the random choices of a step are numbered by its
    rows: one step makes the same selections and the same gradient however it is split.

    The dataset columns ``reference_nll`` and ``token_weight`` reach the training forward if the data collator passes
    them on; see :meth:`cggr_core.CGGRModel.forward`.

    Each record of the training loss in the Trainer's log also holds, since the record before: ``keep_ratio``,
    ``kept_tokens``, ``countable_tokens``; where tokens are scored the means ``score_kept`` and ``score_dropped``, and
    ``scoring_seconds`` for each optimizer step; with ``scoring="gradnorm"`` the share ``gradnorm_kept`` of the squared
    logit-gradient norms that kept tokens hold; and ``full_loss``, the loss of all countable tokens, where they are
    scored at full depth.

    Args:
        *args: Arguments of the Trainer.
        cggr: Settings of CGGR; defaults if not given.
        router: Your own router in place of the one that the settings name; see
            :class:`cggr_core.CGGRModel`. Not :class:`cggr_core.experimental.RememberedScores`.
        **kwargs: Of the Trainer.

    Raises:
        TypeError: When a class combines the mixin with a Trainer that has an unsupported loss, or the mixin is not its
            first base; if ``cggr`` is not a :class:`CGGRConfig`.
        ValueError: If the training arguments cannot be combined with CGGR, or a setting is invalid.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls, CGGRMixin)

    def __init__(
        self,
        *args: Any,
        cggr: CGGRConfig | None = None,
        router: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(self, Trainer):
            name = type(self).__name__
            raise TypeError(
                f"{name} has no Trainer; put one of transformers or TRL after the mixin: "
                f"class {name}(CGGRMixin, SFTTrainer)"
            )
        if cggr is not None and not isinstance(cggr, CGGRConfig):
            raise TypeError(f"cggr must be a CGGRConfig, got {type(cggr).__name__}; write cggr=CGGRConfig(...)")
        self.cggr = CGGRConfig() if cggr is None else cggr
        self.resumed_from: Path | None = None
        self._router = router
        self._routed: CGGRModel | None = None
        self._routed_for: Any = None
        self._scoring, self._updating, self._update = Stopwatch(), Stopwatch(), ExitStack()
        self.forget_steps()
        super().__init__(*args, **kwargs)
        self._token_count: TokenCount | None = None
        self._by_task = trains_by_task(type(self))
        self._task_loss = task_loss(self, self.cggr, self._scoring)
        check_supported(self, self.cggr, router, own_loss=self._task_loss is not None)
        if self._by_task:
            return
        # The Trainer only counts the items of a step if the loss is divided by them.
        self._model_takes_items = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = True
        if kind_of(type(self)) == "sft":
            self._token_count = TokenCount(self)
            take_router_coefficient(self)
        if self.model is not None:
            self.routed_model()  # settings that do not suit this model fail here, not in the first step
        self.add_callback(CGGRCallback(self))

    def routed_model(self) -> CGGRModel:
        """The :class:`~cggr_core.CGGRModel` around the Trainer's current model."""
        if self._routed is not None and self._routed_for is self.model:
            return self._routed
        self._routed_for = self.model
        model = self.accelerator.unwrap_model(self.model)
        if self._routed is None or self._routed.model is not model:
            overrides = {} if self._router is None else {"router": self._router}
            self._routed = self.cggr.build(model, seed=self.args.seed, **overrides)
            self._routed.scoring_stopwatch = self._scoring
        return self._routed

    def forget_steps(self) -> None:
        """Reset the row counter and the metrics: before a run, and after a batch that ran out of memory."""
        self._metrics_window = MetricsWindow()
        self._scoring.read()
        self._updating.read()
        self._last_record: tuple[int, float] | None = None
        self._micro_batch = (-1, 0)

    def step_routing(self) -> None:
        """Advance the keep ratio by one optimizer step; called by the callback."""
        self.routed_model().step()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; a resumed run makes the same selections as an uninterrupted one."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            output = Path(str(self.args.output_dir))
            checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
        self.resumed_from = Path(checkpoint) if checkpoint else None
        self.forget_steps()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of the kept tokens in training; the Trainer's own loss in evaluation.

        Args:
            model: The model, as the Trainer has wrapped it.
            inputs: A batch.
            return_outputs: Whether to return the model's outputs too; only in evaluation.
            num_items_in_batch: Countable tokens of the whole optimizer step.
            **kwargs: Of the Trainer.

        Raises:
            ValueError: If outputs are requested in training, or the batch cannot be routed.
        """
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch, **kwargs}
        if not model.training:
            return self._own_loss(model, evaluation_batch(inputs), **options)
        self._update.enter_context(self._updating.measure(self.accelerator.device))
        if self._task_loss is not None and inputs.get("token_weight") is None:
            loss = self._task_loss.loss(super().compute_loss, model, evaluation_batch(inputs), **options)
            self._metrics_window.add(self._task_loss.metrics)
            return loss
        if return_outputs:
            raise ValueError(
                "return_outputs=True is not supported in training, because the logits of other tokens are not computed"
            )
        if inputs.get("labels") is None:
            raise ValueError(
                f"the batch has {', '.join(sorted(inputs))} but no labels; let the dataset or the data collator add "
                "them (DataCollatorForLanguageModeling(tokenizer, mlm=False) does)"
            )
        routed = self.routed_model()
        place = {"draw": self.state.global_step, "first_row": self.first_row()}
        with routed.routed_forward(), self.accelerator.autocast():
            loss = model(**routed_batch(inputs), num_items=_at_least_one(num_items_in_batch), **place)
        self._metrics_window.add(routed.metrics)
        if self._token_count is not None:
            self._token_count.add(inputs)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The items are counted over all ranks, and the gradients are averaged over the ranks.
            loss = loss * self.accelerator.num_processes
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch; only these two are timed, not the preparation of inputs."""
        if self._last_record is None:
            self._last_record = self.state.global_step, time.perf_counter()
        with self._update:  # started in compute_loss
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics of the steps since the last record to a record of the training loss."""
        if "loss" in logs:
            logs.update(self._read_metrics())
            if self._token_count is not None:
                self._token_count.report(self._sum_over_ranks)
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer removes all columns of a dataset that the model's forward does not name.
        super()._set_signature_columns_if_needed()
        known = self._signature_columns or []
        self._signature_columns = [*known, *(name for name in STEP_COLUMNS if name not in known)]

    def _own_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self._by_task:
            return super().compute_loss(*args, **kwargs)
        if self._token_count is not None:
            self._token_count.report(self._sum_over_ranks)
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, self._model_takes_items
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            self.model_accepts_loss_kwargs = accepts

    def _read_metrics(self) -> dict[str, float]:
        found = self._metrics_window.read(self._sum_over_ranks)
        scoring, updating = self._scoring.read(), self._updating.read()
        now = self.state.global_step, time.perf_counter()
        before, self._last_record = self._last_record, now
        if not found or before is None:
            return found
        steps, seconds = max(now[0] - before[0], 1), now[1] - before[1]
        if scoring:
            found["scoring_seconds"] = scoring / steps
        return {**found, "update_seconds": updating / steps, "update_share": updating / seconds}

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        total: Any = self.accelerator.reduce(sums, "sum")
        return total

    def first_row(self) -> int:
        """Index of this micro-batch's first row in its optimizer step, counted over all micro-batches and ranks."""
        step, micro_batch = self._micro_batch
        micro_batch = micro_batch + 1 if step == self.state.global_step else 0
        self._micro_batch = (self.state.global_step, micro_batch)
        ranks = self.accelerator.num_processes
        rows = self._train_batch_size // (ranks if self.accelerator.split_batches else 1)
        return (micro_batch * ranks + self.accelerator.process_index) * rows


class CGGRTrainer(CGGRMixin, Trainer):
    """The Hugging Face Trainer on the tokens worth learning from; see :class:`CGGRMixin`.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from cggr_train import CGGRConfig, CGGRTrainer
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4)
        >>> data = [{"input_ids": list(range(16)), "labels": list(range(16))}] * 4
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arguments = TrainingArguments(folder, max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
        ...     trainer = CGGRTrainer(
        ...         LlamaForCausalLM(config), arguments, train_dataset=data, cggr=CGGRConfig(min_tokens_ratio=0.5)
        ...     )
        ...     trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        1
    """


def _at_least_one(num_items: Tensor | int | None) -> Any:
    # A step without countable tokens has a loss of 0, not 0 / 0.
    if num_items is None:
        return None
    # An integer, since FSDP2's mixed precision would cast and round a float.
    return num_items.clamp(min=1).long() if isinstance(num_items, Tensor) else max(int(num_items), 1)
