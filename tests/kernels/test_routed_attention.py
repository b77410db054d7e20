import pytest
import torch

import cggr_kernels._routed_attention_launch as module
from cggr_core.routed_attention import routed_attention_reference
from cggr_kernels.routed_attention import routed_attention


def problem(B, K, S, H, HKV, D, dtype, device, *, segments=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, d_out = (
        torch.randn(B, length, heads, D, generator=generator).to(device, dtype)
        for length, heads in ((K, H), (S, HKV), (S, HKV), (K, H))
    )
    position = torch.stack([torch.randperm(S, generator=generator)[:K].sort().values for _ in range(B)])
    segment = None
    if segments:
        segment = torch.randint(0, 2, (B, S), generator=generator).cumsum(1) // 7
        segment[0, -S // 8 :] = -1
        segment = segment.to(device)
    return q, k, v, position.to(device), segment, d_out


def run(function, inputs, d_out):
    q, k, v, *rest = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, *rest)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def check_against_truth(q, k, v, position, segment, d_out, *numbers, kept_rows=None):
    """Output and gradients no further from float64 than torch in the same dtype, by relative norm."""
    rest = (position, segment, *numbers)
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[q.dtype]
    extra = () if kept_rows is None else ("kept",)
    scale = (None,) if extra else ()
    values = run(routed_attention, (q, k, v, *rest, *scale, *extra), d_out)
    rivals = run(routed_attention_reference, (q, k, v, *rest), d_out)
    truths = run(routed_attention_reference, (q.double(), k.double(), v.double(), *rest), d_out.double())
    for name, value, rival, truth in zip(("out", "q", "k", "v"), values, rivals, truths, strict=True):
        assert value.dtype == q.dtype
        if kept_rows is not None and name in "kv":
            assert (value[~kept_rows] == 0).all()
            value, rival, truth = value[kept_rows], rival[kept_rows], truth[kept_rows]
        norm = max(truth.norm(), d_out.double().norm())  # one visible key: true gradients of q and k are 0
        error, rival_error = (value.double() - truth).norm(), (rival.double() - truth).norm()
        assert error <= rival_error + tolerance * norm, (name, error / norm, rival_error / norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("B", "K", "S", "H", "HKV", "D"),
    [(2, 40, 150, 4, 2, 16), (1, 1, 1, 1, 1, 16), (1, 7, 257, 3, 1, 24), (1, 33, 33, 2, 2, 64), (1, 70, 71, 5, 1, 20)],
)
def test_out_and_gradients(B, K, S, H, HKV, D, dtype, device):
    check_against_truth(*problem(B, K, S, H, HKV, D, dtype, device))


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_segments_window_and_softcap(segments, window, softcap, device):
    inputs = problem(2, 40, 150, 4, 2, 16, torch.float32, device, segments=segments)
    check_against_truth(*inputs[:5], inputs[5], window, softcap)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_gradients_of_kept_keys_alone(segments, window, device):
    q, k, v, position, segment, d_out = problem(2, 70, 150, 4, 2, 16, torch.float32, device, segments=segments)
    kept = torch.zeros(2, 150, dtype=torch.bool, device=device).scatter(1, position, True)
    check_against_truth(q, k, v, position, segment, d_out, window, None, kept_rows=kept)


def test_everything_kept_is_ordinary_causal_attention(device):
    q, k, v, _, _, d_out = problem(1, 65, 65, 4, 2, 16, torch.float32, device)
    position = torch.arange(65, device=device)[None]
    values = run(routed_attention, (q, k, v, position), d_out)

    def sdpa(q, k, v):
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    for value, expected in zip(values, run(sdpa, (q, k, v), d_out), strict=True):
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)


