"""A study's recorded steps on a GPU: the gradients of the step as it is, batch after batch and draw after draw."""

import pytest
import torch

from cggr_train.learner import Routing, build_learner
from cggr_train.presets import build_config, build_model
from cggr_train.study.graphed import GraphedLearner

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    ("method", "routing"),
    [
        ("standard", Routing()),
        ("cggr", Routing("kv")),
        ("cggr", Routing("exact", selection="sampled")),
        ("cggr", Routing("detached", router_depth=1)),
        ("random", Routing("kv")),
    ],
)
def test_a_recorded_step_has_the_gradients_of_the_step(method, routing, bfloat16):
    def learner():
        model = build_model(build_config("nano", vocab_size=512, length=64), seed=0).cuda().train()
        return build_learner(model, method, routing, seed=3)

    eager, recorded = learner(), GraphedLearner(learner())
    generator = torch.Generator().manual_seed(0)
    for draw in range(4):
        input_ids = torch.randint(0, 512, (4, 64), generator=generator).cuda()
        found = []
        for one in (eager, recorded):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bfloat16):
                loss = one.loss(input_ids, draw=draw)
            loss.backward()
            gradients = [parameter.grad for parameter in one.model.parameters() if parameter.grad is not None]
            found.append((loss.item(), torch.cat([gradient.flatten() for gradient in gradients])))
            one.model.zero_grad(set_to_none=True)
            # weights move between steps, and the recording must see it
            with torch.no_grad():
                for parameter in one.model.parameters():
                    parameter.mul_(0.99)
        (loss, gradient), (other_loss, other) = found
        tolerance = 2e-2 if bfloat16 else 1e-5
        assert other_loss == pytest.approx(loss, rel=tolerance)
        assert (gradient - other).norm() <= tolerance * gradient.norm()
    kept = {int(one.metrics["kept_tokens"]) for one in (eager, recorded)}
    assert len(kept) == 1
