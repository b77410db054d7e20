"""Changes to objects of transformers and torch apply where they should, and nowhere else."""

import threading

import pytest
import torch
from transformers import LlamaForCausalLM, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cggr_core import CGGRModel
from cggr_core.routing import whole_rows
from cggr_core.routing.masks import routed_masks
from cggr_core.routing.patches import attention
from tests.support.model_steps import ROUTED, tokens
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE


def in_threads(*functions):
    """Run each function in its own thread, and raise the first error."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_models_run_in_two_threads():
    """Each step waits at its first layer for the other one, and gives the same result as alone."""
    names, settings = ("llama", "gpt2"), {"gradient": "kv", "selection": "random", "min_tokens_ratio": 0.5}
    batches = [tokens(seed=seed) for seed in (0, 1)]
    models = [CGGRModel(ROUTABLE[name](), **settings) for name in names]
    alone = []
    for model, batch in zip(models, batches, strict=True):
        model(batch, labels=batch, draw=3).backward()
        alone.append(gradients(model.model))
    meeting = threading.Barrier(2, timeout=60)
    met = []

    def step(number):
        model, batch = models[number], batches[number]

        def meet(*_):
            hook.remove()
            met.append(meeting.wait())

        hook = model._passes.architecture.layers[0].register_forward_pre_hook(meet)
        model(batch, labels=batch, draw=3).backward()

    in_threads(lambda: step(0), lambda: step(1))
    assert sorted(met) == [0, 1], "both were inside a pass at once"
    for model, wanted in zip(models, alone, strict=True):
        assert relative_error(gradients(model.model), wanted) <= 1e-6


def test_a_plain_forward_beside_a_pass_gets_its_own_masks():
    model, batch = ROUTABLE["llama"](), tokens()
    padded = torch.ones_like(batch)
    padded[0, :4] = 0
    wanted = model(batch, attention_mask=padded).logits
    inside, done = threading.Event(), threading.Event()
    found = []

    def routed():
        # A change that would give the other thread a mask of another shape.
        visibility = CGGRModel(ROUTABLE["llama"]())._passes.inputs(input_ids=batch).visibility(torch.zeros(3, 2).long())
        with routed_masks(visibility):
            inside.set()
            assert done.wait(60)

    def plain():
        assert inside.wait(60)
        found.append(model(batch, attention_mask=padded).logits)
        done.set()

    in_threads(routed, plain)
    assert torch.equal(found[0], wanted)


PADDED = {"attention_mask": torch.ones(3, 12, dtype=torch.int64).index_fill_(1, torch.arange(4), 0)}
PACKED = {"position_ids": torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)}


@pytest.mark.parametrize(("gradient", "engine"), [("exact", None), *ROUTED])
@pytest.mark.parametrize("given", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize(("place", "same_config"), [("model.embed_tokens", False), ("model.norm", True)])
def test_a_model_that_runs_inside_a_pass_gets_its_own_masks(gradient, engine, given, place, same_config):
    """A teacher that is called in a hook, with rows of the same shape, so that a wrong mask would not raise."""
    model, batch = ROUTABLE["llama"](), tokens()
    teacher = LlamaForCausalLM(model.config) if same_config else ROUTABLE["qwen3"]()
    wanted = teacher(batch, use_cache=False, **given).logits
    found, settings = [], {"gradient": gradient, "engine": engine, "selection": "random", "min_tokens_ratio": 0.5}
    alone = CGGRModel(ROUTABLE["llama"](), **settings)
    alone(batch, labels=batch, draw=1).backward()
    hook = model.get_submodule(place).register_forward_hook(
        lambda *_: found.append(teacher(batch, use_cache=False, **given).logits) and None
    )
    routed = CGGRModel(model, **settings)
    routed(batch, labels=batch, draw=1).backward()
    hook.remove()
    assert found
    for logits in found:
        torch.testing.assert_close(logits, wanted)
    assert relative_error(gradients(model), gradients(alone.model)) <= 1e-6


def test_blocks_nest_and_leave_what_they_found():
    inner, outer = object(), ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    visibility = CGGRModel(ROUTABLE["llama"]())._passes.inputs(input_ids=tokens()).visibility()
    repeated = torch.tensor([[0, 1, 0, 1]])
    assert outer is sdpa_mask
    with pytest.raises(RuntimeError, match="in the inner block"), whole_rows():
        without = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        assert without is not sdpa_mask
        assert masking_utils.find_packed_sequence_indices(repeated) is None
        with routed_masks(visibility):
            inner = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        assert inner is not without and ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is without
        assert masking_utils.find_packed_sequence_indices(repeated) is None
        with routed_masks(visibility):
            raise RuntimeError("in the inner block")
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
    assert masking_utils.find_packed_sequence_indices(repeated).tolist() == [[0, 0, 1, 1]]


def test_a_builder_that_is_registered_later_is_found():
    def build(**arguments):
        return sdpa_mask(**arguments)

    AttentionMaskInterface.register("registered_later", build)
    try:
        assert ALL_MASK_ATTENTION_FUNCTIONS["registered_later"] is build
        visibility = CGGRModel(ROUTABLE["llama"]())._passes.inputs(input_ids=tokens()).visibility()
        with routed_masks(visibility):
            assert ALL_MASK_ATTENTION_FUNCTIONS["registered_later"] is not build
    finally:
        del AttentionMaskInterface._global_mapping["registered_later"]


def test_a_plain_model_compiles_as_one_graph():
    model, batch = ROUTABLE["llama"]().eval(), tokens()
    wanted = model(batch, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch, use_cache=False).logits, wanted)


def test_torch_uses_no_weight_that_was_cast_without_its_graph():
    """Once it did, silently, under autocast: a pass without gradients would have stopped those of the next."""
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_what_was_told_of_documents_ends_with_its_block():
    """Also while an outer block is still there, which told nothing of them."""
    visibility = CGGRModel(ROUTABLE["llama"]())._passes.inputs(input_ids=tokens()).visibility()
    repeated = torch.tensor([[0, 1, 0, 1]])
    with routed_masks(visibility):
        outer = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        with whole_rows():
            assert masking_utils.find_packed_sequence_indices(repeated) is None
        assert masking_utils.find_packed_sequence_indices(repeated).tolist() == [[0, 0, 1, 1]]
        assert attention._some_pass_runs and ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not outer is not sdpa_mask
    assert not attention._some_pass_runs, "compiled code sees transformers' own again"


def test_a_block_that_tells_nothing_of_documents_leaves_what_an_outer_one_told():
    repeated = torch.tensor([[0, 1, 0, 1]])
    with whole_rows(), attention.changed_mask_builders(lambda name, build: build, architecture=None):
        assert masking_utils.find_packed_sequence_indices(repeated) is None


def test_an_attention_is_registered_with_its_masks():
    name, attend, build = "own_attention", object(), object()
    try:
        attention.register_attention(name, attend, build)
        assert ALL_ATTENTION_FUNCTIONS[name] is attend and ALL_MASK_ATTENTION_FUNCTIONS[name] is build
    finally:
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(name, None)
