"""From files to batches of token ids: documents, the token store on disk, the order of the batches."""

from cggr_train.data.batches import Batches
from cggr_train.data.conversations import Conversations, check_chat_template, conversation_rows
from cggr_train.data.documents import Documents
from cggr_train.data.examples import build_example_store
from cggr_train.data.supervision import IGNORED, Supervised, count_targets, split_supervised
from cggr_train.data.token_store import TokenStore, build_token_store

__all__ = [
    "Conversations",
    "check_chat_template",
    "conversation_rows",
    "Batches",
    "Documents",
    "TokenStore",
    "build_token_store",
    "build_example_store",
    "IGNORED",
    "Supervised",
    "split_supervised",
    "count_targets",
]
