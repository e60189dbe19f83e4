"""The tasks of race.py: a network, its mini-batches, and what it is judged by.

Digits are drawn without replacement, epoch by epoch; text from random places, so that little of it is seen twice.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, scaled_dot_product_attention

from mnist_autoencoder import DIGITS

HELD_OUT = 2000  # digits that are never trained on
CONTEXT = 64


class Task(NamedTuple):
    """What is trained. The loss is the mean over examples, and over characters for text."""

    title: str
    network: Callable[[], nn.Module]
    data: Callable[[], tuple[Data, Data]]  # for training, and held out
    likelihood: str
    batch: int
    steps: int

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.likelihood == "bernoulli":
            return binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(outputs)
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())


class Data(NamedTuple):
    """Inputs and targets of each example."""

    inputs: Tensor
    targets: Tensor

    def batches(self, size: int, seed: int) -> Iterator[Data]:
        """Mini-batches without end, each example once an epoch."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.inputs), generator=generator)
            for chosen in order[: len(order) - len(order) % size].split(size):
                yield self.at(chosen)

    def some(self, count: int) -> Data:
        """The same ones in every run."""
        return self.at(torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(0))[:count])

    def at(self, chosen: Tensor) -> Data:
        return Data(self.inputs[chosen], self.targets[chosen])


# -- digits --


@cache
def digits() -> tuple[Tensor, Tensor]:
    with np.load(DIGITS) as file:
        images, labels = file["x_train"], file["y_train"]
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels.astype(np.int64))


def split(inputs: Tensor, targets: Tensor) -> tuple[Data, Data]:
    return Data(inputs[HELD_OUT:], targets[HELD_OUT:]), Data(inputs[:HELD_OUT], targets[:HELD_OUT])


def classes() -> tuple[Data, Data]:
    """Images (N, 1, 28, 28) and their labels."""
    images, labels = digits()
    return split(images[:, None], labels)


def pixels() -> tuple[Data, Data]:
    """Images (N, 784), to be found again."""
    images = digits()[0].flatten(1)
    return split(images, images)


def autoencoder(sparse: bool) -> nn.Module:
    """784-400-200-100-30-100-200-400-784, tanh, a linear code."""
    sizes = (784, 400, 200, 100, 30, 100, 200, 400, 784)
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    if sparse:
        for layer in layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            chosen = torch.rand_like(layer.weight).argsort(1)[:, :15]  # of Martens 2010: 15 connections a unit
            with torch.no_grad():
                layer.weight.scatter_(1, chosen, torch.randn(chosen.shape))
    tanh = [nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.Identity(), nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.Identity()]
    return nn.Sequential(*(module for pair in zip(layers, tanh, strict=True) for module in pair))


def convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


class ViT(nn.Module):
    """49 patches of 4 x 4 pixels and a class token, two blocks."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(50, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


# -- text --


@cache
def library() -> tuple[Tensor, int]:
    """The source of Python's own library, its 96 printable ASCII characters as numbers."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text("ascii", "ignore") for path in files)
    codes = torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy()).long() - 31
    codes[codes < 0] = 0  # line ends and tabs
    return codes, 96


def text() -> tuple[Data, Data]:
    """Pieces of CONTEXT characters, and each one's next; the last tenth is held out."""
    codes = library()[0]
    pieces = codes[: len(codes) - len(codes) % CONTEXT].view(-1, CONTEXT)
    inputs, targets = pieces[:-1], codes[1 : pieces[:-1].numel() + 1].view(-1, CONTEXT)
    end = len(inputs) * 9 // 10
    return Data(inputs[:end], targets[:end]), Data(inputs[end:], targets[end:])


class Block(nn.Module):
    """Attention, then two layers for each position by itself."""

    def __init__(self, width: int, *, causal: bool, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm1(x)
        maps = (self.query, self.key, self.value)
        q, k, v = (layer(a).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in maps)
        heads = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.mix(heads.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters (N, T) to the logits of the next ones."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        count = library()[1]
        self.tokens, self.positions = nn.Embedding(count, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, count)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # as in GPT-2

    def forward(self, characters: Tensor) -> Tensor:
        x = self.tokens(characters) + self.positions(torch.arange(characters.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class GRU(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        count = library()[1]
        self.tokens = nn.Embedding(count, 32)
        self.gru, self.head = nn.GRU(32, width, batch_first=True), nn.Linear(width, count)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.gru(self.tokens(characters))[0])


TASKS = {
    "autoencoder": Task("MNIST autoencoder", partial(autoencoder, False), pixels, "bernoulli", 500, 600),
    "sparse": Task("MNIST autoencoder, sparse weights", partial(autoencoder, True), pixels, "bernoulli", 500, 600),
    "convnet": Task("Convnet on MNIST", convnet, classes, "categorical", 128, 186),
    "transformer": Task("Character transformer", Transformer, text, "categorical", 16, 600),
    "vit": Task("Vision transformer on MNIST", ViT, classes, "categorical", 64, 500),
    "gru": Task("GRU language model", GRU, text, "categorical", 16, 600),
}
