"""Every attention backend that works on this GPU, in a plain model and in CGGRModel's passes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cggr_core import CGGRModel
from cggr_flash import attention_backends, enable_flash_attention, load_model_with_flash_attention
from tests.support.attention_calls import attention_calls

if not torch.cuda.is_available():
    pytest.skip("asks for the backends of a CUDA device", allow_module_level=True)

ROWS = [row for row in attention_backends("cuda") if not row.name.startswith("sdpa/")]
WORKING = [row.name for row in ROWS if row.available]
# Hub kernels are downloads.
LOCAL = [name for name in WORKING if "/" not in name]
FLASH = [name for name in LOCAL if name.startswith("flash")]

needs_flash = pytest.mark.skipif(not FLASH, reason="; ".join(f"{r.name}: {r.reason}" for r in ROWS[:3]))


def llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.06)
    return model.to(dtype)


def tokens(batch: int = 2, length: int = 256) -> torch.Tensor:
    return torch.randint(1000, (batch, length), generator=torch.Generator().manual_seed(0)).cuda()


def results(model, **inputs) -> dict[str, torch.Tensor]:
    """Logits and gradients of the ordinary step."""
    output = model(**inputs)
    output.loss.backward()
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    kept = inputs.get("attention_mask")
    logits = output.logits.detach().double()
    return found | {"logits": logits if kept is None else logits[kept.bool()]}


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


# flex_attention is compiled anew for every shape, so it is tried on fewer.
PADDED = [(name, True) for name in LOCAL if name != "flex_attention"]
PASSES = [(name, "kv") for name in LOCAL] + [(name, "detached") for name in (*FLASH, "sdpa")]


@pytest.mark.parametrize(("backend", "padded"), [(name, False) for name in LOCAL] + PADDED)
def test_a_backend_is_as_close_to_float64_as_eager_is(backend, padded):
    input_ids = tokens()
    inputs = {"input_ids": input_ids, "labels": input_ids}
    if padded:
        mask = torch.ones_like(input_ids)
        mask[0, 200:] = 0
        inputs |= {"attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
    model = llama()
    eager = results(enable_flash_attention(model, "eager"), **inputs)
    found = results(enable_flash_attention(model, backend), **inputs)
    truth = results(enable_flash_attention(model.double(), "eager"), **inputs)
    assert distance(found, truth) <= 1.5 * distance(eager, truth) + 2e-3


def test_auto_takes_the_first_that_works(caplog):
    with caplog.at_level("INFO", logger="cggr_flash"):
        model = enable_flash_attention(llama())
    assert model.config._attn_implementation in WORKING[:1] or "not " + WORKING[0] in caplog.text
    assert [record.name for record in caplog.records].count("cggr_flash") == 1
    assert f"runs on {model.config._attn_implementation!r}" in caplog.text


def test_float32_gets_an_error_from_flash_and_sdpa_from_auto():
    model = llama(torch.float32)
    with pytest.raises(ValueError, match=r"supports float16 and bfloat16 only, but the model's dtype is float32"):
        enable_flash_attention(model, "flash_attention_2")
    assert enable_flash_attention(model).config._attn_implementation == "sdpa"


@needs_flash
def test_autocast_counts_instead_of_the_weights():
    with torch.autocast("cuda", torch.bfloat16):
        model = enable_flash_attention(llama(torch.float32), FLASH[0])
    assert model.config._attn_implementation == FLASH[0]


@pytest.mark.parametrize("row", [row for row in ROWS if not row.available], ids=lambda row: row.name)
def test_what_does_not_work_says_why_and_what_to_do(row):
    model = llama()
    with pytest.raises(RuntimeError) as error:
        enable_flash_attention(model, row.name)
    assert row.reason in str(error.value)
    assert row.fix in str(error.value)
    assert model.config._attn_implementation == "sdpa"


def test_loading_onto_the_gpu(tmp_path):
    llama().save_pretrained(tmp_path)
    model = load_model_with_flash_attention(tmp_path, device_map="cuda")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == enable_flash_attention(llama()).config._attn_implementation
    with pytest.raises(ValueError, match="float16 and bfloat16 only"):
        load_model_with_flash_attention(tmp_path, "flash_attention_2", dtype=torch.float32, device_map="cuda")


def easy_but_for_some(model, input_ids: torch.Tensor) -> torch.Tensor:
    """Labels that a model finds likely, but for a quarter that it finds unlikely: rounding cannot change the top."""
    with torch.no_grad():
        logits = model(input_ids).logits
    hard = (torch.arange(input_ids.shape[1], device="cuda") % 4 == 1).expand_as(input_ids)
    return torch.where(hard, logits.argmin(-1), logits.argmax(-1)).roll(1, dims=1)


@pytest.mark.parametrize(("backend", "gradient"), PASSES)
def test_context_pass_on_the_backend_and_gradient_pass_routed(backend, gradient):
    model, input_ids = llama(), tokens()
    labels = easy_but_for_some(model, input_ids)
    cggr = CGGRModel(model, gradient=gradient, scoring="loss", selection="topk", min_tokens_ratio=0.25).train()

    def step(name: str) -> tuple[dict[str, torch.Tensor], list[tuple[str, int]]]:
        enable_flash_attention(model, name)
        cggr(input_ids, labels=labels).backward()  # looks at the model on a few tokens first
        model.zero_grad(set_to_none=True)
        cggr.load_routing_state_dict(start)
        with attention_calls() as calls:
            cggr(input_ids, labels=labels).backward()
        found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        cggr.load_routing_state_dict(start)
        return found, calls

    start = cggr.routing_state_dict()
    expected, _ = step("eager")
    found, calls = step(backend)
    assert distance(found, expected) <= 0.1
    length = input_ids.shape[1]
    context = [name for name, queries in calls if queries == length]
    routed = [name for name, queries in calls if queries < length]
    if backend != "eager":  # which is no entry of the registry
        assert context == [backend] * 3
        assert len(routed) == 3
        assert all(name.startswith("cggr_routed") for name in routed)
