"""CGGRTrainer and CGGRMixin: invalid combinations are refused, with what to do instead."""

import pytest
from peft import PromptTuningConfig, get_peft_model
from transformers import DataCollatorWithFlattening, Seq2SeqTrainer, Trainer

from cggr_core.experimental import RememberedScores
from cggr_train import CGGRConfig, CGGRMixin, CGGRTrainer
from tests.support.trainer_kit import examples, pad, tiny_model, trainer


@pytest.fixture(autouse=True)
def _quiet(capsys):
    yield
    capsys.readouterr()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"torch_compile": True}, "torch_compile=True"),
    ],
)
def test_what_cannot_be_combined_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, CGGRConfig(), **values)


def test_other_losses_are_refused(tmp_path):
    plain = trainer(tmp_path)
    with pytest.raises(ValueError, match="compute_loss_func needs a forward of all tokens"):
        CGGRTrainer(plain.model, plain.args, compute_loss_func=lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="return_outputs=True is not supported in training"):
        plain.compute_loss(plain.model.train(), pad(examples(2)), return_outputs=True)


@pytest.mark.parametrize(
    ("cggr", "message"),
    [
        (CGGRConfig(min_tokens_ratio=1.5), "1.5"),
        (CGGRConfig(gradient="half"), "gradient"),  # type: ignore[arg-type]
        (CGGRConfig(router="deep"), "router must be 'full_depth'"),  # type: ignore[arg-type]
        (CGGRConfig(gradient="sequence", selection="supervised"), "whole sequences"),
    ],
)
def test_settings_fail_before_training(tmp_path, cggr, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, cggr)


def test_packing_without_positions_is_refused(tmp_path):
    collator = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True)
    with pytest.raises(ValueError, match="no position_ids; let the data collator return position_ids"):
        trainer(tmp_path, CGGRConfig(), collator=collator).train()


class FocalTrainer(Trainer):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


class TestClasses:
    def test_another_loss_is_refused_when_the_class_is_made(self):
        with pytest.raises(TypeError, match="FocalTrainer computes its own loss"):
            type("Routed", (CGGRMixin, FocalTrainer), {})

    @pytest.mark.parametrize("base", [Trainer, Seq2SeqTrainer])
    def test_the_mixin_comes_first(self, base):
        with pytest.raises(TypeError, match=r"CGGR would never compute.*write class Routed\(CGGRMixin, "):
            type("Routed", (base, CGGRMixin), {})

    def test_a_mixin_without_a_trainer(self, tmp_path):
        with pytest.raises(TypeError, match=r"Routed has no Trainer; .*: class Routed\(CGGRMixin, SFTTrainer\)"):
            trainer(tmp_path, CGGRConfig(), kind=type("Routed", (CGGRMixin,), {}))

    def test_something_around_the_loss(self, tmp_path):
        class Routed(CGGRMixin, Trainer):
            losses = ()

            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                self.losses = (*self.losses, loss.item())
                return loss

        made = trainer(tmp_path, CGGRConfig(), kind=Routed)
        made.train()
        logged = [record["loss"] for record in made.state.log_history if "loss" in record]
        assert made.losses == pytest.approx(logged, abs=1e-3)

    def test_settings_are_a_config(self, tmp_path):
        with pytest.raises(TypeError, match="cggr must be a CGGRConfig, got dict"):
            trainer(tmp_path, {"gradient": "kv"})


def test_remembered_scores_are_refused(tmp_path):
    memory = RememberedScores.empty(examples=8, length=18)
    with pytest.raises(ValueError, match=r"router is RememberedScores.*use cggr train --router remembered"):
        CGGRTrainer(tiny_model(), trainer(tmp_path).args, router=memory)


def test_batches_without_labels_are_refused(tmp_path):
    made = trainer(tmp_path, CGGRConfig(), collator=lambda rows: {"input_ids": pad(rows)["input_ids"]})
    with pytest.raises(ValueError, match="the batch has input_ids but no labels"):
        made.train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by peft
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # peft's, before the error
@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_virtual_tokens_of_prompts_are_refused(tmp_path, gradient):
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"returned logits \[2, 11, 64\] for \[2, 8\] tokens"):
        trainer(tmp_path, CGGRConfig(gradient=gradient), model=model).train()
