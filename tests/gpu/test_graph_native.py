"""Recorded steps on a GPU: equality with eager steps, and what falls back to those."""

import gc
import logging

import pytest
import torch

from cggr_core import CGGRModel
from cggr_core.recording import ledger, recorder
from tests.support.gpu_models import gradients, model, tokens, varied
from tests.support.host_reads import no_host_reads
from tests.support.model_steps import checkpoint_activations
from tests.support.recorded_steps import hold_to_eager, recording_model, replayed, worth_it

pytestmark = pytest.mark.gpu

ENOUGH = ledger.IN_A_ROW + 2
VARIANTS = {
    "kv, two passes": {"gradient": "kv"},
    "kv, router": {"gradient": "kv", "depth": 1},
    "kv, random": {"gradient": "kv", "selection": "random", "seed": 7},
    "kv, random, two passes": {"gradient": "kv", "selection": "random", "engine": "two_pass"},
    "detached, two passes": {"gradient": "detached", "selection": "sampled"},
    "detached, router": {"gradient": "detached", "selection": "topk", "depth": 1},
    "exact": {"gradient": "exact"},
    "sequence": {"gradient": "sequence", "depth": 1},
}


@pytest.fixture(autouse=True)
def kept_whatever_they_save(monkeypatch):
    worth_it(monkeypatch)


def batch(seed: int, length: int = 257, rows: int = 3, **more) -> dict:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, 1000, (rows, length), generator=generator).cuda()
    return {"input_ids": input_ids, "labels": input_ids, **more}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_numbers_of_the_steps_as_they_are(variant):
    """Over optimizer steps of two micro-batches, clipped, with gradients set to None and to zero in between."""
    steps = [[batch(2 * step), batch(2 * step + 1)] for step in range(6)]
    assert hold_to_eager(varied(), steps, tolerance=1e-4, **VARIANTS[variant])[-3:] == [True] * 3


@pytest.mark.parametrize("variant", ["kv, two passes", "kv, random", "detached, router", "exact"])
def test_autocast_with_a_gradient_scale(variant):
    steps = [[batch(step)] for step in range(7)]
    found = hold_to_eager(varied(), steps, tolerance=2e-3, autocast=torch.bfloat16, scale=2.0**10, **VARIANTS[variant])
    assert found[-2:] == [True] * 2


@pytest.mark.parametrize("variant", ["kv, random", "kv, router", "kv, two passes"])
def test_bfloat16_weights(variant):
    steps = [[batch(step), batch(step + 1)] for step in range(6)]
    assert hold_to_eager(varied(torch.bfloat16), steps, tolerance=2e-3, **VARIANTS[variant])[-2:] == [True] * 2


@pytest.mark.parametrize("variant", ["kv, random", "kv, two passes", "exact"])
def test_several_shapes_share_one_memory(variant):
    """Two lengths in turns, with items, draws and first rows, weights and padding that change from step to step."""
    steps = []
    for step in range(8):
        mask = torch.ones(3, 257, dtype=torch.long).cuda()
        mask[0, : step % 4] = 0
        labels = batch(step)["labels"].masked_fill(mask == 0, -100)
        weight = torch.rand(3, 257, generator=torch.Generator().manual_seed(step)).cuda()
        numbers = {"num_items": torch.tensor(1500 + step).cuda() if step % 2 else 1500.0 + step, "draw": 3 * step}
        first = {**batch(step), "labels": labels, "attention_mask": mask, "token_weight": weight, **numbers}
        steps.append([first, batch(step, 130, first_row=3, draw=step, num_items=900)])
    assert hold_to_eager(varied(), steps, tolerance=1e-4, **VARIANTS[variant])[-2:] == [True] * 2


