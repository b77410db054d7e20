"""Documents, masks and positions that a model's own code finds among the tokens, first met in a later batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from cggr_core import CGGRModel, Selection
from cggr_core.routing import findings
from cggr_core.routing.engine import Engine
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.tiny_models import ROUTABLE, grown

ROUTED = [("kv", "interleaved"), ("kv", "two_pass"), ("detached", "interleaved"), ("detached", "two_pass")]
EOS, VOCABULARY, ROWS, LENGTH = 2, 97, 2, 29


def config() -> LlamaConfig:
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
    return LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **tokens)


def document(ids: Tensor, end: int = EOS) -> Tensor:
    """The document of every token, ``[B, S]``; an end of text belongs to the document before it."""
    ends = (ids == end).long()
    return ends.cumsum(1) - ends


def restarting(ids: Tensor) -> Tensor:
    """Positions within documents, ``[B, S]``."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    first = torch.zeros_like(ids)
    first[:, 1:] = torch.where(ids[:, :-1] == EOS, places[:, 1:], 0)
    return places - first.cummax(1).values


class PositionsInModel(LlamaModel):
    """Numbers tokens within documents, which transformers takes for packed rows."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **given: Any) -> Any:
        return super().forward(input_ids=input_ids, position_ids=restarting(input_ids), **given)


class PositionsInRows(LlamaModel):
    """As above, only where there is an end of text."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **given: Any) -> Any:
        if (input_ids[:, :-1] == EOS).any():
            position_ids = restarting(input_ids)
        return super().forward(input_ids=input_ids, position_ids=position_ids, **given)


class PositionsBefore(LlamaForCausalLM):
    """In the forward of the whole model."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **given: Any) -> Any:
        return super().forward(input_ids=input_ids, position_ids=restarting(input_ids), **given)


def blocks(ids: Tensor) -> Tensor:
    """Whether a query sees a key, ``[B, 1, S, S]``."""
    found = document(ids)
    return (found[:, None, :, None] == found[:, None, None, :]) & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()


class MaskInModel(LlamaModel):
    """Builds a mask of documents."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **given: Any) -> Any:
        mask = torch.where(blocks(input_ids), 0.0, torch.finfo(torch.float32).min)
        return super().forward(input_ids=input_ids, attention_mask=mask, **given)


class MaskWhereNeeded(LlamaModel):
    """As above, only where there is an end of text."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **given: Any) -> Any:
        if (input_ids[:, :-1] == EOS).any():
            attention_mask = torch.where(blocks(input_ids), 0.0, torch.finfo(torch.float32).min)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)


class MaskWithoutCache(LlamaModel):
    """As above, only in training, which it takes for a forward without a cache."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **given: Any) -> Any:
        if given.get("past_key_values", given.get("cache")) is None:
            attention_mask = torch.where(blocks(input_ids), 0.0, torch.finfo(torch.float32).min)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)


