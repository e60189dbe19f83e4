"""Whose gradients G is made of: the values of `estimator`, each with its own constants.

The gradients at a network's outputs whose second moment is its Fisher matrix there are sent back through it. What a
parameter of the fallback gets is the square of the sum over the examples, Σ_{n,k} <v_n v_k>, of which the terms n ≠ k
must go. Sampled gradients are independent with mean zero: they do, on average. The columns of the exact root, and the
gradients of the true loss, are not: with random signs ε_n, E[ε_n ε_k] = 0, they do, and v_n v_nᵀ stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._likelihoods import Likelihood


@dataclass(frozen=True)
class Sampled:
    """Of `samples` targets an example drawn from the model itself: unbiased (Section 5)."""

    samples: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            kind = ValueError if isinstance(self.samples, int | float) else TypeError
            raise kind(f"samples is {self.samples!r}, expected an integer >= 1")

    def cotangents(
        self, likelihood: Likelihood, outputs: Tensor, examples: int, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """∂(loss of one example)/∂z for targets from the model's own distribution, over √samples, `samples` times."""
        numbers = outputs.detach().nan_to_num(0.0, 0.0, 0.0)  # what overflowed has no samples; its loss is NaN
        for _ in range(self.samples):
            yield self.samples**-0.5 * cotangent(likelihood, outputs, likelihood.sample(numbers, generator))


@dataclass(frozen=True)
class ExactFisher:
    """Of the expectation over the targets: one backward pass for each output of an example."""

    def cotangents(
        self, likelihood: Likelihood, outputs: Tensor, examples: int, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Columns r of a root of F_R, Σ r rᵀ = F_R, with random signs: one a unit, at one position after the other.

        With `fisher_root(outputs, unit)` of the likelihood; without, from the eigenvectors of the F_R of each example.
        """
        z = _leaf(outputs).detach()
        N = examples if examples and z.shape[0] % examples == 0 else z.shape[0]
        roots = _unit_roots if hasattr(likelihood, "fisher_root") else _eigenvectors
        for root in roots(likelihood, z, N):
            yield (signs(N, generator, z) * root.reshape(N, -1)).reshape(outputs.shape).to(outputs.dtype)


@dataclass(frozen=True)
class Empirical:
    """Of the loss itself, in its own backward pass.

    Args:
        reduction: whether the loss is the mean over the examples, or their sum; G is then the same.
        grad_scaler: the `torch.amp.GradScaler` that scales the loss.
    """

    reduction: str = "mean"
    grad_scaler: Any = field(default=None, repr=False)  # which has no name that another process would know

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {self.reduction!r}, expected one of 'mean', 'sum'")
        if self.grad_scaler is not None and not hasattr(self.grad_scaler, "get_scale"):
            raise TypeError(f"grad_scaler is {self.grad_scaler!r}, expected a torch.amp.GradScaler or None")

    def scale(self, examples: int) -> float:
        """What takes a gradient of the loss to that of one example's."""
        scale = examples if self.reduction == "mean" else 1.0
        return scale / (self.grad_scaler.get_scale() if self.grad_scaler else 1.0)


ESTIMATORS: dict[str, Any] = {"sampled": Sampled, "exact": ExactFisher, "empirical": Empirical}


def estimator_of(estimator: Any, **constants: Any) -> Any:
    """The value that a short form stands for, with these constants where they are not None; a value stays itself.

    Raises:
        TypeError, ValueError: none of them, or a constant that the estimator does not have.
    """
    given = {name: value for name, value in constants.items() if value is not None}
    if isinstance(estimator, tuple(ESTIMATORS.values())):
        if given:
            raise ValueError(f"{', '.join(given)} beside estimator {estimator!r}, which has its own constants")
        return estimator
    if not isinstance(estimator, str) or estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(map(repr, ESTIMATORS))}")
    kind = ESTIMATORS[estimator]
    if unknown := [name for name in given if name not in kind.__dataclass_fields__]:
        raise ValueError(f"{', '.join(unknown)} would have no effect with estimator {estimator!r}")
    return kind(**given)


def cotangent(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """The gradient at the outputs of the sum of the examples' losses."""
    z = _leaf(outputs)
    with torch.enable_grad():
        loss = likelihood.loss(z, targets)
        (gradient,) = torch.autograd.grad(getattr(likelihood, "examples", len(z)) * loss, z)
    return gradient.to(outputs.dtype)


def slope_of_loss(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """The same, of targets that the likelihood takes."""
    if check := getattr(likelihood, "check", None):
        check(outputs, targets)
    return cotangent(likelihood, outputs, targets)


def signs(N: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """1 or -1 for each example (N, 1)."""
    device = like.device if generator is None else generator.device
    drawn = torch.randint(2, (N, 1), generator=generator, device=device)
    return (2 * drawn - 1).to(like)


def _unit_roots(likelihood: Any, z: Tensor, N: int) -> Iterator[Tensor]:
    for unit in range(z.shape[-1]):
        roots = likelihood.fisher_root(z, unit).reshape(N, -1, z.shape[-1])
        for position in range(roots.shape[1]):
            root = torch.zeros_like(roots)
            root[:, position] = roots[:, position]
            yield root


def _eigenvectors(likelihood: Likelihood, z: Tensor, N: int) -> Iterator[Tensor]:
    units = z.numel() // N
    basis = torch.eye(units, dtype=z.dtype, device=z.device)
    columns = [likelihood.fisher_product(z, e.expand(N, -1).reshape(z.shape)).reshape(N, -1) for e in basis]
    w, Q = torch.linalg.eigh(torch.stack(columns, dim=-1))
    return iter((Q * torch.sqrt(w.clamp(min=0.0))[:, None, :]).movedim(-1, 0))


def _leaf(outputs: Tensor) -> Tensor:
    z = outputs.detach()
    return (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z).requires_grad_()
