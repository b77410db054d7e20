"""The structure and the settings of a model, and which changes to it count."""

import copy
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from cggr_core.routing import structure as structures
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE, VOCAB


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
    for name in ("loss_type", "logit_scale", "loss_function", "_loss_function"):
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


@pytest.mark.parametrize(
    ("name", "value"), [("_attn_implementation", "eager"), ("num_hidden_layers", 7), ("decoder_layers", 7)]
)
def test_numbers_of_layers_and_the_attention_are_part_of_a_structure(name, value):
    """Not only settings, which do not count where layers are sharded over ranks."""
    model = ROUTABLE["llama"]()
    before = structures.structure(model)
    setattr(model.config, name, value)
    assert structures.structure(model) != before


def test_a_compiled_part_and_functions_of_a_models_module_are_part_of_a_structure(monkeypatch):
    model = ROUTABLE["llama"]()
    before = structures.structure(model)
    mlp = model.model.layers[0].mlp
    mlp._compiled_call_impl = mlp._call_impl  # what compile() sets, without its time
    assert structures.structure(model) != before
    mlp._compiled_call_impl = None
    assert structures.structure(model) == before
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "apply_rotary_pos_emb", lambda *_: None)
    assert structures.structure(model) != before


def test_a_forward_may_be_any_callable():
    class Called:
        def __call__(self, hidden):
            return hidden

    model = ROUTABLE["llama"]()
    model.model.layers[0].mlp = type("Part", (nn.Module,), {"forward": Called()})()
    assert structures.structure(model) == structures.structure(model)


# PEFT asks transformers for a name that is deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_forward_that_is_bound_again_is_no_change_of_structure(wrapped):
    """As those do who put a replaced one back."""
    model = ROUTABLE["llama"]()
    outer = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if wrapped else model
    before = structures.structure(outer)
    for part in {id(part): part for part in (outer, structures.unwrapped(outer))}.values():
        part.forward = part.forward
        assert structures.structure(outer) == before
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda hidden: hidden
    once = structures.structure(outer)
    mlp.forward = lambda hidden: 2 * hidden
    assert before != once != structures.structure(outer) != before


def test_settings_that_are_changed():
    model = ROUTABLE["llama"]()
    layer, model.loss = model.model.layers[0], nn.Module()
    model.register_module("nothing", None)
    layer.mlp.table, layer.self_attn.config = [1], copy.copy(model.config)
    layer.mlp.p, model.loss.gamma, layer.mlp.drop = 0.5, 2.0, nn.Dropout(0.5)
    settings = structures.Settings(model)
    assert settings.changed() is False
    for holder, name, value in (
        (layer.self_attn, "scaling", 0.3),
        (layer.mlp, "p", 0.25),
        (layer.mlp.drop, "inplace", True),
        (model.config, "rms_norm_eps", 1e-3),
        (layer.self_attn.config, "rms_norm_eps", 1e-2),  # of a part's own
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
    model.config.use_cache, model.config.attention_dropout, model._of_today, model.config.nested = False, 0.3, 5, [[1]]
    layer.mlp.table = [2]
    model.eval()
    assert settings.changed() is False
    assert structures.Settings(ROUTABLE["llama"]()).changed() is False


def test_what_a_loss_of_the_models_own_reads():
    def closed_over():
        scale = [1.0]
        return scale, lambda logits, labels: logits.sum() * scale[0]

    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.inner.table = torch.ones(3)

    model = ROUTABLE["llama"]()
    scale, model.__dict__["_loss_function"] = closed_over()
    other, model.__dict__["loss_function"] = closed_over()
    settings = structures.Settings(model)
    for held in (scale, other):
        held[0] = 2.0
        assert (settings.changed(), settings.changed()) == (True, False)
    del model.__dict__["loss_function"]
    model._modules["loss_function"] = criterion = Criterion()
    settings.look_at(model)
    assert settings.changed() is False
    criterion.inner.table[1] = 5.0
    assert (settings.changed(), settings.changed()) == (True, False)


def test_tensors_of_the_models_parts_are_no_settings():
    """A counter of the backbone, or a frozen weight that is written to: a loss reads none of them."""
    model = ROUTABLE["llama"]()
    model.model.register_buffer("count", torch.zeros(1))
    model.lm_head.requires_grad_(False)
    settings = structures.Settings(model)
    model.model.count += 1
    model.lm_head.weight.mul_(2.0)
    assert settings.changed() is False


def test_each_change_of_a_models_own_attribute_counts_once():
    model, found, said = ROUTABLE["llama"](), [], []
    model.scale = 0.0
    settings = structures.Settings(model)
    for step in range(1, 17):
        model.scale = float(step)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found.append(settings.changed())
        said += [(step, str(each.message)) for each in warned]
    assert [step for step, counts in enumerate(found, 1) if counts] == [1, 2, 3, 4, 5, 6, 7, 8, 16]
    ((when, message),) = said
    assert when == 9 and message.startswith("scale of the model, its config or its loss keeps changing")


def test_a_setting_that_changes_in_every_step_counts_less_and_less():
    model = ROUTABLE["llama"]()
    model.scale = 0.0
    settings, found = structures.Settings(model), []
    with pytest.warns(UserWarning, match="^scale, scaling, temperature of the model.* keeps changing") as warned:
        for step in range(1, 34):
            model.scale = model.config.temperature = model.model.layers[1].self_attn.scaling = float(step)
            found.append(settings.changed())
    assert len(warned) == 1
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


def test_hooks_of_an_adapter_library_are_a_change_of_structure():
    """They compute, unlike those of torch and transformers."""
    model = ROUTABLE["llama"]()
    before = structures.structure(model)

    def compute(*_):
        return None

    compute.__module__ = "peft.tuners.tuners_utils"
    model.model.layers[0].register_forward_pre_hook(compute)
    assert structures.structure(model) != before
