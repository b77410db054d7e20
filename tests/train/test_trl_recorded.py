"""Updates of TRL's trainers whose pass is recorded, on the CPU: TRL's own loss, gradients and logs, from a replay."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from trl import SFTConfig, SFTTrainer

from cggr_core.recording import Recorder
from cggr_train import CGGRConfig
from tests.support.recorded_steps import record_at_once
from tests.support.reenacted import HostClock, Reenacted
from tests.support.trl_kit import QUIET, error, step
from tests.support.trl_updates import CASES, trainer_of, updates

pytestmark = QUIET


@pytest.fixture(autouse=True)
def _recorded_at_once(monkeypatch):
    record_at_once(monkeypatch)


@pytest.fixture
def make(tmp_path, tokenizer):
    return lambda kind, config, cggr, **values: trainer_of(kind, config, tmp_path, tokenizer, cggr, **values)


def same_updates(made, plain, batches):
    """Update both trainers with each batch; their losses and gradients are equal. Yields the gradients."""
    for batch in batches:
        wanted, expected = step(plain, batch)
        found, ours = step(made, batch)
        assert found == pytest.approx(wanted, rel=1e-6)
        assert error(ours, expected) <= 1e-6
        yield expected


def recording(made):
    """The trainer, with its passes recorded on the CPU by doing them again."""
    runs = made._task_loss.forward().runs
    assert runs.recorder is not None
    runs.recorder = Recorder(runs._run, runs._engine, device_type="cpu", graphs=Reenacted, clock=HostClock)
    return runs.recorder


@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_the_updates_as_they_are(make, tokenizer, name, gradient):
    kind, config, values = CASES[name]
    settings = {"gradient": gradient, "selection": "supervised"}
    plain = make(kind, config, CGGRConfig(**settings), **values)
    made = make(kind, config, CGGRConfig(cuda_graph="auto", **settings), **values)
    recorder, replays = recording(made), []
    for _ in same_updates(made, plain, updates(plain, name, len(tokenizer))):
        replays.append(recorder.replayed)
        for metric, count in plain._task_loss.metrics.items():
            assert made._task_loss.metrics[metric] == count
    assert replays[0] is False and replays[-2:] == [True, True]
    assert recorder.recordings == 1
    logged = [{key: values for key, values in one._metrics["train"].items()} for one in (made, plain)]
    for key, values in logged[1].items():
        assert logged[0][key] == pytest.approx(values, rel=1e-5, nan_ok=True), key


@pytest.mark.parametrize("case", ["checkpointing", "margin", "routers", "steps"])
def test_with_what_changes_a_pass(make, tokenizer, case):
    """Checkpointed layers, a margin, an expert routers' loss, and weights that an optimizer changes in place."""
    settings, values = {"selection": "supervised"}, {}
    if case == "margin":
        settings["context_margin"] = 3
    if case == "checkpointing":
        values = {"gradient_checkpointing": True}
    models = [{}, {}]
    if case == "routers":
        config = MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
            router_aux_loss_coef=0.5,
        )  # fmt: skip
        torch.manual_seed(0)
        weights = MixtralForCausalLM(config).state_dict()
        models = [{"model": MixtralForCausalLM(config)} for _ in range(2)]
        for one in models:
            one["model"].load_state_dict(weights)
    plain = make(SFTTrainer, SFTConfig, CGGRConfig(**settings), **models[0], **values)
    made = make(SFTTrainer, SFTConfig, CGGRConfig(cuda_graph="auto", **settings), **models[1], **values)
    recorder, replays = recording(made), []
    if case == "checkpointing":
        for one in (plain, made):
            one.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for gradients in same_updates(made, plain, updates(plain, case, len(tokenizer))):
        replays.append(recorder.replayed)
        for one in (plain, made):
            with torch.no_grad():
                for name, parameter in one.model.named_parameters():
                    if name in gradients:
                        parameter.sub_(0.05 * gradients[name])
    assert replays[-1] is True, recorder.reason


def test_what_changes_the_model_is_followed(make, tokenizer):
    """Another setting drops the recordings; the same shapes are recorded again."""
    plain = make(SFTTrainer, SFTConfig, CGGRConfig(selection="supervised"))
    made = make(SFTTrainer, SFTConfig, CGGRConfig(cuda_graph="auto", selection="supervised"))
    recorder = recording(made)
    batches = updates(plain, "sft", len(tokenizer))
    for batch in batches:
        step(made, batch)
    assert recorder.replayed
    for one in (plain, made):
        for layer in one.model.model.layers:
            layer.self_attn.scaling *= 3.0
    for number, batch in enumerate(batches):
        wanted, expected = step(plain, batch)
        found, ours = step(made, batch)
        assert found == pytest.approx(wanted, rel=1e-6)
        assert error(ours, expected) <= 1e-6
        assert recorder.replayed == (number > 1)


def test_without_graphs_nothing_is_recorded(make):
    made = make(SFTTrainer, SFTConfig, CGGRConfig(cuda_graph=False, selection="supervised"))
    assert made._task_loss.forward().runs.recorder is None
