"""The estimate of a model's curvature from the passes of a training loop: what they show, averaged over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from kfaclinalg import OuterProduct

from ._averages import Averages
from ._blocks import Dense
from ._capture import Capture
from ._discovery import Found
from ._estimators import Empirical, signs
from ._gather import gather, in_full_precision
from ._inverses import Inverses
from ._likelihoods import Likelihood, masked
from ._masks import checked_mask_of, mask_of
from ._settings import tensor_of
from ._statistics import Statistic
from ._team import Team
from ._use import Use
from ._verdict import misjudged


class Estimate:
    """A and G of each layer: the capture, the statistic of this step and the averages over all steps."""

    def __init__(
        self,
        model: nn.Module,
        found: Found,
        *,
        estimator: Any,
        likelihood: Likelihood | None,
        sharing: dict[str, str],
        dtype: torch.dtype,
        generator: torch.Generator,
        outputs: Any,
        mask: Any,
        settled: Callable[[dict[Any, str]], None],
        team: Team,
    ) -> None:
        self.take(found)
        self.estimator, self.likelihood, self.sharing = estimator, likelihood, sharing
        self.dtype, self.generator, self.outputs, self.mask, self.team = dtype, generator, outputs, mask, team
        self.device = found.layers[0].parameters[0].device
        self.averages = Averages()
        self.rejected, self.due, self._estimating = 0, False, False
        self.settled: Callable[..., Any] | None = WeakMethod(settled)
        self.updated: Callable[[Statistic], None] = lambda statistic: None
        self.capture = Capture(model, found.sites, self._keeps, self._follows, self._arrived, self._ended, self._mask)
        self._ends: dict[int, Any] = {}  # the outputs of each pass, and what the diagonal is taken of

    def take(self, found: Found) -> None:
        """These are the layers."""
        self.found, self._blocks = found, set(found.blocks)

    def begin(self, due: bool, keep: bool) -> None:
        """A new statistic, if this step takes one; `keep` where more than A and G is made of it."""
        self.due = due
        self.statistic = Statistic(self.found.blocks, self.sharing, self.dtype, keep, self.team)
        self.training: dict[Any, list[tuple[Use, Tensor]]] = {}
        self._ends, self.capture.empty, self.capture.idle = {}, [], not due

    def update(self, returned: Any) -> None:
        """Take the statistics of the forward pass that returned this."""
        outputs = tensor_of(self.outputs, returned)
        if not outputs.requires_grad:
            raise ValueError("outputs is a tensor without gradients, expected one of a pass with gradients enabled")
        if not self.due or self.capture.paused:
            return
        self._pass_along(outputs)
        self._settle(outputs)
        uses, now = [use for use in self.capture.uses if use.block in self._blocks], self.capture.now
        parameters = {block.parameter: block.parameter for block in self.found.entries}
        cotangents = self._cotangents(outputs) if outputs.numel() else ()
        self._estimating = True
        try:
            reached = self._gather(uses, parameters, outputs, cotangents, now)
        finally:
            self._estimating = False
        if outputs.numel() and not any(reached):
            raise ValueError("update() got outputs of no pass that has shown a layer since the last step() or update()")
        self.capture.uses = [use for use, done in zip(uses, reached, strict=False) if not done]
        self.updated(self.statistic)

    def _pass_along(self, outputs: Tensor) -> None:
        """As many backward passes of no examples as others take: where parameters are sharded all take part in each."""
        times = getattr(self.estimator, "samples", outputs.shape[1:].numel())
        for _ in range(0 if outputs.numel() or not self.capture.empty else times):
            torch.autograd.grad(outputs, self.capture.empty, outputs.detach(), retain_graph=True, allow_unused=True)

    def average(self, gradients: Sequence[Tensor], inverses: Inverses, decay: float) -> dict[str, Any] | None:
        """Take this step's statistic into the averages; None where its numbers, or the gradients, overflowed."""
        self._settle(None)
        new, links = self.statistic.moments(self.scale), inverses.links(self.statistic, self.scale)
        checked = [M.d if hasattr(M, "d") else M for found in new.values() for M in found] + list(gradients)
        extremes = [y for x in checked if x.numel() for y in torch.aminmax(x)]  # NaN where there is one
        if not bool(torch.isfinite(torch.stack(extremes)).all()):
            self.rejected += 1
            return None
        self.averages.take(new, links, self.statistic.rows, decay)
        return new

    @property
    def scale(self) -> float:
        """What takes a captured gradient to that of one example's loss."""
        return self.estimator.scale(self.statistic.examples) if isinstance(self.estimator, Empirical) else 1.0

    def _cotangents(self, outputs: Tensor) -> Iterator[Tensor]:
        passes = {use.of for use in self.capture.uses} or {self.capture.now}
        if len(passes) > 1:  # whose outputs these are
            edges: list[Any] = [use.outputs for use in self.capture.uses]
            slopes = torch.autograd.grad(outputs.sum(), edges, retain_graph=True, allow_unused=True)
            passes = {use.of for use, g in zip(self.capture.uses, slopes, strict=True) if g is not None} or passes
        of = max(passes, key=lambda one: one.number)
        likelihood: Any = masked(self.likelihood, of.mask, outputs)  # type: ignore[arg-type]
        return self.estimator.cotangents(likelihood, outputs, max(one.examples for one in passes), self.generator)

    _gather = in_full_precision(lambda self, *args: gather(self.statistic, *args))

    def _mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return (checked_mask_of if self.team.size == 1 else mask_of)(self.mask, args, kwargs)  # a part may have none

    def _keeps(self, use: Use) -> bool:
        """Whether `update` needs it."""
        return self.due and not isinstance(self.estimator, Empirical) and use.block in self._blocks

    def _follows(self, use: Use) -> bool:
        """Whether its gradient in the loss's backward pass is needed."""
        wanted = (self.due and isinstance(self.estimator, Empirical)) or self._may_be_outer(use)
        return wanted and use.block in self._blocks

    def _may_be_outer(self, use: Use) -> bool:
        block, x = use.block, use.inputs
        if not isinstance(block, Dense) or len(block.shape) > 2 or use.mask is not None or x.device.type != "cpu":
            return False
        return OuterProduct.pays((block.shape[0], block.shape[1]), math.prod(block.positions(x)))

    @in_full_precision
    def _arrived(self, use: Use, g: Tensor) -> None:
        if self._estimating or use.block not in self._blocks:
            return
        if self.due and isinstance(self.estimator, Empirical):
            self.statistic.add(use, g)
        if self._may_be_outer(use) and g.dtype == self.dtype:
            self.training.setdefault(use.block, []).append((use, g))

    def _ended(self, returned: Any) -> None:
        """After a first pass see which layers are none; follow the outputs where a loss's diagonal is wanted."""
        if not self.due:
            return
        if (outputs := self._outputs(returned)) is not None:
            self._settle(outputs)
        entries = self.found.entries
        if isinstance(self.estimator, Empirical) and entries:
            outputs, now = tensor_of(self.outputs, returned), self.capture.now
            self._ends[now.number] = outputs, now, entries
            outputs.register_hook(partial(self._signed, now.number))

    def _settle(self, outputs: Tensor | None) -> None:
        if self.settled is not None and (outputs is None or outputs.numel()):
            settled, self.settled = self.settled(), None
            gone = misjudged(self.capture.others, self.capture.called, self.found, outputs)
            self.capture.leave({block: why for layer, why in gone.items() for block in layer.blocks})
            settled(gone)

    def _outputs(self, returned: Any) -> Tensor | None:
        """The outputs, where they can be told."""
        try:
            outputs = tensor_of(self.outputs, returned)
        except (ValueError, KeyError, IndexError, AttributeError):
            return None
        return outputs if outputs.requires_grad else None

    @in_full_precision
    def _signed(self, number: int, g: Tensor) -> None:
        """Σ ε_n ∂L_n/∂p, with a random sign for each example."""
        if self._estimating or number not in self._ends or not g.numel():
            return
        outputs, of, entries = self._ends.pop(number)
        N = of.examples if of.examples and len(g) % of.examples == 0 else len(g)
        cotangent = (signs(N, self.generator, g) * g.reshape(N, -1)).reshape(g.shape)
        self._estimating = True
        try:
            parameters = [block.parameter for block in entries]
            slopes = torch.autograd.grad(outputs, parameters, cotangent, retain_graph=True, allow_unused=True)
        finally:
            self._estimating = False
        for block, slope in zip(entries, slopes, strict=True):
            if slope is not None:
                self.statistic.saw(of)
                self.statistic.add_entries(block, slope)
