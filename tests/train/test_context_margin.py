"""``context_margin`` reaches the steps from the trainers' config and from the command line."""

import pytest

from cggr_train import CGGRConfig
from cggr_train.errors import InputError
from cggr_train.learner import RoutedLearner, Routing
from cggr_train.option_checks import check_routing
from tests.support.tiny_models import ROUTABLE


def test_the_config_and_the_command_hand_it_on():
    model = ROUTABLE["llama"]()
    assert CGGRConfig(selection="supervised", context_margin=5).build(model).settings.context_margin == 5
    learner = RoutedLearner(model, Routing(selection="supervised", context_margin=5), seed=0)
    assert learner.routed.settings.context_margin == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_margin": -1, "selection": "supervised"}, "--context-margin must be at least 0"),
        ({"context_margin": 4}, "--context-margin 4 requires --selection supervised"),
        ({"context_margin": 4, "selection": "supervised", "gradient": "exact"}, "they are supervised and exact"),
    ],
)
def test_where_it_would_do_nothing_it_is_refused(values, message):
    check_routing(Routing(selection="supervised", gradient="detached", context_margin=4), labelled=True)
    with pytest.raises(InputError, match=message):
        check_routing(Routing(**values), labelled=True)
