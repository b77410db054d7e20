"""The documents are correct: examples run, links lead somewhere, commands exist."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from tests.support.documents import DOCUMENTS, ROOT

EXAMPLES = [
    "README.md",
    "docs/index.md",
    "docs/tasks.md",
    "docs/tutorial.md",
    "docs/guides/any-loss.md",
    "docs/guides/own-loop.md",
    "docs/guides/moe.md",
    "docs/guides/attention.md",
    "docs/guides/backends.md",
    "docs/guides/context-precision.md",
    "docs/guides/learned-router.md",
    "docs/guides/remembered-scores.md",
    "docs/recipes/pretraining.md",
    "docs/recipes/long-prompts.md",
    "docs/recipes/lora.md",
    "docs/recipes/memory-bound.md",
    "packages/cggr-flash/README.md",
    "packages/cggr-moe/README.md",
]
TRAINERS = {
    "docs/trainers/sft.md": ("trl.SFTConfig", [{"prompt": "1 + 1 =", "completion": " 2"}]),
    "docs/trainers/dpo.md": ("trl.DPOConfig", [{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}]),
    "docs/trainers/kto.md": (
        "trl.KTOConfig",
        [{"prompt": "1 + 1 =", "completion": f" {n}", "label": n == 2} for n in (2, 3)],
    ),
    "docs/trainers/grpo.md": ("trl.GRPOConfig", [{"prompt": "1 + 1 ="}]),
    "docs/trainers/rloo.md": ("trl.RLOOConfig", [{"prompt": "1 + 1 ="}]),
    "docs/trainers/distillation.md": ("trl.DistillationConfig", [{"prompt": "1 + 1 ="}]),
    "docs/trainers/gkd.md": (
        "trl.experimental.gkd.GKDConfig",
        [{"messages": [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]}],
    ),
}
"""The page of each of TRL's trainers, with the settings and the rows that it takes."""
ELSEWHERE = {
    "docs/guides/trainer.md": "its scripts are run by tests/train/test_examples.py",
    "docs/guides/trl.md": "its scripts are run by tests/train/test_examples.py",
    "docs/guides/distributed.md": "its script is run by tests/train/test_examples.py",
    "docs/trainers/accelerate.md": "its script is run by tests/train/test_examples.py",
    "docs/recipes/small-models.md": "records a CUDA graph, which tests/gpu/test_model_native.py does",
}
"""Pages with Python that is not run here, and why."""


def identity(path: Path | str) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else path


