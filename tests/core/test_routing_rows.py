"""Rows sliced and merged again, compared with loops and with autograd's own scatters."""

from collections import namedtuple
from types import MappingProxyType

import pytest
import torch

from cggr_core.routing.layer_rows import LayerRows
from cggr_core.routing.rows import Places, merge_rows, replace_rows, stop_gradient

LENGTH = 5
KEPT = torch.tensor([[0, 3], [4, 1]])
OTHER = torch.tensor([[1, 2, 4], [0, 2, 3]])
VALID = torch.tensor([[True, False], [True, True]])


def scattered(rows, index):
    """``[B, H, K, D]`` at their places in zeros ``[B, H, S, D]``, by autograd's own scatter."""
    batch, heads, _, size = rows.shape
    where = index[:, None, :, None].expand(-1, heads, -1, size)
    return torch.zeros(batch, heads, LENGTH, size, dtype=rows.dtype).scatter(2, where, rows)


def keys(slots, dtype=torch.float64):
    # As a projection leaves them: by position in memory.
    return torch.randn(2, slots, 3, 4, dtype=dtype).transpose(1, 2).requires_grad_()


def gradients(outcome, operands, upstream):
    return torch.autograd.grad(outcome, operands, upstream, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("valid", [None, VALID])
def test_merged_rows_and_their_gradients(valid, dtype):
    other, kept, upstream = keys(3, dtype), keys(2, dtype), torch.randn(2, 3, LENGTH, 4).to(dtype)
    wanted = scattered(other, OTHER) + scattered(kept, KEPT)
    other_grad, kept_grad = gradients(wanted, (other, kept), upstream)
    if valid is not None:
        kept_grad = kept_grad * valid[:, None, :, None]
    places = {"others": Places(OTHER, LENGTH), "keeps": Places(KEPT, LENGTH, valid)}
    for merged in (None, wanted.detach()):
        found = merge_rows(other, kept, merged=merged, **places)
        assert torch.equal(found, wanted)
        assert torch.equal(gradients(found, (other,), upstream)[0], other_grad)
        assert torch.equal(gradients(merge_rows(other, kept, **places), (kept,), upstream)[0], kept_grad)
    assert merge_rows(other, kept, **places).transpose(1, 2).is_contiguous()
    # The one that is given is the one that comes back, not put together again.
    marked = wanted.detach() + 1
    assert torch.equal(merge_rows(other, kept, merged=marked, **places), marked)
    with torch.no_grad():
        assert torch.equal(merge_rows(other, kept, merged=marked, **places), marked)
        assert torch.equal(merge_rows(other, kept, **places), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("valid", [None, VALID])
def test_replaced_rows_and_their_gradients(valid, dtype):
    full, kept, upstream = keys(LENGTH, dtype), keys(2, dtype), torch.randn(2, 3, LENGTH, 4).to(dtype)
    counts = torch.ones_like(KEPT, dtype=torch.bool) if valid is None else valid
    fresh = torch.zeros(2, LENGTH, dtype=torch.bool).scatter(1, KEPT, counts)[:, None, :, None]
    # A slot that is not valid holds what the full rows hold.
    held = full.detach().gather(2, KEPT[:, None, :, None].expand(-1, 3, -1, 4))
    kept = torch.where(counts[:, None, :, None], kept.detach(), held).requires_grad_()
    wanted = torch.where(fresh, scattered(kept, KEPT), full)
    found = replace_rows(full, kept, keeps=Places(KEPT, LENGTH, valid))
    assert torch.equal(found, wanted)
    assert found.transpose(1, 2).is_contiguous()
    full_grad, kept_grad = gradients(wanted, (full, kept), upstream)
    for operands, expected in (
        ((full,), (full_grad,)),
        ((kept,), (kept_grad,)),
        ((full, kept), (full_grad, kept_grad)),
    ):
        made = gradients(replace_rows(full, kept, keeps=Places(KEPT, LENGTH, valid)), operands, upstream)
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_full_rows_of_any_layout_are_replaced_in_order():
    full, kept = torch.randn(2, 3, LENGTH, 4), torch.randn(2, 3, 2, 4)
    assert full.is_contiguous()  # by head in memory: as some models hand them over
    found = replace_rows(full, kept, keeps=Places(KEPT, LENGTH))
    for row in range(2):
        for at in range(LENGTH):
            slot = KEPT[row].tolist().index(at) if at in KEPT[row] else None
            assert torch.equal(found[row, :, at], full[row, :, at] if slot is None else kept[row, :, slot])


def test_one_set_of_places_serves_several_dtypes():
    places = Places(KEPT, LENGTH, VALID)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert places.only_valid(torch.ones(2, 2, 1, 1, dtype=dtype)).dtype == dtype
        without = places.without_fresh(torch.ones(2, LENGTH, 1, 1, dtype=dtype))
        assert without.dtype == dtype
        assert without[:, :, 0, 0].tolist() == [[0, 1, 1, 1, 1], [1, 0, 1, 1, 0]]


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 3), (2, 2, 3, 4)])
def test_stopped_gradients(shape):
    hidden, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)
    found = stop_gradient(hidden, passes=VALID)
    assert torch.equal(found, hidden)
    wanted = upstream * VALID.reshape(2, 2, *(1 for _ in shape[2:]))
    assert torch.equal(gradients(found, (hidden,), upstream)[0], wanted)
    broken = torch.full(shape, torch.nan)
    assert not gradients(stop_gradient(hidden, passes=VALID), (hidden,), broken)[0][0, 1].isnan().any()


