"""log det (F + u I) for many u, of a spectrum that is compressed once.

In each interval the sum of log(s + u) over the eigenvalues s is that of its interpolation at Chebyshev points x_j, the
same for all u: Σ_j w_j log(x_j + u). The intervals are the quarters of the octaves. The logarithm's singularity at
-u <= 0 is z = 9 half-widths or more from the middle of [1/2, 5/8]: the error falls like (z + √(z² - 1))^-ORDER, with
14 points below the rounding of float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ORDER, PARTS = 14, 4
CHUNK = 2**14  # eigenvalues at once, which stay in the cache


class Determinant:
    """Of the blocks of F with these eigenvalues, none negative."""

    def __init__(self, spectra: Sequence[Any]) -> None:
        flat = [s.detach().double().flatten() for s in spectra]
        largest = torch.stack([s.max() for s in flat]).max()
        self.top = torch.where(largest == 0, 1.0, largest)
        scaled = [s / self.top for s in flat]
        least = min((float(s[s > 0].min()) for s in scaled if bool((s > 0).any())), default=1.0)
        lowest = math.frexp(least)[1]
        octaves = torch.arange(lowest, 2, dtype=torch.int32, device=self.top.device)
        within = 0.5 + (torch.arange(PARTS).to(self.top)[:, None] + (1 + _points(self.top)) / 2) / (2 * PARTS)
        nodes = torch.ldexp(within.expand(len(octaves), -1, -1).contiguous(), octaves[:, None, None])
        self.nodes = torch.cat([self.top.new_zeros(1), nodes.flatten()])
        self.weights = torch.stack([_weights(s, lowest, len(octaves)) for s in scaled])
        self.total = self.weights.sum(0, keepdim=True)
        self.count = sum(len(s) for s in flat)

    def logdet(self, deltas: Sequence[Any], scale: Any) -> Tensor:
        """log det (scale F + δ I) in float64, for one δ or one a block."""
        scaled, like = scale * self.top, self.top
        u = torch.stack([torch.as_tensor(delta, dtype=like.dtype, device=like.device) for delta in deltas]) / scaled
        weights = self.total if len(deltas) == 1 else self.weights
        return (weights * torch.log(self.nodes + u[:, None])).sum() + self.count * torch.log(scaled)


def _weights(s: Tensor, lowest: int, octaves: int) -> Tensor:
    """How many eigenvalues are zero, and then the weight of each node."""
    positive = s > 0
    mantissas, exponents = torch.frexp(s[positive])
    place = (mantissas - 0.5) * (2 * PARTS)
    part = place.long()
    bins, t, count = (exponents - lowest) * PARTS + part, 2 * (place - part) - 1, octaves * PARTS
    moments = s.new_zeros(ORDER, count)  # of the Chebyshev polynomials, in each interval
    for b, x in zip(bins.split(CHUNK), t.split(CHUNK), strict=True):
        moments += torch.stack([torch.bincount(b, T, count) for T in _chebyshev(x)])
    basis = torch.stack([*_chebyshev(_points(s))])
    basis[0] /= 2
    weights = (2 / ORDER) * moments.mT @ basis
    return torch.cat([(~positive).sum().to(s)[None], weights.flatten()])


def _points(like: Tensor) -> Tensor:
    return torch.cos(math.pi / ORDER * (torch.arange(ORDER).to(like) + 0.5))


def _chebyshev(t: Tensor) -> Iterator[Tensor]:
    """T_0(t), T_1(t), ..."""
    before, now = torch.ones_like(t), t
    for _ in range(ORDER):
        yield before
        before, now = now, 2 * t * now - before
