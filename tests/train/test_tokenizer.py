import pytest
from safetensors.torch import load_file, save_file

from cggr_train.errors import InputError
from cggr_train.presets import PRESETS, build_config, build_model, load_model
from cggr_train.tokenizer import check_vocabulary, load_tokenizer, train_tokenizer


@pytest.mark.parametrize("text", ["def f(x):\n\treturn x\n", "naïve — 漢字 🙂", "  \n\n ", "\x00\x7f"])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_it_survives_a_directory(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert len(again) == len(tokenizer) == 300
    assert again.eos_token_id == tokenizer.eos_token_id
    assert again("return a * 3")["input_ids"] == tokenizer("return a * 3")["input_ids"]


def test_reading_stops_at_the_limit():
    def endless():
        while True:
            yield "abc " * 100

    assert len(train_tokenizer(endless(), vocab_size=258, max_characters=1000)) == 258


def test_bad_input(tmp_path, tokenizer):
    with pytest.raises(InputError, match="--vocab-size must be at least 257"):
        train_tokenizer(["x"], vocab_size=100)
    with pytest.raises(InputError, match="hold no text"):
        train_tokenizer([], vocab_size=300)
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(str(tmp_path / "no"))
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match=r"mine does not match the model: its ids go up to 299, .* has 299 rows"):
        check_vocabulary(tokenizer, 299, name="mine")
    check_vocabulary(tokenizer, 300, name="mine")


def test_a_preset_becomes_the_same_model_for_the_same_seed():
    one, other = (build_model(build_config("nano", vocab_size=300, length=32), seed=5) for _ in range(2))
    different = build_model(build_config("nano", vocab_size=300, length=32), seed=6)
    assert all(map(lambda a, b: a.equal(b), one.parameters(), other.parameters()))
    assert not next(one.parameters()).equal(next(different.parameters()))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name):
    config = build_config(name, vocab_size=300, length=4096)
    assert config.hidden_size % config.num_attention_heads == 0
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.max_position_embeddings == 4096


def test_a_config_file(tmp_path):
    build_config("nano", vocab_size=300, length=32).save_pretrained(tmp_path)
    config = build_config(str(tmp_path / "config.json"), vocab_size=500, length=5000)
    assert (config.vocab_size, config.max_position_embeddings, config.num_hidden_layers) == (500, 5000, 2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a model configuration"):
        build_config(str(tmp_path / "config.json"), vocab_size=500, length=50)


def test_unknown_preset_and_missing_model(tmp_path):
    with pytest.raises(InputError, match="did you mean 'tiny'"):
        build_config("tinny", vocab_size=300, length=32)
    with pytest.raises(InputError, match="does not exist; to train from scratch, give --config"):
        load_model(str(tmp_path / "no"))
    with pytest.raises(InputError, match=r"holds neither config\.json nor a GGUF file; give a directory written by"):
        load_model(str(tmp_path))


@pytest.fixture
def model_folder(tmp_path):
    build_model(build_config("nano", vocab_size=300, length=32), seed=0).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_without_weights_or_tokenizer_is_named_so(model_folder):
    with pytest.raises(InputError, match=r"holds no tokenizer \(none of tokenizer\.json, "):
        load_tokenizer(str(model_folder))
    with pytest.raises(InputError, match=r"model\.safetensors is a file; give the directory that holds it"):
        load_model(str(model_folder / "model.safetensors"))
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights \(\*\.safetensors or \*\.bin\); give a directory written by"):
        load_model(str(model_folder))
    (model_folder / "config.json").unlink()
    (model_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds a PEFT adapter without its base model; merge the two"):
        load_model(str(model_folder))


def test_a_damaged_model_is_refused(model_folder):
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cannot be loaded: .*incomplete metadata.*; if a file of it is damaged"):
        load_model(str(model_folder))


def test_a_model_is_not_filled_up_with_random_weights(model_folder):
    tensors = load_file(model_folder / "model.safetensors")
    lost = [name for name in tensors if "layers.1.mlp" in name]
    save_file({name: tensors[name] for name in tensors if name not in lost}, model_folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks 3 of the weights .* the first being model\.layers\.1\.mlp\.down_proj"):
        load_model(str(model_folder))


def test_a_model_that_its_configuration_does_not_describe(model_folder):
    config = model_folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 300', '"vocab_size": 310'))
    with pytest.raises(InputError, match=r"embed_tokens\.weight has shape \[300, 64\], .* requires \[310, 64\]"):
        load_model(str(model_folder))
