"""The largest tensor that a piece of code allocates, and the memory still held after it."""

import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestAllocation(TorchDispatchMode):
    """Counts elements of the storages that ops return and that were not among their arguments."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def largest_allocation(function):
    with LargestAllocation() as mode:
        function()
    return mode.elements


class Held(TorchDispatchMode):
    """Notes the storages that ops make, for what is alive of them later."""

    def __init__(self):
        super().__init__()
        self._made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self._made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def bytes(self):
        """Bytes held now."""
        gc.collect()
        return sum(size for storage, size in self._made.values() if not storage.expired())
