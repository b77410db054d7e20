"""Conversations: the assistant's turns, and nothing else, are supervised."""

import json

import numpy as np
import pytest

from cggr_train.data import Conversations, TokenStore, build_example_store, check_chat_template, conversation_rows
from cggr_train.data.conversations import tokens_of
from cggr_train.errors import InputError

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
TALK = [
    {"role": "user", "content": "a + b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "and d"},
    {"role": "assistant", "content": "e, f"},
]


@pytest.fixture
def chatting(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def test_what_the_assistant_says_is_supervised_to_the_end_of_its_turn(chatting):
    ids, supervised = tokens_of(TALK, chatting)
    assert chatting.decode(ids) == "<user>a + b\n<assistant>c\n<user>and d\n<assistant>e, f\n"
    runs = np.split(ids, np.flatnonzero(np.diff(supervised)) + 1)
    assert [chatting.decode(run) for run in runs] == [
        "<user>a + b\n<assistant>",
        "c\n",
        "<user>and d\n<assistant>",
        "e, f\n",
    ]
    assert supervised[-1] and not supervised[0]


def test_rows_of_a_store_mark_the_rest(chatting, tmp_path):
    data = tmp_path / "talk.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": [*TALK[:3], {**TALK[3], "content": f"e {n}"}]}) + "\n" for n in range(64))
    )
    build_example_store(
        Conversations([data], field="messages"), chatting, tmp_path / "tokens", length=96, heldout_fraction=0.3,
        rows=conversation_rows,
    )  # fmt: skip
    row = np.asarray(TokenStore.open(tmp_path / "tokens").train[:96])
    assert chatting.decode(row[row >= 0]).startswith("c\ne ")
    with pytest.raises(InputError, match="no example is left in the train data"):
        build_example_store(
            Conversations([data], field="messages"), chatting, tmp_path / "short", length=8, rows=conversation_rows
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": "text"}, "must be a list of messages, .*, got \"text\""), ({}, "must be a list of messages"),
        ({"question": "", "answer": ""}, r"got no such key \(it has question, answer; see --messages\)"),
        ({"messages": [{"role": "user"}]}, r"must be a list of messages, .*, but message 1 is \{\"role\": \"user\"\}"),
        ({"messages": TALK[:1]}, "has the role 'assistant', so there is nothing to train on"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_named_or_counted(tmp_path, line, message):
    data = tmp_path / "talk.jsonl"
    data.write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=message):
        list(Conversations([data], field="messages").records())
    documents = Conversations([data], field="messages", skip_bad=True)
    assert list(documents.records()) == [] and documents.skipped == 1


def test_templates_that_are_missing_or_change_earlier_turns(chatting):
    chatting.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(InputError, match="renders a turn differently when another one follows"):
        tokens_of(TALK, chatting)
    chatting.chat_template = None
    with pytest.raises(InputError, match="--messages needs a chat template"):
        check_chat_template(chatting)
