"""Every setting of TRL's trainers is known, and unknown ones are reported."""

import dataclasses
import re

import pytest
from datasets import Dataset
from transformers import TrainingArguments
from trl import DistillationConfig, DPOConfig, GRPOConfig, GRPOTrainer, KTOConfig, RLOOConfig, SFTConfig, SFTTrainer

from cggr_train import CGGRConfig
from cggr_train.trainer.trl.known_settings import KNOWN_SETTINGS, unknown_settings
from tests.support.trl_kit import QUIET, build

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")]

CONFIGS = (SFTConfig, DPOConfig, KTOConfig, GRPOConfig, RLOOConfig, DistillationConfig)


def settings_of(config: type) -> set[str]:
    shared = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {field.name for field in dataclasses.fields(config)} - shared


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_is_known(config):
    # A new one: does it change the loss? Then test it against TRL's own update; else just name it there.
    assert settings_of(config) == KNOWN_SETTINGS[config.__name__]


def test_every_setting_of_gkd_is_known():
    from trl.experimental.gkd import GKDConfig

    assert settings_of(GKDConfig) == KNOWN_SETTINGS["GKDConfig"]
    assert len(KNOWN_SETTINGS) == len(CONFIGS) + 1


@pytest.mark.parametrize(("setting", "value"), [("delta", 1.5), ("reward_weights", [2.0])])
def test_one_that_is_not_known_is_named(tmp_path, tokenizer, monkeypatch, caplog, setting, value):
    monkeypatch.setitem(KNOWN_SETTINGS, "GRPOConfig", KNOWN_SETTINGS["GRPOConfig"] - {setting})
    build(GRPOTrainer, GRPOConfig, tmp_path, tokenizer, cggr=CGGRConfig())
    assert "CGGR does not know" not in caplog.text, "it is at its default"
    build(GRPOTrainer, GRPOConfig, tmp_path, tokenizer, cggr=CGGRConfig(), **{setting: value})
    assert f"{setting}={value!r}: TRL 1." in caplog.text


def test_fields_of_a_users_own_class_are_the_users(tmp_path):
    @dataclasses.dataclass
    class Mine(SFTConfig):
        rounds: int = 3

    assert unknown_settings(Mine(str(tmp_path), rounds=4, bf16=False, use_cpu=True)) == {}


@pytest.mark.parametrize(
    ("cggr", "why"),
    [
        (CGGRConfig(engine="two_pass"), "engine='two_pass' has no effect: with SFTTrainer, an update takes two passes"),
        (CGGRConfig(router_depth=1), "router_depth=1 applies to tokens selected by a score"),
        (CGGRConfig(unbiased=False), "unbiased=False applies to tokens selected by a score"),
        (CGGRConfig(threshold_sensitivity=0.9), "threshold_sensitivity=0.9 applies to tokens selected by a score"),
        (CGGRConfig(cuda_graph=True), "cuda_graph must be 'auto' or False, got True"),
        (CGGRConfig(skip_zero_advantage=True), "rows have no advantages in the loss of SFTTrainer"),
        (CGGRConfig(selection="random", skip_zero_advantage=False), "a cross-entropy has no advantages"),
    ],
)
def test_one_of_cggr_without_an_effect_is_refused(tmp_path, tokenizer, cggr, why):
    cggr = cggr if cggr.selection else dataclasses.replace(cggr, selection="supervised")
    rows = Dataset.from_list([{"text": "def f(a, b):"}])
    with pytest.raises(ValueError, match=re.escape(why)):
        build(SFTTrainer, SFTConfig, tmp_path, tokenizer, cggr=cggr, train_dataset=rows)
