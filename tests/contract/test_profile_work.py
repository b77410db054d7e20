"""The work that a profile assigns to operators, compared with counts by hand."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import profile

from benchmarks._work import PEAKS, Counted
from benchmarks.step_profile import STEPS, profiled, rows_of


def work_of(call):
    counted = Counted()
    with counted:
        call()
    return {work.name: work for work in counted.calls}


def test_products_are_counted_by_their_sizes_and_their_bytes_once():
    a, b = torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(5, 7, dtype=torch.bfloat16)
    work = work_of(lambda: a @ b)["aten.mm 3x5 @ 5x7"]
    assert work.flop == 2 * 3 * 5 * 7
    assert work.bytes == 2 * (15 + 35 + 21)
    assert work.kind == "half"
    assert work.floor({"half": 1.0, "bytes": 1e9}) == work.flop
    assert work.floor({"half": 1e12, "bytes": 2.0}) == work.bytes / 2


def test_what_is_expanded_is_read_once_and_rows_that_are_taken_alone_count():
    wide, scale = torch.randn(4, 6), torch.randn(1, 1).expand(4, 6)
    assert work_of(lambda: wide * scale)["aten.mul"].bytes == 4 * (24 + 1 + 24)
    table, rows = torch.randn(1000, 8), torch.tensor([1, 2])
    assert work_of(lambda: table.index_select(0, rows))["aten.index_select"].bytes == 2 * 4 * 16


def test_the_backward_pass_is_seen():
    a, b = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    counted = Counted()
    with counted:
        (a @ b).sum().backward()
    assert sum(work.flop for work in counted.calls if "mm" in work.name) == 3 * 2 * 4**3


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_causal_attention_sees_half_of_its_keys_in_either_pass(kv_heads):
    q, k = (torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (2, kv_heads))
    counted = Counted()
    with counted:
        scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).sum().backward()
    flop = {work.name.endswith("_backward"): work.flop for work in counted.calls if "attention" in work.name}
    assert flop == {False: 2 * 2 * 2 * 8 * 8 * 16 / 2, True: 2 * 5 * 2 * 8 * 8 * 16 / 2}


def test_every_board_has_all_rates():
    assert {tuple(sorted(rates)) for rates in PEAKS.values()} == {("bytes", "fp8", "half", "single")}


@pytest.mark.filterwarnings("ignore")  # torch's profiler speaks of itself
def test_calls_of_steps_are_found_again_in_a_profile():
    a, counted = torch.randn(32, 32), Counted()

    def step():
        a @ a

    found = profiled(step, device="cpu", labelled=counted)
    assert isinstance(found, profile)
    row = rows_of(found, counted.calls, device="cpu")["aten.mm 32x32 @ 32x32"]
    assert len(row.works) == STEPS
    assert row.launches == 1
    assert row.seconds > 0
