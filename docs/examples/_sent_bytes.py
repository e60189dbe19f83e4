"""The bytes that a process sends, seen in the collectives of torch.distributed."""

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sent(TorchDispatchMode):
    """The bytes that a process sends, on average over its group, but for votes, counts and names."""

    bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            size = self.size_of(func, args)
            if size is None:
                raise AssertionError(f"{func} is no collective that is counted")
            self.bytes += size
        return func(*args, **(kwargs or {}))

    @staticmethod
    def size_of(func, args):
        group = next(
            ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x)
        )
        tensors = [x for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
        if tensors[0].dtype in (torch.int64, torch.float64, torch.uint8):
            return 0
        entries, share = sum(x.numel() for x in tensors), (group.size() - 1) / group.size()
        name = func.overloadpacket.__name__
        if name == "alltoall_base_":
            _, flat, _, _, counts = args[:5]
            return (flat.numel() - counts[group.rank()]) * flat.element_size()
        shares = {"allreduce_": 2 * share, "reduce_": share, "broadcast_": share}
        return shares[name] * entries * tensors[0].element_size() if name in shares else None
