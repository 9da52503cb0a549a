"""Devices that are not here: one with little memory, and a look at what would make the host wait."""

import re
import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class SmallMemory(TorchDispatchMode):
    """Within the context tensors hold at most so many bytes; what comes on top is out of memory, as on a GPU of that size.

    Attributes:
        held: bytes at present.
        peak: the most so far.
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most, self.held, self.peak, self.known = most, 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage) -> None:
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = size
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, size)
        if self.held > self.most:
            raise torch.OutOfMemoryError(f"out of memory. Tried to allocate {size} bytes of {self.most:g}")

    def _free(self, size: int) -> None:
        self.held -= size


class Launches(TorchDispatchMode):
    """Within the context the operations are counted, by name, that would launch work on a GPU; views and allocations do not."""

    FREE = re.compile(
        "alias|as_strided_?|detach|expand|lift_fresh|narrow|permute|select|slice|split|split_with_sizes|squeeze|t|transpose|unbind|"
        "unfold|unsqueeze|_?(unsafe_)?view|(new_)?empty(_like|_strided)?|_record_function_.*"
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self.FREE.fullmatch(name):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Crossings(TorchDispatchMode):
    """Within the context operations are noted that copy from the host to another device, for which the host would wait.

    Numbers go with a launch. What ``rotssl.base.sending`` sends is pinned, and nobody waits for it.

    Args:
        sent: arrays that it sends, as ``noted`` gives them.
    """

    def __init__(self, sent) -> None:
        super().__init__()
        self.sent, self.found = sent, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in given if x.device.type == "cpu" and x.dim() > 0]
        elsewhere = any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in (*given, *tree_iter(found)))
        known = {array.ctypes.data for array in self.sent}
        if elsewhere and any(x.data_ptr() not in known for x in ours):
            self.found.append(func.overloadpacket.__name__)
        return found


class Tape(TorchDispatchMode):
    """A CUDA graph without a GPU: within the context operations are recorded, and ``replay`` does them again.

    As with a graph, each reads and writes the same tensors every time, whatever Python has bound to its names since, and the
    values of the host are those that it had in the recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done = []

    @classmethod
    def record(cls, work):
        """As rotssl.engine.captured.cuda_graph."""
        tape = cls()
        with tape:
            logs = work()
        return logs, tape.replay

    @staticmethod
    def _storages(tree):
        return {x.untyped_storage().data_ptr() for x in tree_iter(tree) if isinstance(x, torch.Tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        own = self._storages((args, kwargs))
        made = [x for x in tree_iter(found) if isinstance(x, torch.Tensor)]
        fresh = [x.untyped_storage().data_ptr() not in own for x in made]
        if not func.is_view:  # a view sees what is written to its tensor
            self.done.append((func, args, kwargs or {}, made, fresh))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made, fresh in self.done:
            again = [x for x in tree_iter(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for place, value, new in zip(made, again, fresh, strict=True):
                if new:
                    place.detach().copy_(value)


class Waits(TorchDispatchMode):
    """Within the context the operations are noted for which the host would wait, were the tensors on a GPU.

    They are those whose result is a value on the host, or has a shape that depends on values.
    """

    NAMES = re.compile(
        "_local_scalar_dense|is_nonzero|nonzero|equal|masked_select|_?unique.*|bincount|repeat_interleave"
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_iter(args[1:2]))
        if self.NAMES.fullmatch(name) or (name.startswith("index") and masks):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
