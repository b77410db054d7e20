import pytest
import torch

from cggr_core.checks import (
    check_at_least,
    check_choice,
    check_finite_number,
    check_float,
    check_ratio,
    check_same_device,
    check_shape,
    check_targets,
    count_bad_targets,
)


@pytest.mark.parametrize("value", [1e-6, 0.25, 1, 1.0])
def test_ratios_that_are_accepted(value):
    assert check_ratio("ratio", value) == value


@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_ratios_outside(value):
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got .*0\.25 keeps a quarter"):
        check_ratio("ratio", value)


@pytest.mark.parametrize("value", [True, "0.5", None, torch.tensor(0.5)])
def test_ratios_of_another_type(value):
    with pytest.raises(TypeError, match=r"ratio must be a number in \(0, 1\]"):
        check_ratio("ratio", value)


def test_a_wrong_name_gets_the_nearest_right_one():
    with pytest.raises(
        ValueError, match=r"scoring must be one of 'entropy', 'loss', got 'entrpy'; did you mean 'entropy'"
    ):
        check_choice("scoring", "entrpy", ("entropy", "loss"))
    with pytest.raises(ValueError, match=r"got 'zzz'$"):
        check_choice("scoring", "zzz", ("entropy", "loss"))


def test_numbers():
    assert check_at_least("n", 3, 1) == 3
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        check_at_least("n", 0, 1)
    with pytest.raises(TypeError, match=r"n must be an integer, got 1.5 of type float"):
        check_at_least("n", 1.5, 1)
    with pytest.raises(TypeError, match="n must be an integer, got True"):
        check_at_least("n", True, 0)
    assert check_finite_number("x", 2) == 2.0
    with pytest.raises(ValueError, match="x must be a finite number of at least 0, got -1"):
        check_finite_number("x", -1, minimum=0.0)
    with pytest.raises(ValueError, match="x must be a finite number, got nan"):
        check_finite_number("x", float("nan"))
    with pytest.raises(TypeError, match="x must be a number, got 'a' of type str"):
        check_finite_number("x", "a")


def test_tensors():
    with pytest.raises(TypeError, match=r"x must have a floating dtype, got torch.int64 with shape \(2,\)"):
        check_float("x", torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        check_float("x", [1.0])
    with pytest.raises(ValueError, match=r"x must have shape \(3,\) \(one per row\), got \(2,\)"):
        check_shape("x", torch.zeros(2), (3,), "one per row")
    with pytest.raises(ValueError, match=r"x is on meta but y is on cpu; move it with x.to\(y.device\)"):
        check_same_device("x", torch.zeros(1, device="meta"), "y", torch.zeros(1))


def test_targets():
    like = torch.zeros(4, 10)
    good = torch.tensor([0, 9, -100, 3], dtype=torch.int32)
    assert check_targets("targets", good, (4,), 10, -100, like, "logits").dtype == torch.int64
    assert int(count_bad_targets(good, 10)) == 0
    bad = torch.tensor([0, 10, -100, -1])
    assert int(count_bad_targets(bad, 10)) == 2
    message = r"targets holds 2 value\(s\) outside the vocabulary \(the first is 10\): accepted are 0 to 9 and ignore_"
    with pytest.raises(ValueError, match=message):
        check_targets("targets", bad, (4,), 10, -100, like, "logits")
    with pytest.raises(TypeError, match=r"targets must hold integers, got dtype torch.float32; use targets.long\(\)"):
        check_targets("targets", torch.zeros(4), (4,), 10, -100, like, "logits")
    with pytest.raises(
        ValueError, match=r"targets must have shape \(4,\) \(one target per row of logits\), got \(3,\)"
    ):
        check_targets("targets", good[:3], (4,), 10, -100, like, "logits")
    with pytest.raises(ValueError, match="targets is on meta but logits is on cpu"):
        check_targets("targets", good.to("meta"), (4,), 10, -100, like, "logits")
