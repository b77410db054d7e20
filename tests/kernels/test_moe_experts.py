import pytest
import torch

import cggr_kernels.moe_experts as experts_module
import cggr_kernels.moe_plan as plan_module
import cggr_kernels.moe_products as products
from cggr_kernels import _launching
from cggr_kernels.moe_experts import moe_experts
from cggr_kernels.moe_plan import Plan, combine, expand, make_plan, row_bound
from cggr_moe.grouped import moe_experts_reference


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Larger blocks than on a device, since the interpreter's time goes into programs."""
    blocks = products.Blocks(64, 32, 16, 2, 4, 2)
    monkeypatch.setattr(products, "FLOAT_BLOCKS", products.Table(blocks, blocks, blocks))
    monkeypatch.setattr(products, "_SWIGLU_ROWS", 128)
    monkeypatch.setattr(plan_module, "_PAD_PROGRAMS", 1)


def problem(T, H, I, E, K, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, gate_up, down = (
        (torch.randn(size, generator=generator) * 0.4).to(device, dtype) for size in ((T, H), (E, 2 * I, H), (E, H, I))
    )
    index = torch.rand(T, E, generator=generator).argsort(1)[:, :K].to(device)
    weight = torch.rand(T, K, generator=generator).to(device)
    return x, gate_up, down, index, weight


def run(function, x, gate_up, down, index, weight):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, gate_up, down, weight)]
    out = function(*leaves[:3], index, leaves[3])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def check_against_truth(*operands):
    """Output and gradients no further from float64 than torch in the same dtype, by relative norm."""
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3}[operands[0].dtype]
    values, rivals = run(moe_experts, *operands), run(moe_experts_reference, *operands)
    truths = run(moe_experts_reference, *(x.double() if x.is_floating_point() else x for x in operands))
    for place, (value, rival, truth) in enumerate(zip(values, rivals, truths, strict=True)):
        assert value.dtype == rival.dtype
        error, rival_error = (value.double() - truth).norm(), (rival.double() - truth).norm()
        assert error <= rival_error + tolerance * truth.norm(), (place, error / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "H", "I", "E", "K"), [(1, 8, 8, 1, 1), (7, 24, 40, 3, 2), (5, 16, 8, 3, 3)])
def test_output_and_gradients(T, H, I, E, K, dtype, device):
    check_against_truth(*problem(T, H, I, E, K, dtype, device))


def test_nothing_is_saved_for_a_backward_pass_that_does_not_come(monkeypatch, device):
    saved, forward = [], experts_module._forward

    def watched(*arguments):
        out, z, *plan = forward(*arguments)
        saved.append(z.numel() > 0)
        return out, z, *plan

    monkeypatch.setattr(experts_module, "_forward", watched)
    x, gate_up, down, index, weight = problem(3, 8, 8, 2, 1, torch.float32, device)
    moe_experts(x, gate_up, down, index, weight)
    gate_up.requires_grad_()
    moe_experts(x, gate_up, down, index, weight)
    with torch.no_grad():
        moe_experts(x, gate_up, down, index, weight)
    assert saved == [False, True, False]


def test_several_tiles_of_one_expert_and_none_of_others(device):
    x, gate_up, down, _, weight = problem(130, 8, 8, 4, 1, torch.float32, device)
    index = torch.full((130, 1), 2, device=device)
    operands = (x, gate_up, down, index, weight)
    check_against_truth(*operands)
    _, _, d_gate_up, d_down, _ = run(moe_experts, *operands)
    for gradient in (d_gate_up, d_down):
        assert (gradient[[0, 1, 3]] == 0).all()


def test_null_choices(device):
    x, gate_up, down, index, weight = problem(9, 8, 8, 4, 2, torch.float32, device)
    index[::2] = -1
    index[1, 0] = -1
    check_against_truth(x, gate_up, down, index, weight)
    assert (moe_experts(x, gate_up, down, index, weight)[::2] == 0).all()
    # One that is no expert is null as well: no index reaches memory unchecked.
    assert torch.equal(
        moe_experts(x, gate_up, down, index.masked_fill(index < 0, 4), weight),
        moe_experts(x, gate_up, down, index, weight),
    )
    nothing = run(moe_experts, x, gate_up, down, torch.full_like(index, -1), weight)
    assert all((value == 0).all() for value in nothing)


def test_weights_that_begin_anywhere(device):
    x, gate_up, down, index, weight = problem(3, 8, 8, 1, 1, torch.float32, device)
    storage = torch.empty(gate_up.numel() + 1, device=device)
    moved = storage[1:].view_as(gate_up).copy_(gate_up)
    assert moved.data_ptr() % _launching.ALIGNMENT
    assert _launching.descriptor(moved, 1, 8, 8).base.data_ptr() % _launching.ALIGNMENT == 0
    expected = moe_experts(x, gate_up, down, index, weight)
    assert torch.equal(moe_experts(x, moved, down, index, weight), expected)


def test_no_tokens(device):
    x, gate_up, down, index, weight = problem(2, 8, 8, 2, 1, torch.float32, device)
    values = run(moe_experts, x[:0], gate_up, down, index[:0], weight[:0])
    assert values[0].shape == (0, 8)
    assert all((value == 0).all() for value in values)


