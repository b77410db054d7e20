"""Switching a loaded model to a backend: the choice, the results, and the state after a failure."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, CLIPConfig, CLIPModel
from transformers import modeling_flash_attention_utils as transformers_flash
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cggr_flash import enable_flash_attention
from cggr_flash.trial import describe_difference, trial
from tests.support.families import BUILT_IN, EAGER_ONLY, FAMILIES, llava, t5
from tests.support.machines import A100, CPU, H200
from tests.support.tiny_models import ROUTABLE, UNROUTABLE

SWITCHABLE = [name for name in FAMILIES if name not in BUILT_IN]
TOKENS = torch.arange(6, 26).reshape(2, 10)


def set_to(model) -> set[str]:
    """All backends that parts of a model are set to."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return {config._attn_implementation for config in configs.values()}


def step(model, **inputs) -> dict[str, torch.Tensor]:
    """Outputs and gradients of all parameters."""
    inputs = inputs or {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    logits = model.eval()(**inputs).logits
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(logits.square().sum(), list(parameters.values()), allow_unused=True)
    found = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return found | {"logits": logits.detach()}


@pytest.mark.parametrize("family", [name for name in SWITCHABLE if name not in EAGER_ONLY])
def test_sdpa_computes_what_eager_attention_computes(family):
    model = FAMILIES[family]()
    dtype = torch.float32 if family == "mixtral" else torch.float64  # grouped products of experts have no float64
    model = model.to(dtype)
    if getattr(model.config, "attn_pdrop", None):
        model.config.attn_pdrop = 0.0
    inputs = {}
    if family == "llava":
        images = torch.tensor([[5] * 4 + [6] * 6] * 2)
        inputs = {"input_ids": images, "pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    expected = step(enable_flash_attention(model, "eager"), **inputs)
    assert set_to(model) == {"eager"}
    found = step(enable_flash_attention(model, "sdpa"), **inputs)
    assert set_to(model) == {"sdpa"}
    assert found.keys() == expected.keys()
    # Eager attention has its softmax in float32, whatever the model is in; biases of keys have no true gradient at all.
    largest = max(value.norm() for value in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 2e-6 * expected[name].norm() + 1e-7 * largest, name


@pytest.mark.parametrize("family", SWITCHABLE)
def test_auto_takes_the_fastest_that_works_and_says_why_in_one_line(family, caplog):
    with caplog.at_level("INFO", logger="cggr_flash"):
        model = FAMILIES[family]()
        assert enable_flash_attention(model) is model
    wanted = "eager" if family in EAGER_ONLY else "sdpa"
    assert set_to(model) == {wanted}
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert f"{type(model).__name__} on cpu in float32 runs on {wanted!r}; not flash_attention_4" in record.message
    assert "needs an NVIDIA GPU, but the device is cpu" in record.message


def test_a_trial_leaves_no_trace():
    model = ROUTABLE["gpt2"](attn_pdrop=0.3).train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.no_grad():
        enable_flash_attention(model, "sdpa")
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_frozen_and_inference_models_are_tried_too():
    model = ROUTABLE["llama"]().requires_grad_(False)
    with torch.inference_mode():
        assert set_to(enable_flash_attention(model, "eager")) == {"eager"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", BUILT_IN)
def test_models_that_build_their_attention_in_raise_instead_of_pretending(family):
    model = FAMILIES[family]()
    built = model.config._attn_implementation
    other = "eager" if built == "sdpa" else "sdpa"
    with pytest.raises(
        RuntimeError, match=r"fixes its attention backend when it is built, here .*load_model_with_flash"
    ):
        enable_flash_attention(model)
    with pytest.raises(RuntimeError, match=rf"backend='{other}' cannot be used for {type(model).__name__}: "):
        enable_flash_attention(model, other)
    assert set_to(enable_flash_attention(model, built)) == {built}


def test_a_backend_that_should_work_and_does_not_is_passed_over_with_a_warning(on_machine, caplog):
    on_machine(H200)
    model = ROUTABLE["llama"]().bfloat16()
    enable_flash_attention(model)  # the packages are not really there, so transformers refuses them
    assert set_to(model) == {"sdpa"}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for name in ("flash_attention_4", "flash_attention_3", "flash_attention_2"):
        assert f"not {name}: ImportError: " in record.message
    assert record.message.count("\n") == 0


def test_what_the_machine_cannot_do_is_not_tried(on_machine, caplog):
    on_machine(replace(A100, packages={"flash-attn-4": "4.0.0b18", "flash-attn-3": "3.0.0"}))
    with caplog.at_level("INFO", logger="cggr_flash"):
        enable_flash_attention(ROUTABLE["llama"]().bfloat16())
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "not flash_attention_4, flash_attention_3, " in record.message
    assert "(Hopper) or later, but NVIDIA A100 has 8.0" in record.message
    assert "not flash_attention_2: the package flash-attn is not installed" in record.message


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_a_failed_request_leaves_the_model_as_it_was(on_machine, backend):
    on_machine(H200)
    model = llava().bfloat16()
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    with pytest.raises(
        RuntimeError, match=rf"backend={backend!r} cannot be used for Llava.*The model still uses 'sdpa'"
    ):
        enable_flash_attention(model, backend)
    assert model.config._attn_implementation == "sdpa"
    assert set_to(model.model.language_model) == {"sdpa"}
    assert set_to(model.model.vision_tower) == {"eager"}
    assert transformers_flash._loaded_implementation is None  # asked again, the library is imported again
    step(model)


def test_an_explicit_backend_that_the_machine_lacks_raises_with_the_fix(on_machine):
    on_machine(replace(H200, packages={}))
    model = ROUTABLE["llama"]().bfloat16()
    with pytest.raises(RuntimeError) as error:
        enable_flash_attention(model, "flash_attention_2")
    assert str(error.value) == (
        "backend='flash_attention_2' cannot be used for LlamaForCausalLM: the package flash-attn is not installed. "
        "To fix this: python -m pip install --no-build-isolation 'flash-attn>=2.8' (it compiles CUDA code). The "
        "model still uses 'sdpa'"
    )


@pytest.mark.parametrize("backend", ["flash_attention_2", "kernels-community/flash-attn2", "flash_attention_4"])
def test_float32_and_flash_is_an_error(backend):
    model = ROUTABLE["llama"]()
    with pytest.raises(ValueError, match=r"dtype is float32; load the model with dt"):
        enable_flash_attention(model, backend)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_under_autocast_its_dtype_counts(on_machine):
    on_machine(replace(H200, packages={}))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="the package flash-attn is not installed"),
    ):
        enable_flash_attention(ROUTABLE["llama"](), "flash_attention_2")


@pytest.mark.parametrize("backend", ["flash_attention_3", "flash_attention_4", "flex_attention"])
def test_attention_dropout_is_not_left_out_in_silence(on_machine, backend):
    on_machine(H200)
    model = ROUTABLE["llama"](attention_dropout=0.1).bfloat16()
    with pytest.raises(RuntimeError, match=r"it has no dropout, but the model's configuration has attention_dropout"):
        enable_flash_attention(model, backend)


def test_a_softcap_is_not_left_out_in_silence():
    with pytest.raises(RuntimeError, match=r"Gemma2ForCausalLM.*(does not support sdpa|has no softcap)"):
        enable_flash_attention(ROUTABLE["gemma2"](), "sdpa")


def test_a_model_for_one_flash_attention_is_not_given_another(on_machine):
    on_machine(H200)
    with pytest.raises(RuntimeError, match=r"GptOssForCausalLM supports only 'kernels-community/vllm-flash-attn3'"):
        enable_flash_attention(ROUTABLE["gpt-oss"]().bfloat16(), "flash_attention_2")


def test_a_model_without_attention_has_nothing_to_set():
    model = UNROUTABLE["mamba"]()
    with pytest.raises(RuntimeError, match="MambaForCausalLM does not support sdpa in transformers"):
        enable_flash_attention(model, "sdpa")


def uncausal(module, query, key, value, attention_mask, **options):
    return sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": False})


def broken(module, query, key, value, attention_mask, **options):
    raise AssertionError("no kernel for this head size\nand more")


def nothing(module, query, key, value, attention_mask, **options):
    return torch.full_like(query, torch.nan).transpose(1, 2), None


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (uncausal, r"its results differ from eager attention by a relative error of [\d.]+ "),
        (broken, "AssertionError: no kernel for this head size"),
        (nothing, "the results of a tiny forward and backward are not finite"),
    ],
)
def test_a_backend_that_computes_something_else_is_refused(attention, reason, caplog):
    model = enable_flash_attention(ROUTABLE["llama"](), "eager")
    AttentionInterface.register("sdpa", attention)
    try:
        with pytest.raises(RuntimeError, match=reason):
            enable_flash_attention(model, "sdpa")
        assert set_to(model) == {"eager"}
        enable_flash_attention(model)
        assert set_to(model) == {"eager"}
        assert caplog.records[-1].levelname == "WARNING"
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


