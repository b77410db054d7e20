"""From files to batches of token ids: documents, the token store on disk, the order of the batches."""

from cggr_train.data.batches import Batches
from cggr_train.data.documents import Documents
from cggr_train.data.token_store import TokenStore, build_token_store

__all__ = ["Batches", "Documents", "TokenStore", "build_token_store"]
