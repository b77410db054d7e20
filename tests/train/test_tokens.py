import numpy as np
import pytest
import torch

from cggr_train.data import Batches, Documents, TokenStore, build_token_store
from cggr_train.data.batches import in_order
from cggr_train.errors import InputError
from cggr_train.tokenizer import train_tokenizer


def test_every_document_is_stored_once_and_closed(tmp_path, tokenizer, texts):
    store = build_token_store(texts, tokenizer, tmp_path, length=16, heldout_fraction=0.3)
    assert store.documents == len(texts)
    assert store.train.dtype == np.uint16
    both = [tokenizer.decode(ids.tolist()) for ids in (store.train, store.heldout)]
    documents = [text for stream in both for text in stream.split(tokenizer.eos_token) if text]
    assert sorted(documents) == sorted(texts)
    assert both[0].endswith(tokenizer.eos_token)
    assert both[1].endswith(tokenizer.eos_token)
    again = TokenStore.open(tmp_path)
    assert np.array_equal(again.train, store.train)
    assert again.documents == store.documents


def test_equal_documents_stay_on_one_side(tmp_path, tokenizer, texts):
    store = build_token_store(texts * 2, tokenizer, tmp_path, length=16, heldout_fraction=0.3)
    streams = [tokenizer.decode(ids.tolist()).split(tokenizer.eos_token) for ids in (store.train, store.heldout)]
    assert not (set(streams[0]) & set(streams[1]) - {""})


def test_one_long_document_is_split_by_position(tmp_path, tokenizer, texts):
    store = build_token_store(texts[:1], tokenizer, tmp_path, length=16, heldout_fraction=0.1)
    whole = [*tokenizer(texts[0])["input_ids"], tokenizer.eos_token_id]
    assert [*store.train.tolist(), *store.heldout.tolist()] == whole
    assert len(store.heldout) == round(0.1 * len(whole))


def test_given_heldout_documents(tmp_path, tokenizer, texts):
    store = build_token_store(texts[1:], tokenizer, tmp_path, length=16, heldout_documents=texts[:1])
    assert tokenizer.decode(store.heldout.tolist()) == texts[0] + tokenizer.eos_token


def test_too_little_text(tmp_path, tokenizer):
    with pytest.raises(InputError, match="the data files contain no text"):
        build_token_store([], tokenizer, tmp_path, length=16)
    with pytest.raises(InputError, match=r"the text has 7 tokens, fewer than two sequences of 64 \(--length\)"):
        build_token_store(["def f(): return 1"], tokenizer, tmp_path, length=64)
    with pytest.raises(InputError, match=r"the heldout text has 7 tokens, fewer than one sequence of 64"):
        build_token_store(["x = 1\n" * 99], tokenizer, tmp_path, length=64, heldout_documents=["def f(): return 1"])


def test_lines_that_were_left_out_explain_why_too_little_is_left(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n' * 3)
    documents = Documents([path], skip_bad=True)
    with pytest.raises(InputError, match="contain no text; 3 bad lines were left out"):
        build_token_store(documents, tokenizer, tmp_path, length=16)
    with pytest.raises(InputError, match="to train a tokenizer on; 3 bad lines were left out"):
        train_tokenizer(documents, vocab_size=300)


def test_a_store_that_was_cut_short_is_refused(tmp_path, tokenizer, texts):
    build_token_store(texts, tokenizer, tmp_path, length=16, heldout_fraction=0.3)
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(InputError, match=r"train\.bin has 2 bytes"):
        TokenStore.open(tmp_path)
    with pytest.raises(InputError, match="holds no token store"):
        TokenStore.open(tmp_path / "elsewhere")


def test_tokenizer_without_end_of_text(tmp_path, tokenizer, texts):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        build_token_store(texts, bare, tmp_path, length=16)


def test_an_epoch_is_every_sequence_once():
    batches = Batches(np.arange(43), length=4, batch_size=5, seed=3)
    rows = torch.cat([batches.get(number) for number in range(4)])
    assert batches.num_sequences == 10
    for epoch in (rows[:10], rows[10:]):
        assert sorted(epoch.flatten().tolist()) == list(range(40))
    assert not torch.equal(rows[:10], rows[10:]), "the next epoch has another order"
    assert batches.epochs(4) == 2


def test_a_batch_depends_on_its_number_alone():
    one, other = (Batches(np.arange(400), length=4, batch_size=7, seed=3) for _ in range(2))
    later = one.get(40)
    for number in (3, 40, 0):
        expected = other.get(number)
        assert torch.equal(one.get(number), expected)
    assert torch.equal(one.get(40), later)
    assert not torch.equal(Batches(np.arange(400), length=4, batch_size=7, seed=4).get(0), one.get(0))


def test_half_the_batch_sees_the_same_text_in_the_same_order():
    whole = Batches(np.arange(400), length=4, batch_size=8, seed=0)
    half = Batches(np.arange(400), length=4, batch_size=4, seed=0)
    assert torch.equal(torch.cat([half.get(0), half.get(1)]), whole.get(0))


def test_bad_sizes():
    with pytest.raises(InputError, match="at least 2"):
        Batches(np.arange(9), length=1, batch_size=1, seed=0)
    with pytest.raises(InputError, match="9 tokens, fewer than one sequence of 10"):
        Batches(np.arange(9), length=10, batch_size=1, seed=0)


def test_in_order():
    batches = in_order(np.arange(22), length=4, batch_size=2)
    assert [batch.shape[0] for batch in batches] == [2, 2, 1]
    assert torch.cat(batches).flatten().tolist() == list(range(20))
    spread = torch.cat(in_order(np.arange(22), length=4, batch_size=2, limit=3))
    assert spread[:, 0].tolist() == [0, 8, 16]