@pytest.mark.parametrize("gradient", ["exact", "sequence"])
@pytest.mark.parametrize("sliding_window", [None, 60])
def test_padding_and_packing_are_not_looked_at(gradient, sliding_window):
    """transformers asks on the host whether a mask holds any padding, and whether rows are packed."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=sliding_window)
    base = MistralForCausalLM(config).cuda().train()
    for packed in (False, True):
        steps = []
        for step in range(6):
            given = batch(step, 130)
            if packed:
                parts = [torch.arange(40 + step), torch.arange(90 - step)]
                given["position_ids"] = torch.cat(parts).expand(3, 130).cuda()
            else:
                mask = torch.ones(3, 130, dtype=torch.long, device="cuda")
                mask[0, 130 - 7 * (step % 3) :] = 0
                given |= {"attention_mask": mask, "labels": given["labels"].masked_fill(mask == 0, -100)}
            steps.append([given])
        found = hold_to_eager(base, steps, gradient=gradient, selection="random", tolerance=1e-4)
        assert found[-2:] == [True] * 2


def answers(seed: int, counts: tuple[int, ...], length: int = 257, **more) -> dict:
    """Rows whose last tokens are supervised, with the given numbers."""
    given = batch(seed, length, rows=len(counts), **more)
    left_out = torch.arange(length) < length - torch.tensor(counts)[:, None]
    return {**given, "labels": given["labels"].masked_fill(left_out.cuda(), -100)}


SUPERVISED = [
    {"gradient": "kv"},
    {"gradient": "kv", "engine": "two_pass"},
    {"gradient": "detached"},
    {"gradient": "exact"},
]


@pytest.mark.parametrize("settings", SUPERVISED)
def test_supervised_steps_in_buckets_of_slots(settings):
    """Counts change with every micro-batch, and fill three buckets in turns; rows without a label are among them."""
    most = [30, 25, 60, 17, 50, 31, 64, 33, 20, 49, 90, 81, 88, 84, 96, 30, 60]
    steps = [[answers(2 * n, (few, 3, 0)), answers(2 * n + 1, (5, few, 9))] for n, few in enumerate(most)]
    found = hold_to_eager(varied(), steps, selection="supervised", tolerance=1e-4, **settings)
    assert found[-3:] == [True] * 3


@pytest.mark.parametrize("precision", [{"autocast": torch.bfloat16}, {"autocast": torch.float16, "scale": 2.0**8}])
def test_supervised_steps_under_autocast(precision):
    steps = [[answers(n, (40 + n, 3, 0), num_items=50 + n), answers(n + 9, (1, 2, 45))] for n in range(7)]
    found = hold_to_eager(varied(), steps, selection="supervised", tolerance=3e-3, **precision)
    assert found[-2:] == [True] * 2


def test_supervised_steps_of_an_attention_mask():
    """As a Trainer's are: padding on the right, none in some batches."""
    steps = []
    for step in range(7):
        given = answers(step, (40, 20, 9))
        mask = torch.ones(3, 257, dtype=torch.long, device="cuda")
        mask[2, 250 - step % 2 * 30 :] = 0
        steps.append([{**given, "attention_mask": mask, "labels": given["labels"].masked_fill(mask == 0, -100)}])
    assert hold_to_eager(varied(), steps, selection="supervised", tolerance=1e-4)[-2:] == [True] * 2


def test_supervised_steps_read_the_count_and_nothing_else(monkeypatch):
    cggr = recording_model(model(torch.bfloat16), selection="supervised")
    for step in range(ENOUGH):
        cggr(**answers(step, (40, 20, 9))).backward()
    given = answers(9, (38, 20, 9))
    slots = cggr._slots(given["labels"], {})
    monkeypatch.setattr(cggr, "_slots", lambda labels, arguments: slots)
    with no_host_reads():
        loss = cggr(**given)
        loss.backward()
    assert replayed(cggr)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("precision", [{}, {"autocast": torch.bfloat16}])
@pytest.mark.parametrize("settings", [{"selection": "supervised"}, {"selection": "sampled"}, {"selection": "random"}])
def test_checkpointed_layers(settings, precision):
    """Recomputed within the captured backward pass, as TRL's trainers have them by default."""
    base = varied()
    checkpoint_activations(base)
    steps = [[answers(n, (40, 30, 9)), answers(n + 9, (1, 2, 45))] for n in range(7)]
    found = hold_to_eager(base, steps, tolerance=3e-3 if precision else 1e-4, **precision, **settings)
    assert found[-2:] == [True] * 2


def test_checkpointed_layers_with_dropout_run_as_they_are():
    base = model(attention_dropout=0.2)
    checkpoint_activations(base)
    cggr = recording_model(base, selection="random")
    for step in range(ENOUGH):
        cggr(**batch(step)).backward()
    assert "draw random numbers" in cggr._recorder.reason


def test_captures_that_nobody_holds_are_not_taken_away_within_another():
    """Models in garbage reference cycles, which Python may collect at any time."""
    base = model()

    class Collects(torch.nn.Module):
        def forward(self, x):
            # As many objects as make a collection due, where collections are not held off.
            return torch.nn.functional.silu(x) if [[] for _ in range(100_000)] else x

    base.model.layers[1].mlp.act_fn = Collects()
    for _ in range(3):
        cggr = recording_model(base, selection="random")
        cggr.__dict__["itself"] = cggr
        for step in range(ENOUGH):
            cggr(**batch(step)).backward()
        assert replayed(cggr)


