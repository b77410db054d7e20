"""When values of two computations count as the same, and what they are compared on, case by case."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cggr_core import Selection
from cggr_core.routing import agreement, loss_agreement
from cggr_core.routing import structure as structures
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE, VOCAB

ARCHITECTURE = SimpleNamespace(head=SimpleNamespace(fused=True), layers=nn.ModuleList())


def rows(batch, length, padding=None, **more):
    return SimpleNamespace(
        shape=(batch, length), padding=padding, position_ids=torch.zeros(batch, length, dtype=torch.int64), **more
    )


@pytest.mark.parametrize(
    ("length", "alternate", "early"),
    [(1, [0], [0]), (2, [1], [0]), (3, [0, 2], [0, 1]), (6, [1, 3, 5], [0, 1, 2]), (7, [0, 2, 4, 6], [0, 1, 2, 3])],
)
def test_tokens_that_are_compared(length, alternate, early):
    for made, wanted in (
        (agreement.alternate_tokens(rows(3, length)), alternate),
        (agreement.early_tokens(rows(3, length)), early),
    ):
        assert made.index.tolist() == [wanted] * 3
        assert made.valid.all()


def test_a_pass_before_the_kept_tokens_is_compared_with_it(monkeypatch):
    passes, expected = [], torch.randn(1, 4, 8)
    selection = Selection.from_mask(torch.ones(1, 4, dtype=torch.bool), capacity=4)

    def context_pass(model, architecture, inputs, *, depth, keep_graph, read_head, layer_output):
        passes.append((depth, keep_graph, layer_output))
        return "context"

    def gradient_pass(model, architecture, inputs, selection, context, *, keep_graph, read_head):
        passes.append((context, keep_graph))
        read_head(expected)

    monkeypatch.setattr(agreement, "context_pass", context_pass)
    monkeypatch.setattr(agreement, "gradient_pass", gradient_pass)
    given = nn.Identity(), ARCHITECTURE, rows(1, 4), selection, expected
    assert agreement.difference(*given, depth=2, layer_output="wrap") is None
    assert passes == [(2, False, "wrap"), ("context", False)]


def test_infinities_are_apart_from_other_values_alone():
    inf = float("inf")
    value, wanted = torch.tensor([inf, -inf, inf, 1.0]), torch.tensor([inf, -inf, -inf, 3.0])
    assert agreement.apart(value, wanted).tolist() == [0.0, 0.0, inf, -2.0]
    assert agreement.finite(value).tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("dtype", "of_layers", "tolerance"),
    [
        (torch.float64, [torch.float64], (1e-7, 1.0)),
        (torch.float64, [torch.float64, torch.int8], (1e-7, 1.0)),
        (torch.float64, [torch.float32], (1e-7, 1.0)),
        (torch.float32, [torch.float64], (2e-4, 0.99)),
        (torch.float64, [torch.bfloat16], (5e-2, 0.75)),
    ],
)
def test_the_tolerance_is_that_of_the_least_precise_part(dtype, of_layers, tolerance):
    layers = nn.ModuleList(nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=each), False)]) for each in of_layers)
    architecture = SimpleNamespace(layers=layers)
    assert agreement._tolerance(architecture, torch.zeros(1, dtype=dtype)) == tolerance
    on_device = torch.zeros(1, dtype=dtype, device="meta")
    assert agreement._tolerance(architecture, on_device) == (tolerance if dtype == torch.float64 else (1e-2, 0.75))


@pytest.mark.parametrize(("value", "steps"), [("", None), ("1", 1), ("2", 2), ("10", 10)])
def test_steps_between_comparisons(value, steps, monkeypatch):
    monkeypatch.setenv("CGGR_VERIFY", value)
    assert agreement.verification_interval() == steps


def compared(monkeypatch, change, *, dtype=torch.float64, padding=None, tokens=400, scale=1.0):
    """What ``difference`` says where the gradient pass gives ``change`` of the plain forward's values."""
    expected = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(0)).to(dtype) * scale
    selection = Selection.from_mask(torch.ones(1, tokens, dtype=torch.bool), capacity=tokens)

    def gradient_pass(model, architecture, inputs, selection, context, *, keep_graph, read_head):
        assert context is agreement.NO_CONTEXT and not keep_graph
        read_head(change(expected.clone()))

    monkeypatch.setattr(agreement, "gradient_pass", gradient_pass)
    return agreement.difference(
        nn.Identity(), ARCHITECTURE, rows(1, tokens, padding), selection, expected, depth=0, layer_output=None
    )


