"""The gradients at a network's outputs whose second moment is its Fisher matrix there, to be sent back through it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._likelihoods import Likelihood


def sampled(
    likelihood: Likelihood, outputs: Tensor, samples: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """∂(loss of one example)/∂z for targets from the model's own distribution, over √samples, `samples` times."""
    z = _leaf(outputs)
    numbers = z.detach().nan_to_num(0.0, 0.0, 0.0)  # what overflowed has no samples; its loss is NaN all the same
    for _ in range(samples):
        with torch.enable_grad():
            loss = z.shape[0] * likelihood.loss(z, likelihood.sample(numbers, generator))  # a sum over the examples
            (cotangent,) = torch.autograd.grad(loss, z)
        yield (samples**-0.5 * cotangent).to(outputs.dtype)


def exact(likelihood: Likelihood, outputs: Tensor, examples: int) -> Iterator[Tensor]:
    """Columns r of a root of F_R, Σ r rᵀ = F_R: one a unit, at one position of the outputs after the other.

    With `fisher_root(outputs, unit)` of the likelihood; without, from the eigenvectors of the F_R of each example.
    """
    z = _leaf(outputs).detach()
    N = examples if z.shape[0] % examples == 0 else z.shape[0]
    if not hasattr(likelihood, "fisher_root"):
        for root in _eigenvectors(likelihood, z, N):
            yield root.reshape(outputs.shape).to(outputs.dtype)
        return
    for unit in range(z.shape[-1]):
        roots = likelihood.fisher_root(z, unit).reshape(N, -1, z.shape[-1])
        for position in range(roots.shape[1]):
            cotangent = torch.zeros_like(roots)
            cotangent[:, position] = roots[:, position]
            yield cotangent.reshape(outputs.shape).to(outputs.dtype)


def _eigenvectors(likelihood: Likelihood, z: Tensor, N: int) -> Iterator[Tensor]:
    units = z.numel() // N
    basis = torch.eye(units, dtype=z.dtype, device=z.device)
    columns = [likelihood.fisher_product(z, e.expand(N, -1).reshape(z.shape)).reshape(N, -1) for e in basis]
    w, Q = torch.linalg.eigh(torch.stack(columns, dim=-1))
    return iter((Q * torch.sqrt(w.clamp(min=0.0))[:, None, :]).movedim(-1, 0))


def _leaf(outputs: Tensor) -> Tensor:
    z = outputs.detach()
    return (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z).requires_grad_()