def test_positions_and_segments_in_any_order(device):
    q, k, v, position, _, d_out = problem(2, 50, 150, 2, 1, 16, torch.float32, device)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1)).to(device)
    segment = (torch.arange(150, device=device) // 10 % 3 - 1).expand(2, -1)
    for window in (None, 30):
        check_against_truth(q, k, v, position[:, order], None, d_out, window)
        check_against_truth(q, k, v, position[:, order], segment, d_out, window)


@pytest.mark.parametrize("K", [150, 300])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("kept_only", [False, True])
def test_long_documents_and_padding_on_either_side(K, window, kept_only, device):
    """Most blocks of keys are seen by all queries of a block, which are then not asked about each."""
    q, k, v, position, _, d_out = problem(4, K, 300, 2, 1, 16, torch.float32, device)
    segment = torch.zeros(4, 300, dtype=torch.int64)
    segment[0, 170:] = -1
    segment[1, :130] = -1
    segment[2] = torch.tensor([3] * 100 + [1] * 160 + [3] * 40)  # a number that comes again
    kept = torch.zeros(4, 300, dtype=torch.bool, device=device).scatter(1, position, True) if kept_only else None
    check_against_truth(q, k, v, position, segment.to(device), d_out, window, None, kept_rows=kept)


def test_queries_that_see_nothing_give_zero(device):
    q, k, v, position, _, d_out = problem(1, 10, 40, 2, 1, 16, torch.float32, device)
    segment = torch.full((1, 40), -1, device=device)
    for value in run(routed_attention, (q, k, v, position, segment), d_out):
        assert (value == 0).all()


def test_no_queries_give_zero_gradients(device):
    q, k, v, position, _, d_out = problem(2, 0, 40, 2, 1, 16, torch.float32, device)
    out, dq, dk, dv = run(routed_attention, (q, k, v, position), d_out)
    assert out.shape == dq.shape == (2, 0, 2, 16)
    assert (dk == 0).all()
    assert (dv == 0).all()


def test_strided_inputs(device):
    q, k, v, position, _, d_out = problem(2, 20, 60, 4, 2, 16, torch.float32, device)
    expected = run(routed_attention, (q, k, v, position), d_out)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    d_out = d_out.transpose(0, 3).contiguous().transpose(0, 3)
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    for value, same in zip(run(routed_attention, (q, k, v, position), d_out), expected, strict=True):
        assert torch.equal(value, same)


def test_inputs_that_a_copy_engine_cannot_address(device):
    """Rows of 7 elements, keys shared by the batch, and a start that is not aligned."""
    q, k, v, position, _, d_out = problem(2, 20, 60, 4, 2, 7, torch.float32, device)
    k = k[:1].expand(2, -1, -1, -1)
    v = torch.cat([v.flatten(), v.flatten()[:1]])[1:].view_as(v)
    check_against_truth(q, k, v, position, None, d_out)


@pytest.mark.parametrize("D", [24, 72, 136])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_blocks_for_much_shared_memory(D, dtype, monkeypatch, device):
    monkeypatch.setattr(module, "shared_memory", lambda device: 2**20)
    check_against_truth(*problem(1, 20, 70, 4, 2, D, dtype, device))
    inputs = problem(1, 20, 70, 3, 1, D, dtype, device, segments=True)
    check_against_truth(*inputs[:5], inputs[5], 30, 4.0)


@pytest.mark.parametrize("table", [module.FORWARD_BLOCKS, module.QUERY_GRADIENT_BLOCKS, module.KEY_GRADIENT_BLOCKS])
def test_statistics_are_written_for_every_row_that_is_read(table):
    for limit, blocks in table.items():
        assert module.FORWARD_BLOCKS[limit].m % blocks.m == 0
        assert module.QUERY_GRADIENT_BLOCKS[limit].m % module.KEY_GRADIENT_BLOCKS[limit].m == 0


def test_only_queries_want_gradients(device):
    q, k, v, position, _, d_out = problem(1, 20, 60, 4, 2, 16, torch.float32, device)
    expected = run(routed_attention, (q, k, v, position), d_out)[1]
    leaf = q.requires_grad_()
    assert torch.equal(torch.autograd.grad(routed_attention(leaf, k, v, position), leaf, d_out)[0], expected)


def test_bad_input_is_named(device):
    q, k, v, position, segment, _ = problem(1, 8, 40, 4, 2, 16, torch.float32, device, segments=True)
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        routed_attention(q[0], k, v, position)
    with pytest.raises(TypeError, match=r"k must have the dtype of q, got torch\.float16 and torch\.float32"):
        routed_attention(q, k.half(), v, position)
    with pytest.raises(ValueError, match="k and v must be"):
        routed_attention(q, k, v[:, 1:], position)
    with pytest.raises(ValueError, match="must be a multiple of those of k, got 3 and 2"):
        routed_attention(q[:, :, :3], k, v, position)
    with pytest.raises(ValueError, match=r"q_position must have shape \(1, 8\)"):
        routed_attention(q, k, v, position[:, 1:])
    with pytest.raises(TypeError, match="q_position must be int64"):
        routed_attention(q, k, v, position.int())
    with pytest.raises(ValueError, match=r"segment must have shape \(1, 40\)"):
        routed_attention(q, k, v, position, segment[:, 1:])
    with pytest.raises(ValueError, match="k must have at least one key"):
        routed_attention(q, k[:, :0], v[:, :0], position)
    with pytest.raises(ValueError, match="head dimension of q must be 1 to 256, got 512"):
        routed_attention(*(torch.zeros(1, 1, 1, 512, device=device),) * 3, position[:, :1])
    for name, value in {"window": 0, "softcap": 0.0, "scale": -1.0}.items():
        with pytest.raises(ValueError, match=name):
            routed_attention(q, k, v, position, **{name: value})
    with pytest.raises(ValueError, match="key_gradient must be one of"):
        routed_attention(q, k, v, position, key_gradient="none")


def test_op_registration(device):
    q, k, v, position, segment, d_out = problem(1, 8, 40, 4, 2, 16, torch.float32, device, segments=True)
    ops = torch.ops.cggr_kernels
    arguments = (q, k, v, position, segment)
    torch.library.opcheck(ops.routed_attention.default, (*arguments, 5, None, 0.25))
    out, lse = ops.routed_attention(*arguments, None, 4.0, 0.25)
    torch.library.opcheck(ops.routed_attention_query_gradient.default, (*arguments, out, d_out, lse, None, 4.0, 0.25))
    _, delta = ops.routed_attention_query_gradient(*arguments, out, d_out, lse, None, 4.0, 0.25)
    last = (*arguments, d_out, lse, delta, None, 4.0, 0.25)
    torch.library.opcheck(ops.routed_attention_key_gradient.default, (*last, False))
    torch.library.opcheck(ops.routed_attention_key_gradient.default, (*last, True))


def test_compiles_as_one_graph(device, compiler):
    q, k, v, position, segment, d_out = problem(1, 8, 40, 4, 2, 16, torch.float32, device, segments=True)
    inputs = (q, k, v, position, segment)
    compiled = torch.compile(lambda q, *rest: routed_attention(q * 1.0, *rest), fullgraph=True, backend=compiler)
    for value, expected in zip(run(compiled, inputs, d_out), run(routed_attention, inputs, d_out), strict=True):
        torch.testing.assert_close(value, expected)
