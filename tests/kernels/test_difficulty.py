import pytest
import torch

from cggr_core.difficulty import difficulty_reference
from cggr_kernels.difficulty import difficulty

NAMES = ("entropy", "confidence", "margin", "nll", "gradnorm")


def check_against_truth(logits, targets, ignore_index=-100, tolerance=2e-5):
    """No further from the float64 truth than torch in the same dtype, plus a small tolerance."""
    truth = difficulty_reference(logits.double(), targets, ignore_index)
    torch_values = difficulty_reference(logits, targets, ignore_index)
    for name, value, expected, rival in zip(
        NAMES, difficulty(logits, targets, ignore_index), truth, torch_values, strict=True
    ):
        assert value.dtype == torch.float32
        error, rival_error = (value.double() - expected).abs(), (rival.double() - expected).abs()
        assert (error <= rival_error + tolerance * (1 + expected.abs())).all(), (name, error.max(), rival_error.max())


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 257), (1, 1023), (3, 4096), (2, 4097), (2, 9001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_further_from_the_truth_than_torch(shape, dtype, device):
    torch.manual_seed(0)
    logits = (torch.randn(shape, device=device) * 5).to(dtype)
    targets = torch.randint(0, shape[1], shape[:1], device=device)
    check_against_truth(logits, targets)
    check_against_truth(logits, None)


def test_empty(device):
    for value in difficulty(torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)):
        assert value.shape == (0,)


def test_extremes(device):
    inf = float("inf")
    rows = [[0.0, -inf, -inf, -inf], [1e4, -1e4, 0.0, 9.99e3], [3.0, 3.0, 3.0, 3.0], [-1e4, -1e4, -1e4, 1e4]]
    logits = torch.tensor(rows, device=device)
    check_against_truth(logits, torch.tensor([0, 0, 2, 3], device=device))


@pytest.mark.parametrize("size", [4096, 4099])
def test_masked_vocabularies(size, device):
    logits = torch.randn(4, 9000, device=device)[:, :size]
    logits[0, ::2] = -float("inf")
    logits[1, 1:] = -float("inf")
    logits[2] = torch.finfo(torch.float32).min
    logits[2, 4000:4010] = 1.0
    logits[3, :4090] = -float("inf")
    check_against_truth(logits, torch.tensor([1, 0, 4005, 4091], device=device))


@pytest.mark.parametrize("places", [(0, 1), (0, 8), (5, 4096), (1, 2000), (4097, 5000)])
def test_margin_is_zero_when_the_largest_tie_wherever_they_are(places, device):
    logits = torch.zeros(2, 5001, device=device)
    logits[0, list(places)] = 3.0
    logits[1, places[0]], logits[1, places[1]] = 3.0, 2.0
    margin = difficulty(logits)[2]
    assert margin[0] == 0
    assert margin[1] > 0
    check_against_truth(logits, None)


def test_ignored_rows_are_zero_and_not_read(device):
    logits = torch.randn(4, 33, device=device)
    logits[1] = float("nan")
    for ignore_index in (-100, 7):
        targets = torch.tensor([3, ignore_index, 0, ignore_index], device=device)
        values = difficulty(logits, targets, ignore_index)
        for value in values:
            assert (value[[1, 3]] == 0).all()
            assert torch.isfinite(value).all()
        for value, expected in zip(values, difficulty_reference(logits, targets, ignore_index), strict=True):
            torch.testing.assert_close(value[[0, 2]], expected[[0, 2]])
    for value in difficulty(logits, torch.full((4,), -100, device=device)):
        assert (value == 0).all()


@pytest.mark.parametrize("width", [257, 264])
def test_strided_rows_and_unaligned_starts(width, device):
    storage = torch.randn(6, 300, device=device)
    targets = torch.randint(0, width, (6,), device=device)
    for logits in (
        storage[:, :width],
        storage[:, 3 : 3 + width],
        storage[::2, :width],
        storage[:1, :width].expand(6, -1),
    ):
        check_against_truth(logits, targets[: logits.shape[0]])


def test_nan_and_impossible_targets_show_in_the_statistics(device):
    logits = torch.zeros(3, 10, device=device)
    logits[0, 9] = float("nan")
    values = difficulty(logits, torch.tensor([0, 10, -1], device=device))
    for value in values[:2] + values[3:]:
        assert value.isnan().all()


def test_gradnorm_keeps_its_digits_when_the_target_is_certain(device):
    logits = torch.zeros(1, 300, device=device)
    logits[0, 77] = 25.0
    targets = torch.tensor([77], device=device)
    expected = difficulty_reference(logits.double(), targets)[4]
    torch.testing.assert_close(difficulty(logits, targets)[4].double(), expected, rtol=1e-4, atol=0)


def test_bad_input_is_named(device):
    logits = torch.zeros(3, 10, device=device)
    with pytest.raises(ValueError, match="logits must have 2 dimensions"):
        difficulty(logits[None])
    with pytest.raises(TypeError, match="logits must be float32"):
        difficulty(logits.long())
    with pytest.raises(ValueError, match=r"targets must have shape \(3,\)"):
        difficulty(logits, torch.zeros(4, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match="targets must be int64"):
        difficulty(logits, torch.zeros(3, device=device))
    with pytest.raises(ValueError, match="contiguous in the last dimension"):
        difficulty(logits.t())
    with pytest.raises(ValueError, match="must have 1 to 1048576 entries, got 0"):
        difficulty(logits[:, :0])
    with pytest.raises(ValueError, match="got meta and cpu"):
        difficulty(logits, torch.zeros(3, dtype=torch.int64, device="meta"))


def test_op_registration(device):
    logits, targets = torch.randn(4, 9, device=device), torch.tensor([0, 1, -100, 8], device=device)
    torch.library.opcheck(torch.ops.cggr_kernels.difficulty.default, (logits, targets, -100))
    torch.library.opcheck(torch.ops.cggr_kernels.difficulty.default, (logits, None, -100))


def test_compiles_as_one_graph(device, compiler):
    logits, targets = torch.randn(4, 9, device=device), torch.tensor([0, 1, -100, 8], device=device)
    compiled = torch.compile(lambda x, y: difficulty(x * 1.0, y)[4] * 2, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(logits, targets), difficulty_reference(logits, targets)[4] * 2)