class SegmentsInModel(LlamaModel):
    """Adds an embedding of the document to that of the token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.of_documents = nn.Embedding(16, config.hidden_size)

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **given: Any) -> Any:
        embedded = self.embed_tokens(input_ids) + self.of_documents(document(input_ids) % 16)
        return super().forward(inputs_embeds=embedded, **given)


class RestartingRotary(nn.Module):
    """Rotates by places within documents."""

    def __init__(self, config: LlamaConfig, model: LlamaModel) -> None:
        super().__init__()
        self.own = LlamaRotaryEmbedding(config)
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        self.places = restarting(given["input_ids"])

    def forward(self, hidden: Tensor, position_ids: Tensor, **given: Any) -> Any:
        return self.own(hidden, self.places, **given)


def of_kind(kind: type[LlamaModel]) -> Any:
    model = LlamaForCausalLM(config())
    model.model = kind(config())
    return model


def rotary_that_restarts() -> Any:
    model = LlamaForCausalLM(config())
    model.model.rotary_emb = RestartingRotary(config(), model.model)
    return model


class PassingOn(LlamaDecoderLayer):
    """Names the hidden states alone."""

    def forward(self, hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        return super().forward(hidden_states, *args, **given)


def positions_and_layers() -> Any:
    model = PositionsBefore(config())
    model.model.layers = nn.ModuleList(PassingOn(model.config, number) for number in range(2))
    return model


def positions_in_a_hook() -> Any:
    model = LlamaForCausalLM(config())

    def number(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        return args, {**given, "position_ids": restarting(given["input_ids"])}

    model.register_forward_pre_hook(number, with_kwargs=True)
    return model


EXACT: dict[str, Callable[[], Any]] = {
    "positions in the model": lambda: of_kind(PositionsInModel),
    "positions where needed": lambda: of_kind(PositionsInRows),
    "positions before": lambda: PositionsBefore(config()),
    "positions and layers": positions_and_layers,
    "positions in a hook": positions_in_a_hook,
    "mask in the model": lambda: of_kind(MaskInModel),
    "mask where needed": lambda: of_kind(MaskWhereNeeded),
    "mask without a cache": lambda: of_kind(MaskWithoutCache),
    "segments": lambda: of_kind(SegmentsInModel),
    "rotary": rotary_that_restarts,
}


def plain_tokens(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(7, VOCABULARY, (rows, length))


def with_documents() -> Tensor:
    ids = plain_tokens()
    ids[0, 9] = ids[0, 19] = ids[1, 13] = EOS
    return ids


def reference(name: str, model: Any, ids: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """The model whose code makes documents itself; or, as transformers makes none with a cache, a plain one."""
    if not name.startswith(("positions", "mask")):
        return model, {"input_ids": ids}
    plain = LlamaForCausalLM(config())
    plain.load_state_dict(model.state_dict())
    mask = torch.where(blocks(ids), 0.0, torch.finfo(torch.float32).min)
    positions = restarting(ids) if name.startswith("positions") else torch.arange(LENGTH).expand_as(ids)
    return plain.train(), {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize(("gradient", "engine"), [("exact", None), *ROUTED])
@pytest.mark.parametrize("name", EXACT)
def test_documents_of_a_later_batch(name: str, gradient: str, engine: str | None) -> None:
    model = grown(EXACT[name]())
    first, later = plain_tokens(), with_documents()
    routed = CGGRModel(model, gradient=gradient, engine=engine, selection="random").train()
    routed(first, labels=first)
    targets = pad(later[:, 1:], (0, 1), value=-100)
    kept = (targets != -100) & (torch.rand(targets.shape) < 0.4)
    plain, given = reference(name, model, later)
    loss, _ = reference_loss(
        plain, plain.model.layers, kept, kept / kept.sum(), targets.clamp(min=0), gradient=gradient, **given
    )
    loss.backward()
    expected = gradients(plain)
    selection = Selection.from_mask(kept, capacity=int(kept.sum(1).max()), countable=kept)
    value = routed(later, labels=later, selection=selection, num_items=int(kept.sum()))
    value.backward()
    torch.testing.assert_close(value, loss.detach(), rtol=1e-5, atol=1e-5)
    assert relative_error(gradients(model), expected) < 1e-5


@pytest.mark.parametrize(("gradient", "engine"), ROUTED)
def test_checkpointed_layers_are_given_the_cache(gradient: str, engine: str) -> None:
    ids = with_documents()
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = grown(PositionsBefore(config()))
        if checkpointed:
            model.model.layers = nn.ModuleList(map(checkpoint_wrapper, model.model.layers))
        routed = CGGRModel(model, gradient=gradient, engine=engine, selection="random").train()
        routed(ids, labels=ids).backward()
        found.append({name.replace("_checkpoint_wrapped_module.", ""): of for name, of in gradients(model).items()})
    assert relative_error(found[1], found[0]) < 1e-6


def ordinary_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize(("gradient", "engine"), [("exact", None), ("sequence", None), *ROUTED])
@pytest.mark.parametrize("name", EXACT)
def test_every_token_is_an_ordinary_step(name: str, gradient: str, engine: str | None) -> None:
    model = grown(EXACT[name]())
    first, later = plain_tokens(), with_documents()
    selection = "topk" if gradient == "sequence" else "random"
    routed = CGGRModel(model, gradient=gradient, engine=engine, selection=selection, min_tokens_ratio=1.0).train()
    routed(first, labels=first)
    value = routed(later, labels=later)
    torch.testing.assert_close(value, ordinary_loss(model, later).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ROUTABLE))
@pytest.mark.parametrize("packed", [False, True])
def test_code_around_layers_of_every_architecture(name: str, packed: bool) -> None:
    """A model's own code sees no cache, and its layers still get one."""
    model = ROUTABLE[name]()
    seen = []
    model.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    engine = Engine(model)
    ids = plain_tokens(length=17)
    position_ids = torch.arange(17).expand_as(ids) - torch.tensor([[0] * 8 + [8] * 9]) if packed else None
    engine.prepare(engine.inputs(input_ids=ids, position_ids=position_ids), routing=True)
    assert not any(given.get("use_cache") for given in seen) and "past_key_values" not in set().union(*seen)


