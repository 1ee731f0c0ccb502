"""Bytes of the storages that exist, on a CPU and on fake tensors: what plan.py and bench.py count by."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Adds up the bytes of storages that operations inside made and that still exist; `peak` is the most at a time."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = weakref.WeakValueDictionary(), 0  # by id

    @property
    def now(self) -> int:
        """Bytes at this moment; storages that were emptied and filled again (fully_shard's) count as they stand."""
        return sum(storage.nbytes() for storage in self.storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [s for s in self._storages(out) if id(s) not in self.storages]
        if made:
            old = {id(s) for s in self._storages((args, kwargs))}
            for storage in made:
                if id(storage) not in old:  # else a view of what was there before
                    self.storages[id(storage)] = storage
            self.peak = max(self.peak, self.now)
        return out

    @staticmethod
    def _storages(tree) -> list:
        tensors = (x for x in tree_leaves(tree) if isinstance(x, Tensor))
        return [getattr(x, "_local_tensor", x).untyped_storage() for x in tensors]  # of a DTensor, what is held here
