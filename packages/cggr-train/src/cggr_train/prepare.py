"""The first half of a run: tokenizer, model and token store from the settings."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cggr_train.busy import busy
from cggr_train.data import (
    Conversations,
    Documents,
    TokenStore,
    build_example_store,
    build_token_store,
    check_chat_template,
    conversation_rows,
)
from cggr_train.data.documents import has_fields
from cggr_train.errors import InputError, SaveError
from cggr_train.learner import METHODS
from cggr_train.presets import build_config, build_model, check_model_folder, load_model
from cggr_train.settings import TrainSettings
from cggr_train.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare(
    settings: TrainSettings, folder: Path, console: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TokenStore]:
    """Read, check and write everything that training needs, cheap checks first.

    Args:
        settings: Settings of the run.
        folder: The run's folder; created if missing.
        console: Where stages are printed.

    Raises:
        InputError: If any input is invalid.
    """
    if settings.method not in METHODS:
        raise InputError(f"--method must be one of {', '.join(METHODS)}, got {settings.method!r}")
    field = settings.field if settings.answer is None else f"{settings.field},{settings.answer}"
    kind = Documents if settings.messages is None else Conversations
    field = settings.messages or field
    documents = kind(settings.data, field=field, skip_bad=settings.skip_bad)
    heldout = None
    if settings.heldout:
        heldout = kind(settings.heldout, field=field, skip_bad=settings.skip_bad)
    named = settings.messages or settings.answer
    if named is not None:
        plain = [path for source in (documents, heldout) if source for path in source.paths if not has_fields(path)]
        option = "--messages" if settings.messages else "--answer"
        if plain:
            raise InputError(
                f"{option} {named!r} is a key of JSON Lines or Parquet files, but {plain[0]} is plain text"
            )
    documents.check_first()
    if settings.config is not None:
        build_config(settings.config, vocab_size=settings.vocab_size, length=settings.length)
    if settings.model is not None:
        check_model_folder(settings.model)
    with nullcontext() if settings.model is None else busy(f"loading {settings.model}", console):
        tokenizer = _tokenizer(settings, documents, console)
        if settings.messages is not None:
            check_chat_template(tokenizer)
        model = _model(settings, tokenizer)
    tokenizer_name = f"the tokenizer in {settings.tokenizer or settings.model or folder}"
    embedding: Any = model.get_input_embeddings()
    check_vocabulary(tokenizer, embedding.weight.shape[0], name=tokenizer_name)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be created: {error.strerror or error}") from error
    try:
        tokenizer.save_pretrained(folder / "tokenizer")
        build = build_token_store if named is None else build_example_store
        if settings.messages is not None:
            build = partial(build_example_store, rows=conversation_rows)
        with busy("tokenizing", console):
            tokens = build(
                documents, tokenizer, folder / "tokens",
                length=settings.length, heldout_fraction=settings.heldout_fraction, heldout_documents=heldout,
            )  # fmt: skip
    except OSError as error:  # unreadable data raised another error before
        raise SaveError(f"the text's tokens could not be written to {folder}: {error.strerror or error}") from error
    left_out = "bad lines" if named is None else "examples that are bad or longer than --length"
    skipped = f", [yellow]{tokens.skipped:,} {left_out} left out[/]" if tokens.skipped else ""
    console.print(
        f"{tokens.documents:,} documents, {len(tokens.train):,} tokens to train on, "
        f"{len(tokens.heldout):,} held out{skipped}",
        highlight=False,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{type(model).__name__} with {parameters / 1e6:,.1f}M parameters", highlight=False)
    return model, tokenizer, tokens


def prepared(settings: TrainSettings, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TokenStore]:
    """Load what :func:`prepare` wrote into the run's folder, in the other processes of the run."""
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    return _model(settings, tokenizer), tokenizer, TokenStore.open(folder / "tokens")


def _tokenizer(settings: TrainSettings, documents: Documents, console: Console) -> PreTrainedTokenizerBase:
    if settings.tokenizer is not None:
        return load_tokenizer(settings.tokenizer)
    if settings.model is not None:
        try:
            return load_tokenizer(settings.model)
        except InputError as error:
            raise InputError(f"{error}; give its tokenizer with --tokenizer") from error
    with busy(f"training a byte-level BPE of {settings.vocab_size:,} tokens", console):
        return train_tokenizer(documents, vocab_size=settings.vocab_size)


def _model(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if settings.model is None:
        assert settings.config is not None
        config = build_config(settings.config, vocab_size=len(tokenizer), length=settings.length)
        return build_model(config, seed=settings.seed)
    model = load_model(settings.model)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and settings.length > longest:
        raise InputError(
            f"--length must be at most {longest:,}, the maximum length of the model in {settings.model}, "
            f"got {settings.length:,}"
        )
    return model