def test_a_wrong_backward_is_seen():
    model = ROUTABLE["llama"]()
    expected = trial(model)
    assert len(expected) == 2
    assert describe_difference(expected, expected, torch.float32) == ""
    wrong = [expected[0], expected[1] * 1.5]
    assert "differ from eager attention by a relative error of 0.5" in describe_difference(
        wrong, expected, torch.bfloat16
    )


def test_half_of_the_tokens_may_be_off_and_no_more():
    expected = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    for off, refused in ((7, False), (9, True)):
        found = expected.clone()
        found.view(16, 4)[:off] *= 1.5
        assert bool(describe_difference([found], [expected], torch.bfloat16)) == refused


def test_an_image_tower_is_tried_and_keeps_its_backend_where_it_must(caplog):
    model = llava()
    assert len(trial(model)) == 4  # of tokens and of pixels: outputs and gradients
    type(model.model.vision_tower)._supports_sdpa, before = False, type(model.model.vision_tower)._supports_sdpa
    try:
        AttentionInterface.register("another", sdpa_attention_forward)
        model.set_attn_implementation({"text_config": "eager", "vision_config": "another"})
        with caplog.at_level("INFO", logger="cggr_flash"):
            enable_flash_attention(model, "sdpa")
    finally:
        AttentionInterface._global_mapping.pop("another", None)
        type(model.model.vision_tower)._supports_sdpa = before
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert model.model.vision_tower.config._attn_implementation == "another"
    assert "vision_config stays on 'another' (CLIPVisionModel does not support sdpa in transformers)" in caplog.text


