"""Defaults of fine-tuning, and models named as on the hub, without a network."""

import pytest

from cggr_train import fine_tuning
from cggr_train.errors import InputError
from cggr_train.fine_tuning import announce, count_parameters, defaults, local_model
from cggr_train.presets import build_config, build_model

OPEN = {"learning_rate": None, "weight_decay": None, "field": "question,answer", "answer": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_model(build_config("nano", vocab_size=300, length=64), seed=0).save_pretrained(path)
    return str(path)


def test_a_given_model_is_fine_tuned_on_answers_at_a_small_rate(folder):
    found = defaults(folder, **OPEN)
    assert found == (5e-5, 0.01, "question", "answer")
    assert announce(found, 0.05) == (
        "fine-tuning on answer, with question masked: learning rate 5e-05, warm-up over 5% of the budget"
    )
    assert defaults(folder, **OPEN | {"field": "text"})[2:] == ("text", None)
    assert defaults(folder, **OPEN | {"field": "a, b, c"})[2:] == ("a, b", "c")
    assert defaults(folder, **OPEN | {"answer": "reply"})[2:] == ("question,answer", "reply")


def test_what_is_given_is_taken(folder):
    assert defaults(folder, **OPEN | {"learning_rate": 0.5, "weight_decay": 0.0})[:2] == (0.5, 0.0)
    assert defaults(None, **OPEN) == (1e-3, 0.1, "question,answer", None), "from scratch both are text"


def test_parameters_are_counted_without_weights(folder):
    expected = build_model(build_config("nano", vocab_size=300, length=64), seed=0).num_parameters()
    assert count_parameters(folder) == expected


def test_a_path_is_left_to_whoever_loads_it(folder, tmp_path):
    for path in (folder, str(tmp_path / "none"), "./none/at all", "none", "/none/x"):
        assert local_model(path) == path


def test_a_hub_that_cannot_be_reached_is_said_to_be_so(monkeypatch):
    class Session:
        def head(self, url, timeout, follow_redirects):
            assert timeout < 5 and url.endswith("/owner/name/resolve/main/config.json")
            raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    with pytest.raises(InputError, match=r"owner/name is not a directory, and the hub cannot be reached \(Name"):
        local_model("owner/name")


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    class Session:
        def head(self, url, timeout, follow_redirects):
            return type("Answer", (), {"status_code": 404})

    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    with pytest.raises(InputError, match="the Hugging Face hub answers 404 for that name: the model does not exist"):
        local_model("owner/name")


def test_a_misspelt_folder_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(InputError, match=r"the model directory models/none does not exist \(but models does\)"):
        local_model("models/none")


@pytest.mark.parametrize(("parameters", "rate"), [(10**6, 5e-5), (10**9, 5e-5), (7 * 10**9, 2e-5), (10**11, 1e-5)])
def test_larger_models_take_smaller_rates(parameters, rate):
    assert fine_tuning.fine_tuning_rate(parameters) == rate
