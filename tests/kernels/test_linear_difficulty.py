import pytest
import torch

import cggr_kernels.linear_difficulty as module
from cggr_core.difficulty import linear_difficulty_reference
from cggr_kernels.linear_difficulty import linear_difficulty


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of rows, the last one not full."""
    monkeypatch.setattr(module, "MIN_ROWS", 4)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)


def problem(N, H, V, dtype, device):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, generator=generator).to(device, dtype) for size in ((N, H), (V, H), (V,))
    )
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[2::3] = -100
    return hidden, weight, targets.to(device), bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("N", "H", "V"), [(1, 1, 1), (7, 16, 257), (9, 8, 5000), (0, 4, 9)])
@pytest.mark.parametrize("numbers", [(None, None), (3.0, None), (None, 0.3), (5.0, 2.0)])
def test_no_further_from_the_truth_than_torch(N, H, V, dtype, numbers, device):
    hidden, weight, targets, bias = problem(N, H, V, dtype, device)
    for given, head_bias in ((targets, bias), (targets, None), (None, bias)):
        values = linear_difficulty(hidden, weight, given, head_bias, *numbers)
        rivals = linear_difficulty_reference(hidden, weight, given, head_bias, *numbers)
        double_bias = None if head_bias is None else head_bias.double()
        truths = linear_difficulty_reference(hidden.double(), weight.double(), given, double_bias, *numbers)
        for value, rival, truth in zip(values, rivals, truths, strict=True):
            assert value.dtype == torch.float32
            assert value.shape == (N,)
            error, rival_error = (value.double() - truth).abs(), (rival.double() - truth).abs()
            tolerance = 3e-5 if dtype == torch.float32 else 2e-2
            assert (error <= rival_error + tolerance * (1 + truth.abs())).all()


def test_bad_input_is_named(device):
    hidden, weight, targets, bias = problem(6, 8, 100, torch.float32, device)
    with pytest.raises(ValueError, match=r"weight must be \[V, 8\]"):
        linear_difficulty(hidden, weight[:, 1:])
    with pytest.raises(TypeError, match=r"weight must have the dtype of hidden, got torch\.float16"):
        linear_difficulty(hidden, weight.half())
    with pytest.raises(ValueError, match="targets must have shape"):
        linear_difficulty(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="bias must have shape"):
        linear_difficulty(hidden, weight, targets, bias[1:])
    with pytest.raises(ValueError, match="scale must be a positive"):
        linear_difficulty(hidden, weight, targets, scale=-1.0)


def test_op_registration(device):
    hidden, weight, targets, bias = problem(6, 8, 100, torch.float32, device)
    op = torch.ops.cggr_kernels.linear_difficulty.default
    torch.library.opcheck(op, (hidden, weight, targets, bias, 3.0, None, -100))


def test_compiles_as_one_graph(device, compiler):
    hidden, weight, targets, _ = problem(6, 8, 100, torch.float32, device)
    compiled = torch.compile(lambda h, *rest: linear_difficulty(h * 1.0, *rest)[4], fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(hidden, weight, targets), linear_difficulty(hidden, weight, targets)[4])