def test_a_model_whose_whole_cannot_be_run_on_tokens_is_tried_in_its_parts():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 97, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, **sizes}
    vision = {"image_size": 16, "patch_size": 8, **sizes}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    assert [tuple(result.shape) for result in trial(model)] == [(2, 16, 32), (2, 16, 32), (1, 5, 32), (1, 3, 16, 16)]
    assert set_to(enable_flash_attention(model, "sdpa")) == {"sdpa"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
def test_a_peft_wrapper_is_returned_and_what_it_wraps_is_set():
    model = get_peft_model(ROUTABLE["llama"](), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert enable_flash_attention(model, "eager") is model
    assert set_to(model.get_base_model()) == {"eager"}
    enable_flash_attention(model)
    assert set_to(model.get_base_model()) == {"sdpa"}
    model(TOKENS, labels=TOKENS).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_encoder_and_decoder_are_both_tried():
    assert [tuple(result.shape) for result in trial(t5())[:1]] == [(2, 16, 97)]


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), "model", None])
def test_only_transformers_models(model):
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel or a PEFT wrapper of one, got"):
        enable_flash_attention(model, "sdpa")


def test_a_model_without_weights():
    with torch.device("meta"):
        model = type(llava())(llava().config)
    with pytest.raises(ValueError, match="is on the meta device and has no weights; load them first"):
        enable_flash_attention(model.to("meta"), "sdpa")


def test_no_backend_at_all_lists_every_reason(on_machine):
    on_machine(CPU)
    model = ROUTABLE["llama"]()
    model.get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"fails on trial inputs.*not finite"):
        enable_flash_attention(model)
    assert set_to(model) == {"sdpa"}
