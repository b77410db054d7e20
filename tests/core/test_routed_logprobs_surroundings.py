"""Routed log-probabilities with LoRA, checkpointing, autocast and changed models, and what is refused."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from cggr_core import CGGRModel, Selection, routed_hidden, routed_logprobs, select
from tests.support.logprobs import LENGTH, WAYS, slots, some
from tests.support.model_steps import ROUTED, checkpoint_activations, tokens
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, UNROUTABLE

KEEP = some()
PEFT_ASKS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def step(model, input_ids=None, *, gradient="kv", engine=None, keep=None, **inputs):
    input_ids = tokens(3, LENGTH) if input_ids is None else input_ids
    keep = slots(KEEP) if keep is None else keep
    found = routed_logprobs(model, input_ids, keep=keep, gradient_mode=gradient, engine=engine, entropy=True, **inputs)
    (found.logprob * torch.linspace(-1, 1, LENGTH) + 0.1 * found.entropy).sum().backward()
    return found


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize(("gradient", "engine"), WAYS)
@PEFT_ASKS
def test_lora(gradient, engine, targets):
    torch.manual_seed(0)
    model = get_peft_model(ROUTABLE["llama"](), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    step(model, gradient=gradient, engine=engine)
    found = gradients(model)
    merged = copy.deepcopy(model).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    step(merged, gradient=gradient, engine=engine)
    wanted = gradients(merged)
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):  # W + s B A: the gradients of A and B follow from that of W
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            grad = wanted[f"{name}.weight"] * module.scaling["default"]
            full = f"base_model.model.{name}"
            torch.testing.assert_close(found[f"{full}.lora_A.default.weight"], B.T @ grad, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(found[f"{full}.lora_B.default.weight"], grad @ A.T, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize(("gradient", "engine"), WAYS)
@PEFT_ASKS
def test_an_adapter_on_the_head_is_run_for_kept_tokens_alone(gradient, engine):
    """The logits are the model's own, and must not exist for all tokens."""
    model = get_peft_model(ROUTABLE["llama"](), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    sizes = []
    head = model.get_output_embeddings().base_layer
    with_hook = head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    for _ in range(2):  # the first two calls look at a model with a hook
        step(model, gradient=gradient, engine=engine)
    sizes.clear()
    found = step(model, gradient=gradient, engine=engine)
    with_hook.remove()
    assert sizes == [slots(KEEP).index.shape[1]]
    logits = model(input_ids=tokens(3, LENGTH)).logits
    logprob = logits.log_softmax(-1)[:, :-1].gather(2, tokens(3, LENGTH)[:, 1:, None])[:, :, 0]
    torch.testing.assert_close(found.logprob[:, :-1], logprob * found.keep[:, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_checkpointing_gives_the_same_gradients(gradient, engine):
    model = ROUTABLE["llama"]()
    step(model, gradient=gradient, engine=engine)
    wanted = gradients(model)
    checkpoint_activations(model)
    step(model, gradient=gradient, engine=engine)
    assert relative_error(gradients(model), wanted) <= 1e-6


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_autocast(gradient, engine):
    model = ROUTABLE["llama"]()
    step(model, gradient=gradient, engine=engine)
    wanted = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, gradient=gradient, engine=engine)
    assert found.logprob.dtype == found.entropy.dtype == torch.float32
    assert relative_error(gradients(model), wanted) <= 0.05


@pytest.mark.parametrize(("gradient", "engine"), ROUTED)
def test_accumulation_over_micro_batches(gradient, engine):
    model, input_ids = ROUTABLE["llama"](), tokens(3, LENGTH)
    step(model, input_ids, gradient=gradient, engine=engine)
    wanted = gradients(model)
    for row in range(3):
        step(model, input_ids[row : row + 1], gradient=gradient, engine=engine, keep=slots(KEEP[row : row + 1]))
    assert relative_error(gradients(model), wanted) <= 1e-6


def test_two_calls_before_one_backward():
    """As in DPO: chosen and rejected rows of one loss."""
    model, input_ids = ROUTABLE["llama"](), tokens(4, LENGTH)
    both = routed_logprobs(model, input_ids, keep=slots(some(4))).logprob.sum(1)
    torch.nn.functional.logsigmoid(both[:2] - both[2:]).sum().backward()
    wanted = gradients(model)
    chosen, rejected = (
        routed_logprobs(model, input_ids[rows], keep=slots(some(4)[rows])).logprob.sum(1)
        for rows in (slice(0, 2), slice(2, 4))
    )
    torch.nn.functional.logsigmoid(chosen - rejected).sum().backward()
    assert relative_error(gradients(model), wanted) <= 1e-5


def test_a_wrapper_of_cggr_is_its_model():
    model = ROUTABLE["llama"]()
    wanted = step(model).logprob
    torch.testing.assert_close(step(CGGRModel(model)).logprob, wanted)


def test_hooks_run_once_around_all_passes():
    model, calls = ROUTABLE["llama"](), []
    step(model)
    model.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.register_forward_hook(lambda module, args, output: calls.append("after"))
    step(model, engine="two_pass")
    assert calls == ["before", "after"]
    assert "forward" not in model.__dict__


def test_the_engine_is_made_once_and_goes_with_its_model():
    model = ROUTABLE["llama"]()
    step(model)
    first = model.__dict__["_cggr_engine_of_model"]
    step(model)
    assert model.__dict__["_cggr_engine_of_model"] is first
    assert not any("cggr" in name for name in model.state_dict())
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        step(other)
        assert other.__dict__["_cggr_engine_of_model"].engine.model is other
    del other
    gone = weakref.ref(model)
    del model, first
    gc.collect()
    assert gone() is None


@PEFT_ASKS
def test_a_changed_model_gets_an_engine_anew():
    model = ROUTABLE["llama"]()
    step(model)
    gradients(model)
    model.resize_token_embeddings(128)
    found = step(model)
    with torch.no_grad():
        wanted = routed_logprobs(copy.deepcopy(model), tokens(3, LENGTH), keep=KEEP)
    torch.testing.assert_close(found.logprob, wanted.logprob, rtol=1e-4, atol=1e-4)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    step(model)
    adapter = {name: grad for name, grad in gradients(model).items() if "lora_A" in name}
    assert len(adapter) == 3 and all(grad.any() for grad in adapter.values())


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        (KEEP.int(), TypeError, r"keep must be a bool tensor, got torch.int32; use keep.bool\(\)"),
        (None, TypeError, "keep must be a bool tensor, got NoneType"),
        (KEEP[:2], ValueError, r"keep must have shape \[3, 14\], one entry for each input token, got \[2, 14\]"),
        (KEEP[:, 4:], ValueError, "extend a mask of the completions with keep_tokens"),
        (torch.ones(3, LENGTH).bool(), ValueError, r"keep marks 3 position\(s\) that predict no token"),
        (slots(torch.ones(3, LENGTH).bool(), LENGTH), ValueError, r"keep marks 3 position\(s\) that predict no token"),
        (slots(KEEP[:2]), ValueError, r"keep was selected for \[2, 14\] tokens in 2 row\(s\)"),
        (select(torch.rand(3, LENGTH), KEEP, ratio=0.5, scope="batch"), ValueError, "select with scope='row'"),
    ],
)
def test_bad_keep(keep, error, message):
    with pytest.raises(error, match=message):
        routed_logprobs(ROUTABLE["llama"](), tokens(3, LENGTH), keep=keep)