def test_captures_that_are_dropped_do_not_disturb_the_others(monkeypatch):
    monkeypatch.setattr(recorder, "MOST_RECORDINGS", 2)
    lengths = [130, 257, 190]
    steps = [[batch(10 * n + step, length)] for n, length in enumerate(lengths) for step in range(ENOUGH)]
    steps += [[batch(90 + step, length)] for step, length in enumerate((257, 190, 257, 190))]
    found = hold_to_eager(varied(), steps, selection="random", tolerance=1e-4)
    assert found[-4:] == [True] * 4
    assert found[ENOUGH - 1] and found[2 * ENOUGH - 1]


def test_frozen_and_tied_parameters():
    base = model(tie_word_embeddings=True)
    base.model.layers[0].requires_grad_(False)
    found = hold_to_eager(base, [[batch(step)] for step in range(7)], selection="random", tolerance=1e-4)
    assert found[-2:] == [True] * 2


def test_packed_rows_and_a_window():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=19)
    base = MistralForCausalLM(config).cuda().train()
    steps = []
    for step in range(7):
        parts = [torch.arange(40 + step), torch.arange(90 - step)]
        steps.append([batch(step, 130, rows=2, position_ids=torch.cat(parts).expand(2, 130).cuda())])
    assert hold_to_eager(base, steps, selection="random", tolerance=1e-4)[-2:] == [True] * 2


def test_a_loss_that_is_still_around_does_not_spoil_the_recording():
    """The last step's graph, its leaves bound to the default stream, lives on while the next step is recorded."""
    cggr, losses = recording_model(model(), selection="random"), []
    for step in range(ENOUGH + 2):
        losses.append(cggr(**batch(step)))
        losses[-1].backward()
    assert replayed(cggr)
    assert torch.stack(losses).isfinite().all()


def test_dropout_draws_anew_and_as_it_would():
    """The random state after every step is that of an eager step."""
    given = {"attention_dropout": 0.2}
    cggr, eager = recording_model(model(**given), selection="random"), CGGRModel(model(**given), selection="random")
    states, losses = [], []
    for one in (cggr, eager.train()):
        torch.cuda.manual_seed(3)
        for _ in range(ENOUGH + 2):
            loss = one(**batch(0), draw=1)
            loss.backward()
        states.append(torch.cuda.get_rng_state())
        losses.append(loss.detach())
    assert replayed(cggr)
    assert torch.equal(*states)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert cggr(**batch(0), draw=1) != losses[0]


def test_no_host_reads_in_a_replay():
    cggr = recording_model(model(torch.bfloat16), selection="random")
    for step in range(ENOUGH):
        cggr(**batch(step)).backward()
    given = batch(9)
    with no_host_reads():
        loss = cggr(**given)
        loss.backward()
        cggr.step()
    assert replayed(cggr)
    assert torch.isfinite(loss)


def test_bad_labels_and_nan_are_named_one_step_later():
    base, input_ids = model(), tokens()
    cggr = recording_model(base)
    for _ in range(ENOUGH):
        cggr(input_ids, labels=input_ids).backward()
    labels = input_ids.clone()
    labels[0, :4] = 5000
    cggr(input_ids, labels=labels).backward()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"labels of the last step had 3 value"):
        cggr(input_ids, labels=input_ids)
    base.model.norm.weight.data[0] = float("nan")
    cggr(input_ids, labels=input_ids).backward()
    assert replayed(cggr)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"NaN at 768 tokens"):
        cggr(input_ids, labels=input_ids)


def test_a_model_that_waits_for_the_device_runs_as_it_is(caplog):
    base = model()
    act = base.model.layers[1].mlp.act_fn

    class Waits(torch.nn.Module):
        def forward(self, x):
            return act(x) if x.isfinite().all().item() else act(x * 0)

    base.model.layers[1].mlp.act_fn = Waits()
    with caplog.at_level(logging.INFO, "cggr_core.recording.recorder"):
        cggr = recording_model(base, selection="random")
        for step in range(ENOUGH + 2):
            loss = cggr(**batch(step))
            loss.backward()
    assert not replayed(cggr)
    assert loss.isfinite()
    (said,) = [record.message for record in caplog.records]
    assert "the step makes the host wait for the device (test_graph_native.py" in said