def taken(value, dimension, heads=False):
    """Positions of KEPT along a dimension, by a loop over rows; the rows are the dimension before, or the first."""
    rows = 1 if dimension == 2 and tuple(value.shape[:2]) in ((3, 1), (3, 2), (2, 2)) and not heads else 0
    value = value.expand(*(2 if at == rows else size for at, size in enumerate(value.shape)))
    parts = [value.select(rows, row).index_select(dimension - 1, KEPT[row]) for row in range(2)]
    return torch.stack(parts, dim=rows)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "dimension"),
    [
        ("position_ids", (2, 5), torch.int64, 1),
        ("position_ids", (1, 5), torch.int64, 1),
        ("hidden_states", (2, 5, 4), torch.float32, 1),
        ("position_embeddings", (1, 5, 4), torch.float32, 1),
        ("per_layer_input", (2, 5, 5), torch.float32, 1),
        ("streams", (2, 5, 3, 4), torch.float32, 1),
        # Several kinds of position, and streams of hidden states.
        ("position_ids", (3, 2, 5), torch.int64, 2),
        ("position_ids", (3, 1, 5), torch.int64, 2),
        ("position_ids", (2, 2, 5), torch.int64, 2),
        ("position_embeddings", (3, 2, 5, 4), torch.float32, 2),
        ("position_embeddings", (3, 1, 5, 4), torch.float32, 2),
        # With a dimension for heads.
        ("position_bias", (2, 4, 5, 5), torch.float32, 2),
        ("rotary", (2, 1, 5, 4), torch.float32, 2),
        ("rotary", (1, 1, 5, 4), torch.float32, 2),
        ("rotary", (1, 4, 5, 4), torch.float32, 2),
        ("attention_mask", (2, 1, 5, 5), torch.bool, 2),
        ("attention_mask", (1, 1, 5, 5), torch.float32, 2),
        ("attention_mask", (2, 2, 5, 5), torch.float32, 2),
        # Which keys are padding, and what is not about tokens.
        ("attention_mask", (2, 5), torch.int64, None),
        ("attention_mask", (2, 5, 4), torch.float32, None),
        ("attention_mask", (3, 2, 5, 5), torch.float32, None),
        ("inv_freq", (5,), torch.float32, None),
        ("scale", (), torch.float32, None),
        ("table", (2, 4), torch.float32, None),
        ("table", (3, 5), torch.float32, None),
        ("table", (3, 5, 4), torch.float32, None),
        ("table", (2, 3, 5), torch.float32, None),
        ("table", (4, 3, 5, 2), torch.float32, None),
        ("table", (2, 3, 4, 5), torch.float32, None),
    ],
)
def test_arguments_of_a_layer_at_some_positions(name, shape, dtype, dimension):
    value = (torch.randn(shape) * 100).to(dtype)
    rows = LayerRows(KEPT, LENGTH)
    _, named = rows.call((), {name: value}, replace={})
    if dimension is None:
        assert named[name] is value
    else:
        assert torch.equal(named[name], taken(value, dimension, heads="mask" in name))
    # Every position, in order: what there is.
    everything = LayerRows(torch.arange(LENGTH).expand(2, -1), LENGTH)
    assert everything.call((), {name: value}, replace={})[1][name] is value