@pytest.mark.parametrize("form", ["mask", "selection"])
def test_padding_cannot_be_kept(form):
    attention_mask = torch.ones(3, LENGTH).long()
    attention_mask[0, :3], attention_mask[1, -2:] = 0, 0
    keep = torch.zeros(3, LENGTH).bool()
    keep[0, 1:4], keep[1, 9:12] = True, True  # 1 and 2 are padding; so is what 11 would predict
    for function in (routed_logprobs, routed_hidden):
        no_target = r" and 1 position\(s\) that predict no token" if function is routed_logprobs else r"\. It must be"
        with pytest.raises(ValueError, match=r"keep marks 2 position\(s\) of padding" + no_target):
            function(
                ROUTABLE["llama"](),
                tokens(3, LENGTH),
                keep=keep if form == "mask" else slots(keep),
                attention_mask=attention_mask,
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_mode": "sequence"}, "rows without a kept token are left out in every mode"),
        ({"gradient_mode": "KV"}, "gradient_mode must be one of 'kv', 'exact', 'detached'"),
        ({"engine": "one"}, "engine must be one of"),
        ({"gradient_mode": "exact", "engine": "two_pass"}, "leave engine=None"),
        ({"engine": "interleaved", "everywhere": True}, "never runs other tokens up to the head"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"labels": tokens(3, LENGTH)}, "labels: not an input of tokens"),
        ({"use_cache": True, "output_attentions": True}, "use_cache, output_attentions: not an input of tokens"),
        ({"targets": torch.full((3, LENGTH), 97)}, "outside the vocabulary"),
        ({"targets": tokens(3, LENGTH - 1)}, r"targets must have shape \(3, 14\)"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        routed_logprobs(ROUTABLE["llama"](), tokens(3, LENGTH), keep=KEEP, **settings)


def test_models_that_cannot_be_routed_or_are_none():
    with pytest.raises(ValueError, match="gradient='exact'"):
        routed_logprobs(UNROUTABLE["mamba"](), tokens(3, LENGTH), keep=KEEP)
    step(UNROUTABLE["mamba"](), gradient="exact")
    with pytest.raises(TypeError, match=r"model must be a Hugging Face language model.*got Linear"):
        routed_logprobs(torch.nn.Linear(2, 2), tokens(3, LENGTH), keep=KEEP)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": slots(torch.ones(3, LENGTH).bool(), LENGTH)}, r"in the last call, keep marks 3 position\(s\)"),
        ({"targets": torch.full((3, LENGTH), 97)}, r"targets of the last call had 42 value\(s\) outside \[0, 97\)"),
        ({"broken": True}, "NaN at"),
    ],
)
def test_what_a_device_finds_is_raised_one_call_later(monkeypatch, wrong, message):
    """As on a GPU, where looking at values would wait for the device."""
    for module in ("routed", "kept"):
        monkeypatch.setattr(f"cggr_core.logprobs.{module}.values_are_free", lambda tensor: False)
    for module in ("checks", "statistics", "linear_loss"):
        monkeypatch.setattr(f"cggr_core.{module}.values_are_free", lambda tensor: False)
    model, wrong = ROUTABLE["llama"](), dict(wrong)
    step(model)
    if wrong.pop("broken", False):
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.nan)
    step(model, **wrong)
    with pytest.raises(ValueError, match=message):
        step(model)


def test_nan_is_named():
    model = ROUTABLE["llama"]()
    step(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        step(model)
    with pytest.raises(ValueError, match="NaN"):
        routed_hidden(model, tokens(3, LENGTH), keep=Selection.from_mask(KEEP))


@pytest.mark.parametrize("argument", [{"temperature": 0.7}, {"everywhere": True}, {"entropy": True}])
def test_what_only_the_head_has_is_refused_for_hidden_states(argument):
    input_ids = tokens(3, LENGTH)
    with pytest.raises(ValueError, match=f"{next(iter(argument))}: routed_hidden gives hidden states"):
        routed_hidden(ROUTABLE["llama"](), input_ids, keep=some(), **argument)