class Mixed:
    """Adds the mean of a layer's tokens to each of them, once a forward's rows hold a token; ``found`` says which."""

    def __init__(self, found: Callable[[Tensor], Tensor]) -> None:
        self.found, self.mixes = found, False

    def note(self, module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        self.mixes = bool(self.found(given["input_ids"]).any())

    def mix(self, module: nn.Module, args: Any) -> Any:
        return (args[0] + args[0].mean(1, keepdim=True), *args[1:]) if self.mixes else None


class Separated(Mixed):
    """Reads its token off its class."""

    separator = 34

    def __init__(self) -> None:
        super().__init__(self.separates)

    def separates(self, ids: Tensor) -> Tensor:
        return ids == self.separator


TOKENS = torch.tensor([41, 43])


def of_a_variable(token: int) -> Callable[[Tensor], Tensor]:
    return lambda ids: ids == token


RARE: dict[str, Callable[[Tensor], Tensor]] = {
    "global": lambda ids: ids == EOS,
    "constant": lambda ids: ids == 31,
    "variable": of_a_variable(32),
    "list": lambda ids: torch.isin(ids, TOKENS),
    "called": lambda ids: document(ids, end=33) > 0,
    "attribute of a class": Separated().found,
    "threshold": lambda ids: ids >= VOCABULARY - 1,
    "added last": lambda ids: ids == VOCABULARY - 5 + len("ab"),
}


@pytest.mark.parametrize("name", RARE)
@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_tokens_that_change_a_layer_are_named_at_once(name: str, engine: str) -> None:
    model = grown(LlamaForCausalLM(config()))
    mixed = Mixed(RARE[name])
    model.register_forward_pre_hook(mixed.note, with_kwargs=True)
    model.model.layers[1].register_forward_pre_hook(mixed.mix)
    first = torch.randint(50, 80, (2, 13))
    routed = CGGRModel(model, gradient="kv", engine=engine, selection="random").train()
    with pytest.raises(ValueError, match=r"in code that is not transformers' own.*use gradient='exact'"):
        routed(first, labels=first)
    exact = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0).train()
    first[0, 5] = EOS
    torch.testing.assert_close(exact(first, labels=first), ordinary_loss(model, first).detach())


def test_the_token_is_in_the_message() -> None:
    model = grown(LlamaForCausalLM(config()))
    mixed = Mixed(RARE["constant"])
    model.register_forward_pre_hook(mixed.note, with_kwargs=True)
    model.model.layers[1].register_forward_pre_hook(mixed.mix)
    first = torch.randint(50, 80, (2, 13))
    with pytest.raises(ValueError, match="in rows that hold token 31 "):
        CGGRModel(model, gradient="kv").train()(first, labels=first)


def test_later_batches_are_compared_at_powers_of_two() -> None:
    """Two tokens in a row are not among the rows that a first comparison makes up."""
    model = grown(LlamaForCausalLM(config()))
    mixed = Mixed(lambda ids: (ids[:, 1:] == 60) & (ids[:, :-1] == 60))
    model.register_forward_pre_hook(mixed.note, with_kwargs=True)
    model.model.layers[1].register_forward_pre_hook(mixed.mix)
    routed = CGGRModel(model, gradient="kv").train()
    first = torch.randint(61, 80, (2, 13))
    for _ in range(3):
        routed(first, labels=first)
    later = first.clone()
    later[0, 3] = later[0, 4] = 60
    with pytest.raises(ValueError, match="different values for kept tokens"):
        routed(later, labels=later)


def test_models_of_transformers_alone_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    for look in ("probe", "probe_whole_rows", "probe_rare_tokens"):
        own = getattr(findings, look)

        def noted(*args: Any, own: Any = own, look: str = look, **named: Any) -> Any:
            compared.append(look)
            return own(*args, **named)

        monkeypatch.setattr(findings, look, noted)
    for hooked in (False, True):
        model = grown(LlamaForCausalLM(config()))
        if hooked:
            model.register_forward_pre_hook(lambda module, args: None)
        routed = CGGRModel(model, gradient="kv").train()
        first = plain_tokens()
        for _ in range(8):
            routed(first, labels=first)
        later = ["probe_rare_tokens", *["probe_whole_rows"] * 3] if hooked else []
        assert compared == ["probe", *later]
        compared.clear()
