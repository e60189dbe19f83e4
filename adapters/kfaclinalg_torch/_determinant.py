"""log det (F + u I) for many u, of a spectrum that is compressed once.

In each octave the sum of log(s + u) over the eigenvalues s is that of its interpolation at Chebyshev points x_j, which
are the same for all u: Σ_j w_j log(x_j + u). The logarithm's singularity at -u <= 0 is three half-widths or more from
the middle of [1/2, 1], so that the error falls like (3 + √8)^-ORDER: with 22 points below the rounding of float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ORDER = 22


class Determinant:
    """Of the blocks of F with these eigenvalues, none negative."""

    def __init__(self, spectra: Sequence[Any]) -> None:
        flat = [s.detach().double().flatten() for s in spectra]
        like, blocks, sizes = flat[0], len(flat), [len(s) for s in flat]
        s = torch.cat(flat)
        self.top = torch.where(s.max() == 0, 1.0, s.max())
        s = s / self.top
        self.counts = like.new_tensor(sizes)
        block = torch.arange(blocks, device=s.device).repeat_interleave(torch.tensor(sizes, device=s.device))
        positive = s > 0
        mantissas, exponents = torch.frexp(s[positive])
        octaves, at = exponents.unique(return_inverse=True)
        bins, number = block[positive] * len(octaves) + at, blocks * len(octaves)
        moments = [torch.bincount(bins, T, number) for T in _chebyshev(4 * mantissas - 3)]
        points = torch.cos(math.pi / ORDER * (torch.arange(ORDER).to(like) + 0.5))
        weights = (2 / ORDER) * torch.stack(moments, -1) @ torch.stack([*_chebyshev(points)])
        weights -= moments[0][:, None] / ORDER  # of T_0 but the half
        within = ((points + 3) / 4).repeat(len(octaves), 1)
        zeros = torch.bincount(block[~positive], minlength=blocks).to(like)
        self.nodes = torch.cat([like.new_zeros(1), torch.ldexp(within, octaves[:, None]).flatten()])
        self.weights = torch.cat([zeros[:, None], weights.view(blocks, -1)], 1)
        self.total = self.weights.sum(0, keepdim=True)

    def logdet(self, deltas: Sequence[Any], scale: Any) -> Tensor:
        """log det (scale F + δ I) in float64, for one δ or one a block."""
        scaled, like = scale * self.top, self.top
        u = torch.stack([torch.as_tensor(delta, dtype=like.dtype, device=like.device) for delta in deltas]) / scaled
        weights = self.total if len(deltas) == 1 else self.weights
        return (weights * torch.log(self.nodes + u[:, None])).sum() + self.counts.sum() * torch.log(scaled)


def _chebyshev(t: Tensor) -> Iterator[Tensor]:
    """T_0(t), T_1(t), ..."""
    before, now = torch.ones_like(t), t
    for _ in range(ORDER):
        yield before
        before, now = now, 2 * t * now - before
