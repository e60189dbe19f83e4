"""A second device on a machine of one: within `TwoDevices` what is moved to "meta" meets nothing that is not."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")


class There(Tensor):
    """A tensor on the second device."""


class TwoDevices(TorchFunctionMode):
    def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if f == Tensor.device.__get__ and isinstance(args[0], There):
                return THERE
            if f == Tensor.to:
                return _moved(*args, **kwargs)
            found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            there = {isinstance(x, There) for x in found if x.ndim or isinstance(x, There)}
            if len(there) > 1:
                raise RuntimeError(f"{f} of tensors on two devices")
            new = kwargs.get("device") == THERE
            out = f(*tree_map(_plain, args), **tree_map(_plain, kwargs | ({"device": "cpu"} if new else {})))
            if True not in there and not new:
                return out
            return tree_map(lambda x: x.as_subclass(There) if isinstance(x, Tensor) else x, out)


def _moved(x: Tensor, *to: Any, **options: Any) -> Tensor:
    """x.to(...), the device first, second or by name."""
    given = [*to, *options.values()]
    device: Any = There if isinstance(x, There) else Tensor
    for one in given:
        if isinstance(one, Tensor):
            device = There if isinstance(one, There) else Tensor
        elif isinstance(one, torch.device) or one in ("cpu", "meta"):
            device = There if torch.device(one) == THERE else Tensor
    dtypes = [getattr(one, "dtype", one) for one in given]
    dtype = next((one for one in dtypes if isinstance(one, torch.dtype)), x.dtype)
    return _plain(x).to(dtype).as_subclass(device)


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, There) else x
