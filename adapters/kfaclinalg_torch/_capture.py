"""What the forward and backward passes of a model show of its blocks, caught by hooks that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from ._blocks import Block
from ._discovery import Found, Site
from ._entries import Entries
from ._layer import Layer
from ._once import still


class Pass(NamedTuple):
    """One forward pass of the model, over so many examples; the `mask` (N, ...) says which positions count."""

    number: int
    examples: int
    mask: Tensor | None = None

    @property
    def counted(self) -> int:
        """The examples of which any position counts."""
        return self.examples if self.mask is None else int(self.mask.reshape(len(self.mask), -1).any(1).sum())


class Use(NamedTuple):
    """One use of a block: what it saw, and where its outputs stand in autograd's graph."""

    block: Block
    of: Pass
    inputs: Tensor
    version: int
    single: bool  # no batch: one example without a dimension for it
    outputs: GradientEdge | None
    mask: Tensor | None  # of the positions of this block

    def examples(self) -> int:
        """Those of the pass; 1 where the first dimension holds none of them, as in an embedding of positions."""
        rows = self.inputs.shape[0]
        return rows if self.block.scattered else self.of.examples if rows % self.of.examples == 0 else 1

    def pair(self, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The inputs and the gradient at the outputs, the batch first, in the dtype of the factors."""
        if self.inputs._version != self.version:
            raise RuntimeError(f"the inputs of {self.block.name!r} were changed in place after its forward pass")
        x = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        g = (g[None] if self.single else g).to(dtype)
        if self.mask is None:
            return x, g
        last = self.mask.reshape(*self.mask.shape, *[1] * (g.ndim - self.mask.ndim))
        return x, torch.where(last if self.block.channels_last else self.mask[:, None], g, 0.0)


class Capture:
    """Hooks on a model's blocks: `uses` holds those that are `kept`, `arrived` gets the gradients of those `followed`.

    Forward passes without gradients show nothing; nor do modules whose pass is not what their rule's formula says,
    which come into `others`. `ended` gets what a pass that shows returns. `mask_of` gives the mask of a pass from the
    model's inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[nn.Module, Site],
        kept: Callable[[Use], bool],
        followed: Callable[[Use], bool],
        arrived: Callable[[Use, Tensor], None],
        ended: Callable[[Any], None],
        mask_of: Callable[..., Tensor | None] | None = None,
        *,
        always: bool = False,
    ) -> None:
        # The model holds the hooks; what they call must not live as long as it does.
        self.kept, self.followed, self.arrived, self.ended = map(_weakly, (kept, followed, arrived, ended))
        self.mask_of = None if mask_of is None else _weakly(mask_of)
        self.uses: list[Use] = []
        self.others: dict[nn.Module, str] = {}
        self.called: set[Block] = set()
        self.paused = self.removed = False
        self.always = always  # whether a rule's forward takes the place of the module's in passes that show nothing
        self.now = Pass(0, 0)
        self._trusted: set[nn.Module] = set()
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._replaced = []
        for module, site in sites.items():
            if not site.blocks:
                continue
            if site.rule.forward is not None:
                vars(module)["forward"] = partial(self._instead, module, site, vars(module).get("forward"))
                self._replaced.append(module)
            else:
                self._handles.append(module.register_forward_hook(partial(self._after, site), with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._end))  # after those of the model's own blocks

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
        mask = self.mask_of(*args, **kwargs) if self.mask_of and not self.paused else None
        self.now = Pass(self.now.number + 1, examples_of((args, kwargs)), mask)

    @torch.compiler.disable
    def _end(self, model: nn.Module, args: Any, returned: Any) -> None:
        if self._shows:
            self.ended(returned)

    @torch.compiler.disable
    def _after(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if self._shows and self._is_its_rule(site, module, output, args, kwargs):
            given = dict(kwargs)
            first = [given.pop("input")] if not args and "input" in given else []
            x, *others = [*first, *args, *given.values()]
            for block in site.blocks:
                self._record(block, x, output, None, *others)

    @torch.compiler.disable
    def _instead(self, module: nn.Module, site: Site, own: Any, *args: Any, **kwargs: Any) -> Any:
        forward: Any = own or partial(type(module).forward, module)
        if own is not None or self.removed or module in self.others or not (self.always or self._shows):
            return forward(*args, **kwargs)

        def see(suffix: str, x: Tensor, s: Tensor, mask: Tensor | None) -> None:
            name = f"{site.name}.{suffix}".lstrip(".")
            for block in site.blocks if self._shows else ():
                if block.name in (name, f"{name}.bias"):
                    self._record(block, x, s, mask)

        if site.rule.formula is not None and not self._is_its_rule(site, module, None, args, kwargs):
            return forward(*args, **kwargs)
        return site.rule.forward(module, see, *args, **kwargs)  # type: ignore[misc]

    @property
    def _shows(self) -> bool:
        return not self.paused and torch.is_grad_enabled()

    def _is_its_rule(self, site: Site, module: nn.Module, output: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the module does what its rule says: compared in the first pass that shows it."""
        if site.rule.formula is None or module in self._trusted:
            return True
        if module in self.others:
            return False
        with torch.no_grad(), still(module):
            try:
                came = output if output is not None else type(module).forward(module, *args, **kwargs)
                expected = site.rule.formula(module, *args, **kwargs)
                agrees = _agree(came, expected)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
                agrees = False
        if agrees:
            self._trusted.add(module)
        else:
            self.others[module] = f"the forward pass of this {type(module).__name__} is one of its own"
        return agrees

    def _record(self, block: Block, x: Tensor, output: Tensor, mask: Tensor | None, *others: Any) -> None:
        if not output.requires_grad or not x.numel():
            return
        single = x.ndim < block.batched_ndim
        if single:
            x, self.now = x[None], self.now._replace(examples=1, mask=None)
        of = self.now if self.now.examples else self.now._replace(examples=x.shape[0])
        with torch.no_grad():
            seen = block.seen(x.detach(), *others)
        self.called.add(block)
        mask = _fitted(of.mask if mask is None else mask, block, seen)
        use = Use(block, of, seen, seen._version, single, None, mask)
        # a checkpoint that runs a part of the model again in a backward pass shows nothing new
        if self.kept(use) and torch._C._current_graph_task_id() == -1:
            self.uses.append(use._replace(outputs=get_gradient_edge(output)))
        if self.followed(use):
            output.register_hook(partial(self.arrived, use))


def misjudged(capture: Capture, found: Found, outputs: Tensor | None) -> dict[Layer, str]:
    """The layers that a first pass, which gave these outputs, has shown to be none, and why.

    Their modules do something else than their rule says, or their weights are used without calling them. Where the
    outputs are not known the gradients tell.
    """
    reasons = {block: why for module, why in capture.others.items() for block in found.sites[module].blocks}
    gone = {layer: reasons[block] for layer in found.layers for block in layer.blocks if block in reasons}
    shown = {p for block in capture.called for p in block.parameters}
    silent = [
        layer
        for layer in found.layers
        if layer not in gone and layer.parameters[0] not in shown and not isinstance(layer.blocks[0], Entries)
    ]
    if silent:
        parameters = [layer.parameters[0] for layer in silent]
        slopes: Any = [p.grad for p in parameters]
        if outputs is not None:
            slopes = torch.autograd.grad(outputs.sum(), parameters, retain_graph=True, allow_unused=True)
        used = (layer for layer, g in zip(silent, slopes, strict=True) if g is not None)
        gone |= dict.fromkeys(used, "its weights are used without a call of the module")
    return gone


def examples_of(inputs: Any) -> int:
    """The length of the first dimension of the first tensor; 0 where there is none."""
    for x in tree_leaves(inputs, is_leaf=lambda x: isinstance(x, PackedSequence)):
        if isinstance(x, PackedSequence):
            return int(x.batch_sizes[0])
        if isinstance(x, Tensor) and x.ndim > 0:
            return x.shape[0]
    return 0


def _weakly(method: Any) -> Callable[..., Any]:
    """The method of an object while that lives, nothing after; a function as it is."""
    if not isinstance(method, MethodType):
        return method
    reference: Any = WeakMethod(method)
    return lambda *args, **kwargs: method(*args, **kwargs) if (method := reference()) else None


def _fitted(mask: Tensor | None, block: Block, seen: Tensor) -> Tensor | None:
    """The mask of a block's positions: of all of them, or of the examples where it has but one for each."""
    if mask is None:
        return None
    positions = block.positions(seen)
    if positions[: mask.ndim] == mask.shape:
        return mask.reshape(*mask.shape, *[1] * (len(positions) - mask.ndim)).expand(positions)
    if torch.Size(positions).numel() == mask.numel():
        return mask.reshape(positions)
    return mask.flatten(1).any(1) if mask.ndim > 1 and positions == mask.shape[:1] else None


def _agree(came: Any, expected: Any) -> bool:
    """Whether two results are the same to rounding."""
    pairs = zip(tree_leaves(came), tree_leaves(expected), strict=True)
    return all(_is_close(x, y) for x, y in pairs if isinstance(x, Tensor) and x.is_floating_point())


def _is_close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    norm = torch.linalg.vector_norm
    return bool(norm(x.double() - y.double()) <= 16 * torch.finfo(x.dtype).eps * norm(y.double()))
