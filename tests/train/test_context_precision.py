"""``context_precision`` reaches the passes from the trainers' config and from the command line."""

import pytest
from trl import GRPOConfig, GRPOTrainer

from cggr_core.routing import Engine
from cggr_train import CGGRConfig
from cggr_train.errors import InputError
from cggr_train.learner import RoutedLearner, Routing
from cggr_train.option_checks import check_routing
from tests.support.tiny_models import ROUTABLE
from tests.support.trl_kit import QUIET, build, policy_batch, step

pytestmark = QUIET


def test_the_config_and_the_command_hand_it_on():
    model = ROUTABLE["llama"]()
    assert CGGRConfig(context_precision="fp8").build(model).settings.context_precision == "fp8"
    learner = RoutedLearner(model, Routing(context_precision="fp8"), seed=0)
    assert learner.routed.settings.context_precision == "fp8"


def test_modes_without_such_tokens_are_refused():
    check_routing(Routing(gradient="detached", context_precision="fp8"))
    with pytest.raises(InputError, match="--gradient is 'exact'"):
        check_routing(Routing(gradient="exact", context_precision="fp8"))


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_a_policy_update_hands_it_on(precision, tmp_path, tokenizer, monkeypatch):
    own, seen = Engine.gradient, []

    def note(self, *args, precision=None, **options):
        seen.append(precision)
        return own(self, *args, precision=precision, **options)

    monkeypatch.setattr(Engine, "gradient", note)
    config = CGGRConfig(context_precision=precision)
    made = build(GRPOTrainer, GRPOConfig, tmp_path, tokenizer, cggr=config)
    step(made, policy_batch(len(tokenizer)))
    assert seen == [precision]


def test_a_policy_update_refuses_it_where_all_tokens_take_gradients(tmp_path, tokenizer):
    config = CGGRConfig(gradient="exact", context_precision="fp8")
    with pytest.raises(ValueError, match="gradient is 'exact'; leave context_precision=None"):
        build(GRPOTrainer, GRPOConfig, tmp_path, tokenizer, cggr=config)
