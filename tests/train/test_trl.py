"""CGGRMixin in front of TRL's SFTTrainer: prompts masked, packed, with its own defaults (bfloat16, checkpointing)."""

import pytest
import torch
from datasets import Dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from cggr_train import CGGRConfig, CGGRMixin
from tests.support.trainer_kit import change, relative_error, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:(trl|transformers|peft)[.]"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(trl|transformers|datasets|multiprocess)[.]"),
]


class RoutedSFTTrainer(CGGRMixin, SFTTrainer):
    pass


@pytest.fixture(scope="session")
def dataset():
    rows = [
        {"prompt": f"def function_{n}(a, b):\n", "completion": f"    return a * {n}" + " + b" * (n % 4) + "\n"}
        for n in range(8)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def build(tmp_path, dataset, tokenizer):
    def make(cggr: CGGRConfig | None = None, *, kind: type = RoutedSFTTrainer, peft_config=None, model=None, **values):
        plain = {
            "max_steps": 2, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.5,
            "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none",
            "use_cpu": True, "logging_steps": 1, "bf16": False, "dataloader_pin_memory": False,
            "train_sampling_strategy": "sequential", "max_length": 48, "dataset_num_proc": None,
        }  # fmt: skip
        more = {} if cggr is None else {"cggr": cggr}
        model = tiny_model(vocab_size=len(tokenizer)) if model is None else model
        return kind(
            model, SFTConfig(str(tmp_path), **{**plain, **values}), train_dataset=dataset, eval_dataset=dataset,
            processing_class=tokenizer, peft_config=peft_config, **more,
        )  # fmt: skip

    return make


def trained(made):
    before = tiny_model(vocab_size=made.model.config.vocab_size)
    made.train()
    return change(before, made.model)


def kept_and_labels(made, monkeypatch):
    """Train, and return what every forward kept, its labels and its packed documents."""
    passes, seen = made.routed_model()._passes, []
    original = passes.gradient

    def gradient(batch, selection, *args, **kwargs):
        seen.append((selection.mask, batch.segment))
        return original(batch, selection, *args, **kwargs)

    monkeypatch.setattr(passes, "gradient", gradient)
    labels = []
    forward = made.routed_model().forward
    monkeypatch.setattr(
        made.routed_model(), "forward", lambda **inputs: labels.append(inputs["labels"]) or forward(**inputs)
    )
    made.train()
    return [(kept, batch, segment) for (kept, segment), batch in zip(seen, labels, strict=True)]


def test_its_own_defaults(build, monkeypatch):
    # bfloat16 and checkpointing are on unless switched off.
    made = build(CGGRConfig(), bf16=None)
    assert made.args.bf16
    pairs = kept_and_labels(made, monkeypatch)
    for kept, labels, _ in pairs:
        supervised = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        assert kept.any() and not (kept & ~supervised).any(), "a prompt was kept"
        assert kept.sum() < supervised.sum()
    record = made.state.log_history[0]
    assert record["keep_ratio"] == pytest.approx(0.25, abs=0.1)
    assert {"score_kept", "gradnorm_kept", "full_loss"} <= record.keys()


@pytest.mark.parametrize("packing", [False, True])
def test_supervised_keeps_exactly_the_supervised_tokens(build, monkeypatch, packing):
    made = build(CGGRConfig(selection="supervised"), packing=packing, per_device_train_batch_size=2)
    for kept, labels, segment in kept_and_labels(made, monkeypatch):
        assert (segment is not None and segment.max() > 0) == packing
        assert kept.equal(torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)))
        assert (labels == -100).any()


def test_with_everything_kept_it_is_the_sft_trainer(build):
    plain = trained(build(kind=SFTTrainer))
    assert relative_error(trained(build(CGGRConfig(min_tokens_ratio=1.0))), plain) <= 1e-5


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_padding_free_and_accumulated_equal_the_padded_step(build, gradient):
    cggr = CGGRConfig(gradient=gradient, selection="supervised")
    padded = trained(build(cggr))
    assert relative_error(trained(build(cggr, padding_free=True, max_length=None)), padded) <= 2e-6
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert relative_error(trained(build(cggr, **split)), padded) <= 1e-6


def test_lora(build):
    from peft import LoraConfig

    made = build(CGGRConfig(), peft_config=LoraConfig(target_modules="all-linear", r=2))
    made.train()
    moved = [p for name, p in made.model.named_parameters() if "lora_B" in name]
    assert moved and all(p.any() for p in moved)


def test_evaluation_is_its_own(build):
    assert build(CGGRConfig()).evaluate()["eval_loss"] == build(kind=SFTTrainer).evaluate()["eval_loss"]


@pytest.mark.parametrize("coefficient", [None, 0.0, 0.3])
def test_the_router_loss_has_trls_coefficient(build, tokenizer, coefficient):
    from transformers import MixtralConfig, MixtralForCausalLM

    records = []
    for kind, cggr in ((SFTTrainer, None), (RoutedSFTTrainer, CGGRConfig(gradient="exact", min_tokens_ratio=1.0))):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, router_aux_loss_coef=0.1,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        made = build(cggr, kind=kind, model=MixtralForCausalLM(config), max_steps=1, router_aux_loss_coef=coefficient)
        made.train()
        records.append(made.state.log_history[0])
    plain, routed = records
    assert ("aux_loss" in plain) == (coefficient != 0.0)
    assert routed["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert routed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_tokens_are_counted_as_in_the_sft_trainer(build):
    values = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 2, "logging_steps": 2}
    counts = []
    for made in (build(kind=SFTTrainer, **values), build(CGGRConfig(), **values)):
        made.train()
        keys = ("num_tokens", "eval_num_tokens")
        counts.append([{key: record[key] for key in keys if key in record} for record in made.state.log_history])
    assert counts[0] == counts[1] and counts[0][0]["eval_num_tokens"] < counts[0][1]["num_tokens"]


def test_other_losses_are_refused(build):
    with pytest.raises(ValueError, match="loss_type='dft'"):
        build(CGGRConfig(), loss_type="dft")


def test_one_command_line_configures_both(tmp_path):
    line = (
        f"--output_dir {tmp_path} --use_cpu true --selection supervised --max_length 256 --min_tokens_ratio 0.5".split()
    )
    training, cggr = HfArgumentParser((SFTConfig, CGGRConfig)).parse_args_into_dataclasses(line)
    assert training.max_length == 256
    assert cggr == CGGRConfig(selection="supervised", min_tokens_ratio=0.5)
