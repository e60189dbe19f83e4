"""K-FAC as a preconditioner of gradients, for the training loop that you have."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from kfaclinalg import Kronecker, LayerFactors, OuterProduct

from . import _estimators as estimators
from ._averages import Averages
from ._capture import Capture, Use
from ._checkpoint import check, check_generator, check_keys, is_number, packed, restored
from ._discovery import Layer, check_owners, found, owners
from ._inverses import Factored
from ._likelihoods import Likelihood, likelihood_of, new_generator
from ._modules import Block, Linear
from ._outer import outer_gradient
from ._settings import Number, Period, at, check_options, check_together, inverses_of, sharing_of
from ._statistics import Statistic, several_processes


def _in_full_precision(f: Callable[..., Any]) -> Callable[..., Any]:
    """Without gradients, and without autocast, which would take products in half precision."""

    @wraps(f)
    def wrapped(self: KFACPreconditioner, *args: Any) -> Any:
        with torch.no_grad(), torch.autocast(self._layers[0].parameters[0].device.type, enabled=False):
            return f(self, *args)

    return wrapped


class KFACPreconditioner:
    """The gradient of every layer becomes G⁻¹ ∇W A⁻¹, and any optimizer of `torch.optim` takes it from there.

    The layers: `Linear`, `Conv1d/2d/3d` and `ConvTranspose1d/2d/3d`, `Embedding`, `LayerNorm`, `RMSNorm`, `GroupNorm`,
    `BatchNorm1d/2d/3d` and `MultiheadAttention`; used several times and with tied weights too. `skipped` says what is
    left alone. A is the second moment of the inputs, G that of the gradients of one example's loss, both averaged over
    the steps; the first dimension of the model's first input counts the examples. Forward passes without gradients show
    nothing, whatever `train()` or `eval()` says.

    Args:
        model: the module; inside `DistributedDataParallel` or `torch.compile` either it or the wrapper.
        likelihood: of the outputs: "categorical" (logits in the last dimension), "bernoulli", "gaussian", or an object
            with the methods of `kfaclinalg_torch.Likelihood`. The empirical estimator needs none.
        estimator: whose gradients G is made of. "sampled": of `samples` targets drawn from the model itself; "exact":
            the expectation over them; both by `update(outputs)` before the loss's backward pass. "empirical": of the
            loss itself.
        reduction: whether the loss is the mean over the examples, or their sum; the empirical G is then the same.
        damping: λ. Factored Tikhonov damping takes γ = √λ (Section 6.3); a number, or a function of the step.
        decay: the bound of ε in the averages, ε = min(1 - 1/k, decay) (Section 5).
        statistics_period, inverse_period: in steps, numbers or functions of the step. The layers' inverses are
            refreshed in different steps of a period, so that none costs much more than another. With an inverse period
            of 1 substitution takes the place of explicit inverses.
        weight_sharing: "expand" takes every position by itself, "reduce" the mean input and the summed gradient of an
            example (Eschenhagen et al. 2023); for single modules, a mapping of their names.
        kl_clip, kl_lr: κ and lr: the update is multiplied by `min(1, √(κ / Σ lr² |⟨V, U⟩|))`, V and U being the
            gradients before and after. None: it is not.
        structure: "block-diagonal" (Section 4.2), "eigen" (EKFAC) or, for linear layers that follow each other as they
            stand in the model, "block-tridiagonal" (Section 4.3).
        exact_damping: (A ⊗ G + λ I)⁻¹ (eqn 6) in the place of factored damping.
        rank: A and G of this rank, or this rank and a diagonal (`kfaclinalg.low_rank_inverse`). None: of full rank.
        pi_norm: the norm of π: "trace", "frobenius", "spectral".
        skip: names of modules to leave alone.
        generator: the source of the sampled targets. None: one that is seeded from torch's global one.
        grad_scaler: the `torch.amp.GradScaler` that scales the loss, for the empirical estimator.
        factor_dtype: of A, G and the inverses, whatever the model's is.

    Raises:
        TypeError, ValueError: a wrong option, or nothing that can be preconditioned; it says what came and what was
            expected.

    >>> model = nn.Linear(2, 3)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> preconditioner = KFACPreconditioner(model, likelihood="categorical")
    >>> outputs = model(torch.ones(4, 2))
    >>> preconditioner.update(outputs)
    >>> nn.functional.cross_entropy(outputs, torch.zeros(4, dtype=torch.int64)).backward()
    >>> preconditioner.step()
    >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str | Likelihood | None = None,
        estimator: str = "sampled",
        reduction: str = "mean",
        damping: Number = 1e-3,
        decay: float = 0.95,
        statistics_period: Period = 1,
        inverse_period: Period = 10,
        weight_sharing: str | Mapping[str, str] = "expand",
        kl_clip: Number | None = None,
        kl_lr: Number = 1.0,
        structure: str = "block-diagonal",
        exact_damping: bool = False,
        rank: int | None = None,
        samples: int = 1,
        pi_norm: str = "trace",
        skip: Sequence[str] = (),
        generator: torch.Generator | None = None,
        grad_scaler: Any = None,
        factor_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_options(
            estimator=estimator,
            reduction=reduction,
            structure=structure,
            damping=damping,
            decay=decay,
            statistics_period=statistics_period,
            inverse_period=inverse_period,
            kl_clip=kl_clip,
            kl_lr=kl_lr,
            rank=rank,
            samples=samples,
            pi_norm=pi_norm,
            factor_dtype=factor_dtype,
        )
        check_together(estimator, likelihood, structure, exact_damping, rank)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is {generator!r}, expected a torch.Generator or None")
        if grad_scaler is not None and not hasattr(grad_scaler, "get_scale"):
            raise TypeError(f"grad_scaler is {grad_scaler!r}, expected a torch.amp.GradScaler or None")
        model = _unwrapped(model)
        known = found(model, skip)
        self.skipped: dict[str, str] = known.skipped
        self._layers = known.layers
        self._blocks = [block for layer in known.layers for block in layer.blocks]
        self._sharing = sharing_of(weight_sharing, known.layers)
        self.estimator, self.reduction, self.structure = estimator, reduction, structure
        self.likelihood = None if likelihood is None else likelihood_of(likelihood)
        self.damping, self.decay, self.samples = damping, decay, samples
        self.statistics_period, self.inverse_period = statistics_period, inverse_period
        self.kl_clip, self.kl_lr = kl_clip, kl_lr
        self.grad_scaler, self.factor_dtype = grad_scaler, factor_dtype
        self.rejected = 0  #: statistics that held a NaN or an infinity
        self.generator = generator or new_generator(known.layers[0].parameters[0].device)
        self._averages = Averages(decay)
        self._inverses = inverses_of(structure, exact_damping, rank, pi_norm, inverse_period, known.layers)
        self._steps = 0
        self._estimating = False
        self._begin()
        self._capture = Capture(model, known.sites, self._keeps, self._follows, self._arrived)
        weakref.finalize(self, self._capture.remove)  # where nobody has called `remove`
        self._owners = owners(model, known.layers)
        if self.skipped:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            warnings.warn(f"KFACPreconditioner leaves some gradients as they are. {reasons}", stacklevel=2)

    @property
    def layers(self) -> dict[str, LayerFactors]:
        """The moving averages of A and G, by the names of the modules."""
        return self._averages.layers

    def update(self, outputs: Tensor) -> None:
        """Take the statistics of the forward pass that gave these outputs, before the loss's backward pass.

        Each sample, or column of the exact factor, is one backward pass through the layers, without weight gradients.
        Where no statistic is due, nothing happens.

        Raises:
            ValueError: the estimator is "empirical", which takes the loss's own backward pass.
        """
        if self.estimator == "empirical":
            raise ValueError("estimator 'empirical' takes its statistics from loss.backward(): do not call update()")
        if not isinstance(outputs, Tensor) or not outputs.requires_grad:
            raise ValueError(
                f"outputs is a {type(outputs).__name__}, expected a tensor of a pass with gradients enabled"
            )
        if not self._due or self._capture.paused:
            return
        uses = self._capture.uses
        edges: list[Any] = [use.outputs for use in uses]
        reached: list[bool] = []
        self._estimating = True
        try:
            for draw, cotangent in enumerate(self._cotangents(outputs) if uses else ()):
                slopes = torch.autograd.grad(outputs, edges, cotangent, retain_graph=True, allow_unused=True)
                reached = [g is not None for g in slopes]
                self._gather(uses, slopes, draw)
        finally:
            self._estimating = False
        if not outputs.numel():
            return  # the other processes may have examples, and wait in `step`
        if not any(reached):
            raise ValueError("update() got outputs of no pass that has shown a layer since the last step() or update()")
        self._capture.uses = [use for use, done in zip(uses, reached, strict=True) if not done]

    def _cotangents(self, outputs: Tensor) -> Iterator[Tensor]:
        likelihood: Any = self.likelihood
        if self.estimator == "sampled":
            return estimators.sampled(likelihood, outputs, self.samples, self.generator)
        passes = {use.of for use in self._capture.uses}
        if len(passes) > 1:  # whose outputs these are
            edges: list[Any] = [use.outputs for use in self._capture.uses]
            slopes = torch.autograd.grad(outputs.sum(), edges, retain_graph=True, allow_unused=True)
            passes = {use.of for use, g in zip(self._capture.uses, slopes, strict=True) if g is not None} or passes
        return estimators.exact(likelihood, outputs, max(passes).examples)

    @_in_full_precision
    def step(self) -> None:
        """Average what was captured, refresh the inverses whose turn it is, and precondition the gradients in place.

        Raises:
            ValueError: a module or a parameter was replaced since the preconditioner was made.
            RuntimeError: nothing was captured so far.
            LinAlgError: the factors of a layer could not be inverted in three refreshes in a row.
        """
        check_owners(self._owners)
        damping = at(self._steps, "damping", self.damping)
        period = at(self._steps, "inverse_period", self.inverse_period)
        statistic, scale = self._statistic, self._scale()
        shown = not statistic.empty or (self._due and several_processes())
        accepted = shown and self._average(statistic, scale)
        if not self._averages.taken and not shown:
            missing = "loss.backward()" if self.estimator == "empirical" else "update(outputs)"
            raise RuntimeError(f"nothing was captured before step(): call {missing} first, with gradients enabled")
        averages = self._averages.layers
        factors = {layer.name: layer.factors(averages) for layer in self._layers}
        known = {name: layer for name, layer in factors.items() if layer is not None}
        self._inverses.refresh(self._steps, period, damping, Factored(known, self._averages.links))
        if accepted:
            self._inverses.observe(statistic, scale, self.decay, damping)
        self._precondition()
        self._steps += 1
        self._capture.uses = []
        self._begin()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Capture nothing in the passes under the `with`."""
        before, self._capture.paused = self._capture.paused, True
        try:
            yield
        finally:
            self._capture.paused = before

    def remove(self) -> None:
        """Take all hooks away; the model is then as it was."""
        self._capture.remove()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, in tensors, numbers, lists and dictionaries."""
        state = {"averages": self._averages.state(), "inverses": self._inverses.state()}
        alone = {"structure": self.structure, "steps": self._steps, "generator": self.generator.get_state()}
        return alone | packed(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict` as if there had been no stop: bitwise, on one machine.

        Raises:
            ValueError: it is none, or of a model with other layers, or another structure. Nothing has changed then.
        """
        check_keys(state_dict, ("averages", "inverses", "structure", "steps", "generator"))
        if state_dict["structure"] != self.structure:
            raise ValueError(f"the state is of structure {state_dict['structure']!r}, expected {self.structure!r}")
        steps = state_dict["steps"]
        check(isinstance(steps, int) and is_number(steps), f"steps is {steps!r}")
        check_generator(self.generator, state_dict["generator"])
        like = self._layers[0].parameters[0].detach().to(self.factor_dtype)
        averages, inverses = (restored(state_dict[name], like) for name in ("averages", "inverses"))
        self._averages.check(averages, self._blocks, chained=self.structure == "block-tridiagonal")
        self._inverses.check(inverses, {layer.name: layer.matrix(torch.detach) for layer in self._layers})
        self._averages.load(averages)
        self._inverses.load(inverses)
        self._steps = steps
        self.generator.set_state(state_dict["generator"])
        self._begin()

    @_in_full_precision
    def _gather(self, uses: Sequence[Use], slopes: Sequence[Tensor | None], draw: int) -> None:
        for use, g in zip(uses, slopes, strict=True):
            if g is not None:
                self._statistic.add(use, g, draw)

    def _begin(self) -> None:
        """A new statistic, if this step takes one."""
        self._due = self._steps % at(self._steps, "statistics_period", self.statistics_period) == 0
        self._statistic = Statistic(self._blocks, self._sharing, self.factor_dtype, self._inverses.keeps_uses)
        self._training: dict[Block, list[tuple[Use, Tensor]]] = {}

    def _keeps(self, use: Use) -> bool:
        """Whether `update` needs it."""
        return self._due and self.estimator != "empirical"

    def _follows(self, use: Use) -> bool:
        """Whether its gradient in the loss's backward pass is needed."""
        return (self._due and self.estimator == "empirical") or self._may_be_outer(use)

    def _may_be_outer(self, use: Use) -> bool:
        block, x = use.block, use.inputs
        fits = isinstance(block, Linear) and block.whole and x.ndim == 2 and x.device.type == "cpu"
        return fits and OuterProduct.pays((len(block.parameters[0]), x.shape[1]), len(x))

    @_in_full_precision
    def _arrived(self, use: Use, g: Tensor) -> None:
        if self._estimating:
            return
        if self._due and self.estimator == "empirical":
            self._statistic.add(use, g)
        if self._may_be_outer(use) and g.dtype == self.factor_dtype:
            self._training.setdefault(use.block, []).append((use, g))

    def _scale(self) -> float:
        """What takes a captured gradient to that of one example's loss."""
        if self.estimator != "empirical":
            return 1.0
        scale = self._statistic.examples if self.reduction == "mean" else 1.0
        return scale / (self.grad_scaler.get_scale() if self.grad_scaler else 1.0)

    def _average(self, statistic: Statistic, scale: float) -> bool:
        """Take a statistic into the averages, unless this step's numbers overflowed."""
        new, links = statistic.moments(scale), self._inverses.links(statistic, scale)
        checked = [M for found in new.values() for M in found]
        checked += [p.grad for layer in self._layers for p in layer.parameters if p.grad is not None]
        extremes = [y for x in checked if x.numel() for y in torch.aminmax(x)]  # NaN where there is one
        if not bool(torch.isfinite(torch.stack(extremes)).all()):
            self.rejected += 1
            return False
        self._averages.take(new, links)
        return True

    def _precondition(self) -> None:
        ready = {layer.name: layer for layer in self._layers if all(map(_is_trained, layer.parameters))}
        Vs = ((name, self._gradient_of(layer)) for name, layer in ready.items())
        agreement: Any = 0.0
        changed = []
        for name, U in self._inverses.apply(Vs):
            parts = ready[name].parts(_gradient, U)
            if self.kl_clip is not None:
                agreement = agreement + torch.stack([(g * u).sum() for g, u in parts]).sum().abs()
            for g, u in parts:
                g.copy_(u)
                changed.append(g)
        if self.kl_clip is not None and changed:
            kappa, lr = at(self._steps, "kl_clip", self.kl_clip), at(self._steps, "kl_lr", self.kl_lr)
            torch._foreach_mul_(changed, torch.sqrt(kappa / (lr**2 * agreement)).clamp(max=1.0))

    def _gradient_of(self, layer: Layer) -> Any:
        """∇W (m, n), as the `OuterProduct` of the batch's own g and a where it is that and has an inverse for it."""
        block = layer.dense
        if isinstance(block, Linear) and isinstance(self._inverses.inverses.get(layer.name), Kronecker):
            uses = self._training.get(block)
            if uses and (outer := outer_gradient(block, uses, self._steps)):
                return outer
        return layer.matrix(_gradient).to(self.factor_dtype)


def _unwrapped(model: Any) -> nn.Module:
    """The model itself, inside the wrappers of torch.compile and DistributedDataParallel."""
    if hasattr(model, "_orig_mod"):
        torch.compiler.reset()  # what was compiled before knows nothing of the hooks
        return _unwrapped(model._orig_mod)
    return _unwrapped(model.module) if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _is_trained(parameter: Tensor) -> bool:
    """Whether it has a gradient, and was not frozen since."""
    return parameter.grad is not None and parameter.requires_grad


def _gradient(parameter: Tensor) -> Any:
    return parameter.grad
