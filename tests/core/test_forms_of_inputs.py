"""Inputs that concern whole rows, in every mode: masks per query, several kinds of positions, noise on embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from cggr_core import CGGRModel, Selection, loss_coefficients
from cggr_core.routing.architectures import describe
from cggr_core.targets import align_labels
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

LENGTH = 12
ROUTED = [(gradient, engine) for gradient in ("kv", "detached") for engine in ("interleaved", "two_pass")]


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(10, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def hold_to_reference(model: PreTrainedModel, gradient: str, engine: str | None, seed: int = 0, **inputs: Any) -> None:
    input_ids = inputs["input_ids"]
    targets = align_labels(input_ids, shifted=True, vocab_size=VOCAB)
    mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    mask[0, 1::3], mask[1:, 4::5] = True, True
    mask &= targets.countable
    selection = Selection.from_mask(mask, countable=targets.countable, capacity=4)
    coefficients = torch.zeros(mask.shape).scatter_(1, selection.index, loss_coefficients(selection, targets.countable))
    torch.manual_seed(seed)
    wanted, _ = reference_loss(
        model, describe(model).layers, mask, coefficients, targets.tokens, gradient=gradient, **inputs
    )
    wanted.backward()
    expected = gradients(model)
    wrapped = CGGRModel(model, gradient=gradient, engine=engine, selection="random")
    torch.manual_seed(seed)
    loss = wrapped(**inputs, labels=input_ids, selection=selection)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert relative_error(gradients(model), expected) <= 2e-6


def qwen2_vl() -> PreTrainedModel:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    special = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def kinds_of_positions(rows: int, kinds: int) -> Tensor:
    time = torch.arange(LENGTH)
    if kinds == 4:  # the text's first, of two packed documents
        time = torch.cat([time[:5], time[: LENGTH - 5]])
    positions = torch.stack([time, time // 2, time // 3])[:, None] * torch.arange(1, rows + 1)[None, :, None]
    return positions if kinds == 3 else torch.cat([time.expand(1, rows, -1), positions])


# With the cache of the reference for "detached", transformers does not look for packed documents.
@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize(
    ("gradient", "engine", "kinds"),
    [
        (gradient, engine, kinds)
        for gradient, engine in [("exact", None), *ROUTED]
        for kinds in (3, 4)
        if (gradient, kinds) != ("detached", 4)
    ],
)
def test_positions_of_several_kinds(gradient: str, engine: str | None, kinds: int, rows: int) -> None:
    inputs = {"input_ids": tokens(rows), "position_ids": kinds_of_positions(rows, kinds)}
    hold_to_reference(qwen2_vl(), gradient, engine, **inputs)


@pytest.mark.parametrize("rows", [2, 3])
def test_kept_rows_have_their_positions_and_masks(rows: int) -> None:
    mask = torch.ones(LENGTH, LENGTH).tril().bool().repeat(rows, 1, 1, 1)
    mask[0, :, 5:, 3] = False
    positions = kinds_of_positions(rows, 3)
    for model, name, given, place in (
        (ROUTABLE["llama"](), "attention_mask", mask, 0),
        (qwen2_vl(), "position_ids", positions, 1),
    ):
        wrapped = CGGRModel(model, gradient="sequence", min_tokens_ratio=1 / rows, selection="random")
        loss = wrapped(tokens(rows), labels=tokens(rows), **{name: given}).detach()
        alone = [
            model(
                input_ids=tokens(rows)[row : row + 1],
                labels=tokens(rows)[row : row + 1],
                **{name: given.narrow(place, row, 1)},
            ).loss.detach()
            for row in range(rows)
        ]
        assert min(float((loss - own).abs()) for own in alone) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_for_every_query(dtype: torch.dtype) -> None:
    seen = torch.ones(LENGTH, LENGTH).tril().bool().repeat(2, 1, 1, 1)
    seen[0, :, 5:, 3] = False
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    hold_to_reference(ROUTABLE["llama"](), "exact", None, **inputs)
    model = CGGRModel(ROUTABLE["llama"](), gradient="kv", selection="random")
    with pytest.raises(ValueError, match=r"^attention_mask must be \[2, 12\].*got \[2, 1, 12, 12\].*gradient='exact'"):
        model(**inputs, labels=tokens())


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
def test_noise_on_embeddings_is_drawn_for_whole_rows(gradient: str) -> None:
    """NEFTune, whose size depends on the number of tokens; in one pass it is that of a plain forward."""
    model = ROUTABLE["llama"]()

    def noisy(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not (module.training or gradient == "exact"):  # in every mode it could not be told from a difference
            return output
        size = 5.0 / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-size, size)

    model.get_input_embeddings().register_forward_hook(noisy)
    hold_to_reference(model, gradient, None if gradient == "exact" else "interleaved", input_ids=tokens())


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached", "sequence"])
@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        ("bert-masked", {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}),
        ("mixtral", {"router_jitter_noise": 0.1, "attention_dropout": 0.1}),
    ],
)
def test_dropout_draws_as_in_the_models_own_step(name: str, rates: dict[str, float], gradient: str) -> None:
    """If everything is kept, a seed gives the model's own loss, and leaves the generator in the same state."""
    model = ROUTABLE[name](**rates)
    wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0)
    for seed in range(2):  # the first step looks at the model
        torch.manual_seed(seed)
        own = model(input_ids=tokens(), labels=tokens()).loss
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        loss = wrapped(tokens(), labels=tokens())
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)


END = 2  # of a document


def of_documents(input_ids: Tensor) -> Tensor:
    """Positions that restart after every end of a document."""
    places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return places - torch.where(pad(input_ids[:, :-1] == END, (1, 0)), places, 0).cummax(1).values


class Packing(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, position_ids: Any = None, **arguments: Any) -> Any:
        position_ids = of_documents(input_ids) if position_ids is None else position_ids
        return super().forward(input_ids=input_ids, position_ids=position_ids, **arguments)


def by_a_subclass(model: Any) -> None:
    model.__class__ = Packing


def by_a_hook(model: Any) -> None:
    def give(module: Any, args: Any, arguments: dict[str, Any]) -> Any:
        return args, {**arguments, "position_ids": of_documents(arguments["input_ids"])}

    model.model.register_forward_pre_hook(give, with_kwargs=True)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("gradient", ["exact", "sequence"])
@pytest.mark.parametrize("pack", [by_a_subclass, by_a_hook])
def test_documents_that_a_model_finds_itself(pack: Callable[[Any], None], gradient: str, after: int, rows: int) -> None:
    """Code around a model's layers may derive positions from the tokens, though no caller says that rows are packed."""
    model: Any = ROUTABLE["llama"]()
    routed = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0)
    input_ids = torch.randint(3, VOCAB, (rows, 17))
    input_ids[:, 9] = input_ids[0, 13] = END
    for _ in range(after):
        routed(input_ids, labels=input_ids)
    packed = {"position_ids": of_documents(input_ids), "use_cache": False}
    expected = model(input_ids=input_ids, labels=input_ids, **packed).loss
    assert abs(expected - model(input_ids=input_ids, labels=input_ids, use_cache=False).loss) > 1e-3
    pack(model)
    torch.testing.assert_close(routed(input_ids, labels=input_ids), expected)
