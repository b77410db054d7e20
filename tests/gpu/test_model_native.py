"""CGGRModel on a GPU: equality, no host reads, and the whole step as one CUDA graph."""

import re
from pathlib import Path

import pytest
import torch

from cggr_core import CGGRModel, create_truncated_router
from cggr_core.routing.norms import fused_norms
from tests.support.gpu_models import gradients, model, relative_error, tokens
from tests.support.host_reads import no_host_reads

pytestmark = pytest.mark.gpu

VARIANTS = {
    "kv, two passes": ({"gradient": "kv"}, False),
    "kv, router": ({"gradient": "kv"}, True),
    "kv, random": ({"gradient": "kv", "selection": "random"}, False),
    "detached, two passes": ({"gradient": "detached", "selection": "sampled"}, False),
    "detached, router": ({"gradient": "detached", "selection": "topk"}, True),
}


def wrapped(base, variant: str) -> CGGRModel:
    settings, routed = VARIANTS[variant]
    return CGGRModel(base, create_truncated_router(base, 1) if routed else None, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_cpu(variant):
    """Kernels, devices and dtypes of indices aside, the same selection and the same gradients."""
    base, input_ids = model(), tokens()
    loss = wrapped(base, variant)(input_ids, labels=input_ids)
    loss.backward()
    found = {name: value.cpu() for name, value in gradients(base).items()}
    base.cpu()
    expected = wrapped(base, variant)(input_ids.cpu(), labels=input_ids.cpu())
    expected.backward()
    torch.testing.assert_close(loss.detach().cpu(), expected.detach(), rtol=1e-4, atol=0)
    assert relative_error(found, gradients(base)) <= 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_host_reads_in_the_step(variant):
    base, input_ids = model(torch.bfloat16), tokens()
    cggr = wrapped(base, variant)
    for _ in range(2):
        cggr(input_ids, labels=input_ids).backward()
    with no_host_reads():
        loss = cggr(input_ids, labels=input_ids)
        loss.backward()
        cggr.step()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_is_one_cuda_graph(variant):
    base, input_ids = model(), tokens()
    cggr = wrapped(base, variant)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            cggr(input_ids, labels=input_ids).backward()
            base.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    before = cggr.routing_state_dict()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cggr(input_ids, labels=input_ids)
        loss.backward()
    loss = loss.detach()  # what it was made of is bound to the stream of the capture
    captured = {name: parameter.grad for name, parameter in base.named_parameters()}

    replayed = []
    for _ in range(2):
        graph.replay()
        replayed.append((loss.detach().clone(), {name: value.clone() for name, value in captured.items()}))
    base.zero_grad(set_to_none=True)
    again = wrapped(base, variant)
    again.load_routing_state_dict(before)
    for replayed_loss, replayed_gradients in replayed:
        eager = again(input_ids, labels=input_ids)
        eager.backward()
        torch.testing.assert_close(replayed_loss, eager.detach(), rtol=1e-5, atol=0)
        assert relative_error(replayed_gradients, gradients(base)) <= 1e-5
    if "topk" not in VARIANTS[variant][0].values():
        assert replayed[0][0] != replayed[1][0], "every replay must draw anew"


def test_the_recipe_for_small_models():
    """The example of the documentation, which a CPU cannot run, trains."""
    recipe = Path(__file__).parents[2] / "docs/recipes/small-models.md"
    *_, example = re.findall(r"^```python\n(.*?)^```", recipe.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    base = model()
    names = {
        "torch": torch,
        "model": base,
        "cggr_model": CGGRModel(base, selection="random"),
        "batches": iter([tokens()] * 12),
    }
    with torch.no_grad():
        before = base(tokens(), labels=tokens()).loss
    exec(compile(example, recipe.name, "exec"), names)
    with torch.no_grad():
        after = base(tokens(), labels=tokens()).loss
    assert names["loss"].isfinite()
    assert after < before


def test_bad_labels_and_nan_logits_are_named_one_step_later():
    base, input_ids = model(), tokens()
    cggr = CGGRModel(base)
    labels = input_ids.clone()
    labels[0, :4] = 5000
    cggr(input_ids, labels=labels).backward()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"labels of the last step had 3 value"):
        cggr(input_ids, labels=input_ids)
    base.model.norm.weight.data[0] = float("nan")
    cggr(input_ids, labels=input_ids)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"NaN at 768 tokens"):
        cggr(input_ids, labels=input_ids)


def test_flash_attention_in_the_context_pass_and_a_window():
    """Sliding windows and packed rows, through the routed kernel, against the CPU's dense masks."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=19)
    base = MistralForCausalLM(config).cuda().train()
    input_ids = torch.randint(0, 500, (2, 130), device="cuda")
    position_ids = torch.cat([torch.arange(50), torch.arange(80)]).expand(2, 130).cuda()
    given = {"labels": input_ids, "position_ids": position_ids}
    CGGRModel(base)(input_ids, **given).backward()
    found = {name: value.cpu() for name, value in gradients(base).items()}
    base.cpu()
    CGGRModel(base)(input_ids.cpu(), **{name: value.cpu() for name, value in given.items()}).backward()
    assert relative_error(found, gradients(base)) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_are_one_kernel_each_way(dtype):
    norm = model(dtype).model.norm
    forward = fused_norms([norm])[norm]
    x = torch.randn(3, 257, 128, device="cuda", dtype=dtype, requires_grad=True)
    forward(x).sum().backward()  # loads what it runs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        y = forward(x)
        torch.cuda.synchronize()
    kernels = [event.key for event in profiler.key_averages() if event.self_device_time_total]
    assert len(kernels) == 1, kernels
    assert y.grad_fn.name() == "FusedRmsNormBackward0"
    truth = torch.nn.functional.rms_norm(x.double(), (128,), norm.weight.double(), norm.variance_epsilon)
    own = (norm(x).double() - truth).norm()
    assert (y.double() - truth).norm() <= own + 1e-7 * truth.norm()
