"""CGGRModel in training scripts: checkpointing, LoRA, autocast, accumulation, dropout."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cggr_core import CGGRModel, Selection
from tests.support.model_steps import MODES, ROUTED, backward, checkpoint_activations, routed, tokens
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB


class TestSurroundings:
    @pytest.mark.parametrize(("gradient", "engine"), ROUTED)
    @pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-rotary", "bert-masked", "mixtral"])
    def test_gradient_checkpointing_changes_nothing(self, name, gradient, engine):
        model, input_ids = ROUTABLE[name](), tokens()
        settings = {"gradient": gradient, "engine": engine, "selection": "random"}
        _, wanted = backward(CGGRModel(model, **settings), input_ids)
        checkpoint_activations(model)
        calls = []
        layer = CGGRModel(model)._passes.architecture.layers[1]
        first = next(module for module in layer.modules() if "weight" in module._parameters)
        hook = first.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        wrapped = CGGRModel(model, **settings)
        loss = wrapped(input_ids, labels=input_ids)
        forwards = len(calls)
        loss.backward()
        hook.remove()
        assert len(calls) > forwards, "no layer was recomputed"
        assert relative_error(gradients(model), wanted) <= 1e-6
        assert any(module.__dict__.get("gradient_checkpointing") for module in model.modules())

    # peft asks transformers by a name that newer versions have renamed.
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    @pytest.mark.parametrize("gradient", MODES)
    def test_lora(self, gradient):
        model = get_peft_model(ROUTABLE["llama"](), LoraConfig(target_modules="all-linear", r=4, lora_alpha=8))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        input_ids = tokens()
        plain = model(input_ids=input_ids, labels=input_ids).loss
        plain.backward()
        wanted = gradients(model)
        wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0, selection="random")
        loss, found = backward(wrapped, input_ids)
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
        assert relative_error(found, wanted) <= 1e-5
        assert any("lora_A" in name and value.abs().sum() > 0 for name, value in found.items())

    @pytest.mark.parametrize(("gradient", "engine"), ROUTED)
    def test_autocast_reaches_every_weight(self, gradient, engine):
        """A weight cast where gradients are off must not be reused, without its graph, where they are on."""
        model, input_ids = ROUTABLE["llama"](), tokens()
        settings = {"gradient": gradient, "engine": engine, "selection": "random"}
        _, wanted = backward(CGGRModel(model, **settings), input_ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = CGGRModel(model, **settings)(input_ids, labels=input_ids)
        loss.backward()
        found = gradients(model)
        assert loss.dtype == torch.float32
        missing = [name for name in wanted if wanted[name].abs().sum() > 0 and found[name].abs().sum() == 0]
        assert not missing
        assert relative_error(found, wanted) <= 0.1

    def test_gradient_scaler(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        _, wanted = backward(routed(model), input_ids)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale(routed(model)(input_ids, labels=input_ids)).backward()
        scaler.unscale_(optimizer)
        assert relative_error(gradients(model), wanted) <= 1e-6

    @pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
    def test_accumulation_equals_one_batch(self, gradient):
        """With num_items, micro-batches add up to the batch; rows are selected one by one, so they are the same."""
        model, input_ids = ROUTABLE["llama"](), tokens(rows=4)
        labels = input_ids.clone()
        labels[0, :7] = -100
        mask = torch.zeros(4, 12, dtype=torch.bool)
        mask[:, [2, 7, 8]] = True
        mask &= torch.cat([labels[:, 1:], labels.new_full((4, 1), -100)], 1) != -100

        def selection(rows: slice) -> Selection:
            return Selection.from_mask(mask[rows], weight=torch.full((4, 12), 4.0)[rows], capacity=3)

        wrapped = CGGRModel(model, gradient=gradient)
        count = (labels[:, 1:] != -100).sum()
        wrapped(input_ids, labels=labels, selection=selection(slice(0, 4))).backward()
        wanted = gradients(model)
        for rows in (slice(0, 1), slice(1, 4)):
            part = wrapped(input_ids[rows], labels=labels[rows], selection=selection(rows), num_items=count)
            part.backward()
        assert relative_error(gradients(model), wanted) <= 1e-6

    @pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
    def test_dropout(self, engine):
        """Every computation draws its own mask; with everything kept, one pass draws the masks of ordinary training."""
        dropout = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.0}
        model, input_ids = ROUTABLE["gpt2"](**dropout), tokens()
        wrapped = CGGRModel(model, engine=engine, selection="random", min_tokens_ratio=1.0)
        wrapped(input_ids, labels=input_ids).backward()  # the first step looks at the model
        model.zero_grad()
        torch.manual_seed(1)
        first, first_gradients = backward(wrapped, input_ids)
        torch.manual_seed(1)
        second, second_gradients = backward(wrapped, input_ids)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert relative_error(first_gradients, second_gradients) == 0
        assert not torch.equal(backward(wrapped, input_ids)[0], first)
        if engine == "interleaved":
            torch.manual_seed(1)
            plain = model(input_ids=input_ids, labels=input_ids).loss
            plain.backward()
            torch.testing.assert_close(first, plain.detach(), rtol=1e-5, atol=0)
            assert relative_error(first_gradients, gradients(model)) <= 1e-5

    def test_mixture_of_experts_balancing_loss_is_that_of_the_kept_tokens(self):
        model = ROUTABLE["mixtral"](output_router_logits=True)
        input_ids = tokens()
        attention_mask = torch.ones_like(input_ids)
        plain = model(input_ids=input_ids, labels=input_ids)
        wrapped = CGGRModel(model, selection="random", min_tokens_ratio=1.0)
        loss, _ = backward(wrapped, input_ids, attention_mask=attention_mask)
        torch.testing.assert_close(loss, plain.loss.detach(), rtol=1e-5, atol=0)
        assert wrapped.metrics["auxiliary_loss"] > 0
        part = CGGRModel(model, selection="random", min_tokens_ratio=0.25)
        backward(part, input_ids, attention_mask=attention_mask)
        assert part.metrics["auxiliary_loss"] != wrapped.metrics["auxiliary_loss"]

    @pytest.mark.parametrize("gradient", ["kv", "detached"])
    @pytest.mark.parametrize("name", ["gpt-oss", "mixtral", "qwen3-moe"])
    def test_balancing_loss_is_the_same_in_both_engines(self, name, gradient):
        """The interleaved engine calls layers inside layers, whose routers must not be collected."""
        model, input_ids = ROUTABLE[name](output_router_logits=True, router_aux_loss_coef=0.5), tokens()
        found = {}
        for engine in ("interleaved", "two_pass"):
            wrapped = CGGRModel(model, gradient=gradient, engine=engine, selection="random", min_tokens_ratio=0.25)
            loss, grads = backward(wrapped, input_ids, draw=0)
            found[engine] = loss, wrapped.metrics["auxiliary_loss"], grads
        (loss, auxiliary, grads), (other_loss, other_auxiliary, other_grads) = found.values()
        assert auxiliary > 0.1
        torch.testing.assert_close(auxiliary, other_auxiliary)
        torch.testing.assert_close(loss, other_loss)
        assert relative_error(grads, other_grads) <= 1e-5

    @pytest.mark.parametrize("gradient", MODES)
    def test_a_head_that_is_not_one_matrix_is_run_by_the_model(self, gradient):
        class DoublingHead(nn.Linear):
            def forward(self, hidden):
                return 2.0 * super().forward(hidden)

        model, input_ids = ROUTABLE["llama"](), tokens()
        head = DoublingHead(32, VOCAB, bias=False)
        head.weight = model.lm_head.weight
        model.set_output_embeddings(head)
        plain = model(input_ids=input_ids, labels=input_ids).loss
        plain.backward()
        wanted = gradients(model)
        wrapped = CGGRModel(model, gradient=gradient, selection="sampled", min_tokens_ratio=1.0)
        assert not wrapped._passes.architecture.head.fused
        with pytest.warns(UserWarning, match="its own logits are used"):
            loss, found = backward(wrapped, input_ids)
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
        assert relative_error(found, wanted) <= 1e-5

    # Dynamo looks at .grad of whatever tensor a compiled module is given.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    @pytest.mark.parametrize(("gradient", "engine"), ROUTED)
    def test_compiled_norms_and_mlps(self, gradient, engine):
        """As the guide on backends recommends: modules that routing does not touch are called unchanged."""
        model, input_ids = ROUTABLE["llama"](), tokens()
        settings = {"gradient": gradient, "engine": engine, "selection": "random"}
        _, wanted = backward(CGGRModel(model, **settings), input_ids)
        for name, module in model.named_modules():
            if name.endswith(("norm", ".mlp")):
                module.compile(backend="aot_eager", dynamic=False)
        _, found = backward(CGGRModel(model, **settings), input_ids)
        assert relative_error(found, wanted) <= 1e-6

    def test_embeddings_in_place_of_token_ids(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = routed(model)
        loss, _ = backward(wrapped, input_ids)
        wrapped = routed(model)
        embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
        again = wrapped(inputs_embeds=embeddings, labels=input_ids)
        again.backward()
        torch.testing.assert_close(again.detach(), loss)
        assert (embeddings.grad.abs().sum(2) > 0).sum() >= wrapped.metrics["kept_tokens"]


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is:DeprecationWarning", "ignore:`torch.jit.*` is:FutureWarning")
@pytest.mark.parametrize(("gradient", "engine"), [("exact", None), *ROUTED])
def test_a_traced_module_is_a_part_like_any_other(gradient, engine):
    model, input_ids = ROUTABLE["llama"](), tokens()
    settings = {"gradient": gradient, "engine": engine, "selection": "random"}
    loss, wanted = backward(CGGRModel(model, **settings), input_ids)
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = torch.jit.trace(mlp, torch.randn(2, 5, 32), check_trace=False)
    again, found = backward(CGGRModel(model, **settings), input_ids)
    torch.testing.assert_close(again, loss)
    assert relative_error(found, wanted) <= 1e-6
