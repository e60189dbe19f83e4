"""The likelihoods of a network's outputs z: loss, samples and the Fisher matrix F_R of the outputs (Appendix C).

Each loss is minus the log likelihood, summed over output units, mean over examples. z are natural parameters
(logits, means), for which F_R is also the Hessian of the loss with respect to z.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ._masks import counting, spread


class Likelihood(Protocol):
    """What `KFAC` asks of a likelihood; it may also have a method `check(outputs, targets)` that raises ValueError."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Minus the log likelihood, the mean over the examples."""

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Targets drawn from the model's own distribution."""

    def fisher_product(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        """F_R times the tangents, an example at a time; shaped like the outputs."""


class Bernoulli:
    """p = sigmoid(z), targets in [0, 1]; F_R = diag(p (1 - p))."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _check_shape("bernoulli", outputs, targets)
        _check_range("bernoulli", targets, 0, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return _mean_over_examples(losses)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.bernoulli(_proper(torch.sigmoid(outputs)), generator=generator)

    def fisher_product(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        p = torch.sigmoid(outputs)
        return p * (1 - p) * tangents

    def fisher_root(self, outputs: Tensor, unit: int) -> Tensor:
        p = torch.sigmoid(outputs)
        return torch.sqrt(p * (1 - p)) * _one_hot(outputs, unit)


class Categorical:
    """p = softmax(z) over the last dimension, targets are class indices (N, ...); F_R = diag(p) - p pᵀ."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim < 2 or targets.shape != outputs.shape[:-1]:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}, "
                "expected class indices (N, ...) for outputs (N, ..., classes)"
            )
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(f"targets have dtype {targets.dtype}, expected integer class indices")
        _check_range("categorical", targets, 0, outputs.shape[-1] - 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = functional.cross_entropy(outputs.movedim(-1, 1), targets.long(), reduction="none")
        return _mean_over_examples(losses)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        p = _proper(torch.softmax(outputs, dim=-1))
        return torch.multinomial(p.flatten(0, -2), 1, generator=generator).reshape(p.shape[:-1])

    def fisher_product(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        p = torch.softmax(outputs, dim=-1)
        weighted = p * tangents
        return weighted - p * weighted.sum(dim=-1, keepdim=True)

    def fisher_root(self, outputs: Tensor, unit: int) -> Tensor:
        p = torch.softmax(outputs, dim=-1)
        return torch.sqrt(p[..., unit, None]) * (_one_hot(outputs, unit) - p)


class Gaussian:
    """Mean z and unit variance, the constant left out: ½ ‖y - z‖²; F_R = I."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _check_shape("gaussian", outputs, targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _mean_over_examples(0.5 * (targets - outputs) ** 2)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
        return outputs + noise

    def fisher_product(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        return tangents

    def fisher_root(self, outputs: Tensor, unit: int) -> Tensor:
        return _one_hot(outputs, unit)


LIKELIHOODS: dict[str, Likelihood] = {"bernoulli": Bernoulli(), "categorical": Categorical(), "gaussian": Gaussian()}


class Masked:
    """A likelihood of the positions that count: those of a mask (N, ...), or (...) of the outputs."""

    def __init__(self, likelihood: Likelihood, mask: Tensor) -> None:
        self.likelihood, self.mask = likelihood, mask
        self.examples = int(counting(mask).sum())
        if hasattr(likelihood, "fisher_root"):
            self.fisher_root = self._fisher_root

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if check := getattr(self.likelihood, "check", None):
            check(outputs[self.mask], targets[self.mask])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows = outputs[self.mask]
        if not len(rows):
            return rows.sum(dtype=torch.float64)  # a piece of which nothing counts
        return self.likelihood.loss(rows, targets[self.mask]) * (len(rows) / self.examples)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.likelihood.sample(outputs, generator)

    def fisher_product(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        return self._counted(self.likelihood.fisher_product(outputs, tangents))

    def _fisher_root(self, outputs: Tensor, unit: int) -> Tensor:
        return self._counted(self.likelihood.fisher_root(outputs, unit))  # type: ignore[attr-defined]

    def _counted(self, x: Tensor) -> Tensor:
        return torch.where(spread(self.mask, x.ndim), x, 0.0)


def masked(likelihood: Likelihood, mask: Tensor | None, outputs: Tensor) -> Likelihood:
    """The likelihood of the positions that count; all do where the mask is not of the outputs' positions."""
    if isinstance(likelihood, Categorical) and outputs.ndim < 2:
        raise ValueError(f"outputs have shape {tuple(outputs.shape)}, expected (N, ..., classes) (categorical)")
    if mask is None:
        return likelihood
    if mask.ndim < outputs.ndim and mask.shape == outputs.shape[: mask.ndim]:
        return Masked(likelihood, mask)
    examples = counting(mask)
    return Masked(likelihood, examples) if examples.shape == outputs.shape[:1] else likelihood


def likelihood_of(likelihood: str | Likelihood) -> Likelihood:
    if isinstance(likelihood, type):
        raise TypeError(f"likelihood is the class {likelihood.__name__}, expected an object, {likelihood.__name__}()")
    if not isinstance(likelihood, str):
        missing = [name for name in ("loss", "sample", "fisher_product") if not hasattr(likelihood, name)]
        if missing:
            raise ValueError(f"likelihood {likelihood!r} lacks the methods {', '.join(missing)}")
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood is {likelihood!r}, expected one of {', '.join(map(repr, LIKELIHOODS))}")
    return LIKELIHOODS[likelihood]


def new_generator(device: torch.device) -> torch.Generator:
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    return torch.Generator(device).manual_seed(seed)


def _mean_over_examples(losses: Tensor) -> Tensor:
    # float64: late in training ρ compares losses that differ in the sixth digit
    return losses.sum(dtype=torch.float64) / losses.shape[0]


def _one_hot(outputs: Tensor, unit: int) -> Tensor:
    return torch.zeros_like(outputs).index_fill_(-1, torch.tensor(unit, device=outputs.device), 1.0)


def _proper(p: Tensor) -> Tensor:
    """Probabilities, 1 where they are NaN: to draw from NaN is an error, on a GPU one that ends the process. What
    comes of such outputs is NaN all the same."""
    return torch.where(p.isnan(), 1.0, p)


def _check_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, expected {tuple(outputs.shape)}, that of the outputs ({name})"
        )
    if targets.dtype != outputs.dtype:
        raise ValueError(f"targets have dtype {targets.dtype}, expected {outputs.dtype}, that of the outputs ({name})")


def _check_range(name: str, targets: Tensor, low: int, high: int) -> None:
    """NaN passes: it makes the loss NaN, and the step is refused."""
    if bool(((targets < low) | (targets > high)).any()):
        raise ValueError(
            f"targets lie in [{targets.min().item()}, {targets.max().item()}], expected [{low}, {high}] ({name})"
        )