def test_arguments_in_containers_are_taken_apart_once():
    Pair = namedtuple("Pair", ["a", "b"])
    cos, sin, cache = torch.randn(2, LENGTH, 4), torch.randn(2, LENGTH, 4), object()
    hidden, pair, fixed = torch.randn(2, LENGTH, 4), Pair(torch.randn(2, LENGTH), 1), MappingProxyType({})
    rows = LayerRows(KEPT, LENGTH)
    named = {"tables": {"cos": cos, "pair": [cos, sin]}, "pair": pair, "fixed": fixed, "flag": True, "cache": cache}
    fresh = torch.randn(2, 2, 4)
    args, found = rows.call(
        (hidden, (cos, sin)), {**named, "again": hidden}, replace={id(hidden): fresh, id(cache): None}
    )
    assert args[0] is fresh and found["again"] is fresh and found["cache"] is None
    assert torch.equal(args[1][0], taken(cos, 1)) and torch.equal(args[1][1], taken(sin, 1))
    assert type(args[1]) is tuple and type(found["tables"]["pair"]) is list
    assert found["tables"]["cos"] is found["tables"]["pair"][0] is args[1][0]
    assert found["pair"] is pair and found["fixed"] is fixed and found["flag"] is True
    assert rows.call((cos,), {}, replace={})[0][0] is args[1][0]


def test_hidden_states_at_positions_and_back():
    hidden = torch.randn(2, LENGTH, 4, requires_grad=True)
    rows = LayerRows(KEPT, LENGTH)
    kept = rows.hidden(hidden)
    assert torch.equal(kept, taken(hidden, 1)) and kept.requires_grad
    whole = rows.spread(kept)
    wanted = torch.zeros(2, LENGTH, 4)
    for row in range(2):
        wanted[row, KEPT[row]] = hidden[row, KEPT[row]].detach()
    assert torch.equal(whole, wanted)
    whole.sum().backward()
    assert torch.equal(hidden.grad, (wanted != 0).float())
    everything = LayerRows(torch.arange(LENGTH).expand(2, -1), LENGTH)
    assert everything.spread(hidden) is hidden and everything.hidden(hidden) is hidden
    with pytest.raises(ValueError, match=r"^hidden states \[2, 4, 4\] have no dimension for the 5 tokens$"):
        rows.hidden(torch.randn(2, 4, 4))


@pytest.mark.parametrize(
    "name", ["position_embeddings", "position_ids", "hidden_states", "cos", "sin", "rotary_pos_emb"]
)
def test_as_many_kinds_of_position_as_rows(name):
    value = torch.randn(2, 2, LENGTH, 4)
    _, kwargs = LayerRows(KEPT, LENGTH).call((), {name: value}, replace={})
    for kind in range(2):
        for row in range(2):
            assert torch.equal(kwargs[name][kind, row], value[kind, row, KEPT[row]])


def test_streams_of_hidden_states_of_several_rows():
    value = torch.randn(3, 2, LENGTH, 4)
    _, kwargs = LayerRows(KEPT, LENGTH).call((), {"streams": value}, replace={})
    for row in range(2):
        assert torch.equal(kwargs["streams"][:, row], value[:, row, KEPT[row]])


def test_a_single_row_is_not_taken_for_kinds_or_heads():
    value = torch.randn(1, 1, LENGTH, 4)
    for kinds in (1, 2):
        whole = value.expand(kinds, -1, -1, -1)
        _, kwargs = LayerRows(KEPT[:1], LENGTH).call((), {"streams": whole}, replace={})
        assert torch.equal(kwargs["streams"], whole[:, :, KEPT[0]])


def test_as_many_heads_as_rows_is_refused():
    rows = LayerRows(KEPT, LENGTH)
    with pytest.raises(ValueError, match=r"alibi has shape \[2, 2, 5, 5\], and either .* the batch of 2 rows"):
        rows.call((), {"alibi": torch.randn(2, 2, LENGTH, LENGTH)}, replace={})
    with pytest.raises(ValueError, match="position_bias has shape"):
        rows.call((), {"position_bias": torch.randn(2, 2, LENGTH, LENGTH)}, replace={})
    _, kwargs = rows.call((), {"attention_mask": torch.randn(2, 2, LENGTH, LENGTH)}, replace={})
    assert kwargs["attention_mask"].shape == (2, 2, KEPT.shape[1], LENGTH)