def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore::FutureWarning:(trl|transformers|peft)[.]")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(trl|transformers|datasets|multiprocess)[.]")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what torch.compile imports
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked for by PEFT
@pytest.mark.parametrize("document", EXAMPLES)
def test_examples_run_in_order(document, monkeypatch, tmp_path):
    """The Python blocks of a page run one after the other, on a tiny model in place of the reader's own."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    from cggr import CGGRLoss, CGGRModel
    from cggr_train.tokenizer import train_tokenizer

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: small_model())
    monkeypatch.chdir(tmp_path)
    import cggr_flash

    monkeypatch.setattr(cggr_flash, "load_model_with_flash_attention", lambda name, **settings: small_model())
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert blocks
    input_ids = torch.randint(0, 64, (2, 16))
    labels = input_ids.clone()
    labels[:, :4] = -100
    tokenizer = train_tokenizer(["0 + 1 = 2"], vocab_size=257)
    model = small_model()
    names = {
        "torch": torch,
        "CGGRModel": CGGRModel,
        "model": model,
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
        "criterion": CGGRLoss(min_tokens_ratio=0.25),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "groups_of_batches": [[{"input_ids": input_ids, "labels": labels}] * 2],
        "logits": torch.randn(2, 15, 257, requires_grad=True),
        "targets": labels[:, 1:],
        "token_weight": torch.rand(2, 15),
        "tokenizer": tokenizer,
        "difficulty": CGGRLoss,
        "loader": [{"input_ids": input_ids, "labels": labels, "example_ids": torch.arange(2)}] * 3,
        "path": tmp_path / "scores.safetensors",
        "hidden_states": torch.randn(2, 8, 1024),
        "dataset": Dataset.from_list([{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(4)]),
        "args": SFTConfig(max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no"),
    }
    for block in blocks:
        exec(compile(block, document, "exec"), names)


@pytest.mark.filterwarnings("ignore::FutureWarning:(trl|transformers|peft)[.]")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(trl|transformers|datasets|multiprocess)[.]")
@pytest.mark.parametrize("document", TRAINERS)
def test_the_page_of_a_trainer_trains(document, monkeypatch, tmp_path):
    """The page's Python takes one step on a tiny model, with the trainer's own settings."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM

    from cggr_train.tokenizer import train_tokenizer

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.chdir(tmp_path)
    name, rows = TRAINERS[document]
    module, _, config = name.rpartition(".")
    settings = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "dataloader_pin_memory": False}
    kind = getattr(importlib.import_module(module), config)
    if hasattr(kind, "num_generations"):
        settings["num_generations"] = 2
    if hasattr(kind, "max_completion_length"):
        settings["max_completion_length"] = 4
    tokenizer = train_tokenizer(["0 + 1 = 2"], vocab_size=257)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    )
    small_model().save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")  # where TRL finds a reference model again
    names = {
        "model": model,
        "teacher": small_model(),
        "tokenizer": tokenizer,
        "dataset": Dataset.from_list(rows * (4 // len(rows))),
        "args": kind(str(tmp_path), **settings),
    }
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    exec(compile(block, document, "exec"), names)
    assert names["trainer"].state.global_step == 1
    assert names["trainer"].model is model


@pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n_steps|sequential sampler|`val_dataloader`|litlogger).*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning[.]")
@pytest.mark.filterwarnings("ignore::FutureWarning:(lightning|torch)[.]")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
@pytest.mark.filterwarnings("ignore:.*tensorboardX")
def test_the_page_of_lightning_trains(monkeypatch, tmp_path):
    pytest.importorskip("lightning", reason="the Lightning module is an extra, cggr-train[lightning]")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/trainers/lightning.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    model, input_ids = small_model(), torch.randint(0, 64, (2, 16))
    before = model.lm_head.weight.detach().clone()
    batches = [{"input_ids": input_ids, "labels": input_ids}]
    names = {"model": model, "dataloader": torch.utils.data.DataLoader(batches, batch_size=None)}
    exec(compile(block, "docs/trainers/lightning.md", "exec"), names)
    assert not model.lm_head.weight.equal(before)
    assert (tmp_path / "trained/model.safetensors").is_file()


def test_every_page_with_python_is_run_or_says_where():
    pages = {identity(path) for path in DOCUMENTS if "```python" in path.read_text(encoding="utf-8")}
    assert pages == {*EXAMPLES, *ELSEWHERE, *TRAINERS, "docs/trainers/lightning.md"}


@pytest.mark.parametrize("document", [name for name in ELSEWHERE if name.startswith("docs/guides")])
def test_scripts_of_the_guides_are_shown_whole(document):
    shown = re.findall(r'^--8<-- "(.+)"$', (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE)
    assert shown and all((ROOT / script).is_file() for script in shown)


@pytest.mark.parametrize("document", DOCUMENTS, ids=identity)
def test_relative_links_lead_to_files(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [target for target in targets if target and not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if "packages" in path.parts], ids=identity)
def test_the_readme_of_a_package_has_no_relative_links(document):
    """A package index shows it without the repository around it."""
    assert "](" not in re.sub(r"\]\((https://|#)", "", document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_every_session_that_a_document_names_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:nox|--no-venv) -s (\w+)", text)) - {"NAME"}
    defined = set(
        re.findall(r"^@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert named and named <= defined


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


TRANSLATED = (
    r"\banew\b|\bat hand\b|\bfor want of\b|\b(?:is|are|was|were) told\b|\bof one's own\b|\bnext to nothing\b|"
    r"\bis not asked\b"
)
"""Constructions that read as a translation, which no prose linter knows."""


@pytest.mark.parametrize("folder", ["docs", "examples", "packages"])
def test_prose_is_idiomatic(folder):
    paths = [path for kind in ("*.md", "*.py") for path in sorted((ROOT / folder).rglob(kind))]
    assert len(paths) > 5
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(TRANSLATED, line)
    ]
    assert not found, "\n".join(found)
