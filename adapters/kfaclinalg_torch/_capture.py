"""What the forward and backward passes of a model show of its blocks, caught by hooks that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ._blocks import Block
from ._discovery import Site
from ._gather import keep_what_is_saved
from ._masks import check_examples, mask_of_block
from ._use import Pass, Use, size_of
from ._verdict import disagreement


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
        keep_what_is_saved()
        # The model holds the hooks; what they call must not live as long as it does.
        self.kept, self.followed, self.arrived, self.ended = map(_weakly, (kept, followed, arrived, ended))
        self.sites = sites
        self.mask_of = None if mask_of is None else _weakly(mask_of)
        self.uses: list[Use] = []
        self.empty: list[Any] = []  # where passes of no examples end that others' passes need
        self.others: dict[nn.Module, str] = {}
        self.called: set[Block] = set()
        self.paused = self.removed = self.idle = False  # idle: a rule's forward would show what nobody keeps
        self.always = always  # whether a rule's forward takes the place of the module's in passes that show nothing
        self.now = Pass(0, 0)
        self.trusted: set[nn.Module] = set()
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        self._replaced = []
        for module, site in sites.items():
            if not site.blocks:
                continue
            if site.rule.forward is not None:
                vars(module)["forward"] = partial(self._instead, module, site, vars(module).get("forward"))
                self._replaced.append(module)
            else:
                first = hasattr(module, "unshard")  # before FSDP takes the whole parameters away
                hook = partial(self._after, site)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=first))
        self._handles.append(model.register_forward_hook(self._end))  # after those of the model's own blocks

    def leave(self, gone: Mapping[Block, str]) -> None:
        """Let the modules of which all blocks are gone do what they did before."""
        for module, site in self.sites.items():
            if site.blocks and all(block in gone for block in site.blocks):
                self.others.setdefault(module, gone[site.blocks[0]])

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Capture:
        """That of a copied model is nobody's, and shows nothing."""
        twin = memo[id(self)] = copy(self)
        twin.removed = twin.paused = True
        twin.uses, twin.empty = [], []
        return twin

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = self.mask_of(*args, **kwargs) if self.mask_of and not self.paused else None
        examples, entries = size_of((args, kwargs))
        if mask is not None and self._shows:
            check_examples(mask, examples)
        self.now = Pass(self.now.number + 1, examples, entries, mask)

    @torch.compiler.disable
    def _end(self, model: nn.Module, args: Any, returned: Any) -> None:
        if self._shows:
            self.ended(returned)

    @torch.compiler.disable
    def _after(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if self._shows and self._is_its_rule(site, module, output, args, kwargs):
            given = signature(module.forward).bind(*args, **kwargs) if kwargs else None
            x, *others = (*given.args, *given.kwargs.values()) if given else args
            for block in site.blocks:
                self._record(block, x, output, None, *others)

    @torch.compiler.disable
    def _instead(self, module: nn.Module, site: Site, own: Any, *args: Any, **kwargs: Any) -> Any:
        forward: Any = own or partial(type(module).forward, module)
        shows, below = self.always or (self._shows and not self.idle), captures_of(own)
        if below is None or self.removed or module in self.others or not shows:
            return forward(*args, **kwargs)
        seeing = [(self, site), *((other, its) for other, its in below if module not in other.others)]

        def see(suffix: str, x: Tensor, s: Tensor, mask: Tensor | None) -> None:
            for capture, its in seeing:
                capture._see(its, suffix, x, s, mask)

        if site.rule.formula is not None and not self._is_its_rule(site, module, None, args, kwargs):
            return forward(*args, **kwargs)
        return site.rule.forward(module, see, *args, **kwargs)  # type: ignore[misc]

    def _see(self, site: Site, suffix: str, x: Tensor, s: Tensor, mask: Tensor | None) -> None:
        name = f"{site.name}.{suffix}".lstrip(".")
        for block in site.blocks if self._shows else ():
            if block.name in (name, f"{name}.bias"):
                self._record(block, x, s, mask)

    @property
    def _shows(self) -> bool:
        return not self.paused and torch.is_grad_enabled()

    def _is_its_rule(self, site: Site, module: nn.Module, output: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the module does what its rule says: compared in the first pass that shows it."""
        if site.rule.formula is None or module in self.trusted:
            return True
        if module in self.others:
            return False
        if why := disagreement(site, module, output, args, kwargs):
            self.others[module] = why
        else:
            self.trusted.add(module)
        return not why

    def _record(self, block: Block, x: Tensor, output: Tensor, mask: Tensor | None, *others: Any) -> None:
        if not output.requires_grad:
            return
        if not x.numel():
            self.empty.append(get_gradient_edge(output))
            return
        single = x.ndim < block.batched_ndim
        if single and x.numel() == self.now.entries:  # the model's own input, and no vector that all examples share
            self.now = self.now._replace(examples=1, mask=None)
        x = x[None] if single else x
        of = self.now if self.now.examples else self.now._replace(examples=x.shape[0])
        with torch.no_grad():
            seen = block.seen(x.detach(), *others)
        self.called.add(block)
        mask = mask_of_block(of.mask if mask is None else mask, block, seen)
        use = Use(block, of, seen, seen._version, single, None, mask)
        # a checkpoint that runs a part of the model again in a backward pass shows nothing new
        if self.kept(use) and torch._C._current_graph_task_id() == -1:
            self.uses.append(use._replace(outputs=get_gradient_edge(output)))
        if self.followed(use):
            output.register_hook(partial(self.arrived, use))


def captures_of(forward: Any) -> list[tuple[Capture, Site]] | None:
    """The captures, and their sites, whose forward pass this is, one on top of the other; None where it is another."""
    found = []
    while isinstance(forward, partial) and isinstance(capture := getattr(forward.func, "__self__", None), Capture):
        _, site, forward = forward.args
        found += [] if capture.removed else [(capture, site)]
    return found if forward is None else None


def _weakly(method: Any) -> Callable[..., Any]:
    """The method of an object while that lives, nothing after; a function as it is."""
    if not isinstance(method, MethodType):
        return method
    reference: Any = WeakMethod(method)
    return lambda *args, **kwargs: method(*args, **kwargs) if (method := reference()) else None
