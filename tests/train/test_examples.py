"""The scripts under examples/ work, on a tiny model and a few lines of text."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaForCausalLM

from cggr_train.presets import load_model
from tests.support.trainer_kit import tiny_model
from tests.support.two_ranks import run_on_two_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = [
    "--use_cpu",
    "true",
    "--max_steps",
    "2",
    "--report_to",
    "none",
    "--save_strategy",
    "no",
    "--learning_rate",
    "0.01",
]


@pytest.fixture
def model(tmp_path, tokenizer):
    folder = tmp_path / "model"
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path, texts):
    path = tmp_path / "text.txt"
    path.write_text("".join(texts[:4]))
    return path


def example(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def accelerate_loop(model: str, text: str, out: str, sizes: dict[str, int]) -> None:
    """On one of several ranks."""
    example("accelerate_loop")(model, text, out, **sizes)


def was_trained(out: Path, model: Path) -> bool:
    """Whether ``out`` holds the plain model with every parameter moved."""
    trained, information = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = dict(load_model(str(model)).named_parameters())
    return all(not parameter.equal(before[name]) for name, parameter in trained.named_parameters())


def test_plain_loop(tmp_path, model, text, capsys):
    lines = (EXAMPLES / "plain_loop.py").read_text().split("def main", 1)[1].split("if __name__", 1)[0].splitlines()
    assert len(lines) <= 30
    example("plain_loop")(str(model), str(text), str(tmp_path / "out"), steps=20, batch_size=2, length=32)
    assert was_trained(tmp_path / "out", model)
    printed = capsys.readouterr().out
    assert "step 1: loss" in printed and "kept 100%" in printed, "it starts with everything"
    assert "kept 26%" in printed  # 8 of 31


def test_accelerate_loop_is_the_same_on_two_ranks(tmp_path, model, text, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the device of whoever came first
    sizes = {"steps": 2, "accumulate": 2, "length": 32}
    example("accelerate_loop")(str(model), str(text), str(tmp_path / "one"), batch_size=4, **sizes)
    arguments = (str(model), str(text), str(tmp_path / "two"), {"batch_size": 2, **sizes})
    printed = run_on_two_ranks(accelerate_loop, *arguments, folder=tmp_path)
    assert sum(output.count("step 2: kept") for output in printed) == 1
    assert was_trained(tmp_path / "one", model)
    one, two = (load_model(str(tmp_path / out)).parameters() for out in ("one", "two"))
    assert max((a - b).abs().max() for a, b in zip(one, two, strict=True)) <= 1e-5


def test_trainer_from_the_command_line_and_from_yaml(tmp_path, model, text):
    data = ["--model", str(model), "--text", str(text), "--length", "32", "--min_tokens_ratio", "0.5"]
    example("trainer")([*data, "--output_dir", str(tmp_path / "out"), *CPU])
    assert was_trained(tmp_path / "out", model)
    flags = [*data, *CPU, "--output_dir", str(tmp_path / "yaml")]
    path = tmp_path / "settings.yaml"
    # Quoted, a "no" is no boolean.
    values = {
        name[2:]: repr(value) if value == "no" else value for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    example("trainer")([str(path)])
    one, two = (load_model(str(tmp_path / out)).parameters() for out in ("out", "yaml"))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning:(trl|transformers)[.]")  # what TRL sets by default
def test_sft(tmp_path, model):
    data = tmp_path / "data.jsonl"
    rows = ({"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(32))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(model), "--data", str(data), "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
    example("sft")([*arguments, "--selection", "supervised", *CPU])
    assert was_trained(tmp_path / "out", model)


@pytest.mark.filterwarnings("ignore::FutureWarning:(trl|transformers)[.]")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(trl|transformers|datasets|multiprocess)[.]")
def test_grpo(tmp_path, model):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + {n} =", "answer": f" {2 * n}"}) + "\n" for n in range(8)))
    arguments = ["--model", str(model), "--data", str(data), "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
    arguments += ["--num_generations", "4", "--per_device_train_batch_size", "4", "--max_completion_length", "6"]
    main = example("grpo")
    assert main.__globals__["right"]([" 4\n", "4 is it"], answer=["4", "4"]) == [1.0, 0.0]
    # An untrained model answers nothing right, and a group that is rewarded alike has no advantage.
    main.__globals__["right"] = lambda completions, **_: [float(number) for number in range(len(completions))]
    main([*arguments, "--top_entropy_quantile", "0.5", *CPU])
    assert was_trained(tmp_path / "out", model)


@pytest.mark.filterwarnings("ignore::FutureWarning:(trl|transformers)[.]")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(trl|transformers|datasets|multiprocess)[.]")
def test_dpo(tmp_path, model):
    data = tmp_path / "data.jsonl"
    rows = ({"prompt": f"{n} + {n} =", "chosen": f" {2 * n}", "rejected": f" {n}, or"} for n in range(8))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", str(model), "--data", str(data), "--output_dir", str(tmp_path / "out"), "--bf16", "false"]
    example("dpo")([*arguments, "--per_device_train_batch_size", "4", *CPU])
    assert was_trained(tmp_path / "out", model)


@pytest.mark.filterwarnings("ignore::FutureWarning:(trl|transformers)[.]")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(trl|transformers|datasets|multiprocess)[.]")
def test_distillation(tmp_path, model, tokenizer):
    torch.manual_seed(1)
    teacher = tiny_model(vocab_size=len(tokenizer))
    for parameter in teacher.parameters():  # not the student, which has the same seed
        parameter.data.mul_(1.5)
    teacher.save_pretrained(tmp_path / "teacher")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + {n} ="}) + "\n" for n in range(8)))
    arguments = ["--model", str(model), "--teacher", str(tmp_path / "teacher"), "--data", str(data), "--bf16", "false"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_completion_length", "6"]
    example("distillation")([*arguments, "--per_device_train_batch_size", "4", *CPU])
    assert was_trained(tmp_path / "out", model)
