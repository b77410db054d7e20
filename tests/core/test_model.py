"""CGGRModel in a training script: the traps, the surroundings it has to work in, and what it says when misused."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cggr_core import CGGRModel, Selection, create_truncated_router
from reference_routing import gradients, relative_error
from tiny_models import ROUTABLE, VOCAB

MODES = ("exact", "kv", "detached", "sequence")
ROUTED = [("kv", "interleaved"), ("kv", "two_pass"), ("detached", "interleaved"), ("detached", "two_pass")]


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def backward(wrapped: CGGRModel, input_ids, **inputs):
    inputs.setdefault("labels", input_ids)
    loss = wrapped(input_ids, **inputs)
    loss.backward()
    return loss.detach(), gradients(wrapped.model)


def routed(model, gradient="kv", engine=None, **settings) -> CGGRModel:
    selection = settings.pop("selection", "random" if engine == "interleaved" else "sampled")
    return CGGRModel(model, gradient=gradient, engine=engine, selection=selection, **settings)


def checkpoint_activations(model):
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # before transformers 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})


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
        """Every computation draws its own mask; with everything kept, one pass draws those of ordinary training."""
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
        loss, found = backward(wrapped, input_ids)
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
        assert relative_error(found, wanted) <= 1e-5

    # Dynamo looks at .grad of whatever tensor a compiled module is given.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    @pytest.mark.parametrize(("gradient", "engine"), ROUTED)
    def test_compiled_norms_and_mlps(self, gradient, engine):
        """What the guide on backends recommends: modules between the seams are called as they are."""
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


class TestEdges:
    @pytest.mark.parametrize("gradient", MODES)
    def test_nothing_countable_is_a_zero_connected_to_the_graph(self, gradient):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, gradient=gradient)
        loss, found = backward(wrapped, input_ids, labels=torch.full_like(input_ids, -100))
        assert loss == 0
        assert all(bool((value == 0).all()) for value in found.values())
        assert wrapped.metrics["kept_tokens"] == 0

    @pytest.mark.parametrize("gradient", MODES)
    @pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 2), (2, 3), (1, 7)])
    def test_few_tokens(self, gradient, rows, length):
        model, input_ids = ROUTABLE["llama"](), tokens(rows, length)
        wrapped = CGGRModel(model, gradient=gradient)
        loss, _ = backward(wrapped, input_ids)
        assert torch.isfinite(loss)
        assert wrapped.metrics["countable_tokens"] == rows * (length - 1)
        kept = wrapped.metrics["kept_tokens"]
        assert kept > 0 if length > 1 else kept == 0

    @pytest.mark.parametrize("gradient", MODES)
    def test_labels_that_do_not_count_are_never_kept(self, gradient):
        model, input_ids = ROUTABLE["llama"](), tokens()
        labels = input_ids.masked_fill(torch.arange(12) % 3 == 0, -100)
        wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0)
        backward(wrapped, input_ids, labels=labels)
        assert wrapped.metrics["kept_tokens"] == wrapped.metrics["countable_tokens"] == (labels[:, 1:] != -100).sum()

    def test_supervised_keeps_exactly_the_labelled_tokens(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        labels = input_ids.clone()
        labels[0, :9] = -100
        labels[1, :5] = -100
        exact = CGGRModel(model, gradient="exact", selection="supervised")
        loss, _ = backward(exact, input_ids, labels=labels)
        plain = model(input_ids=input_ids, labels=labels).loss
        torch.testing.assert_close(loss, plain.detach())
        wrapped = CGGRModel(model, selection="supervised")
        loss, _ = backward(wrapped, input_ids, labels=labels)
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
        assert wrapped.metrics["engine"] == "interleaved"
        assert wrapped.metrics["keep_ratio"] == 1

    @pytest.mark.parametrize("gradient", MODES)
    def test_the_weighted_loss_estimates_the_full_loss(self, gradient):
        model, input_ids = ROUTABLE["llama"](), tokens(rows=6)
        wrapped = CGGRModel(model, gradient=gradient, selection="sampled", min_tokens_ratio=0.5, scoring="combined")
        with torch.no_grad():
            full = model(input_ids=input_ids, labels=input_ids).loss
            losses = torch.stack([wrapped(input_ids, labels=input_ids) for _ in range(80)])
        standard_error = losses.std() / 80**0.5
        assert (losses.mean() - full).abs() <= 4 * standard_error
        assert standard_error > 0

    def test_user_weights_multiply(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, selection="random", min_tokens_ratio=1.0)
        loss, _ = backward(wrapped, input_ids)
        doubled, _ = backward(wrapped, input_ids, token_weight=torch.full((3, 12), 2.0))
        torch.testing.assert_close(doubled, 2 * loss)
        only_first = torch.zeros(3, 12)
        only_first[0] = 1.0
        loss, _ = backward(wrapped, input_ids, token_weight=only_first)
        torch.testing.assert_close(loss, model(input_ids=input_ids[:1], labels=input_ids[:1]).loss.detach() / 3)


class TestIsTheWrappedModel:
    def test_in_evaluation_without_labels_and_for_saving(self, tmp_path):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model)
        assert wrapped.state_dict().keys() == model.state_dict().keys()
        assert len(list(wrapped.parameters())) == len(list(model.parameters()))
        torch.testing.assert_close(wrapped(input_ids).logits, model(input_ids).logits)
        wrapped.eval()
        torch.testing.assert_close(
            wrapped(input_ids, labels=input_ids).loss, model(input_ids=input_ids, labels=input_ids).loss
        )
        generated = wrapped.generate(input_ids[:1, :4], max_new_tokens=2, do_sample=False)
        assert generated.shape == (1, 6)
        wrapped.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(again(input_ids).logits, model(input_ids).logits)

    def test_a_router_of_the_same_model_adds_no_parameters(self):
        model = ROUTABLE["llama"]()
        wrapped = CGGRModel(model, create_truncated_router(model, 1))
        assert [name for name, _ in wrapped.named_parameters()] == [f"model.{n}" for n, _ in model.named_parameters()]

    def test_nothing_of_the_model_stays_changed(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        checkpoint_activations(model)
        before = {name: dict(module.__dict__) for name, module in model.named_modules()}
        for gradient, engine in ROUTED:
            backward(routed(model, gradient, engine), input_ids)
        for name, module in model.named_modules():
            assert "forward" not in module.__dict__, name
            assert module.training == before[name]["training"]
            assert module.__dict__.get("gradient_checkpointing") == before[name].get("gradient_checkpointing")
        assert model.config._attn_implementation == "sdpa"

    def test_nothing_of_the_model_stays_changed_after_an_error(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = routed(model)
        backward(wrapped, input_ids)

        def fail(*_):
            raise RuntimeError("a layer failed")

        hook = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="a layer failed"):
            wrapped(input_ids, labels=input_ids)
        hook.remove()
        assert all("forward" not in module.__dict__ for module in model.modules())
        backward(wrapped, input_ids)

    def test_deep_copies(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = routed(model)
        loss, _ = backward(wrapped, input_ids)
        copied = copy.deepcopy(routed(model))
        torch.testing.assert_close(backward(copied, input_ids)[0], loss)


class TestScheduleAndState:
    def test_starts_at_its_ratio_without_any_step(self):
        model, input_ids = ROUTABLE["llama"](), tokens(length=33)
        router = create_truncated_router(model, 1)
        wrapped = CGGRModel(model, router=router, min_tokens_ratio=0.25)
        backward(wrapped, input_ids)
        assert wrapped.metrics["keep_ratio"] == 0.25
        assert wrapped.metrics["kept_tokens"] == 24

    def test_warms_up_from_everything(self):
        model, input_ids = ROUTABLE["llama"](), tokens(length=33)
        wrapped = CGGRModel(model, min_tokens_ratio=0.25, warmup_steps=2)
        ratios = []
        for _ in range(4):
            backward(wrapped, input_ids)
            ratios.append(round(wrapped.metrics["keep_ratio"].item(), 3))
            wrapped.step()
        assert ratios == [1.0, 0.625, 0.25, 0.25]

    def test_says_once_that_step_is_never_called(self):
        model, input_ids = ROUTABLE["llama"](), tokens(1, 3)
        wrapped = CGGRModel(model, warmup_steps=10, gradient="exact")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(120):
                wrapped(input_ids, labels=input_ids)
        assert len([w for w in caught if "step()" in str(w.message)]) == 1

    def test_a_resumed_run_makes_the_same_selections(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        whole = CGGRModel(model, selection="sampled", seed=5, warmup_steps=6)
        losses = []
        for step in range(6):
            losses.append(backward(whole, input_ids)[0])
            whole.step()
            if step == 2:
                state = whole.routing_state_dict()
        resumed = CGGRModel(model, selection="sampled", seed=5, warmup_steps=6)
        resumed.load_routing_state_dict(state)
        for step in range(3, 6):
            assert torch.equal(backward(resumed, input_ids)[0], losses[step])
            resumed.step()
        assert len({loss.item() for loss in losses}) == 6

    def test_a_resumed_run_has_the_same_dynamic_ratio(self):
        model, input_ids = ROUTABLE["llama"](), tokens(length=65)
        whole = CGGRModel(model, dynamic_threshold=True, threshold_sensitivity=1.0)
        backward(whole, input_ids)
        state = whole.routing_state_dict()
        resumed = CGGRModel(model, dynamic_threshold=True, threshold_sensitivity=1.0)
        resumed.load_routing_state_dict(state)
        assert torch.equal(backward(whole, input_ids)[0], backward(resumed, input_ids)[0])
        assert whole.schedule.ratio == resumed.schedule.ratio != 0.25

    def test_dynamic_ratio_follows_the_confidence_of_the_step_before(self):
        model, input_ids = ROUTABLE["llama"](), tokens(length=65)
        wrapped = CGGRModel(model, dynamic_threshold=True, threshold_sensitivity=1.0)
        backward(wrapped, input_ids)
        assert wrapped.metrics["keep_ratio"] == 0.25
        confidence = wrapped.metrics["confidence"].item()
        backward(wrapped, input_ids)
        assert confidence < 0.5
        assert wrapped.metrics["keep_ratio"] > 0.25


class TestMetrics:
    def test_what_was_done_is_reported(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, selection="topk", scoring="loss", min_tokens_ratio=0.3)
        loss, _ = backward(wrapped, input_ids)
        metrics = wrapped.metrics
        assert metrics["engine"] == "two_pass"
        assert metrics["gradient"] == "kv"
        assert metrics["countable_tokens"] == 33
        assert metrics["kept_tokens"] == 9
        torch.testing.assert_close(metrics["loss"], loss)
        torch.testing.assert_close(metrics["score_kept"], loss)  # top-k of the loss, unweighted: the same mean
        assert metrics["score_dropped"] < metrics["score_kept"]
        torch.testing.assert_close(
            metrics["full_loss"], model(input_ids=input_ids, labels=input_ids).loss.detach(), rtol=1e-5, atol=0
        )

    @pytest.mark.parametrize(
        ("settings", "with_router", "engine"),
        [
            ({}, False, "two_pass"),
            ({}, True, "interleaved"),
            ({"selection": "random"}, False, "interleaved"),
            ({"selection": "supervised"}, False, "interleaved"),
            ({"selection": "random", "engine": "two_pass"}, False, "two_pass"),
            ({"engine": "two_pass"}, True, "two_pass"),
            ({"gradient": "exact"}, False, "plain"),
            ({"gradient": "sequence"}, True, "plain"),
        ],
    )
    def test_the_engine_is_what_the_scores_need(self, settings, with_router, engine):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, create_truncated_router(model, 1) if with_router else None, **settings)
        backward(wrapped, input_ids)
        assert wrapped.metrics["engine"] == engine

    def test_a_router_may_be_any_model(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        router = ROUTABLE["gpt2"]().eval()
        wrapped = CGGRModel(model, router, selection="topk", scoring="loss", min_tokens_ratio=0.2)
        backward(wrapped, input_ids)
        logits = router(input_ids).logits[:, :-1]
        nll = nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
        torch.testing.assert_close(wrapped.metrics["score_kept"], nll.topk(2).values.mean().detach())
        assert wrapped.metrics["engine"] == "interleaved"
        assert "router.transformer.wte.weight" in dict(wrapped.named_parameters())
        assert all(parameter.grad is None for parameter in router.parameters())


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"gradient": "kw"}, "did you mean 'kv'"),
            ({"selection": "stratfied"}, "did you mean 'stratified'"),
            ({"scoring": "entropi"}, "did you mean 'entropy'"),
            ({"engine": "two-pass"}, "did you mean 'two_pass'"),
            ({"min_tokens_ratio": 0.0}, r"min_tokens_ratio must be in \(0, 1\]"),
            ({"min_tokens_ratio": 1.5}, r"min_tokens_ratio must be in \(0, 1\]"),
            ({"engine": "interleaved"}, "needs the selection before the layers"),
            ({"gradient": "sequence", "selection": "supervised"}, "keeps whole sequences"),
            ({"dynamic_threshold": True, "selection": "random"}, "scores none"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CGGRModel(ROUTABLE["llama"](), **settings)

    def test_not_a_hugging_face_model(self):
        with pytest.raises(TypeError, match="Hugging Face"):
            CGGRModel(nn.Linear(2, 2))

    @pytest.mark.parametrize(
        ("inputs", "error", "message"),
        [
            ({"labels": torch.zeros(3, 11, dtype=torch.long)}, ValueError, "labels must have shape"),
            ({"labels": torch.zeros(3, 12)}, TypeError, r"labels must be torch.int64, got torch.float32"),
            ({"labels": torch.full((3, 12), VOCAB)}, ValueError, "labels holds 33 value.s. outside the vocabulary"),
            ({"labels": torch.zeros(3, 12, dtype=torch.long, device="meta")}, ValueError, "labels is on meta"),
            ({"attention_mask": torch.ones(3, 11)}, ValueError, "attention_mask must have shape"),
            ({"attention_mask": torch.ones(3, 12, 12)}, ValueError, "attention_mask must be"),
            ({"position_ids": torch.arange(11)[None]}, ValueError, "position_ids must have shape"),
            ({"token_weight": torch.ones(3)}, ValueError, "token_weight must have shape"),
            ({"reference_nll": torch.ones(3, 12)}, ValueError, "scoring='excess' only"),
        ],
    )
    def test_inputs(self, inputs, error, message):
        model, input_ids = ROUTABLE["llama"](), tokens()
        with pytest.raises(error, match=message):
            CGGRModel(model)(input_ids, **{"labels": input_ids, **inputs})
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_nan_logits_are_counted(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model)
        backward(wrapped, input_ids)
        model.model.norm.weight.data[0] = float("nan")
        with pytest.raises(ValueError, match=r"NaN.* at 33"):
            wrapped(input_ids, labels=input_ids)

    def test_a_selection_for_another_batch(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        selection = Selection.from_mask(torch.ones(2, 12, dtype=torch.bool), capacity=4)
        with pytest.raises(ValueError, match="selection was made for"):
            CGGRModel(model)(input_ids, labels=input_ids, selection=selection)
