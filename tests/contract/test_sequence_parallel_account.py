"""The account of sequence parallelism agrees with textbook counts, and scales with GPUs and ratios."""

import pytest

from benchmarks.sequence_parallel import CONTROL, Sizes, account, steps

SIZES = Sizes()
RATES = {"rate": 5e14, "link": 3.5e11}


def of(name, *, length=131_072, ranks=4, ratio=0.25):
    return account(SIZES, steps(ratio, SIZES.layers)[name.format(r=ratio)], length=length, ranks=ranks, **RATES)


def test_the_standard_step_is_six_operations_per_weight_and_token():
    weights = SIZES.layers * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256
    found = of("standard", length=1024, ranks=1)["operations"]
    attention = 3.5 * 32 * 4 * 4096 * 1024**2 / 2  # forward, and backward at two and a half times that
    assert found == pytest.approx(6 * weights * 1024 + attention, rel=1e-9)


def test_one_gpu_moves_nothing():
    assert all(of(name, ranks=1)["moved"] == 0 for name in ("standard", CONTROL, "interleaved, kv, ratio {r}"))


@pytest.mark.parametrize("name", ["standard", CONTROL, "two passes, kv, ratio {r}", "interleaved, detached, ratio {r}"])
def test_gpus_share_work_and_memory(name):
    two, eight = of(name, ranks=2), of(name, ranks=8)
    assert eight["operations"] == pytest.approx(two["operations"] / 4)
    assert eight["kept"] == pytest.approx(two["kept"] / 4)
    assert eight["moved"] == pytest.approx(two["moved"] * (7 / 8) / (1 / 2))


def test_keeping_everything_costs_what_the_standard_step_costs():
    assert of("interleaved, kv, ratio {r}", ratio=1.0)["operations"] == of("standard")["operations"]