def off(share, error):
    """The first ``share`` of the rows, wrong by a relative ``error`` each."""

    def change(values):
        count = round(share * values.shape[1])
        values[:, :count] = values[:, :count] * (1 + error)
        return values

    return change


@pytest.mark.parametrize(
    ("dtype", "share", "error", "same"),
    [
        (torch.float64, 1.0, 0.9e-7, True),
        (torch.float64, 1 / 400, 1.2e-7, False),  # every row counts
        (torch.float32, 1.0, 1e-4, True),
        (torch.float32, 1.0, 4e-4, False),
        (torch.float32, 0.005, 1.0, True),  # a few rows may fall on the other side of a router's choice
        (torch.float32, 0.02, 1.0, False),
        (torch.bfloat16, 1.0, 0.02, True),
        (torch.bfloat16, 1.0, 0.1, False),
        (torch.bfloat16, 0.2, 1.0, True),
        (torch.bfloat16, 0.3, 1.0, False),
    ],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_tolerance_follows_the_dtype(dtype, share, error, same, scale, monkeypatch):
    said = compared(monkeypatch, off(share, error), dtype=dtype, scale=scale)
    assert (said is None) is same
    if said is not None:
        assert said.startswith("relative error ") and ", tolerance " in said


def test_under_autocast_the_tolerance_is_that_of_half_precision(monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        assert compared(monkeypatch, off(1.0, 0.02), dtype=torch.float32) is None
    assert compared(monkeypatch, off(1.0, 0.02), dtype=torch.float32) is not None


def test_float32_values_of_layers_in_half_precision_have_its_tolerance(monkeypatch):
    monkeypatch.setattr(ARCHITECTURE, "layers", nn.ModuleList([nn.Linear(2, 2, dtype=torch.bfloat16)]))
    assert compared(monkeypatch, off(1.0, 0.02), dtype=torch.float32) is None
    assert compared(monkeypatch, off(1.0, 0.1), dtype=torch.float32) is not None


def test_the_error_that_is_said_is_the_one_there_is(monkeypatch):
    assert compared(monkeypatch, off(0.5, 0.25)) == "relative error 0.25, tolerance 1e-07"

    def zero(values):
        values[0, 0] = 0
        return values

    assert compared(monkeypatch, zero) == "relative error 1, tolerance 1e-07"


def test_rows_without_a_number_agree_where_both_have_none(monkeypatch):
    expected = torch.ones(1, 4, 3, dtype=torch.float64)
    expected[0, 1, 2] = torch.nan
    selection = Selection.from_mask(torch.ones(1, 4, dtype=torch.bool), capacity=4)
    value = expected.clone()
    monkeypatch.setattr(agreement, "gradient_pass", lambda *_, read_head, **__: read_head(value))

    def said():
        return agreement.difference(
            nn.Identity(), ARCHITECTURE, rows(1, 4), selection, expected, depth=0, layer_output=None
        )

    assert said() is None
    value[0, 2, 0] = torch.nan
    assert said() is not None
    value = expected.nan_to_num(0.0)
    assert said() is not None


def test_rows_of_zeros_agree(monkeypatch):
    assert compared(monkeypatch, lambda values: values, scale=0.0) is None


def test_padding_and_empty_slots_are_not_compared(monkeypatch):
    padding = torch.ones(1, 40, dtype=torch.int64)
    padding[0, :10] = 0
    assert compared(monkeypatch, off(0.25, 1.0), tokens=40) is not None
    assert compared(monkeypatch, off(0.25, 1.0), tokens=40, padding=padding) is None
    assert compared(monkeypatch, off(0.3, 1.0), tokens=40, padding=padding) is not None
    assert compared(monkeypatch, off(1.0, 1.0), tokens=40, padding=padding * 0) is None
    said = compared(monkeypatch, lambda values: values[:, :-1], tokens=40)
    assert said is not None and said.endswith("[1, 39, 8] instead of [1, 40, 8]")


class Jittered(nn.Module):
    """Noise from a rate of its own, or from nothing that can be switched off."""

    def __init__(self, jitter_noise: float | None):
        super().__init__()
        self.jitter_noise = jitter_noise

    def forward(self, given):
        if not self.training:
            return given
        return given + torch.rand(()) * (1.0 if self.jitter_noise is None else self.jitter_noise)


@pytest.mark.parametrize(
    ("noise", "training", "modes", "seen_in"),
    [
        (nn.Dropout(0.0), True, [True] * 2, True),
        (nn.Dropout(0.5), True, [True] * 4, True),
        (Jittered(0.3), True, [True] * 4, True),
        (Jittered(None), True, [True] * 4 + [False], False),
        (nn.Dropout(0.5), False, [False], False),
    ],
)
def test_values_are_compared_in_a_mode_that_gives_them_again(noise, training, modes, seen_in):
    model = nn.Sequential(nn.Linear(4, 4), noise).train(training)
    model[0].eval()  # as a part that is frozen
    given, calls = torch.randn(3, 4), []
    rates = {name: value for name, value in vars(noise).items() if isinstance(value, float)}

    def run(model, architecture, inputs):
        calls.append(model.training)
        return model(given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_head_values", run)
        state = torch.get_rng_state()
        with agreement.comparable(model, ARCHITECTURE, rows(1, 3)) as expected:
            assert torch.equal(expected, model(given)) and not expected.requires_grad
            assert model.training is seen_in
        assert model.training is training and not model[0].training
        assert {name: getattr(noise, name) for name in rates} == rates
        assert torch.equal(state, torch.get_rng_state())
        # A second look where the mode may matter alone.
        assert calls == modes


@pytest.mark.parametrize(
    ("own", "ours", "dtype", "autocast", "same"),
    [
        (0.5, 0.5 + 0.9e-5, torch.float32, False, True),
        (0.5, 0.5 + 1.2e-5, torch.float32, False, False),
        (0.5, 0.5 - 1.2e-5, torch.float64, False, False),
        (100.0, 100.0 + 9e-4, torch.float64, False, True),
        (100.0, 100.0 + 2e-3, torch.float64, False, False),
        (-100.0, -100.0 + 9e-4, torch.float64, False, True),
        (2.0, 2.015, torch.bfloat16, False, True),
        (2.0, 2.03, torch.bfloat16, False, False),
        (2.0, 2.015, torch.float32, True, True),
    ],
)
def test_two_losses_are_the_same(own, ours, dtype, autocast, same):
    logits = torch.zeros(1, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert loss_agreement.same_loss(torch.tensor(own, dtype=torch.float64), ours, logits) is same


def test_a_loss_in_half_precision_has_its_tolerance_whatever_the_logits_are():
    assert loss_agreement.same_loss(torch.tensor(2.0, dtype=torch.bfloat16), 2.015, torch.zeros(1))


def labelled(input_ids, padding=None, *, embeds=None, masked=False, **settings):
    config = SimpleNamespace(**settings)
    config.get_text_config = lambda: config

    def forward(input_ids, attention_mask=None):
        pass

    base = SimpleNamespace(
        config=config,
        get_output_embeddings=lambda: nn.Linear(4, VOCAB),
        forward=forward if masked else lambda input_ids: None,
    )
    per_token = {"input_ids": input_ids} if embeds is None else {"inputs_embeds": embeds}
    return loss_agreement._few_labelled_tokens(
        base, SimpleNamespace(per_token=per_token, padding=padding), loss_agreement._TOKENS
    )


def test_the_tokens_that_a_loss_is_tried_on():
    input_ids = torch.arange(3, 33).view(3, 10)
    given, labels = labelled(input_ids)
    assert torch.equal(given["input_ids"], input_ids[:2, :8]) and set(given) == {"input_ids"}
    wanted = input_ids[:2, :8].clone()
    wanted[:, 3] = wanted[1, 5] = -100
    assert torch.equal(labels, wanted)
    # A special token is a target like any other.
    wanted[0, 2] = 0
    assert torch.equal(labelled(input_ids, pad_token_id=0)[1], wanted)
    for outside in (-1, VOCAB, None, [], "0", True):
        assert labelled(input_ids, pad_token_id=outside)[1][0, 2] == input_ids[0, 2]
    assert labelled(input_ids, pad_token_id=VOCAB - 1)[1][0, 2] == VOCAB - 1
    wanted[1, 2], wanted[0, 4], wanted[1, 4], wanted[0, 6], wanted[1, 6] = 90, 91, 2, 92, 93
    specials = {"size": 95, "bos_token_id": 2, "x_token_index": 92, "pad_token_id": 0, "y_token_ids": [90, 93, 94]}
    assert torch.equal(labelled(input_ids, eos_token_id=[90, 91], **specials)[1], wanted)
    assert torch.equal(labelled(input_ids[:2], eos_token_id=[90, 91], **specials)[1], wanted)
    assert labelled(input_ids[:, :2], pad_token_id=0)[1].tolist() == input_ids[:2, :2].tolist()
    assert labelled(input_ids[:, :3], pad_token_id=0)[1].tolist() == [[3, 4, 0], [13, 14, 15]]
    assert labelled(input_ids[:, :4])[1].tolist() == [[3, 4, 5, -100], [13, 14, 15, -100]]
    assert torch.equal(input_ids, torch.arange(3, 33).view(3, 10))
    # A single row is two.
    given, labels = labelled(input_ids[:1, :6])
    assert torch.equal(given["input_ids"], input_ids[[0, 0], :6])
    assert labels.tolist() == [[3, 4, 5, -100, 7, 8], [3, 4, 5, -100, 7, -100]]


@pytest.mark.parametrize("padding", [None, torch.zeros(3, 10, dtype=torch.int64), torch.zeros(3, 10).bool()])
def test_the_tokens_that_a_loss_is_tried_on_are_attended_to_but_for_one(padding):
    for masked in (True, False):
        given, labels = labelled(torch.arange(3, 33).view(3, 10), padding, masked=masked)
        if padding is None and not masked:
            assert "attention_mask" not in given
            continue
        wanted = torch.ones(2, 8, dtype=torch.int64 if padding is None else padding.dtype)
        wanted[0, 7] = 0
        assert torch.equal(given["attention_mask"], wanted) and given["attention_mask"].dtype == wanted.dtype
        assert labels[0, 7] == 10
    for length, last in ((4, 1), (5, 0)):
        given, _ = labelled(torch.arange(3, 33).view(3, 10)[:, :length], masked=True)
        assert given["attention_mask"].tolist() == [[*[1] * (length - 1), last], [1] * length]


def test_embeddings_have_labels_too():
    given, labels = labelled(None, embeds=torch.randn(3, 9, 4))
    assert given["inputs_embeds"].shape == (2, 8, 4)
    wanted = torch.arange(16).view(2, 8) % VOCAB
    wanted[:, 3] = wanted[1, 5] = -100
    assert torch.equal(labels, wanted)


def test_placeholders_of_images_become_other_tokens():
    inner = SimpleNamespace(audio_token_id=1, eoi_token_index=2, hidden_size=5, image_size=7, image_token_id="6")
    config = SimpleNamespace(image_token_id=0, bos_token_id=4, get_text_config=lambda: inner)
    input_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    assert loss_agreement.text_alone(input_ids, config).tolist() == [[3, 3, 3, 3, 4, 5, 6, 7]]
    plain = SimpleNamespace(bos_token_id=0, hidden_size=4)
    plain.get_text_config = lambda: plain
    assert loss_agreement.text_alone(input_ids, plain) is input_ids


def test_which_arguments_only_a_loss_reads():
    def loss_function(
        logits, labels, vocab_size, input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids, focal_gamma
    ):
        raise AssertionError("not called")

    model = SimpleNamespace(loss_function=loss_function)
    # What the model reads besides is no argument of its loss alone.
    read = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids", "labels", "vocab_size")
    given = {**dict.fromkeys(read, 1), "use_cache": 5}
    assert loss_agreement.loss_arguments(model, given) == {}
    of_loss = {"num_items_in_batch": 6, "ignore_index": 7, "focal_gamma": 8, "my_labels": 9, "reduction": "sum"}
    of_loss |= {"shift_labels": 1, "label_smoothing": 0.1, "class_weights": 2}
    assert loss_agreement.loss_arguments(model, given | of_loss) == of_loss
    assert loss_agreement.loss_arguments(SimpleNamespace(), {"focal_gamma": 8, "reduction": "sum"}) == {
        "reduction": "sum"
    }


@pytest.mark.parametrize("name", ["router_aux_loss_coef", "aux_loss_coef", "router_aux_loss_coefficient"])
@pytest.mark.parametrize("place", ["model", "config"])
def test_an_auxiliary_loss_is_weighted_by_whichever_name_its_weight_has(name, place):
    config = SimpleNamespace()
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config)
    output = SimpleNamespace(aux_loss=torch.tensor(4.0))
    with pytest.raises(ValueError, match="returns an auxiliary loss"):
        loss_agreement.auxiliary_loss(model, output)
    setattr(model if place == "model" else config, name, 0.25)
    assert loss_agreement.auxiliary_loss(model, output) == 1.0
    for none in (SimpleNamespace(aux_loss=None), SimpleNamespace(aux_loss=4.0), SimpleNamespace()):
        assert loss_agreement.auxiliary_loss(model, none) is None


def test_a_structure_is_its_modules_and_settings():
    model = ROUTABLE["llama"]()
    before = structures.structure(model)
    assert before == structures.structure(model)
    modules = [part for part in before if isinstance(part, nn.Module)]
    assert {id(part) for part in modules} == {id(part) for part in model.modules()}
    # Each module once as part of the tree; head and embeddings once more, as such. Each forward of a class once.
    assert len(modules) == len(list(model.modules())) + 2

    def changed(change, undo):
        change()
        found = structures.structure(model) != before
        undo()
        assert structures.structure(model) == before
        return found

    attention, own = model.model.layers[1].self_attn, model.model.layers[1].self_attn.q_proj
    assert changed(lambda: setattr(attention, "q_proj", nn.Linear(1, 1)), lambda: setattr(attention, "q_proj", own))
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_router_logits"):
        assert changed(
            lambda name=name: setattr(model.config, name, 3.0), lambda name=name: delattr(model.config, name)
        )
    for name in ("loss_type", "logit_scale", "_loss_function"):
        was = model.__dict__.get(name)
        assert changed(
            lambda name=name: model.__dict__.update({name: "other"}),
            lambda name=name, was=was: model.__dict__.pop(name) if was is None else model.__dict__.update({name: was}),
        )
    removed = []
    for part in (model, attention, model.model.layers[2]):
        for register in (part.register_forward_hook, part.register_forward_pre_hook):
            assert changed(
                lambda register=register: removed.append(register(lambda *_: None)), lambda: removed.pop().remove()
            )
    mlp = model.model.layers[0].mlp
    assert changed(lambda: setattr(mlp, "forward", lambda hidden: hidden), lambda: delattr(mlp, "forward"))
    kind, forward = type(mlp), type(mlp).forward
    assert changed(lambda: setattr(kind, "forward", lambda *_: 0), lambda: setattr(kind, "forward", forward))
    hooks = nn.modules.module
    assert changed(
        lambda: removed.append(hooks.register_module_forward_hook(lambda *_: None)), lambda: removed.pop().remove()
    )
    assert changed(
        lambda: removed.append(hooks.register_module_forward_pre_hook(lambda *_: None)), lambda: removed.pop().remove()
    )


def test_settings_that_are_changed():
    model = ROUTABLE["llama"]()
    layer, model.loss = model.model.layers[0], nn.Module()
    layer.mlp.p, model.loss.gamma, layer.mlp.drop = 0.5, 2.0, nn.Dropout(0.5)
    settings = structures.Settings(model)
    assert settings.changed() is False
    for holder, name, value in (
        (layer.self_attn, "scaling", 0.3),
        (layer.mlp, "p", 0.25),
        (layer.mlp.drop, "inplace", True),
        (model.config, "rms_norm_eps", 1e-3),
        (model.config, "of_today", "new"),
        (model, "of_today", 3),
        (model.loss, "gamma", 1.0),
        (model.loss, "of_today", None),
        (model.loss, "of_today", False),
    ):
        setattr(holder, name, value)
        assert (settings.changed(), settings.changed()) == (name != "of_today" or value is not None, False), name
    del model.config.of_today
    assert settings.changed() is True
    # Noise, what is a module's own business, switches of a forward that leave its values, and what is no plain value.
    layer.mlp.drop.p, layer.self_attn.attention_dropout, layer.mlp._count, layer.mlp.jitter_noise = 0.1, 0.2, 3, 0.4
    model.config.use_cache, model.config.attention_dropout, model._of_today, model.config.of_today = False, 0.3, 5, [1]
    model.eval()
    assert settings.changed() is False
    assert structures.Settings(ROUTABLE["llama"]()).changed() is False


def test_a_setting_that_changes_in_every_step_counts_less_and_less():
    model = ROUTABLE["llama"]()
    settings, found = structures.Settings(model), []
    for step in range(1, 34):
        model.config.temperature = model.model.layers[1].self_attn.scaling = float(step)
        found.append(settings.changed())
    assert [step for step, counts in enumerate(found, 1) if counts] == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
    model.config.temperature = 0.0
    model.model.layers[2].self_attn.scaling = 7.0
    assert settings.changed() is True, "the other one did not change before"


def test_a_head_of_its_own_is_a_change_of_structure():
    model = ROUTABLE["llama"]()
    before = structures.structure(model)
    model.lm_head.forward = lambda hidden: hidden
    assert structures.structure(model) != before
    del model.lm_head.forward
    assert structures.structure(model) == before
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert structures.structure(model) != before
    handle.remove()
    assert structures.structure(model) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "get_output_embeddings", lambda: None)
        assert structures.structure(model)[:2] == [None, False]


def test_modules_in_several_places_and_empty_places_are_looked_at_once():
    model = ROUTABLE["llama"]()
    before = structures.structure(model)
    model.model.register_module("nothing", None)
    assert structures.structure(model) == before
    model.model.again = model.lm_head
    model.model.layers[0].whole = model.model  # a circle
    modules = [part for part in structures.structure(model) if isinstance(part, nn.Module)]
    assert len(modules) == len({id(part) for part in modules}) + 2


def test_hooks_of_torch_itself_are_no_change_of_structure():
    model = ROUTABLE["llama"]()
    before = structures.structure(model)

    def observe(*_):
        return None

    for owner in ("torch.utils.module_tracker", "transformers.utils.output_capturing"):
        observe.__module__ = owner
        hooks = (
            nn.modules.module.register_module_forward_pre_hook(observe),
            model.lm_head.register_forward_hook(observe),
        )
        try:
            assert structures.structure(model)[2:] == before[2:], "a hook on the head is seen there"
        finally:
            for hook in hooks:
                hook.remove()
    assert model(tokens()).logits.shape[-1] == VOCAB


def test_the_error_gives_the_loss_with_either_alignment():
    base = nn.Identity()
    base.config = SimpleNamespace(get_text_config=SimpleNamespace)
    kinds = [(False, True), (False, False), (True, True), (True, False)]
    for of_kind in (kinds, kinds[::-1]):
        found = {loss_agreement.Alignment(*kind): 1.0 + sum(kind) + 2 * kind[0] for kind in of_kind}
        said = str(loss_agreement.another_loss(base, "on 16 tokens", torch.tensor(9.5), found))
        shifted, unshifted = (5, 2) if of_kind is kinds else (4, 1)
        assert f"on 16 tokens it is 9.5, cross-entropy {shifted} with shifted labels and {unshifted} without" in said
        assert "(it has an additional term, another weighting or other ignored labels)" in said


def test_what_a_routed_step_makes_of_logits():
    logits, labels = torch.randn(2, 6, 9).bfloat16(), torch.randint(9, (2, 6))
    labels[0, 2] = labels[1] = -100
    output, items = SimpleNamespace(), torch.tensor(7.0)
    for shifted in (True, False):
        targets, predictions = (labels[:, 1:], logits[:, :-1]) if shifted else (labels, logits)
        nll = -predictions.double().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
        nll, count = nll[targets != -100].sum().item(), (targets != -100).sum().item()
        for divided, by in ((None, count), (items, 7)):
            found = loss_agreement.routed_loss(nn.Identity(), output, logits, labels, shifted=shifted, items=divided)
            assert found == pytest.approx(nll / by, rel=1e-6), "in float32"


@pytest.mark.parametrize(
    ("of_model", "of_config", "said"),
    [
        ({"loss_function": 1}, {"label_smoothing": 0.1}, "loss_function was replaced"),
        ({"_loss_function": 1}, {}, "loss_function was replaced"),
        ({}, {"label_smoothing": 0.1, "aux_weight": 2, "hidden_size": 5}, "has aux_weight=2, label_smoothing=0.1"),
        ({}, {"loss_kind": "focal", "loss_a": 0, "loss_b": "", "loss_c": False, "loss_d": [1]}, "loss_kind='focal'"),
    ],
)
def test_a_likely_cause_is_named(of_model, of_config, said):
    config = SimpleNamespace(**of_config)
    base = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), **of_model)
    assert loss_agreement._likely_cause(base).endswith(said)


def test_an_ordinary_forward_is_given_the_whole_batch():
    padding = torch.ones(2, 3)
    for given, wanted in ((None, {"a": 1, "b": 2}), (padding, {"a": 1, "b": 2, "attention_mask": padding})):
        made = agreement.plain_arguments(rows(2, 3, given, quiet={"b": 2}, arguments=lambda: {"a": 1}))
        assert made == wanted