def test_a_model_that_draws_on_the_host_runs_as_it_is():
    """A layer that is left out at random would be left out in every replay, or in none."""
    base = model()
    act = base.model.layers[1].mlp.act_fn

    class Sometimes(torch.nn.Module):
        def forward(self, x):
            return act(x) if torch.rand([]) < 2 else x

    base.model.layers[1].mlp.act_fn = Sometimes()
    cggr = recording_model(base, gradient="exact", selection="random")
    for step in range(ENOUGH):
        cggr(**batch(step)).backward()
    assert "the step draws random numbers on the host" in cggr._recorder.reason


def test_a_capture_that_fails_leaves_training_as_it_is():
    """Something that torch forbids during capture, which the check before it cannot detect."""
    base, other = model(), model()
    act = base.model.layers[1].mlp.act_fn

    class Refuses(torch.nn.Module):
        def forward(self, x):
            if torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
            return act(x)

    base.model.layers[1].mlp.act_fn = Refuses()
    cggr, eager = recording_model(base, selection="random"), CGGRModel(other, selection="random").train()
    for step in range(ENOUGH + 2):
        for one in (cggr, eager):
            one(**batch(step)).backward()
    assert "recording failed" in cggr._recorder.reason
    torch.cuda.empty_cache()  # which asks the allocator whether a capture is under way
    assert torch.randn(3, device="cuda").isfinite().all()  # which asks the generator
    found, wanted = gradients(base), gradients(other)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_memory_is_given_back():
    base = model()
    cggr = recording_model(base, selection="random")
    for step in range(ENOUGH):
        cggr(**batch(step)).backward()
    held = cggr._recorder._places.graphs.held_bytes
    assert held > 0
    base.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    cggr._recorder._forget()
    gc.collect()  # captures run none, and what a capture left in a cycle holds its memory
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - held // 2


def test_a_capture_leaves_room_for_a_step_as_it_is(monkeypatch, caplog):
    cggr = recording_model(model(), selection="random")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 1 << 40))
    with caplog.at_level(logging.INFO, "cggr_core.recording.recorder"):
        for step in range(ENOUGH):
            cggr(**batch(step)).backward()
    assert not replayed(cggr)
    (said,) = [record.message for record in caplog.records]
    assert "less than an eager step needs" in said
    monkeypatch.undo()
    worth_it(monkeypatch)
    for step in range(ENOUGH):
        cggr(**batch(step, 130)).backward()
    assert replayed(cggr)


def test_one_kind_is_refused_and_another_captured(monkeypatch):
    cggr = recording_model(model(), selection="random")
    for worth, length in ((0.0, 257), (1e9, 130)):
        monkeypatch.setattr(recorder, "_WORTH", worth)
        for step in range(ENOUGH):
            cggr(**batch(step, length)).backward()
        assert replayed(cggr) is (worth > 0)


def test_threads_that_pin_memory_go_on():
    """As a data loader's does while a step is recorded."""
    from torch.utils.data import DataLoader

    rows = torch.randint(0, 1000, (300, 64))
    loader = DataLoader(rows, batch_size=3, pin_memory=True, num_workers=1, prefetch_factor=4)
    cggr = recording_model(model(), selection="random")
    for number, ids in enumerate(loader):
        ids = ids.cuda(non_blocking=True)
        cggr(ids, labels=ids).backward()
        if number == ENOUGH + 4:
            break
    assert replayed(cggr)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
@pytest.mark.parametrize("settings", [{"selection": "random"}, {"gradient": "exact", "selection": "random"}])
def test_a_trainer_with_accumulation_and_clipping(settings, precision, tmp_path, monkeypatch):
    """Ten optimizer steps of two micro-batches: what training did to the weights, with and without recordings."""
    from transformers import TrainingArguments

    from cggr_train import CGGRConfig
    from tests.support.trainer_kit import examples, relative_error
    from tests.support.trainer_ranks import run

    monkeypatch.setattr(TrainingArguments, "n_gpu", 1)
    values = {"max_steps": 10, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, **precision}
    values["data"] = examples(80, length=24)
    changes = []
    for number, graph in enumerate(("auto", False)):
        made, found = run(CGGRConfig(cuda_graph=graph, **settings), tmp_path / str(number), **values)
        assert replayed(made.routed_model()) is (graph == "auto")
        changes.append(found["change"])
    assert relative_error(*changes) <= (2e-2 if precision else 1e-3)
