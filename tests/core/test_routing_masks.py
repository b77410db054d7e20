"""What queries at chosen positions may see, entry by entry, and which attention they run on."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import masking_utils
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    eager_mask,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from cggr_core.backends import _registry
from cggr_core.routed_attention import routed_attention_reference
from cggr_core.routing import attention, cache, masks
from cggr_core.routing.masks import RoutedMask, Visibility, causal_window, packed_segments

POSITION_IDS = torch.tensor([[7, 8, 9, 0, 1, 2], [0, 0, 1, 5, 6, 7]])
PADDING = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
INDEX = torch.tensor([[1, 4, 5], [0, 2, 4]])


def visibility(position=INDEX, padding=None, segment=None):
    return Visibility(position, 6, padding, segment, POSITION_IDS)


def test_documents_start_where_positions_do_not_go_on():
    found = packed_segments(POSITION_IDS)
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 2, 2]]


@pytest.mark.parametrize("pattern", [causal_mask_function, sliding_window_causal_mask_function(2)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING, PADDING.bool()])
@pytest.mark.parametrize("routed", [False, True])
def test_a_mask_entry_by_entry(pattern, packed, padding, routed):
    segment = packed_segments(POSITION_IDS) if packed else None
    window = None if pattern is causal_mask_function else 2
    # As a model's forward asks for it; what is said of queries, keys and padding is the pass's business.
    arguments = {"batch_size": 2, "q_length": 3, "kv_length": 3, "q_offset": 1, "kv_offset": 2}
    arguments |= {"attention_mask": torch.zeros(2, 3, dtype=torch.bool), "device": torch.device("cpu")}
    mask = RoutedMask(visibility(INDEX if routed else None, padding, segment), pattern, arguments)
    places = INDEX if routed else torch.arange(6).expand(2, -1)
    wanted = torch.zeros(2, 1, places.shape[1], 6, dtype=torch.bool)
    for row in range(2):
        for slot, query in enumerate(places[row].tolist()):
            for key in range(6):
                sees = key <= query and (window is None or query - key < window)
                same = not packed or (segment[row, query] == segment[row, key]).item()
                wanted[row, 0, slot, key] = sees and same and (padding is None or bool(padding[row, key]))
    assert torch.equal(mask.dense, wanted)
    for dtype in (torch.float32, torch.bfloat16):
        added = mask.added(dtype)
        assert added.dtype == dtype
        assert torch.equal(added == 0, wanted) and torch.equal(added == -torch.inf, ~wanted)
        assert mask.added(dtype) is added
    assert torch.equal(mask.position, places)
    assert mask.pattern == (True, window)
    numbers = torch.zeros(2, 6, dtype=torch.int64) if segment is None else segment
    if padding is None:
        assert mask.segment is segment
    else:
        assert torch.equal(mask.segment, torch.where(padding.bool(), numbers, -1))


@pytest.mark.parametrize("kind", [masks.RowMask, RoutedMask])
def test_masks_are_told_apart_as_objects(kind):
    """What was made for one does not serve another, and their tensors are not compared."""
    first, second = (kind(visibility(INDEX), causal_mask_function, {}) for _ in range(2))
    assert first == first and first != second and len({first, second}) == 2


def test_queries_of_queries():
    whole = visibility(None).at(INDEX, key_gradient="kept")
    assert whole.position is INDEX and whole.key_gradient == "kept"
    slots = torch.tensor([[2, 0], [1, 2]])
    assert whole.at(slots, key_gradient="all").position.tolist() == [[5, 1], [2, 4]]
    mask = RoutedMask(visibility(None), causal_mask_function, {}).at(INDEX, key_gradient="kept")
    assert mask.visibility.position is INDEX and mask.visibility.key_gradient == "kept"


@pytest.mark.parametrize(
    ("window", "size", "wanted"),
    [
        (None, 2, [(0, 3, 0, 5), (3, 6, 0, 10), (6, 9, 0, 12)]),
        (3, 2, [(0, 3, 0, 5), (3, 6, 3, 10), (6, 9, 8, 12)]),
        (3, 4, [(0, 4, 0, 9), (4, 8, 4, 12), (8, 12, 9, 12)]),
    ],
)
def test_stretches_of_queries_and_the_keys_that_they_may_see(window, size, wanted, monkeypatch):
    monkeypatch.setattr(masks, "STRETCH", size)
    position = torch.tensor([[0, 2, 4, 5, 6, 9, 10, 10, 11], [1, 1, 3, 8, 9, 9, 10, 11, 11]])
    pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    found = RoutedMask(Visibility(position, 12, None, None, POSITION_IDS), pattern, {}).stretches
    assert [(queries.start, queries.stop, keys.start, keys.stop) for queries, keys in found] == wanted


@pytest.mark.parametrize("taken_apart", [False, True])
def test_builders_of_a_pass(taken_apart, monkeypatch):
    """Block masks are made for the queries of a layer; flash attention's and others' as the models ask for them."""
    built = []

    def build(**arguments):
        built.append(arguments)
        return "built"

    for name in ("flex_attention", "flash_attention_2", "sdpa"):
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, build)
    whole = visibility(None, PADDING)
    with masks.routed_masks(whole, **({"taken_apart": True} if taken_apart else {})):
        block, flash, plain = (
            ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ("flex_attention", "flash_attention_2", "sdpa")
        )
    assert flash is build and plain is not build
    mask = block(mask_function=causal_mask_function, batch_size=2, q_length=6)
    if not taken_apart:
        assert mask == "built" and [each["q_length"] for each in built] == [6]
        return
    assert isinstance(mask, masks.UnbuiltMask) and built == []
    assert mask.at(INDEX, key_gradient="kept") == "built"
    (asked,) = built
    assert (asked["batch_size"], asked["q_length"], asked["kv_length"]) == (2, 3, 6)
    assert torch.equal(asked["attention_mask"], PADDING.bool())
    for query, key, sees in ((0, 1, True), (0, 2, False), (2, 5, True)):  # by place among the queries
        assert bool(asked["mask_function"](0, 0, torch.tensor(query), torch.tensor(key))) is sees
    with pytest.raises(NotImplementedError):
        masks.RowMask(whole, causal_mask_function, {}).at(INDEX, key_gradient="all")


def test_masks_that_the_host_does_not_look_at():
    with masks.unseen_masks():
        assert ALL_MASK_ATTENTION_FUNCTIONS["eager"] is eager_mask
        build = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1]])).tolist() == [[0, 0]]
    arguments = {"batch_size": 2, "q_length": 6, "kv_length": 6, "mask_function": causal_mask_function}
    assert sdpa_mask(**arguments) is None
    assert torch.equal(build(**arguments), torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6))


class CallablePattern:
    def __call__(self, batch, head, query, key):
        return key <= query


def of_another_module(batch, head, query, key):
    return key <= query


# Named like one of transformers' own.
of_another_module.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"


@pytest.mark.parametrize(
    ("pattern", "known"),
    [
        (causal_mask_function, (True, None)),
        (sliding_window_causal_mask_function(3), (True, 3)),
        (sliding_window_overlay(3), (False, 3)),
        (bidirectional_mask_function, (False, None)),
        (chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)), (False, None)),
        (and_masks(causal_mask_function, sliding_window_overlay(3)), (False, None)),
        (and_masks(sliding_window_overlay(3), bidirectional_mask_function), (False, 3)),
        (and_masks(sliding_window_overlay(3), causal_mask_function, causal_mask_function), (False, 3)),
        (or_masks(sliding_window_overlay(3), causal_mask_function), (False, None)),
        (partial(causal_mask_function), (False, None)),
        (CallablePattern(), (False, None)),
        (of_another_module, (False, None)),
    ],
)
def test_patterns_that_can_be_said_in_numbers(pattern, known):
    assert causal_window(pattern) == known


@pytest.mark.parametrize(
    ("change", "needless"),
    [
        ({}, True),
        ({"mask_function": sliding_window_causal_mask_function(6)}, True),
        ({"mask_function": sliding_window_causal_mask_function(5)}, False),
        ({"mask_function": bidirectional_mask_function}, False),
        ({"mask_function": chunked_causal_mask_function(6, torch.zeros(2, dtype=torch.int64))}, False),
        ({"allow_is_causal_skip": False}, False),
        ({"attention_mask": torch.ones(2, 6, dtype=torch.bool)}, False),
        ({"q_length": 5}, False),
    ],
)
def test_masks_that_say_no_more_than_causal_attention_does(change, needless, monkeypatch):
    monkeypatch.setattr(masks, "sdpa_mask", lambda **asked: asked)
    arguments = {"mask_function": causal_mask_function, "batch_size": 2, "q_length": 6, "kv_length": 6} | change
    asked = {"attention_mask": None, "allow_is_causal_skip": True} | arguments
    assert masks._mask_where_needed(**arguments) == (None if needless else asked)


@pytest.mark.parametrize("before", [0, 4])
def test_positions_before_the_queries(before):
    shared = SimpleNamespace(length=before) if before else None

    def made(queries, in_layers):
        found = cache.PassCache(queries=queries, length=6, shared=shared, places={})
        assert not found.in_layers
        found.in_layers = in_layers
        return found

    # Whole rows, and what is made for whole rows: what stands before them.
    for queries, in_layers in ((6, False), (6, True), (2, False)):
        assert made(queries, in_layers).get_seq_length() == before
        assert made(queries, in_layers).get_seq_length(3) == before
    # Layers make the number of keys of it.
    assert made(2, True).get_seq_length() + 2 == before + 6
    with pytest.raises(RuntimeError, match=r"^layer 0 derives positions"):
        made(2, True).get_seq_length(0)
    assert made(2, True).get_mask_sizes(2, 0) == (before + 6, 0)


@pytest.fixture
def gradients_are_back():
    yield
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("gradients_are_back")
def test_other_tokens_wait_for_the_kept_ones():
    other = cache.OtherTokensCache(
        index=torch.tensor([[0, 2]]),
        kept_index=torch.tensor([[1]]),
        length=3,
        keep_graph=False,
        last_layer=1,
        shared=None,
        places={},
    )
    keys, values = torch.randn(2, 1, 2, 2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^layer 0 ran on the other tokens before"):
        other.update(keys, values, 0)
    assert not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    other.kept = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4)
    whole = other.update(keys, values, 0)
    torch.set_grad_enabled(True)
    assert torch.equal(whole[0], torch.cat([keys[:, :, :1], other.kept[0], keys[:, :, 1:]], dim=2))
    assert other.merged is whole and not whole[0].requires_grad
    assert not any(part.requires_grad for part in other.recorded[0])
    with pytest.raises(cache.LastLayerReachedError):
        other.update(keys, values, 1)


@pytest.fixture
def kernel(monkeypatch):
    calls = []

    def routed_attention(*arguments):
        calls.append(arguments)
        return routed_attention_reference(*arguments)

    monkeypatch.setitem(_registry.kernels, ("routed_attention", "cpu"), ("test", routed_attention))
    return calls


def model(takes_any=True, capped=False):
    config = SimpleNamespace(attn_logit_softcapping=30.0 if capped else None)
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, _supports_attention_backend=takes_any)


def chosen(model, device="cpu"):
    choose = attention.implementation(model, device)
    return [choose(name) for name in ("sdpa", "flex_attention", "flash_attention_2", "eager", None)]


def test_the_attention_of_a_pass_without_a_kernel():
    uncapped = masks.ROUTED_UNCAPPED
    assert chosen(model()) == [uncapped, "flex_attention", "sdpa", "eager", None]
    assert chosen(model(takes_any=False)) == ["sdpa", "flex_attention", "sdpa", "eager", None]
    assert chosen(model(capped=True)) == [uncapped, "flex_attention", "eager", "eager", None]
    assert chosen(model(), "meta") == ["sdpa", "flex_attention", "sdpa", "eager", None]
    plain = model()
    del plain._supports_attention_backend
    assert chosen(plain) == chosen(model(takes_any=False))


def test_the_attention_of_a_pass_with_a_kernel(kernel):
    routed = [masks.ROUTED_UNCAPPED, masks.ROUTED, masks.ROUTED, "eager", None]
    assert chosen(model()) == chosen(model(capped=True)) == routed
    assert chosen(model(takes_any=False)) == ["sdpa", "flex_attention", "sdpa", "eager", None]


def test_the_attention_of_a_pass_on_another_device(monkeypatch):
    monkeypatch.setitem(_registry.kernels, ("routed_attention", "meta"), ("test", routed_attention_reference.__call__))
    assert chosen(model(), "meta") == [masks.ROUTED_UNCAPPED, masks.ROUTED, masks.ROUTED, "eager", None]


def attended(change=None, *, pattern=causal_mask_function, value_size=4, heads=2, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 4, generator=generator, dtype=dtype)
    key = torch.randn(2, heads, 6, 4, generator=generator, dtype=dtype)
    value = torch.randn(2, heads, 6, value_size, generator=generator, dtype=dtype)
    arguments = {"batch_size": 2, "device": torch.device("cpu")}
    mask = RoutedMask(visibility(INDEX, PADDING), pattern, arguments)
    module = SimpleNamespace(num_key_value_groups=4 // heads, training=True, is_causal=True)
    found, _ = attention._attend(module, query, key, value, change(mask) if change else mask, scaling=0.3, **options)
    groups = 4 // heads
    wanted = scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, 1),
        value.repeat_interleave(groups, 1),
        attn_mask=mask.dense,
        scale=0.3,
    )
    return found, wanted.transpose(1, 2)


def check(found, wanted):
    real = PADDING.bool().gather(1, INDEX)  # what padding attends to is nobody's business
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [2, 4])
def test_attention_without_a_kernel_is_that_of_the_dense_mask(heads):
    check(*attended(heads=heads))
    check(*attended(heads=heads, value_size=6))
    check(*attended(lambda mask: mask.dense, heads=heads))


@pytest.mark.parametrize(("size", "calls"), [(1, 3), (2, 2), (192, 1)])
def test_attention_in_stretches_of_queries(size, calls, monkeypatch):
    monkeypatch.setattr(masks, "STRETCH", size)
    made = []

    def noted(*operands, **options):
        made.append(operands)
        return scaled_dot_product_attention(*operands, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", noted)
    for pattern in (causal_mask_function, sliding_window_causal_mask_function(2)):
        found, wanted = attended(pattern=pattern)
        check(found, wanted)
        assert found.is_contiguous() and len(made) == calls
        made.clear()
    attended(dropout=0.5)
    assert len(made) == 1, "one draw for all"


def test_what_the_op_does_not_know_is_left_to_the_dense_mask(kernel):
    check(*attended())
    assert len(kernel) == 1 and kernel[0][5:] == (None, None, 0.3, "all")
    attended(softcap=20.0)
    assert len(kernel) == 2 and kernel[1][6] == 20.0
    check(*attended(value_size=6))
    check(*attended(lambda mask: mask.dense))
    chunked = chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64))
    check(*attended(pattern=chunked))
    with pytest.raises(ValueError, match="caps its attention scores"):
        attended(pattern=chunked, softcap=20.0)
    assert len(kernel) == 2


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
@pytest.mark.parametrize("offered", [True, False])
def test_sinks_and_biases_reach_an_attention_that_knows_them(name, offered, kernel, monkeypatch):
    seen = []

    def sdpa_attention_forward(module, query, key, value, mask, **options):
        seen.append((mask, options))
        return torch.zeros(2, 3, 4, 4), None

    if not offered:
        monkeypatch.delitem(_registry.kernels, ("routed_attention", "cpu"))
    monkeypatch.setattr(attention, "sdpa_attention_forward", sdpa_attention_forward)
    added = torch.randn(4)
    attended(**{name: added}, dropout=0.25)
    ((mask, options),) = seen
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 3, 6)
    assert options[name] is added and options["scaling"] == 0.3 and options["dropout"] == 0.25
    assert not kernel
    attended(**{name: None})
    assert len(seen) == 1


def test_dropout_of_the_attention_drops(kernel):
    for change in (None, lambda mask: mask.dense):
        for options in ({}, {"value_size": 6}):
            torch.manual_seed(0)
            found, wanted = attended(change, dropout=0.9, **options)
            assert (found[0] == 0).float().mean() > 0.2
            assert not torch.allclose(found[0], wanted[0])
    assert not kernel


def test_operands_are_cast_as_autocast_casts_them(kernel):
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attended()
        assert found.dtype == torch.bfloat16
        assert {part.dtype for part in kernel[-1][:3]} == {torch.bfloat16}
        found, _ = attended(dtype=torch.float64)
        assert found.dtype == torch.float64
