"""Loading checkpoints: the loaded model, the errors, and how often files are read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FalconForCausalLM, LlamaForCausalLM

from cggr_flash import load_model_with_flash_attention
from tests.support.families import EAGER_ONLY, FAMILIES, llava
from tests.support.machines import H200, V100

TOKENS = torch.arange(6, 26).reshape(2, 10)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A whole checkpoint; tests that damage one copy it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    FAMILIES["llama"]().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def loads(monkeypatch):
    """Records every call of ``from_pretrained`` on the classes that tests load, and still runs it."""
    calls: list[dict] = []
    for model_class in (LlamaForCausalLM, FalconForCausalLM):
        original = model_class.from_pretrained

        def from_pretrained(*args, original=original, **arguments):
            calls.append(arguments)
            return original(*args, **arguments)

        monkeypatch.setattr(model_class, "from_pretrained", from_pretrained)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_as_it_was_saved(family, tmp_path):
    model = FAMILIES[family]().eval()
    model.save_pretrained(tmp_path)
    loaded = load_model_with_flash_attention(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config._attn_implementation == ("eager" if family in EAGER_ONLY else "sdpa")
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    inputs = {"decoder_input_ids": TOKENS} if loaded.config.is_encoder_decoder else {}
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS, **inputs).logits, model(TOKENS, **inputs).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = load_model_with_flash_attention(tmp_path / "again", "eager" if family != "falcon" else "sdpa")
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_dtype_of_the_checkpoint_by_default_and_as_asked(checkpoint):
    assert load_model_with_flash_attention(checkpoint).dtype == torch.float32
    assert load_model_with_flash_attention(str(checkpoint), dtype="bfloat16").dtype == torch.bfloat16
    assert load_model_with_flash_attention(checkpoint, dtype=torch.float16).dtype == torch.float16


def test_further_arguments_reach_the_configuration_and_the_model(checkpoint):
    model = load_model_with_flash_attention(checkpoint, attention_dropout=0.5, device_map={"": "cpu"})
    assert model.config.attention_dropout == 0.5
    config = type(model.config).from_pretrained(checkpoint, attention_dropout=0.25)
    assert load_model_with_flash_attention(checkpoint, config=config).config.attention_dropout == 0.25


def test_weights_are_read_once_however_many_backends_are_passed_over(checkpoint, loads, on_machine, caplog):
    on_machine(H200)
    model = load_model_with_flash_attention(checkpoint, dtype="bfloat16")
    assert model.config._attn_implementation == "sdpa"
    assert "not flash_attention_4: ImportError" in caplog.text
    assert len(loads) == 1


def test_a_model_that_builds_its_attention_in_is_made_again_without_a_download(tmp_path, loads, on_machine, caplog):
    FAMILIES["falcon"]().save_pretrained(tmp_path)
    on_machine(replace(H200, packages={"flash-attn-4": "4.0.0b18"}))
    model = load_model_with_flash_attention(tmp_path, dtype="bfloat16", force_download=True)
    assert type(model.transformer.h[0].self_attention).__name__ == "FalconAttention"
    assert model.config._attn_implementation == "sdpa"
    assert [(each["attn_implementation"], each["force_download"]) for each in loads] == [
        ("flash_attention_4", True),
        ("sdpa", False),
    ]
    (record,) = caplog.records
    assert "FalconForCausalLM on cuda:0 (NVIDIA H200) in bfloat16 runs on 'sdpa'; " in record.message
    assert "not flash_attention_4: ImportError: " in record.message


def test_a_model_that_builds_its_attention_in_on_an_explicit_backend(tmp_path, on_machine):
    FAMILIES["falcon"]().save_pretrained(tmp_path)
    assert load_model_with_flash_attention(tmp_path, "eager").config._attn_implementation == "eager"
    on_machine(H200)
    with pytest.raises(RuntimeError, match=r"backend='flash_attention_2' cannot be used for FalconForCausalLM: Import"):
        load_model_with_flash_attention(tmp_path, "flash_attention_2", dtype="bfloat16")


def test_a_model_of_the_hub_is_taken_from_its_cache(saved, tmp_path, loads):
    cache, commit = tmp_path / "models--owner--tiny", "0" * 40
    shutil.copytree(saved, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    assert load_model_with_flash_attention("owner/tiny", **where).config._attn_implementation == "sdpa"
    assert len(loads) == 1
    weights = cache / "snapshots" / commit / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged \(\d+ bytes; .*download it again"):
        load_model_with_flash_attention("owner/tiny", **where)


def test_an_explicit_backend_that_cannot_work_is_refused_before_the_weights_are_read(checkpoint, loads, on_machine):
    on_machine(V100)
    with pytest.raises(RuntimeError) as error:
        load_model_with_flash_attention(checkpoint, "flash_attention_2", dtype="float16", device_map="cuda")
    assert str(error.value) == (
        "backend='flash_attention_2' cannot be used for LlamaForCausalLM: needs compute capability 8.0 (Ampere) or "
        "later, but Tesla V100 has 7.0. To fix this: use backend='sdpa', whose kernels support older GPUs"
    )
    assert loads == []


def test_flash_without_a_device_says_where_to_put_the_model(checkpoint, loads):
    with pytest.raises(RuntimeError, match=r"the device is cpu\. To fix this: put the model on a GPU \(device_map"):
        load_model_with_flash_attention(checkpoint, "flash_attention_2", dtype="bfloat16")
    assert loads == []


@pytest.mark.parametrize("dtype", [torch.float32, "float32", "auto"])
def test_flash_in_float32_is_an_error_and_nothing_is_cast(checkpoint, loads, dtype):
    with pytest.raises(ValueError, match=r"backend='flash_attention_2' supports float16 and bfloat16 only"):
        load_model_with_flash_attention(checkpoint, "flash_attention_2", dtype=dtype, device_map="cuda")
    assert loads == []


@pytest.mark.parametrize("name", ["no/such/folder", "./model", "~/no-such-model", "/no-such-root/model"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=r"does not exist \(but /.* does\)"):
        load_model_with_flash_attention(name)


def test_a_path_that_is_nearly_there(checkpoint):
    with pytest.raises(FileNotFoundError, match=rf"does not exist \(but .* does\); did you mean {checkpoint}\?"):
        load_model_with_flash_attention(checkpoint.with_name("modell"))


def test_neither_a_folder_nor_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'owner/model' does not exist .*, and the hub has no model of"):
        load_model_with_flash_attention("owner/model", local_files_only=True)


def test_a_file_instead_of_a_folder(checkpoint):
    with pytest.raises(FileNotFoundError, match="is a file; pass the folder that contains it"):
        load_model_with_flash_attention(checkpoint / "model.safetensors")


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; it holds nothing"):
        load_model_with_flash_attention(tmp_path)


def test_one_level_too_high(checkpoint):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json \(but its folder 'model' has one\)"):
        load_model_with_flash_attention(checkpoint.parent)
    assert load_model_with_flash_attention(checkpoint.parent, subfolder="model").config.model_type == "llama"


def test_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds a PEFT adapter without its base model; load the base model"):
        load_model_with_flash_attention(tmp_path)


def test_a_folder_without_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has a config\.json but no weights: neither model\.safetensors nor"):
        load_model_with_flash_attention(checkpoint)


DAMAGES = {
    "cut off": lambda data: data[: len(data) // 2],
    "a git-lfs pointer": lambda data: b"version https://git-lfs.github.com/spec/v1",
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named_before_a_model_is_made(checkpoint, damage, loads):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(DAMAGES[damage](weights.read_bytes()))
    with pytest.raises(ValueError, match=rf"{weights} is damaged \(\d+ bytes; .*git-lfs pointer; download it again"):
        load_model_with_flash_attention(checkpoint)
    assert loads == []


@pytest.fixture
def sharded(checkpoint) -> Path:
    LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(checkpoint.with_name("sharded"), max_shard_size="40KB")
    return checkpoint.with_name("sharded")


def test_shards(sharded):
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert load_model_with_flash_attention(sharded).config.model_type == "llama"
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shards[1]} is damaged"):
        load_model_with_flash_attention(sharded)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 of the {len(shards)} files .*: {shards[1].name}; download"):
        load_model_with_flash_attention(sharded)


def test_a_damaged_index(sharded):
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged \(JSONDecodeError"):
        load_model_with_flash_attention(sharded)


def test_pickles_are_read_only_when_that_is_asked_for(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only as pytorch_model\.bin, a pickle, which can run code when"):
        load_model_with_flash_attention(checkpoint)
    model = load_model_with_flash_attention(checkpoint, use_safetensors=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_a_model_with_some_weights_missing_is_not_returned(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of the tensors of Llama.*up_proj\.weight\), which transformers wo"):
        load_model_with_flash_attention(checkpoint)


def test_code_of_a_checkpoint_is_not_run_unless_that_is_asked_for(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "own.py").write_text("raise SystemExit('this code was run')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model_with_flash_attention(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"backend": "flash_attention_5"}, ValueError, "did you mean 'flash_attention_"),
        ({"dtype": "bf16"}, ValueError, "dtype must be 'auto', a floating torch dtype or the name of one"),
        ({"dtype": torch.int8}, ValueError, "dtype must be 'auto', a floating torch dtype or the name of one"),
        ({"attn_implementation": "sdpa"}, TypeError, "does not take 'attn_implementation': say backend="),
        ({"torch_dtype": "auto"}, TypeError, "does not take 'torch_dtype': say dtype="),
        ({"output_loading_info": True}, TypeError, "does not take 'output_loading_info': only the model is returned"),
        ({"config": {"a": 1}}, TypeError, "config must be a transformers configuration, got dict"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_arguments_that_make_no_sense(checkpoint, arguments, error, text):
    with pytest.raises(error, match=text):
        load_model_with_flash_attention(checkpoint, **arguments)


def test_a_name_is_a_string_or_a_path():
    with pytest.raises(TypeError, match="name_or_path must be a string or a path, got int"):
        load_model_with_flash_attention(3)


def test_a_vision_and_text_model_keeps_both_parts(tmp_path):
    llava().save_pretrained(tmp_path)
    model = load_model_with_flash_attention(tmp_path, "sdpa")
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert model.model.language_model.config._attn_implementation == "sdpa"
