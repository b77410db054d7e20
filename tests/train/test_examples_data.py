"""Examples of a prompt and an answer: rows, labels, losses, and the share of answers that are right."""

import json

import pytest
import torch

from cggr_train.data import Documents, TokenStore, build_example_store, count_targets, split_supervised
from cggr_train.errors import InputError
from cggr_train.evaluate import heldout_loss
from cggr_train.exact_match import exact_match, final_answer
from cggr_train.grouped_attention import attend
from cggr_train.learner import Routing, build_learner
from cggr_train.presets import build_config, build_model
from cggr_train.run import start_run
from cggr_train.settings import TrainSettings

CPU = torch.device("cpu")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [{"q": f"what is {n} + {n}?", "a": f"{n} + {n} = {2 * n} #### {2 * n}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def store(questions, tokenizer, tmp_path):
    return build_example_store(
        Documents([questions], field="q,a"), tokenizer, tmp_path / "store", length=64, heldout_fraction=0.3
    )


def rows_of(stream):
    return torch.from_numpy(stream.reshape(-1, 64).astype("int64"))


def test_a_row_is_a_prompt_an_answer_and_its_end(store, tokenizer):
    rows = rows_of(store.train)
    assert len(rows) + len(rows_of(store.heldout)) == 40
    input_ids, labels = split_supervised(rows)
    supervised = labels[0] >= 0
    first = int(supervised.nonzero()[0])
    assert tokenizer.decode(input_ids[0, :first]) == tokenizer.decode(input_ids[0, :first]).rstrip("\n") + "\n"
    answer = tokenizer.decode(input_ids[0][supervised])
    assert answer.startswith(tuple("0123456789")) and answer.endswith(tokenizer.eos_token)
    assert supervised[first : first + int(supervised.sum())].all(), "one stretch"
    assert (input_ids[0, first + int(supervised.sum()) :] == tokenizer.eos_token_id).all()
    assert count_targets(rows[:1]) == supervised.sum()


def test_examples_that_are_too_long_are_counted(questions, tokenizer, tmp_path):
    documents = Documents([questions], field="q,a")
    short = build_example_store(documents, tokenizer, tmp_path / "b", length=30, heldout_fraction=0.3)
    assert short.skipped > 0
    assert TokenStore.open(tmp_path / "b").skipped == short.skipped
    with pytest.raises(InputError, match=r"no example is left in the train data: \d+ exceed --length 8"):
        build_example_store(documents, tokenizer, tmp_path / "c", length=8)
    with pytest.raises(InputError, match="left in the heldout data: no example fell to it; give more data, a larger"):
        build_example_store(documents, tokenizer, tmp_path / "d", length=64, heldout_fraction=1e-6)


@pytest.mark.parametrize(
    "routing", [Routing("kv", selection="supervised"), Routing("exact", 0.5), Routing("kv", 1.0, "random")]
)
def test_only_answers_have_a_loss(store, routing):
    model = build_model(build_config("nano", vocab_size=300, length=64), seed=0)
    rows = rows_of(store.train)[:4]
    input_ids, labels = split_supervised(rows)
    wanted = model(input_ids=input_ids, labels=labels).loss
    standard = build_learner(model, "standard", Routing(), seed=0)
    torch.testing.assert_close(standard.loss(rows), wanted)
    assert standard.metrics["kept_tokens"] == (labels[:, 1:] >= 0).sum()
    learner = build_learner(model, "cggr", routing, seed=0)
    loss = learner.loss(rows)
    if routing.ratio == 1.0 or routing.selection == "supervised":
        torch.testing.assert_close(loss, wanted)
    assert learner.metrics["countable_tokens"] == (labels[:, 1:] >= 0).sum()
    assert heldout_loss(model, [rows], device=CPU) == pytest.approx(wanted.item(), rel=1e-5)


def test_parts_of_a_batch_weigh_as_their_answers_do(questions, tmp_path, console):
    """Accumulated batches divide by the answers' tokens of the whole step."""
    losses = []
    for number, (size, accumulate) in enumerate(((8, 1), (2, 4))):
        settings = TrainSettings(
            data=(str(questions),), field="q", answer="a", config="nano", vocab_size=300, length=64, batch_size=size,
            accumulate=accumulate, steps=3, heldout_fraction=0.3, method="standard", device="cpu",
        )  # fmt: skip
        losses.append(start_run(settings, tmp_path / str(number), console).heldout_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_answers_of_a_plain_text_are_refused(data_files, tmp_path, console):
    settings = TrainSettings(data=(str(data_files[0]),), answer="a", config="nano", length=64, device="cpu")
    with pytest.raises(InputError, match=r"--answer 'a' is a key of JSON Lines or Parquet files, but .* is plain text"):
        start_run(settings, tmp_path / "run", console)


class Knowing(torch.nn.Module):
    """Answers ``generate`` from memory: the rows it knows rightly, the others with their question."""

    def __init__(self, rows, known):
        super().__init__()
        self.answers = {}
        for number, row in enumerate(rows):
            input_ids, labels = split_supervised(row[None])
            first = int((labels[0] >= 0).nonzero()[0])
            self.answers[tuple(input_ids[0, :first].tolist())] = input_ids[0, first:] if number in known else None

    def generate(self, input_ids, attention_mask, generation_config, use_cache):
        made = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            question = row[mask.bool()]
            assert mask.sort().values.equal(mask), "padded on the left"
            answer = self.answers[tuple(question.tolist())]
            answer = question if answer is None else answer
            made.append(torch.nn.functional.pad(answer, (0, 64 - len(answer)), value=generation_config.eos_token_id))
        return torch.cat([input_ids, torch.stack(made)], dim=1)


@pytest.mark.parametrize("after", ["####", None])
def test_the_share_of_right_answers(store, tokenizer, after):
    rows = rows_of(store.heldout)
    known = set(range(0, len(rows), 3))
    model = Knowing(rows, known).train()
    found = exact_match(model, rows, tokenizer, after=after, device=CPU, batch_size=4)
    assert found == (len(known), len(rows))
    assert model.training


@pytest.mark.parametrize("tokens_per_turn", [3, 128])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_greedy_decoding_is_the_models_own(store, tokenizer, implementation, tokens_per_turn):
    """Batched, padded, cached and in turns, a model says what it says to each question alone."""
    config = build_config("nano", vocab_size=300, length=128)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    model = build_model(config, seed=0).eval()
    model.set_attn_implementation(implementation)
    rows = rows_of(store.heldout)[:5]
    said = []
    for row in rows:
        input_ids, labels = split_supervised(row[None])
        ids = input_ids[:, : int((labels[0] >= 0).nonzero()[0])]
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        said.append(ids[0, -8:])
    own = rows.clone()
    for row, answer in zip(own, said, strict=True):
        first = int((row >= 0).nonzero()[0])
        row[first:] = -1 - tokenizer.eos_token_id
        row[first : first + 8] = answer
    model.generation_config.eos_token_id = None
    found = exact_match(model, own, tokenizer, device=CPU, slack=0, batch_size=3, tokens_per_turn=tokens_per_turn)
    assert found == (5, 5)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("masked", [False, True])
def test_one_token_attends_as_through_sdpa(masked):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 1, 8, generator=generator)
    key, value = (torch.randn(3, 2, 11, 8, generator=generator) for _ in range(2))
    mask = torch.rand(3, 1, 1, 11, generator=generator) < 0.6 if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    found, weights = attend(module, query, key, value, mask, scaling=0.3, dropout=0.0)
    repeated = (part.repeat_interleave(3, dim=1) for part in (key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    assert weights is None


def test_a_mark_that_is_missing_is_an_error(store, tokenizer):
    with pytest.raises(InputError, match="--answer-after is '@@'"):
        exact_match(Knowing([], set()), rows_of(store.heldout), tokenizer, after="@@", device=CPU)


def test_what_is_compared_of_an_answer():
    assert final_answer("so it is 1,234,567. #### $1,000.", "####") == "$1000"
    assert final_answer(" a\n b ", None) == "a b"
