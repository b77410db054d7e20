"""Fine-tuning a given model: finding it, and defaults for fine-tuning instead of pretraining."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from cggr_core.settings import SUPERVISED, RoutingSettings
from cggr_train.errors import InputError

HUB_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")
HUB_SECONDS = 4.0
"""Timeout for the hub's first response, in seconds."""
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Files to download: safetensors weights, configuration and tokenizer; no code."""
FROM_SCRATCH_RATE, FROM_SCRATCH_DECAY, FINE_TUNING_DECAY = 1e-3, 0.1, 0.01
RATES = ((1e9, 5e-5), (8e9, 2e-5))
"""Learning rates up to a number of parameters; 1e-5 beyond."""


class Defaults(NamedTuple):
    """Defaults of settings that were not given.

    Attributes:
        learning_rate: Peak learning rate.
        weight_decay: Weight decay of matrices.
        field: Keys of the text, or of the prompt if there is an answer.
        answer: Key of the answer, the only supervised part; None for plain text.
    """

    learning_rate: float
    weight_decay: float
    field: str
    answer: str | None


def defaults(
    model: str | None, *, learning_rate: float | None, weight_decay: float | None, field: str, answer: str | None
) -> Defaults:
    """Fill in defaults for fine-tuning a model or for training from scratch.

    In fine-tuning, the last of several fields is the answer, and the others are a masked prompt.

    Args:
        model: Directory of the model to fine-tune; None to train from scratch.
        learning_rate: What was given, or None.
        weight_decay: What was given, or None.
        field: Keys joined by commas.
        answer: Key of the answer, or None.

    Raises:
        InputError: If the model's configuration cannot be read.

    Example:
        >>> defaults(None, learning_rate=None, weight_decay=None, field="question,answer", answer=None)
        Defaults(learning_rate=0.001, weight_decay=0.1, field='question,answer', answer=None)
    """
    if model is None:
        rate, decay = FROM_SCRATCH_RATE, FROM_SCRATCH_DECAY
    else:
        rate = fine_tuning_rate(count_parameters(model)) if learning_rate is None else learning_rate
        decay = FINE_TUNING_DECAY
        prompt, comma, last = field.rpartition(",")
        if comma and answer is None:
            field, answer = prompt, last.strip()
    return Defaults(
        rate if learning_rate is None else learning_rate, decay if weight_decay is None else weight_decay, field, answer
    )


def default_selection(answers: str | None, *, by_score: bool) -> str:
    """Select all supervised tokens if prompts are masked: keeping part of them costs about as much and teaches less.

    Args:
        answers: Key of the only supervised part; None if every token is supervised.
        by_score: Whether a ratio or a score was requested.

    Example:
        >>> default_selection("answer", by_score=False), default_selection(None, by_score=False)
        ('supervised', 'stratified')
    """
    return SUPERVISED if answers is not None and not by_score else RoutingSettings.selection


def default_selections(answers: str | None, *, by_score: bool) -> tuple[str, ...]:
    """The selections of a study: the default of training, and one by score.

    Args:
        answers: See :func:`default_selection`.
        by_score: See :func:`default_selection`.

    Example:
        >>> default_selections("answer", by_score=False), default_selections(None, by_score=False)
        (('supervised', 'stratified'), ('stratified',))
    """
    return tuple(dict.fromkeys((default_selection(answers, by_score=by_score), RoutingSettings.selection)))


def announce(chosen: Defaults, warmup: float, messages: str | None = None) -> str:
    """One line that describes the fine-tuning run."""
    what = f"on {chosen.answer}, with {chosen.field} masked" if chosen.answer else "on every token of the text"
    what = "on the assistant's turns" if messages else what
    return f"fine-tuning {what}: learning rate {chosen.learning_rate:g}, warm-up over {warmup:.0%} of the budget"


def fine_tuning_rate(parameters: int) -> float:
    """Default learning rate for fine-tuning; smaller for larger models.

    Example:
        >>> fine_tuning_rate(135_000_000), fine_tuning_rate(3_000_000_000), fine_tuning_rate(70_000_000_000)
        (5e-05, 2e-05, 1e-05)
    """
    return next((rate for most, rate in RATES if parameters <= most), 1e-5)


def count_parameters(model: str) -> int:
    """Number of parameters of the model in a directory, from its configuration; no weights are read.

    Raises:
        InputError: If the configuration cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cggr_train.presets import check_model_folder, gguf_argument

    check_model_folder(model)
    config: Any = AutoConfig.from_pretrained(model, local_files_only=True, **gguf_argument(model))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()
    except ValueError as error:
        raise InputError(f"{model} has no causal language model: {str(error).strip().splitlines()[0]}") from error


def local_model(name: str) -> str:
    """The directory of a model: a path unchanged, or a name on the Hugging Face hub after downloading it.

    Args:
        name: Path of a directory, or ``OWNER/NAME`` on the hub.

    Raises:
        InputError: If there is no such directory and no such name, or the hub cannot be reached.
    """
    if Path(name).exists() or HUB_NAME.fullmatch(name) is None or "/" not in name:
        return name  # loading it reports what is wrong with a directory
    if Path(name).parent.is_dir():
        raise InputError(f"the model directory {name} does not exist (but {Path(name).parent} does)")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import get_session

    try:
        return snapshot_download(name, local_files_only=True, allow_patterns=FILES)
    except LocalEntryNotFoundError:
        pass
    advice = f"download it elsewhere (hf download {name} --local-dir DIRECTORY) and give that directory"
    try:
        url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
        answer = get_session().head(url, timeout=HUB_SECONDS, follow_redirects=True)
    except Exception as error:  # proxies, sockets and offline mode each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name} is not a directory, and the hub cannot be reached ({reason}); {advice}") from error
    if answer.status_code >= 400:
        raise InputError(
            f"{name} is not a directory, and the Hugging Face hub answers {answer.status_code} for that name: the "
            f"model does not exist or requires a login; {advice}"
        )
    return snapshot_download(name, allow_patterns=FILES)