@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (300, 3, 2), (37, 100, 4)])
def test_the_plan_is_a_stable_sort(T, E, K, device):
    generator = torch.Generator().manual_seed(T)
    index = torch.randint(-1, E, (T, K), generator=generator).to(device)
    plan = make_plan(index, E)
    flat, row = index.flatten(), plan.row.flatten()
    used = [int((flat == e).sum()) for e in range(E)]
    assert plan.used.tolist() == used
    start, tiles = 0, []
    for e in range(E):
        assert plan.segment[e] == start
        # In the order of the tokens: what makes every later sum the same from run to run.
        assert row[flat == e].tolist() == list(range(start, start + used[e]))
        tiles += [e] * -(-used[e] // 128)
        start = len(tiles) * 128
    assert (row[flat < 0] == -1).all()
    assert int(plan.segment[E]) == start <= row_bound(T * K, E)
    assert int(plan.tiles) == len(tiles)
    assert plan.tile_expert[: len(tiles)].tolist() == tiles


def test_rows_are_bounded_by_the_worst_case():
    for choices, E in ((1, 1), (1, 128), (129, 2), (1000, 3), (1000, 1000)):
        # One choice in each of as many experts as there can be, and all others in one of them.
        touched = min(E, choices)
        worst = (touched - 1) * 128 + -(-(choices - touched + 1) // 128) * 128
        assert worst <= row_bound(choices, E) <= choices + 127 * touched


def test_only_the_gradients_that_are_wanted(device):
    operands = problem(3, 8, 8, 1, 1, torch.float32, device)
    expected = run(moe_experts, *operands)[1:]
    for place, gradient in zip((0, 1, 2, 4), expected, strict=True):
        inputs = [tensor.detach() for tensor in operands]
        leaf = inputs[place].requires_grad_()
        out = moe_experts(*inputs)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        assert torch.equal(torch.autograd.grad(out, leaf, upstream)[0], gradient), place
    assert not moe_experts(*(tensor.detach() for tensor in operands)).requires_grad


def test_bad_input_is_named(device):
    x, gate_up, down, index, weight = problem(5, 8, 8, 3, 2, torch.float32, device)
    with pytest.raises(ValueError, match=r"gate_up must be \[E, 2I, 8\]"):
        moe_experts(x, gate_up[..., 1:], down, index, weight)
    with pytest.raises(ValueError, match=r"down must have shape \(3, 8, 8\)"):
        moe_experts(x, gate_up, down[:2], index, weight)
    with pytest.raises(TypeError, match=r"down must have the dtype of x, got torch\.float16 and torch\.float32"):
        moe_experts(x, gate_up, down.half(), index, weight)
    with pytest.raises(ValueError, match="the intermediate dimension must be a multiple of 4 in"):
        moe_experts(x, gate_up[:, :14], down[..., :7], index, weight)
    with pytest.raises(TypeError, match="index must be int64"):
        moe_experts(x, gate_up, down, index.int(), weight)
    with pytest.raises(ValueError, match=r"index must be \[5, K\] and weight float32"):
        moe_experts(x, gate_up, down, index, weight[:, :1])
    with pytest.raises(ValueError, match="down must be on the device of x, got meta and cpu"):
        moe_experts(x, gate_up, down.to("meta"), index, weight)


def test_op_registration(device):
    x, gate_up, down, index, weight = problem(3, 8, 8, 2, 1, torch.float32, device)
    ops = torch.ops.cggr_kernels
    # What lies beyond the rows in use is not written: shapes, mutation and fakes are what is checked here.
    utilities = ("test_schema", "test_faketensor")
    arguments = (x, gate_up, down, index, weight, True)
    torch.library.opcheck(ops.moe_experts.default, arguments, test_utils=utilities)
    out, z, *plan = ops.moe_experts(*arguments)
    arguments = (torch.ones_like(out), x, gate_up, down, weight, z, *plan, [True, True, False, True])
    torch.library.opcheck(ops.moe_experts_gradient.default, arguments, test_utils=utilities)


def test_compiles_as_one_graph(device, compiler):
    operands = problem(5, 8, 8, 2, 1, torch.float32, device)
    compiled = torch.compile(moe_experts, fullgraph=True, backend=compiler)
    for value, expected in zip(run(compiled, *operands), run(moe_experts, *operands), strict=True):
        assert torch.equal(value, expected)


def test_rows_beyond_what_int32_counts(device):
    """More than 2**31 elements in one buffer, of which the pages that are touched alone take memory."""
    H = 8192
    first = 2**31 // H
    row = torch.tensor([[first], [first + 5], [-1]], dtype=torch.int32, device=device)
    segment = torch.tensor([first, first + 128], dtype=torch.int32, device=device)
    used = torch.tensor([120], dtype=torch.int32, device=device)
    tile_expert = torch.zeros(first // 128 + 1, dtype=torch.int32, device=device)
    plan = Plan(row, segment, used, tile_expert, tile_expert[:1])
    x = torch.randn(3, H, device=device).half()
    rows, _ = expand(x, plan)
    assert rows.numel() > 2**31
    assert torch.equal(rows[[first, first + 5]], x[:2])
    assert (rows[first + 120 : first + 128] == 0).all()
    out = combine(rows, plan)
    assert torch.equal(out[:2], x[:2])
    assert (out[2] == 0).all()
