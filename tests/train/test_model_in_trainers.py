"""A CGGRModel passed to a Trainer that would not run its forward is refused, with what to write instead."""

import pytest
from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from cggr_core import CGGRModel
from cggr_train import CGGRTrainer
from tests.support.trainer_kit import arguments, examples, pad, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:(trl|transformers|peft)[.]"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(trl|transformers|datasets|multiprocess)[.]"),
]
PAIRS = Dataset.from_list([{"prompt": "def f(a):\n", "chosen": "    return a\n", "rejected": "    return 1\n"}] * 2)


def text_arguments(kind, folder, **values):
    return kind(str(folder), report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=2, **values)


def of_sft(model, folder, tokenizer):
    data = Dataset.from_list([{"prompt": "def f(a):\n", "completion": "    return a\n"}] * 2)
    return SFTTrainer(model, text_arguments(SFTConfig, folder), train_dataset=data, processing_class=tokenizer)


def of_dpo(model, folder, tokenizer):
    return DPOTrainer(
        model, ref_model=tiny_model(vocab_size=len(tokenizer)), args=text_arguments(DPOConfig, folder),
        train_dataset=PAIRS, processing_class=tokenizer,
    )  # fmt: skip


def of_grpo(model, folder, tokenizer):
    return GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=text_arguments(GRPOConfig, folder, num_generations=2), train_dataset=PAIRS.select_columns(["prompt"]),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("make", [of_sft, of_dpo, of_grpo])
def test_a_trainer_of_trl_refuses_it(tmp_path, tokenizer, make):
    model = tiny_model(vocab_size=len(tokenizer))
    model.config._name_or_path = "tiny"
    with pytest.raises(TypeError, match="put CGGRMixin first"):
        make(CGGRModel(model), tmp_path, tokenizer)


@pytest.mark.parametrize("kind", [Trainer, CGGRTrainer])
def test_the_trainer_refuses_it(tmp_path, kind):
    with pytest.raises(TypeError, match="put CGGRMixin first"):
        kind(CGGRModel(tiny_model()), arguments(tmp_path), train_dataset=examples(), data_collator=pad)


def test_training_mode_is_the_wrapped_models():
    model = tiny_model()
    routed = CGGRModel(model)
    for change in (routed, model):
        assert change.eval().training is False
        assert routed.training is model.training is False
        assert change.train().training is True
        assert routed.training is model.training is True
