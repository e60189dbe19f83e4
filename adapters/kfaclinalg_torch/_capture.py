"""What the forward and backward passes of a model show of its blocks, caught by hooks that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from . import _attention as attention
from ._modules import Block


class Pass(NamedTuple):
    """One forward pass of the model, over so many examples."""

    number: int
    examples: int


class Use(NamedTuple):
    """One use of a block: what it saw, and where its outputs stand in autograd's graph."""

    block: Block
    of: Pass
    inputs: Tensor
    version: int
    single: bool  # no batch: one example without a dimension for it
    outputs: GradientEdge | None

    def examples(self) -> int:
        """Those of the pass; 1 where the first dimension holds none of them, as in an embedding of positions."""
        return self.of.examples if self.inputs.shape[0] % self.of.examples == 0 else 1

    def pair(self, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The inputs and the gradient at the outputs, the batch first, in the dtype of the factors."""
        if self.inputs._version != self.version:
            raise RuntimeError(f"the inputs of {self.block.name!r} were changed in place after its forward pass")
        x = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        return x, (g[None] if self.single else g).to(dtype)


def _weakly(method: Any) -> Callable[..., Any]:
    """The method of an object while that lives, nothing after."""
    reference: Any = WeakMethod(method)
    return lambda *args: method(*args) if (method := reference()) else None


class Capture:
    """Hooks on a model's blocks: `uses` holds those that are `kept`, `arrived` gets the gradients of those `followed`.

    Forward passes without gradients show nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[nn.Module, tuple[Block, ...]],
        kept: Callable[[Use], bool],
        followed: Callable[[Use], bool],
        arrived: Callable[[Use, Tensor], None],
    ) -> None:
        # The model holds the hooks; what they call must not live as long as it does.
        self.kept, self.followed, self.arrived = _weakly(kept), _weakly(followed), _weakly(arrived)
        self.uses: list[Use] = []
        self.paused = self.removed = False
        self._pass = Pass(0, 0)
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._replaced = []
        for module, blocks in sites.items():
            if not blocks:
                continue
            if isinstance(module, nn.MultiheadAttention):
                own = vars(module).get("forward")
                vars(module)["forward"] = partial(self._attend, module, blocks, own)
                self._replaced.append(module)
            else:
                self._handles.append(module.register_forward_hook(partial(self._used, blocks), with_kwargs=True))

    def remove(self) -> None:
        self.removed = True
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            forward = vars(module).get("forward")
            while isinstance(forward, partial) and getattr(getattr(forward.func, "__self__", None), "removed", False):
                forward = forward.args[2]  # of those that were put on top of each other all that are removed by now
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
        self._handles, self._replaced = [], []

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 0)
        first = next(tensors, None)
        self._pass = Pass(self._pass.number + 1, 0 if first is None else first.shape[0])

    @torch.compiler.disable
    def _used(
        self,
        blocks: tuple[Block, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        x = args[0] if args else kwargs["input"]
        for block in blocks:
            self._record(block, x, output)

    def _record(self, block: Block, x: Tensor, output: Tensor) -> None:
        if self.paused or not (torch.is_grad_enabled() and output.requires_grad) or not x.numel():
            return
        single = x.ndim < block.batched_ndim
        if single:
            x, self._pass = x[None], self._pass._replace(examples=1)
        of = self._pass if self._pass.examples else self._pass._replace(examples=x.shape[0])
        with torch.no_grad():
            seen = block.seen(x.detach())
        use = Use(block, of, seen, seen._version, single, None)
        # a checkpoint that runs a part of the model again in a backward pass shows nothing new
        if self.kept(use) and torch._C._current_graph_task_id() == -1:
            self.uses.append(use._replace(outputs=get_gradient_edge(output)))
        if self.followed(use):
            output.register_hook(partial(self.arrived, use))

    @torch.compiler.disable
    def _attend(
        self, module: nn.MultiheadAttention, blocks: tuple[Any, ...], own: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if own is not None or self.removed or self.paused or not torch.is_grad_enabled():
            return own(*args, **kwargs) if own else type(module).forward(module, *args, **kwargs)

        def project(i: int, x: Tensor) -> Tensor:
            W = module.in_proj_weight if i < 3 else module.out_proj.weight
            b = module.in_proj_bias if i < 3 else module.out_proj.bias
            part = blocks[i].part
            # the layout of the module's own outputs, on which the numbers of a later dropout depend
            y = functional.linear(x.transpose(0, 1), W[part], None if b is None else b[part]).transpose(0, 1)
            self._record(blocks[i], x, y)
            return y

        return attention.forward(module, project, *args, **kwargs)
