"""The networks whose steps are timed, of the sizes that people train; small ones in a dry run."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from _bench import DRY

AUTOENCODER = (20, 16, 8, 16, 20) if DRY else (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
VOCABULARY = 50 if DRY else 1024


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation, beside a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        convolution = {"padding": 1, "bias": False}
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, **convolution),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, **convolution),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Sequential:
    """For images (N, 3, 32, 32)."""
    width = 4 if DRY else 64
    sizes = [width, width, 2 * width, 4 * width, 8 * width]
    blocks = [
        ResidualBlock(inputs if i == 0 else outputs, outputs, 2 if i == 0 and outputs > width else 1)
        for inputs, outputs in itertools.pairwise(sizes)
        for i in range(2)
    ]
    stem = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


class TransformerBlock(nn.Module):
    """A block of GPT-2's shape."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(d), nn.LayerNorm(d)])
        self.qkv, self.out, self.heads = nn.Linear(d, 3 * d), nn.Linear(d, d), heads
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for y in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


def transformer() -> nn.Sequential:
    """Twelve blocks of GPT-2 small, with a small vocabulary: the stack is what is measured."""
    d, depth, heads = (32, 2, 2) if DRY else (768, 12, 12)
    blocks = (TransformerBlock(d, heads) for _ in range(depth))
    return nn.Sequential(nn.Embedding(VOCABULARY, d), *blocks, nn.LayerNorm(d), nn.Linear(d, VOCABULARY))


def autoencoder() -> nn.Sequential:
    modules: list[nn.Module] = []
    for n, m in itertools.pairwise(AUTOENCODER):
        modules += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*modules[:-1])
